"""Questions about the same pictures share a row: their answers are those that each has alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from vlm.conversation import Conversation, ImageSlot, Turn

if TYPE_CHECKING:
    from PIL import Image

    from vlm.model import VLM

Draw = Callable[..., "Image.Image"]


def test_questions_about_the_same_pictures_are_as_alone(tiny_model: VLM, draw: Draw, tmp_path: Path) -> None:
    """They share a row where their pictures stand alike: one twice, one that goes on, more than fit."""
    first, second = draw(1), tmp_path / "second.png"
    draw(2).save(second)
    one = Conversation.ask([first], "who?")
    asks = [
        one,
        Conversation.ask([second, first], "what is on the grass?"),
        one,
        one.answered("a man").then("and where?"),
        Conversation((first,), (Turn("user", ("this: ", ImageSlot(0), "what is it?")),)),
        Conversation((second, first), (Turn("user", (ImageSlot(0), "and", ImageSlot(1), "too")),)),
        Conversation.ask([second, first], "a very long one " * 8),
        *(Conversation.ask([first], f"what is {n}?") for n in range(12)),
        Conversation.ask([], "a"),
        Conversation.ask([], "two"),
    ]
    for beams, size in ((1, 16), (1, 3), (2, 16)):
        together = tiny_model.ask_batch(asks, max_new_tokens=10, batch_size=size, num_beams=beams)
        for ask, answer in zip(asks, together, strict=True):
            alone = tiny_model.ask_batch([ask], max_new_tokens=10, num_beams=beams)[0]
            assert (answer.text, answer.finish_reason, answer.usage) == (
                alone.text,
                alone.finish_reason,
                alone.usage,
            )
            assert answer.logprob == pytest.approx(alone.logprob, abs=1e-3)
    assert len({answer.text for answer in together}) > 3
