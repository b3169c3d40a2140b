"""How near another answer was: the smallest gap between what was chosen and what was not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch

from vlm.answering import shown
from vlm.beams import _Beams
from vlm.conversation import Conversation
from vlm.generation import DecodeBatch, DecodeRequest

if TYPE_CHECKING:
    from PIL import Image

    from vlm.model import VLM

Draw = Callable[..., "Image.Image"]
END = 9


def gaps(model: VLM, ask: Conversation, steps: int) -> list[float]:
    """Best minus second-best log-probability of every greedy step, by whole forward passes."""
    row, features = shown(model, ask)
    tokens, found = row.tokens, []
    with torch.inference_mode():
        for _ in range(steps):
            batch = model.processor.batch([model.processor.row([tokens])])
            likely = model(batch, features)[0, -1].log_softmax(-1)
            best, where = likely.masked_fill(model.language.never_said(), float("-inf")).topk(2)
            found.append(float(best[0] - best[1]))
            if int(where[0]) == model.language.frame.end:
                break
            tokens.add([int(where[0])])
    return found


def test_greedy_margin_is_the_smallest_gap(tiny_model: VLM, draw: Draw) -> None:
    asks = [Conversation.ask([draw(n)], "what is on the grass? " * n) for n in range(1, 5)]
    answers = tiny_model.ask_batch(asks, max_new_tokens=8, batch_size=4)
    for ask, answer in zip(asks, answers, strict=True):
        expected = gaps(tiny_model, ask, 8)
        assert len(expected) == answer.usage.completion_tokens
        assert answer.margin == pytest.approx(min(expected), abs=1e-3)


def test_words_that_are_equally_likely_have_no_margin(make_tiny: Callable[..., VLM], draw: Draw) -> None:
    model = make_tiny()
    ask = Conversation.ask([draw(1)], "what?")
    assert model.ask_batch([ask], max_new_tokens=6)[0].margin > 1e-3  # type: ignore[operator]
    weight = model.language.head_weight
    assert weight is not None
    with torch.no_grad():  # every word beyond the added ones has a twin
        weight[5::2] = weight[4:-1:2][: len(weight[5::2])]
    assert model.ask_batch([ask], max_new_tokens=6)[0].margin == 0


def test_a_drawn_answer_has_none(make_tiny: Callable[..., VLM], draw: Draw) -> None:
    model = make_tiny()
    ask = Conversation.ask([draw(1)], "what?")
    assert model.ask_batch([ask], max_new_tokens=4, temperature=1.0, seed=1)[0].margin is None


def test_drawn_and_greedy_rows_side_by_side(make_tiny: Callable[..., VLM], draw: Draw) -> None:
    from vlm.config import GenerationConfig

    model = make_tiny()
    batch = DecodeBatch(model)
    seen = shown(model, Conversation.ask([draw(1)], "what?"))
    drawn, greedy = (GenerationConfig(max_new_tokens=4, temperature=t, seed=0) for t in (1.0, 0.0))
    writers = [
        batch.writer(slot) for slot in batch.add([DecodeRequest(*seen, drawn), DecodeRequest(*seen, greedy)])
    ]
    while len(batch):
        batch.step()
    assert writers[0].margin == math.inf
    assert 0 < writers[1].margin < math.inf


def test_a_beams_gap_is_at_the_border_of_who_goes_on() -> None:
    beams = _Beams(2, penalty=1.0)
    beams.take([(-1.0, 0, 5, -1.0), (-1.5, 0, 6, -1.5), (-2.0, 0, 7, -2.0), (-9.0, 0, 8, -9.0)], END)
    assert beams.margin == pytest.approx(0.5)  # the order of the two that are kept decides nothing
    # The end at the top would not count if it came third, 0.3 lower; who goes on is decided by 0.6.
    beams.take([(-1.0, 0, END, -0.1), (-1.2, 0, 5, -0.2), (-1.3, 1, 6, -0.3), (-1.9, 0, 7, -0.9)], END)
    assert beams.margin == pytest.approx(0.3)
    # The end in third place would count 0.1 higher.
    beams.take([(-2.0, 0, 5, -0.8), (-2.1, 1, 6, -0.8), (-2.2, 0, END, -1.0), (-4.0, 0, 7, -2.8)], END)
    assert beams.margin == pytest.approx(0.1)


def test_beams_compare_the_two_best_at_the_end_too() -> None:
    beams = _Beams(2, penalty=0.0)
    beams.take([(-1.0, 0, 5, -1.0), (-1.4, 0, 6, -1.4), (-9.0, 0, 7, -9.0)], END)
    assert beams.margin == pytest.approx(7.6)
    beams.take([(-1.5, 0, END, -0.5), (-1.75, 1, END, -0.35), (-8.0, 0, 6, -7.0), (-9.5, 1, 7, -8.1)], END)
    assert beams.done
    assert beams.best([-8.0, -9.5])[1] == [5, END]
    assert beams.margin == pytest.approx(0.25)


def test_an_answer_by_beams_has_a_margin(tiny_model: VLM, draw: Draw) -> None:
    asks = [Conversation.ask([draw(n)], "what is on the grass?") for n in range(3)]
    found = [a.margin for a in tiny_model.ask_batch(asks, num_beams=3, max_new_tokens=8)]
    alone = [tiny_model.ask_batch([ask], num_beams=3, max_new_tokens=8)[0].margin for ask in asks]
    assert found == pytest.approx(alone, abs=1e-3)
    assert all(margin is not None and margin > 0 for margin in found)
