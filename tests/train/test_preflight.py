"""What is predicted of a run, and that predicting leaves no trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from vlm.data.collate import Pair, told_length
from vlm.train.config import FastConfig
from vlm.train.preflight import peak_memory, preflight

if TYPE_CHECKING:
    from vlm.data.collate import Group
    from vlm.train.config import TrainConfig
    from vlm.train.loop import Part, Step, Trainer

Recipe = Callable[..., "TrainConfig"]
TrainerOf = Callable[["TrainConfig"], "tuple[Trainer, list[Step]]"]


def test_the_batch_that_tells_most_is_tried(
    recipe: Recipe, trainer_of: TrainerOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, _ = trainer_of(recipe(batch=2, fast=FastConfig(length_groups=False)))
    talker = trainer.groups[7]
    pair = talker.by_source[0][0]
    talker.by_source[0][:] = [Pair(pair.example, "a long answer " * 9, 1.0)] * 3
    others = [told_length(group, 0, 0) for group in trainer.groups if group is not talker]
    assert told_length(talker, 0, 0) > 2 * max(others)
    tried: list[Group] = []
    plain = trainer.prepare

    def prepare(part: Sequence[Group], epoch: int) -> Part:
        tried.extend(part)
        return plain(part, epoch)

    monkeypatch.setattr(trainer, "prepare", prepare)
    plan = preflight(trainer)
    assert talker in tried
    assert plan.micro == 2 and plan.step_seconds > 0
    assert plan.memory > peak_memory(torch.device("cpu")) // 2


def test_predicting_leaves_no_trace(recipe: Recipe, trainer_of: TrainerOf) -> None:
    config = recipe(steps=3, sizes={"dropout": 0.2})
    losses = []
    for predicted in (True, False):
        trainer, steps = trainer_of(config)
        torch.manual_seed(1)
        if predicted:
            preflight(trainer)
        trainer.run()
        losses.append([step.loss for step in steps])
    assert losses[0] == losses[1]


def test_states_that_may_be_kept_are_memory_too(recipe: Recipe, trainer_of: TrainerOf) -> None:
    config = recipe(batch=2)
    trainer, _ = trainer_of(config)
    without = preflight(trainer).memory
    trainer.config = replace(config, fast=FastConfig(lower_cache=3000))
    assert preflight(trainer).memory > without + (2900 << 20)


@pytest.mark.parametrize(("batch", "epochs"), [(5, 6 / 3), (12, 6.0), (64, 6.0)])
def test_an_epoch_is_as_many_steps_as_it_has_batches(
    recipe: Recipe, trainer_of: TrainerOf, batch: int, epochs: float
) -> None:
    """12 pictures: the last batch of an epoch may be short, and a batch never reaches into the next."""
    trainer, _ = trainer_of(recipe(steps=6, batch=batch))
    assert preflight(trainer).epochs == pytest.approx(epochs)
    trainer.step = trainer.config.steps
    assert next(trainer.batches())[0] == epochs
