"""What several test files of this folder call, beside the fixtures of conftest.py: it is on their path."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from PIL import Image

from vlm import weights
from vlm.conversation import Conversation, ImageSlot, Turn
from vlm.errors import WeightsError
from vlm.weights import PINS, Pin, resolve

Draw = Callable[..., Image.Image]
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
ENCODER, LANGUAGE = PINS["efficientnet-lite2"], PINS["smollm2-135m-instruct"]


# --- pictures -----------------------------------------------------------------------------------------


def quadrants(mode: str = "RGB") -> Image.Image:
    """32 x 16: red, green over blue, white; blocks of 16 x 8, so that JPEG keeps them nearly exact."""
    image = Image.new("RGB", (32, 16))
    for box, colour in zip(((0, 0), (16, 0), (0, 8), (16, 8)), (RED, GREEN, BLUE, WHITE), strict=True):
        image.paste(colour, (*box, box[0] + 16, box[1] + 8))
    return image.convert(mode)


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *extra: bytes) -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    data = png_chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + data + png_chunk(b"IEND", b"")


# --- prompts ------------------------------------------------------------------------------------------


def mixed(draw: Draw) -> list[Conversation]:
    """Prompts of all lengths, with no image to four, in one group and in several."""
    apart = (ImageSlot(0), "this ", ImageSlot(1), ImageSlot(2), "and that")
    return [
        Conversation.ask([draw(1)], "what is on the grass?"),
        Conversation.ask([], "a"),
        Conversation((draw(2), draw(3), draw(4)), (Turn("user", apart),)),
        Conversation.ask([draw(5), draw(6)], "two " * 20),
        Conversation.ask([draw(7)], "who?").answered("a man").then("and here?", [draw(8)]),
        Conversation.ask([], "no picture at all, but a good many words " * 2),
    ]


# --- weights ------------------------------------------------------------------------------------------


def needs_wheel(pin: Pin) -> None:
    source = pin.source()
    if source is None or not source.is_file():
        pytest.skip(f"the wheel {pin.wheel} is not installed")


def other(pin: Pin, monkeypatch: pytest.MonkeyPatch, **changes: object) -> Pin:
    """The registry with one pin changed, as a newer or an older release would have it."""
    changed = replace(pin, **changes)  # type: ignore[arg-type]
    monkeypatch.setitem(weights.PINS, pin.id, changed)
    return changed


def one_line(run: Callable[[], object]) -> str:
    with pytest.raises(WeightsError) as caught:
        run()
    message = str(caught.value)
    assert "\n" not in message
    return message


def damages(tensors: dict[str, torch.Tensor], name: str) -> Iterator[dict[str, torch.Tensor]]:
    """Tensors without the one of this name, then with others in its place."""
    yield {key: value for key, value in tensors.items() if key != name}
    stored = tensors[name]
    other = stored.long() if stored.is_floating_point() else stored.float()
    for wrong in (torch.zeros(3, 3), other, torch.tensor(10**15)):
        yield tensors | {name: wrong}


# --- stand-ins ----------------------------------------------------------------------------------------


class Language:
    """SmolLM2's tokenizer without its weights."""

    max_positions = 8192

    def __init__(self) -> None:
        from transformers import AutoTokenizer

        from vlm.language import LanguageModel, _without_added_tokens, chat_frame

        try:
            folder = resolve("smollm2-135m-instruct", offline=True).path
        except WeightsError as missing:
            pytest.skip(f"the frozen weights are not here: {missing}")
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.frame = chat_frame(self.tokenizer)
        self._plain = _without_added_tokens(self.tokenizer)
        self.encode_text = lambda text: LanguageModel.encode_text(self, text)  # type: ignore[arg-type]
        self.longest_token = max(map(len, self.tokenizer.get_vocab()))


class Adapter:
    """An adapter without soft tokens or weights."""

    soft_tokens, question_aware, max_group = 0, False, 8
