"""Print training samples: as a person reads them, and as the model sees them with what it learns marked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vlm.conversation import Conversation, ImageSlot
from vlm.data.example import Example

if TYPE_CHECKING:
    from vlm.model import VLM

LEARNED = ("\u27e6", "\u27e7")


def plain_sample(example: Example) -> str:
    """The conversation line by line; the answer, which alone is learned, in double brackets."""
    lines = []
    for turn in example.turns:
        parts = [f"<picture {p.index + 1}>" if isinstance(p, ImageSlot) else p for p in turn.parts]
        lines.append(f"{turn.role}: {' '.join(part.strip() for part in parts)}")
    answer = example.answers[0] if example.answers else ""
    lines.append(f"assistant: {LEARNED[0]}{answer}{LEARNED[1]}")
    names = [str(image) if isinstance(image, str | Path) else "(bytes)" for image in example.images]
    return "\n".join([f"pictures: {', '.join(names)}", *lines])


def masked_sample(model: VLM, example: Example) -> str:
    """The token sequence of an example with its first answer, as text.

    What the model is trained to say stands in double brackets; soft tokens of picture n read <picture n>.

    Raises:
        DataError: the conversation does not fit the model.
    """
    tokens = model.processor.tokens(Conversation(example.images, example.turns), example.answers[0])
    pieces: list[str] = []
    run: list[int] = []
    learned = False
    soft = max(1, model.processor.soft_tokens)
    last = ""

    def flush() -> None:
        if run:
            text = str(model.language.tokenizer.decode(run, skip_special_tokens=False))
            pieces.append(f"{LEARNED[0]}{text}{LEARNED[1]}" if learned else text)
            run.clear()

    for code, supervised in zip(tokens.codes, tokens.supervised, strict=True):
        if code < 0:
            flush()
            mark = f"<picture {(-code - 1) // soft + 1}>"
            if mark != last:
                pieces.append(mark)
            last = mark
            continue
        if supervised != learned:
            flush()
            learned = supervised
        run.append(code)
    flush()
    return "".join(pieces)
