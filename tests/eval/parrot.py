"""A stand-in for a model: it answers with a function of the words and the picture's name, and can be killed.

python parrot.py OUT.json ITEMS_BEFORE_DEATH BATCH [OPTION ...]   (0: never)
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vlm.answer import Answer, Usage
from vlm.conversation import Conversation
from vlm.errors import DataError
from vlm.eval import runner
from vlm.eval.predictions import Prediction


class Parrot:
    """What `vlm.eval` asks of a model."""

    adapter_name = "parrot"
    hashes = {"adapter": "0"}
    consensus = known_answers = None

    def __init__(self, die_after: int = 0, fails_on: str = "") -> None:
        self.asked: list[str] = []
        self.die_after, self.fails_on = die_after, fails_on

    def blank_image(self) -> Image.Image:
        return Image.new("RGB", (4, 4))

    def ask_batch(self, conversations: Sequence[Conversation], **generation: Any) -> list[Answer]:
        found = []
        for conversation in conversations:
            words = "|".join(turn.text for turn in conversation.turns)
            pictures = [image.name if isinstance(image, Path) else "blank" for image in conversation.images]
            if self.fails_on and self.fails_on in pictures:
                raise DataError(f"{self.fails_on} is damaged")
            said = hashlib.sha256((words + str(pictures)).encode()).hexdigest()
            text = ("yes", "no", "red", "2", "kite", "")[int(said, 16) % 6]
            self.asked.append(f"{words}{pictures}")
            found.append(
                Answer(text, "stop", Usage(5, 2, len(pictures)), {}, -int(said[:2], 16) / 100, "parrot")
            )
        if self.die_after and len(self.asked) >= self.die_after:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    def score(
        self, conversations: Sequence[Conversation], candidates: Sequence[Sequence[str]]
    ) -> list[list[float]]:
        return [[-float(len(text)) for text in row] for row in candidates]


def work(count: int = 10, **header: Any) -> runner.Work:
    names = [f"item{number}" for number in range(count)]
    conversations = [Conversation.ask([Path(f"{n}.jpg")], "what is it " * (len(n) % 3)) for n in names]
    return runner.Work(names, conversations, {"batch_size": 2}, header)


def run(model: Any, todo: runner.Work, path: Path) -> list[Prediction]:
    return runner.answer_all(model, todo, path, "test", lambda text: None)


def main(out: str, die_after: int, batch: int, *extra: str) -> int:
    from vlm.eval import session
    from vlm.eval.main import _parser

    data = str(Path(__file__).parent / "fixtures" / "vqav2")
    args = _parser().parse_args(
        ["vqav2", "--data", data, "--out", out, "--batch-size", str(batch), "--no-html", *extra]
    )
    session.apply_common = lambda args: None  # type: ignore[assignment]
    session._model = lambda args: Parrot(die_after)  # type: ignore[assignment,return-value]
    return session.run(args)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:]))
