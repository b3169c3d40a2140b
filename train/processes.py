"""What several processes of one run must agree on; with one process all of it costs nothing.

Only the adapter moves, so data parallelism is one sum of one flat gradient a step: no wrapper around the
model, and exactly the arithmetic of one process with the whole batch.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast
from torch import Tensor, nn

T = TypeVar("T")
TERMINATED = 143
"""Exit code of a run that a signal ended early: 128 + SIGTERM."""


class Processes:
    """This process among those of a run."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.rank: int = accelerator.process_index
        self.count: int = accelerator.num_processes
        self.main: bool = accelerator.is_main_process

    def mine(self, items: Sequence[T]) -> list[T]:
        """This process's share of a batch; none where the batch is smaller than the processes are many."""
        return list(items[self.rank :: self.count])

    def sums(self, numbers: Sequence[float]) -> list[float]:
        """Each number summed over the processes, in float64."""
        if self.count == 1:
            return [float(number) for number in numbers]
        kind = torch.float32 if self.accelerator.device.type == "mps" else torch.float64
        mine = torch.tensor([float(n) for n in numbers], dtype=kind, device=self.accelerator.device)
        found: list[float] = self.accelerator.reduce(mine, reduction="sum").tolist()
        return found

    def gather(self, numbers: Sequence[int]) -> list[list[int]]:
        """Every process's numbers, the first one's first."""
        mine = torch.tensor([list(numbers)], device=self.accelerator.device)
        found: list[list[int]] = (self.accelerator.gather(mine) if self.count > 1 else mine).tolist()
        return found

    def agree(self, number: int) -> bool:
        """Whether all processes have the same number."""
        return len({found for (found,) in self.gather([number])}) == 1

    def same_start(self, adapter: nn.Module) -> None:
        """Every process begins with the first one's weights."""
        if self.count > 1:
            with torch.no_grad():
                for tensor in (*adapter.parameters(), *adapter.buffers()):
                    tensor.copy_(broadcast(tensor.detach().clone()))

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Gradients summed over the processes, in one flat message."""
        if self.count == 1:
            return
        # A parameter that no process used keeps no gradient, and so does not decay.
        used = self.sums([p.grad is not None for p in parameters])
        parameters = [p for p, count in zip(parameters, used, strict=True) if count]
        parts = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        flat = self.accelerator.reduce(torch.cat([part.flatten() for part in parts]), reduction="sum")
        begin = 0
        for parameter in parameters:
            piece = flat[begin : begin + parameter.numel()]
            parameter.grad = piece.view_as(parameter).clone()
            begin += parameter.numel()

    def random_states(self) -> list[Tensor]:
        """The states of every process's random generator, the first one's first."""
        return self._everyones(torch.get_rng_state())

    def device_states(self) -> list[Tensor]:
        """The states of every process's generator on its GPU, the first one's first; none without a GPU."""
        if self.accelerator.device.type != "cuda":
            return []
        return self._everyones(torch.cuda.get_rng_state(self.accelerator.device))

    def _everyones(self, state: Tensor) -> list[Tensor]:
        if self.count == 1:
            return [state]
        gathered = self.accelerator.gather(state.to(self.accelerator.device)[None])
        return list(gathered.cpu())

    @contextmanager
    def listening(self, stop: Callable[[], None]) -> Iterator[None]:
        """SIGTERM and the first Ctrl-C call `stop`; a second Ctrl-C interrupts at once."""

        def handler(number: int, _frame: FrameType | None) -> None:
            if number == signal.SIGINT:
                signal.signal(signal.SIGINT, signal.default_int_handler)
            stop()

        with _handled(handler, signal.SIGTERM, signal.SIGINT):
            yield


@contextmanager
def leaving(out: str) -> Iterator[None]:
    """SIGTERM ends the process with a word where `listening` does not: while pictures are read, say.

    Nothing is to be saved there: what has been encoded is in the feature cache, the steps are in the states.
    """

    def handler(_number: int, _frame: FrameType | None) -> None:
        if PartialState().is_main_process:
            print(f"stopped; the same command goes on: {out}", file=sys.stderr, flush=True)
        raise SystemExit(TERMINATED)

    with _handled(handler, signal.SIGTERM):
        yield


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None], *numbers: signal.Signals) -> Iterator[None]:
    """These signals go to a handler meanwhile."""
    try:
        before = {number: signal.signal(number, handler) for number in numbers}
    except ValueError:  # not the main thread: nobody sends signals there
        yield
        return
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
