"""What a run will need, before its first step; and how that compares with what it took.

The figures come from two trial steps on batches of the recipe's own first epoch: the first one is timed, the
one that tells most is measured for memory, and everything they touched is put back.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from vlm.data.collate import Group, batches_from, epoch_batches, told_length
from vlm.train.loop import Trainer

SHARE = 0.5
"""Share of the free memory that activations may take."""


@dataclass
class Preflight:
    """Predictions of a run.

    Attributes:
        frozen, trained: parameters.
        pictures, answers: distinct pictures, and everything there is to be learnt of them; 0 where they are
            streamed, and nobody has counted them.
        steps: left to go; `epochs` of the data in all steps together.
        micro: pictures a forward pass.
        step_seconds, seconds: of one step, of all that are left.
        memory: bytes at the run's peak.
    """

    frozen: int
    trained: int
    pictures: int
    answers: int
    steps: int
    epochs: float
    micro: int
    step_seconds: float
    seconds: float
    memory: int

    def text(self) -> str:
        """Two lines for people."""
        known = self.pictures > 0
        epochs = f" ({self.epochs:.2g} epochs)" if known else ""
        each = f", {duration(self.seconds / max(self.epochs, 1e-9))} an epoch" if known else ""
        data = f"{self.pictures} pictures, {self.answers} answers" if known else "pictures from shards"
        return (
            f"{self.trained / 1e6:.1f} M parameters trained, {self.frozen / 1e6:.1f} M frozen; {data}\n"
            f"{self.steps} steps{epochs} of about {self.step_seconds:.2f} s: "
            f"about {duration(self.seconds)}{each}; "
            f"peak memory about {self.memory / 1e9:.1f} GB; {self.micro} pictures a pass"
        )

    def compared(self, seconds: float, memory: int) -> str:
        """The prediction beside what happened; `seconds` is what the steps took, `memory` the most held."""
        return (
            f"took {duration(seconds)} (predicted {duration(self.seconds)}), "
            f"peak memory {memory / 1e9:.1f} GB (predicted {self.memory / 1e9:.1f} GB)"
        )

    def facts(self) -> dict[str, Any]:
        """For run.json."""
        return asdict(self)


def duration(seconds: float) -> str:
    """A time for people: "42 s", "7 min", "3 h 20 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held of a GPU; on another device, of main memory.

    Where the system tells them apart, pages of files (stored features, weights) are not counted: they are
    dropped whenever something else needs the room.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == "darwin":
        return peak
    return peak * 1024 - _kernel_says("/proc/self/status", "RssFile:", 0)


def free_memory(device: torch.device) -> int:
    """Bytes that may still be taken where a run computes; a large number where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return _kernel_says("/proc/meminfo", "MemAvailable:", 1 << 40)


def _kernel_says(path: str, name: str, unknown: int) -> int:
    """Bytes of a line that the kernel writes in kB; `unknown` where it does not."""
    try:
        with open(path, encoding="ascii") as file:
            for line in file:
                if line.startswith(name):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return unknown


def preflight(trainer: Trainer) -> Preflight:
    """Tries two steps, chooses the micro-batch if the recipe leaves it open, and predicts the rest."""
    config, groups = trainer.config, trainer.groups
    epoch, first, heaviest = _batches(trainer)
    with _untouched(trainer):
        # All processes make the same passes: those that share the layers wait for each other in each.
        sizes = [len(first), len(heaviest), trainer.micro or _choose_micro(trainer, heaviest, epoch)]
        *sizes, trainer.micro = map(min, zip(*trainer.processes.gather(sizes), strict=True))
        _trial(trainer, first[:1], epoch)  # warms everything up
        seconds = _trial(trainer, first[: sizes[0]], epoch)
        _trial(trainer, heaviest[: sizes[1]], epoch)
    trained = sum(p.numel() for p in trainer.model.trainable())
    everything = sum(p.numel() for p in trainer.model.parameters())
    left = config.steps - trainer.step
    # AdamW's two averages come with the first real step, the states below the adapter with the others.
    memory = (
        peak_memory(trainer.accelerator.device)
        + (0 if trainer.step else 8 * trained)
        + (config.fast.lower_cache << 20)
    )
    return Preflight(
        frozen=everything - trained,
        trained=trained,
        pictures=0 if config.stream else len(groups),
        answers=0 if config.stream else sum(len(pairs) for group in groups for pairs in group.by_source),
        steps=left,
        epochs=0.0 if config.stream else left / -(-len(groups) // config.batch),
        micro=trainer.micro,
        step_seconds=seconds,
        seconds=seconds * left,
        memory=memory,
    )


@contextmanager
def _untouched(trainer: Trainer) -> Iterator[None]:
    """Puts random generators, gradients and the model's mode back."""
    state = torch.get_rng_state()
    device = trainer.accelerator.device
    drawn = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    trainer.model.train()
    try:
        yield
    finally:
        trainer.optimizer.zero_grad(set_to_none=True)
        trainer.model.eval()
        torch.set_rng_state(state)
        if drawn is not None:
            torch.cuda.set_rng_state(drawn, device)


def _choose_micro(trainer: Trainer, batch: list[Group], epoch: int) -> int:
    """The whole batch, halved until its activations fit."""
    rows = trainer.prepare(batch, epoch).rows
    if not rows:
        return len(batch)  # words are learnt without the language model, whose activations need the room
    nodes = max(len(row.codes) for row in rows) * len(rows) / len(batch)
    language = trainer.model.language
    lowest = min(trainer.adapter.at_layers, default=0)
    config = language.model.config
    inner = getattr(config, "intermediate_size", None) or 4 * language.width
    # Per node and layer: residuals, norms, projections, the feed-forward, one row of attention.
    floats = 10 * language.width + 4 * inner + 3 * config.num_attention_heads * nodes
    needed = 4 * floats * nodes * (language.num_layers - lowest)
    micro = len(batch)
    while micro > 1 and micro * needed > SHARE * free_memory(trainer.accelerator.device):
        micro = -(-micro // 2)
    return micro


def _batches(trainer: Trainer) -> tuple[int, list[Group], list[Group]]:
    """The epoch, and what this process reads of its next batch and of the one that tells most."""
    config, groups = trainer.config, trainer.groups
    by_length = config.fast.length_groups
    epoch, first = next(batches_from(groups, config.batch, config.seed, trainer.step, by_length))

    def weight(batch: list[int]) -> int:
        """What a batch takes, padded to its longest row."""
        return len(batch) * max(told_length(groups[i], config.seed, epoch) for i in batch)

    def share(batch: list[int]) -> list[Group]:
        return trainer.processes.mine([groups[i] for i in batch]) or [groups[batch[0]]]

    heaviest = max(epoch_batches(groups, config.batch, config.seed, epoch, by_length), key=weight)
    return epoch, share(first), share(heaviest)


def _trial(trainer: Trainer, batch: list[Group], epoch: int) -> float:
    """Seconds of a forward and backward pass over a batch."""
    began = time.perf_counter()
    for begin in range(0, len(batch), trainer.micro):
        trainer.backward(trainer.prepare(batch[begin : begin + trainer.micro], epoch), 1.0)
    return time.perf_counter() - began
