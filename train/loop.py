"""The training loop: accelerate's engine, one recipe, an adapter at the end.

A step's loss is the sum over every supervised token of every micro-batch and process, divided by the
sum of their weights, so neither the micro-batch nor the number of processes changes what is learnt.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from vlm.checkpoint import save_adapter
from vlm.config import to_dict
from vlm.data.collate import Group, batches_from, rows_of, seeded, told_of
from vlm.errors import VLMError
from vlm.model import VLM
from vlm.processor import Row
from vlm.train.config import TrainConfig
from vlm.train.optim import Average, build_optimizer, learning_rate
from vlm.train.prepare import FeatureStore
from vlm.train.selfcritical import CiderReward, caption_references, rewarded
from vlm.train.state import load_state, newest_valid, save_state

BAD_STEPS = 5
"""Steps in a row with a loss that is no number, after which a run gives up."""


class TrainingError(VLMError):
    """A run that cannot go on."""


@dataclass
class Step:
    """What one step did."""

    step: int
    loss: float
    lr: float
    norm: float
    tokens: int
    seconds: float
    numbers: dict[str, float] = field(default_factory=dict)


@dataclass
class _Part:
    """A micro-batch: its rows, their images' features, and the mean reward of its sampled captions."""

    rows: list[Row]
    features: Tensor
    reward: float


class Trainer:
    """Runs a recipe over groups of examples.

    Args:
        report: called with each step's figures.
    """

    def __init__(
        self,
        model: VLM,
        config: TrainConfig,
        groups: list[Group],
        store: FeatureStore,
        report: Callable[[Step], None],
    ) -> None:
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available())
        self.config, self.groups, self.store, self.report = config, groups, store, report
        self.out = Path(config.out)
        self.model = model.to(self.accelerator.device)
        self.adapter = model.adapter
        if config.precision == "bf16":
            model.language.halve()
        self.optimizer = build_optimizer(self.adapter, config.optim)
        self.average = Average(self.adapter, config.optim.average) if config.optim.average else None
        self.step = 0
        self.bad = 0
        self.skipped = 0
        self.stopping = False
        self.reward = CiderReward(caption_references(groups)) if config.objective == "cider" else None

    def resume(self) -> list[Path]:
        """Continues from the newest whole state, if there is one; returns the damaged ones passed over."""
        path, damaged = newest_valid(self.out / "state")
        if path is not None:
            extra = load_state(path, self.adapter, self.optimizer, self.average)
            if extra["config"] != _identity(self.config):
                raise TrainingError(f"{path} is of another recipe: choose another out=FOLDER, or remove it")
            self.step, self.skipped = extra["step"], extra["skipped"]
        return damaged

    def run(self) -> None:
        """Trains to the last step, or to SIGTERM, and leaves the adapter in `out`."""
        previous = signal.signal(signal.SIGTERM, self._stop)
        try:
            self._steps()
        finally:
            signal.signal(signal.SIGTERM, previous)
        if self.accelerator.is_main_process:
            self.save_adapter()

    def save_adapter(self, card: str = "") -> None:
        """Writes the adapter (its moving average, where there is one) as float16."""
        tensors = self.average.tensors if self.average else self.adapter.state_dict()
        save_adapter(self.model, self.out, card=card, tensors={k: v.half() for k, v in tensors.items()})

    def _stop(self, _signal: int, _frame: FrameType | None) -> None:
        self.stopping = True

    def _steps(self) -> None:
        config = self.config
        self.model.train()
        if self.step == 0:
            set_seed(config.seed)
        stream = batches_from(self.groups, config.batch, config.seed, self.step)
        while self.step < config.steps and not self.stopping:
            epoch, indices = next(stream)
            began = time.perf_counter()
            result = self._one_step(epoch, [self.groups[i] for i in indices])
            self.step += 1
            result.seconds = time.perf_counter() - began
            result.step = self.step
            if self.accelerator.is_main_process:
                self.report(result)
            if self.step % config.save_every == 0 or self.step == config.steps or self.stopping:
                self._save()
        self.model.eval()

    def _save(self) -> None:
        if self.accelerator.is_main_process:
            extra = {"step": self.step, "skipped": self.skipped, "config": _identity(self.config)}
            save_state(
                self.out / "state",
                self.step,
                self.adapter,
                self.optimizer,
                self.average,
                extra,
                self.config.keep,
            )
        self.accelerator.wait_for_everyone()

    def _one_step(self, epoch: int, groups: list[Group]) -> Step:
        config = self.config
        rate = learning_rate(self.step, config.steps, config.optim)
        for settings in self.optimizer.param_groups:
            settings["lr"] = rate * settings["factor"]
        mine = groups[self.accelerator.process_index :: self.accelerator.num_processes]
        micro = config.micro or max(1, len(mine))
        # Every process divides by the weight of the whole step, known before the first backward pass.
        parts = [self._prepare(mine[i : i + micro], epoch) for i in range(0, len(mine), micro)]
        weight = torch.tensor(sum(self._weight(row) for part in parts for row in part.rows))
        weight = self.accelerator.reduce(weight.to(self.accelerator.device), reduction="sum")
        total = torch.zeros((), device=self.accelerator.device)
        tokens = 0
        for part in parts:
            batch = self.model.processor.batch(part.rows).to(self.accelerator.device)
            tokens += batch.ids.numel()
            with self._autocast():
                loss, _ = self.model.loss(batch, part.features.to(self.accelerator.device), config.smoothing)
            (loss / weight).backward()
            total += loss.detach()
        loss_value = float(self.accelerator.reduce(total, reduction="sum") / weight)
        self._reduce_gradients()
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.trainable(), config.optim.clip))
        self._update(loss_value, norm, groups)
        numbers = self.adapter.statistics()
        if self.reward is not None:
            numbers["reward"] = sum(part.reward for part in parts) / len(parts)
        return Step(0, loss_value, rate, norm, tokens, 0.0, numbers)

    def _weight(self, row: Row) -> float:
        """What a row counts in a step's mean; advantages sum to nothing, so with them it is the tokens."""
        return sum(weight for _, _, weight in row.labels) if self.reward is None else len(row.labels)

    def _prepare(self, groups: list[Group], epoch: int) -> _Part:
        config, processor = self.config, self.model.processor
        seen: list[Tensor] = []
        for group in groups:
            mirrored = group.mirrors and seeded(config.seed, epoch, group.id, "view").random() < config.flip
            seen.append(self.store(group, "flip" if mirrored else "whole"))
        told = [told_of(group, processor, config.seed, epoch) for group in groups]
        reward = 0.0
        if self.reward is not None:
            with self._autocast():
                sampled, reward = rewarded(self.model, self.reward, groups, torch.cat(seen), config.samples)
            told = [one + other for one, other in zip(told, sampled, strict=True)]
        rows: list[Row] = []
        features: list[Tensor] = []
        for pairs, feature in zip(told, seen, strict=True):
            made = rows_of(pairs, processor)
            rows += made
            features += [feature] * len(made)
        return _Part(rows, torch.cat(features), reward)

    def _autocast(self) -> Any:
        if self.config.precision == "bf16":
            return torch.autocast(self.accelerator.device.type, torch.bfloat16)
        return nullcontext()

    def _reduce_gradients(self) -> None:
        if self.accelerator.num_processes > 1:
            for parameter in self.model.trainable():
                if parameter.grad is not None:
                    parameter.grad = self.accelerator.reduce(parameter.grad, reduction="sum")

    def _update(self, loss: float, norm: float, groups: list[Group]) -> None:
        """Moves the weights, unless the loss or its gradient is no number."""
        if math.isfinite(loss) and math.isfinite(norm):
            self.optimizer.step()
            self.bad = 0
            if self.average is not None:
                self.average.update(self.adapter)
        else:
            self.bad += 1
            self.skipped += 1
            names = ", ".join(group.id for group in groups[:20])
            if self.bad >= BAD_STEPS:
                raise TrainingError(f"{BAD_STEPS} steps in a row gave no finite loss; the last saw {names}")
        self.optimizer.zero_grad(set_to_none=True)


def _identity(config: TrainConfig) -> dict[str, Any]:
    """What must not change between a run and its continuation."""
    values = to_dict(config)
    for free in ("out", "save_every", "keep", "log_every", "note", "feature_cache", "data"):
        values.pop(free)
    return values
