"""A run that is killed with -9 at many places, each time going on from what it saved.

It is a program of its own, so that it can fork: torch is loaded once, and no test's threads are in the way.

    python killed.py RECIPE.yaml steps 1 2 3 ...    killed right after each of these steps, in turn
    python killed.py RECIPE.yaml calls 0 1 2 ...    killed before the n-th file call of a save, in turn

Every child continues the same run; the last one, unharmed, ends it.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import traceback

import torch

from vlm.train import state
from vlm.train.recipe import read_recipe
from vlm.train.record import Record
from vlm.train.run import train


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_after_step(number: int) -> None:
    """Dies once step `number` is made and logged."""
    honest = Record.__call__

    def report(self: Record, step: object) -> None:
        honest(self, step)
        if getattr(step, "step") >= number:  # noqa: B009
            self._log.flush()
            die()

    Record.__call__ = report


def die_before_call(number: int) -> None:
    """Dies in the second save, before the `number`-th of its calls that change files."""
    saves, calls = 0, 0
    save = state.save_state

    def counted(name: str) -> None:
        honest = getattr(os, name)

        def call(*args: object, **kwargs: object) -> object:
            nonlocal calls
            if saves == 2:
                if calls == number:
                    die()
                calls += 1
            return honest(*args, **kwargs)

        setattr(state.os, name, call)

    def watched(*args: object, **kwargs: object) -> object:
        nonlocal saves
        saves += 1
        return save(*args, **kwargs)

    for name in ("fsync", "replace", "rename", "unlink", "rmdir", "mkdir"):
        counted(name)
    state.save_state = watched


def child(recipe: str, kind: str, number: int | None) -> int:
    """Forks a run; returns how it ended: 0, or the signal that killed it as a negative number."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            if number is not None:
                (die_after_step if kind == "steps" else die_before_call)(number)
            code = 0 if train(read_recipe(recipe), offline=True, device="cpu") else 3
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    torch.set_num_threads(1)
    # What every child would otherwise import for itself.
    for module in ("timm", "transformers", "transformers.models.llama.modeling_llama", "matplotlib.figure"):
        importlib.import_module(module)
    recipe, kind, *numbers = sys.argv[1:]
    for number in map(int, numbers):
        print("ended", number, child(recipe, kind, number), flush=True)
    print("ended", "-", child(recipe, kind, None), flush=True)
