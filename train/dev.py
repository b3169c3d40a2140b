"""Which pictures a run learns from, and its loss on some that no run of the recipe does.

The pictures set aside (`dev`) are the first in an order made by a hash of their names, and those learnt
(`pictures`) come next: the same for every seed, and fewer of them are always among more. So runs of any size
can be compared by one number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from vlm.data.collate import Group, Source, all_fitting, image_name, rows_of, told_of
from vlm.data.example import Example
from vlm.data.splits import rank_by_image
from vlm.errors import DataError
from vlm.model import VLM
from vlm.train.config import TrainConfig
from vlm.train.hints import hint_texts
from vlm.train.holdout import write_report
from vlm.train.loop import Trainer
from vlm.train.prepare import FeatureStore, groups_of, read_sources
from vlm.train.recipe import identity
from vlm.train.record import DEV
from vlm.train.screen import Screen

SALT = "dev"
SEED = 0
"""Of what is asked about the pictures set aside, whatever the run's own seed."""
TOGETHER = 8
"""Pictures a forward pass."""


def apportion(config: TrainConfig) -> tuple[list[Source], list[Source]]:
    """What the recipe learns from, and what is set aside for its loss; everything and nothing by default.

    Raises:
        ConfigError: the recipe names no sources.
        DataError: there are too few pictures, or a source cannot be read.
    """
    sources, aside = read_sources(config), []
    if config.dev:
        fixed = sources if config.seed == SEED else read_sources(replace(config, seed=SEED))
        aside = _first(fixed, config.dev, "dev")
        away = {image_name(image) for source in aside for e in source.examples for image in e.images}
        sources = [
            _only(s, [e for e in s.examples if not away & {image_name(i) for i in e.images}]) for s in sources
        ]
    if config.pictures:
        sources = _first(sources, config.pictures, "pictures")
    return sources, aside


def _first(sources: Sequence[Source], count: int, key: str) -> list[Source]:
    """Everything said of `count` pictures."""
    examples = [example for source in sources for example in source.examples]
    ranks = rank_by_image(examples, SALT)
    there = max(ranks, default=-1) + 1
    if there < count:
        raise DataError(f"{key}={count} are more pictures than the {there} there are")
    kept = {id(e) for e, rank in zip(examples, ranks, strict=True) if rank < count}
    return [_only(s, [e for e in s.examples if id(e) in kept]) for s in sources]


def _only(source: Source, examples: list[Example]) -> Source:
    """Some of a source's examples; the others are passed by, and its unusable rows stay counted."""
    passed_by = source.passed_by + len(source.examples) - len(examples)
    return replace(source, examples=examples, passed_by=passed_by)


@dataclass
class Dev:
    """The pictures set aside, with their features."""

    groups: list[Group]
    store: FeatureStore

    def write(self, trainer: Trainer) -> dict[str, Any]:
        """Measures the adapter as it is saved (its moving average, where there is one), and writes it down.

        Returns:
            `loss` in nats per supervised token, what it is a mean over, and whose it is.
        """
        if trainer.average is not None:
            trainer.adapter.load_state_dict(trainer.average.tensors)
        loss, weight = dev_loss(trainer, self.groups, self.store)
        found = {
            "loss": loss,
            "weight": weight,
            "pictures": len(self.groups),
            "hash": self.store.data_hash(self.groups),
            "learnt": len(trainer.groups),
            "trained": sum(p.numel() for p in trainer.model.trainable()),
            "recipe": identity(trainer.config),
        }
        if trainer.processes.main:
            write_report(Path(trainer.config.out) / DEV, found)
        return found


def open_dev(
    config: TrainConfig, model: VLM, aside: Sequence[Source], screen: Screen, accelerator: Accelerator
) -> Dev | None:
    """The pictures set aside, encoded; None where there are none, or the objective has another loss."""
    if not aside or config.objective == "words":
        return None
    fitting = []
    for source in aside:
        examples, unfit = all_fitting(source.examples, model.processor)
        fitting.append(replace(source, examples=examples))
        for row in unfit:
            screen.say(f"{row.where} was set aside for the loss and cannot be used: {row.detail}")
    groups = groups_of(fitting)
    rank, count = accelerator.process_index, accelerator.num_processes
    store = FeatureStore(model.features, groups, 0.0, model.config.hints, screen.progress, rank, count)
    for name, problem in store.bad.items():
        screen.say(f"{name} was set aside for the loss and cannot be used: {problem}")
    return Dev(store.usable(groups), store)


@torch.no_grad()
def dev_loss(trainer: Trainer, groups: Sequence[Group], store: FeatureStore) -> tuple[float, float]:
    """Mean loss over the supervised tokens of `groups`, each as its source weighs it; and their weight.

    Of every picture the same answers are asked, as many as a recipe draws in an epoch, with its own hints.

    Raises:
        DataError: there is no token to predict.
    """
    model, config = trainer.model.eval(), trainer.config
    device, mine = trainer.accelerator.device, trainer.processes.mine(groups)
    total = weight = 0.0
    for begin in range(0, len(mine), TOGETHER):
        rows, features = [], []
        for group in mine[begin : begin + TOGETHER]:
            told = told_of(group, model.processor, SEED, 0, hint_texts(store.labels(group, "whole")))
            made = rows_of(told, model.processor, config.fast.shared_rows)
            rows += made
            features += [store(group, "whole")[row.tokens.images] for row in made]
        batch = model.processor.batch(rows).to(device)
        with trainer.autocast():
            likely = model.label_logprobs(batch, torch.cat(features).to(device))
        total -= float((batch.label_weights * likely).sum())
        weight += float(batch.label_weights.sum())
    total, weight = trainer.processes.sums([total, weight])
    if not weight:
        raise DataError("nothing is said of the pictures that were set aside (dev)")
    return total / weight, weight
