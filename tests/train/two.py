"""One of two processes of a run: `python two.py RECIPE.yaml OUT.json` under torch's launcher.

Writes the losses and a digest of the weights of every process. VLM_TEST_SIGNAL=N: the second process gets a
SIGTERM in the middle of step N. VLM_TEST_APART: every process has a disk of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor

from vlm.data.collate import Group
from vlm.train.loop import Step, Trainer
from vlm.train.prepare import groups_of, read_sources
from vlm.train.processes import Processes
from vlm.train.recipe import read_recipe
from vlm.train.run import TRAINERS, make_model, prepare
from vlm.train.screen import Screen
from vlm.train.streamed import Feed, StreamTrainer


def digest(trainer: Trainer) -> str:
    """SHA-256 of the adapter's weights."""
    total = hashlib.sha256()
    for value in trainer.adapter.state_dict().values():
        total.update(value.numpy().tobytes())
    return total.hexdigest()


def held(trainer: Trainer) -> float:
    """Share of the language model's layers that this process holds between steps."""
    parameters = [p for layer in trainer.model.language.layers for p in layer.parameters()]
    mine = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in parameters)
    return mine / sum(p.numel() for p in parameters)


def signal_in(step: int, trainer: Trainer) -> None:
    """The second process is told to end while the gradients of a step are summed."""
    plain = trainer.processes.sum_gradients

    def summed(parameters: Any) -> None:
        if trainer.step + 1 == step and trainer.processes.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        plain(parameters)

    trainer.processes.sum_gradients = summed  # type: ignore[method-assign]


def main(recipe: str, out: Path) -> None:
    """Trains; the first process writes what all of them have come to."""
    torch.set_num_threads(1)
    config = read_recipe(recipe)
    accelerator = Accelerator(cpu=True)
    if "VLM_TEST_APART" in os.environ:
        config = replace(config, out=f"{config.out}-{accelerator.process_index}")
    model = make_model(config, offline=True)
    if accelerator.process_index:
        with torch.no_grad():  # a process that begins elsewhere is put right by the first one
            for parameter in model.adapter.parameters():
                parameter.add_(1.0)
    steps: list[Step] = []
    trainer: Trainer
    if config.stream:
        feed = Feed(config, model, Processes(accelerator), offline=True)
        trainer = StreamTrainer(model, config, feed, steps.append, accelerator)
    else:
        groups: list[Group]
        groups, store = prepare(config, model, groups_of(read_sources(config)), Screen(False), accelerator)
        kind = TRAINERS.get(config.objective, Trainer)
        trainer = kind(model, config, groups, store, steps.append, accelerator)
    trainer.resume()
    if "VLM_TEST_SIGNAL" in os.environ:
        signal_in(int(os.environ["VLM_TEST_SIGNAL"]), trainer)
    trainer.run()
    found = torch.zeros(accelerator.num_processes, 32, dtype=torch.uint8)
    found[accelerator.process_index] = torch.tensor(list(bytes.fromhex(digest(trainer))), dtype=torch.uint8)
    found = accelerator.reduce(found.int(), reduction="sum")
    if accelerator.is_main_process:
        rewards = [step.numbers.get("reward") for step in steps]
        weights = [bytes(row.tolist()).hex() for row in found]
        losses = [step.loss for step in steps]
        out.write_text(
            json.dumps({"losses": losses, "rewards": rewards, "weights": weights, "held": held(trainer)})
        )
    accelerator.wait_for_everyone()  # a process that leaves while another still talks to it aborts
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
