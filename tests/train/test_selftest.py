"""The self-test: passes where pictures reach the words, and says so where they do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vlm.cli import main
from vlm.data.collate import Source, group_by_image
from vlm.data.example import Example
from vlm.errors import DataError
from vlm.train.config import OptimConfig
from vlm.train.selftest import GOAL, selftest, told_apart
from vlm.train.shapes import shapes

QFORMER = "model.qformer={width: 192, depth: 2, heads: 3, queries: 4, feedforward: 768}"


@pytest.mark.slow
@pytest.mark.parametrize("settings", [[], ["model.adapter=qformer", QFORMER]], ids=["flamingo", "qformer"])
def test_eight_pictures_are_learnt_by_heart(
    real_model: object, settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "selftest", "smoke", *settings, "--offline"]) == 0
    loss = float(capsys.readouterr().out.split()[1])
    assert loss < GOAL


def test_it_fails_where_pictures_tell_nothing(
    recipe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An encoder that gives the same features for every picture: the words cannot be told apart."""
    from vlm.vision import Encoder

    honest = Encoder.forward
    monkeypatch.setattr(Encoder, "forward", lambda self, pixels: 0 * honest(self, pixels) + 1)
    loss, steps = selftest(replace(recipe(), optim=OptimConfig(lr=1e-2)), offline=True, steps=80)
    assert steps == 80
    assert loss > 0.5


def test_the_eight_differ_and_are_asked_one_question() -> None:
    chosen = told_apart(group_by_image([Source(shapes(24))]))
    pairs = [pair for group in chosen for pairs in group.by_source for pair in pairs]
    assert len(chosen) == len({group.id for group in chosen}) == 8
    assert len(pairs) == len({pair.answer for pair in pairs}) == 8
    assert len({pair.example.turns[-1].text for pair in pairs}) == 1


def test_questions_of_ones_own_need_not_be_the_same(tmp_path: Path) -> None:
    examples = [replace(e, turns=e.turns) for e in shapes(24) if e.turns[0].text.startswith("Is the shape")]
    chosen = told_apart(group_by_image([Source(examples)]))
    answers = {pair.answer for group in chosen for pairs in group.by_source for pair in pairs}
    assert answers == {"yes", "no"}


def test_one_answer_for_all_is_nothing_to_tell_apart() -> None:
    same = [Example(e.images, e.turns, ("yes",), e.id) for e in shapes(8)]
    with pytest.raises(DataError, match="nothing to tell apart"):
        told_apart(group_by_image([Source(same)]))
