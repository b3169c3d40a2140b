"""The training loop: accelerate's engine, one recipe, an adapter at the end.

A step's loss is the sum over every supervised token of every micro-batch and process, divided by the
sum of their weights, so neither the micro-batch nor the number of processes changes what is learnt.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from vlm.checkpoint import save_adapter
from vlm.data.collate import Group, batches_from, masked_text, rows_of, seeded, told_of
from vlm.errors import VLMError
from vlm.model import VLM
from vlm.processor import Row, Tokens
from vlm.train import fast, mup, state
from vlm.train.config import TrainConfig
from vlm.train.hints import drawn_labels, naming
from vlm.train.mup import Scale
from vlm.train.optim import Average, build_optimizer, gradient_norms, learning_rate
from vlm.train.precision import in_bf16
from vlm.train.prepare import FeatureStore
from vlm.train.processes import Processes
from vlm.train.recipe import identity, other_keys
from vlm.train.record import SKIPPED, note_skipped
from vlm.train.selfcritical import CiderReward, caption_references, rewarded
from vlm.train.sharded import shard

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
    epoch: int = 0
    skipped: bool = False


@dataclass
class Part:
    """A micro-batch: its rows, their images' features, and the mean reward of its sampled captions.

    `targets` stands for the rows where words are learnt, and beside them where pairs of answers are.
    """

    rows: list[Row]
    features: Tensor
    reward: float = 0.0
    targets: Tensor | None = None


class Trainer:
    """Runs a recipe over groups of examples.

    Args:
        report: called with each step's figures, on the main process.
        accelerator: made for the machine when None.
    """

    def __init__(
        self,
        model: VLM,
        config: TrainConfig,
        groups: list[Group],
        store: FeatureStore,
        report: Callable[[Step], None],
        accelerator: Accelerator | None = None,
    ) -> None:
        self.accelerator = accelerator or Accelerator(cpu=not torch.cuda.is_available())
        self.processes = Processes(self.accelerator)
        self.config, self.groups, self.store, self.report = config, groups, store, report
        self.out = Path(config.out)
        self.adapter = model.adapter
        # Processes on unlike machines compute alike.
        able = self.processes.gather([int(in_bf16(config.precision, self.accelerator.device))])
        self.bf16 = all(flag for (flag,) in able)
        if self.bf16:
            model.language.halve()
        self.loss = fast.prepare(model, config.fast)
        self.sharded = shard(model, config, self.accelerator)  # before it moves: one device may not hold it
        self.model = model.to(self.accelerator.device)
        self.trained = self.trained_part()
        self.processes.same_start(self.trained)
        self.optimizer = build_optimizer(self.trained, config.optim, self.scales())
        self.average = Average(self.adapter, config.optim.average) if config.optim.average else None
        self.micro = config.micro
        self.step = 0
        self.bad = 0
        self.skipped = 0
        self.seconds = 0.0
        self.asked = False
        self.data_hash = store.data_hash(groups)
        self.reward = CiderReward(caption_references(groups)) if config.objective == "cider" else None

    def trained_part(self) -> nn.Module:
        """What the optimizer moves and a state holds: the adapter."""
        return self.adapter

    def scales(self) -> dict[str, Scale]:
        """muP's factors on rates and first weights, by the names of what is trained."""
        return mup.scales(self.model, self.config.optim.mup_base)

    # --- from start to end -------------------------------------------------------------------------

    def resume(self, say: Callable[[str], None] = lambda _: None) -> None:
        """Continues from the newest whole state, if there is one.

        Raises:
            TrainingError: the state is of another recipe or other data, or not all processes have it.
        """
        path, damaged = state.newest_valid(self.out / "state")
        if not self.processes.agree(state.step_of(path) if path else 0):
            raise TrainingError(
                f"{self.out} differs between processes: out must lie on a disk that all share"
            )
        for folder in damaged:
            say(f"{folder} is damaged; {'the state before it is used' if path else 'starting anew'}")
        if path is None:
            return
        tensors, meta = state.read_state(path)
        extra = meta["extra"]
        if changed := other_keys(extra["config"], self.config):
            raise TrainingError(
                f"{path} is of another recipe ({', '.join(changed)}): choose another out=FOLDER, "
                "or give --fresh to start anew"
            )
        if extra.get("data", self.data_hash) != self.data_hash:
            raise TrainingError(
                f"{path} was trained on other pictures or answers: choose another out=FOLDER, or give --fresh"
            )
        self.step, self.skipped = extra["step"], extra["skipped"]
        if (begun := state.processes_of(tensors)) != self.processes.count:
            say(f"the run was saved by {begun} processes, and {self.processes.count} go on: they draw anew")
            set_seed(self.config.seed + self.processes.rank + self.step)
        state.restore(
            path, tensors, meta["groups"], self.trained, self.optimizer, self.average, self.processes.rank
        )
        self.bad, self.seconds = extra.get("bad", 0), extra.get("seconds", 0.0)
        self.micro = extra.get("micro", self.micro)
        if (threads := extra.get("threads", torch.get_num_threads())) != torch.get_num_threads():
            # Sums are split among threads, so their number is part of every result's last bits.
            say(f"the run was started with {threads} threads and goes on with as many")
            torch.set_num_threads(threads)
        if (narrow := extra.get("bf16", self.bf16)) != self.bf16:
            was, now = ("bfloat16", "float32") if narrow else ("float32", "bfloat16")
            say(f"the run was started in {was} and goes on in {now}: precision=... keeps to one")
        self.continue_from(extra)
        say(f"continuing after step {self.step}")

    def run(self) -> None:
        """Trains to the last step, or until told to stop, and leaves the adapter in `out`."""
        with self.processes.listening(self.stop):
            self.learn()
        if self.processes.main and not self.written:
            self.save_adapter()
            state.note_written(self.out / "state", self.step)
        self.accelerator.wait_for_everyone()

    @property
    def written(self) -> bool:
        """Whether the adapter of this very step is in `out`."""
        written = state.written_step(self.out / "state")
        return written == self.step and (self.out / "adapter.safetensors").is_file()

    def save_adapter(self) -> None:
        """Writes the adapter (its moving average, where there is one) as float16."""
        tensors = self.average.tensors if self.average else self.adapter.state_dict()
        save_adapter(self.model, self.out, tensors={k: v.half() for k, v in tensors.items()})

    def stop(self) -> None:
        """Ends the run after the step that is being made; the processes agree on that at its end."""
        self.asked = True

    def learn(self, save: bool = True) -> None:
        """Makes the steps that are left, or those until `stop`; saves states on the way if `save`."""
        config = self.config
        self.model.train()
        if self.step == 0:
            set_seed(config.seed + self.processes.rank)
        stream, stopping = self.batches(), False
        try:
            while self.step < config.steps and not stopping:
                began = time.perf_counter()
                result = self.one_step(*next(stream))
                self.step += 1
                result.step = self.step
                result.seconds = time.perf_counter() - began
                self.seconds += result.seconds
                if self.processes.main:
                    self.report(result)
                # A signal may reach one process alone, at any time: none may act on it by itself.
                stopping = sum(self.processes.sums([self.asked])) > 0
                due = self.step % config.save_every == 0 or self.step == config.steps or stopping
                if save and due:
                    self.save()
        finally:
            self.model.eval()

    def batches(self) -> Iterator[tuple[int, list[Group]]]:
        """(epoch, the pictures of a step) from the next step on, without end."""
        config = self.config
        by_length = config.fast.length_groups
        for epoch, indices in batches_from(self.groups, config.batch, config.seed, self.step, by_length):
            yield epoch, [self.groups[i] for i in indices]

    def mine(self, groups: Sequence[Group]) -> list[Group]:
        """What this process learns of a step's pictures."""
        return self.processes.mine(groups)

    def progress(self) -> dict[str, Any]:
        """What else a state says; every process calls it."""
        return {}

    def continue_from(self, extra: dict[str, Any]) -> None:
        """Takes up what a state says."""

    def counted(self) -> dict[str, Any]:
        """What else is written down of a run at its end; every process calls it."""
        return {}

    def save(self) -> None:
        """Writes the state of every process."""
        randoms, progress = self.processes.random_states(), self.progress()
        devices = self.processes.device_states()
        if self.processes.main:
            extra = {
                "step": self.step,
                "skipped": self.skipped,
                "bad": self.bad,
                "seconds": self.seconds,
                "micro": self.micro,
                "threads": torch.get_num_threads(),
                "bf16": self.bf16,
                "data": self.data_hash,
                "config": identity(self.config),
                **progress,
            }
            files = state.pack(self.trained, self.optimizer, self.average, randoms, extra, devices)
            state.save_state(self.out / "state", self.step, files, self.config.keep)
        self.accelerator.wait_for_everyone()

    # --- one step ----------------------------------------------------------------------------------

    def one_step(self, epoch: int, groups: list[Group]) -> Step:
        """One optimizer step over a batch of groups; every process calls it with the same batch."""
        config = self.config
        rate = learning_rate(self.step, config.steps, config.optim)
        for settings in self.optimizer.param_groups:
            settings["lr"] = rate * settings["factor"]
        mine = self.mine(groups)
        micro = self.micro or max(1, len(mine))
        parts = [self.prepare(mine[i : i + micro], epoch) for i in range(0, len(mine), micro)]
        # Every process divides by the weight of the whole step, known before the first backward pass.
        local = sum(map(self.weight, parts))
        (weight,) = self.processes.sums([local])
        idle = self.idle(parts, groups, epoch) if self.sharded else []
        total, tokens = 0.0, 0
        for part in parts:
            loss, size = self.backward(part, weight)
            total, tokens = total + loss, tokens + size
        for part in idle:
            self.backward(part, math.inf)
        rewards = sum(part.reward * len(part.rows) for part in parts)
        rows = sum(len(part.rows) for part in parts)
        total, read, rewards, shown = self.processes.sums([total, tokens, rewards, rows])
        parameters = list(self.trained.parameters())
        self.processes.sum_gradients(parameters)
        numbers = self.adapter.statistics() | gradient_norms(self.adapter)
        norm = float(nn.utils.clip_grad_norm_(parameters, config.optim.clip))
        skipped = not self._update(total / weight, norm, groups)
        if self.reward is not None:
            numbers["reward"] = rewards / max(1, shown)
        return Step(0, total / weight, rate, norm, int(read), 0.0, numbers, epoch, skipped)

    def idle(self, parts: Sequence[Part], groups: Sequence[Group], epoch: int) -> list[Part]:
        """Passes that count nothing, for a process with fewer of them than another: they gather together."""
        most = max(count for (count,) in self.processes.gather([len(parts)]))
        missing = most - len(parts)
        return [parts[0] if parts else self.prepare(groups[:1], epoch)] * missing if missing else []

    def backward(self, part: Part, weight: float) -> tuple[float, int]:
        """Adds a part's gradient; returns its loss (a sum) and the number of tokens read."""
        batch = self.model.processor.batch(part.rows).to(self.accelerator.device)
        features = part.features.to(self.accelerator.device)
        with self.autocast():
            loss = self.loss(batch, features, self.config.smoothing)
        (loss / weight).backward()
        return float(loss.detach()), batch.ids.numel()

    def weight(self, part: Part) -> float:
        """What a part counts in a step's mean; advantages sum to nothing, so with them it is the tokens."""
        if self.reward is not None:
            return sum(len(row.labels) for row in part.rows)
        return sum(weight for row in part.rows for _, _, weight in row.labels)

    def view(self, group: Group, epoch: int) -> str:
        """How an epoch shows a group's pictures.

        Rewards compare with the captions as they were written: where these say left or right, unmirrored.
        """
        if not self.config.flip or not group.mirrors or (self.reward is not None and group.sided):
            return "whole"
        chance = seeded(self.config.seed, epoch, group.key, "view")
        return "flip" if chance.random() < self.config.flip else "whole"

    def prepare(self, groups: Sequence[Group], epoch: int) -> Part:
        """A micro-batch of an epoch's drawing."""
        config, processor = self.config, self.model.processor
        seen: list[Tensor] = []
        hints: list[list[str]] = []
        told: list[list[tuple[Tokens, float]]] = []
        own: list[int] = []  # the groups of which more than a name is learnt
        for group in groups:
            view = self.view(group, epoch)
            seen.append(self.store(group, view))
            labels = drawn_labels(group, view, epoch, self.groups, self.store, config)
            hints.append(labels.texts)
            said = [] if labels.foreign else told_of(group, processor, config.seed, epoch, labels.texts, view)
            if not labels.foreign:
                own.append(len(told))
            told.append(said + naming(group, labels, epoch, self.store, processor, config))
        reward = 0.0
        if self.reward is not None and own:
            shown, hinted = torch.cat([seen[i] for i in own]), [hints[i] for i in own]
            described = [groups[i] for i in own]
            with self.autocast():
                sampled, reward = rewarded(self.model, self.reward, described, shown, hinted, config)
            for i, captions in zip(own, sampled, strict=True):
                told[i] += captions
        rows: list[Row] = []
        features: list[Tensor] = []
        for group, pairs, feature in zip(groups, told, seen, strict=True):
            self._check_supervised(group, pairs)
            made = rows_of(pairs, processor, config.fast.shared_rows)
            rows += made
            features += [feature[row.tokens.images] for row in made]
        return Part(rows, torch.cat(features), reward)

    def _check_supervised(self, group: Group, told: Sequence[tuple[Tokens, float]]) -> None:
        for tokens, _ in told:
            if not any(tokens.supervised):
                raise TrainingError(
                    f"{group.id}: a sample has no token to learn: {masked_text(tokens, self.model.language)}"
                )

    def autocast(self) -> Any:
        """The precision that the run computes in."""
        if self.bf16:
            return torch.autocast(self.accelerator.device.type, torch.bfloat16)
        return nullcontext()

    def _update(self, loss: float, norm: float, groups: Sequence[Group]) -> bool:
        """Moves the weights, unless the loss or its gradient is no number; returns whether it did."""
        fine = math.isfinite(loss) and math.isfinite(norm)
        if fine:
            self.optimizer.step()
            self.bad = 0
            if self.average is not None:
                self.average.update(self.adapter)
        else:
            self.bad += 1
            self.skipped += 1
            if self.processes.main:
                note_skipped(self.out, self.step + 1, loss, norm, groups)
        self.optimizer.zero_grad(set_to_none=True)
        if self.bad >= BAD_STEPS:
            raise TrainingError(
                f"{BAD_STEPS} steps in a row gave no finite loss; {self.out / SKIPPED} names their samples"
            )
        return fine
