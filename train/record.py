"""What a run leaves for people: log.jsonl, run.json, curve.png, events of the trackers.

A run that goes on after an interruption first drops what the log says of steps after its last state.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator

from vlm import __version__
from vlm.config import flat, to_dict
from vlm.errors import ConfigError, DataError
from vlm.train.config import TrainConfig
from vlm.train.curve import draw_curve
from vlm.train.screen import Screen

if TYPE_CHECKING:
    from vlm.data.collate import Group
    from vlm.train.loop import Step

LOG = "log.jsonl"
RUN = "run.json"
DEV = "dev.json"
CURVE = "curve.png"
SKIPPED = "skipped.jsonl"
RISK = "risk.png"
REDRAW = 60.0
"""Seconds between two drawings of the curve while a run goes on."""


def read_log(out: Path) -> list[dict[str, Any]]:
    """The lines of a run's log, oldest first; a line that was cut short is left out."""
    path = out / LOG
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text("utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def trim_log(out: Path, step: int) -> None:
    """Leaves the lines up to `step`, once each."""
    rows = {row["step"]: row for row in read_log(out) if row["step"] <= step}
    content = "".join(json.dumps(rows[number]) + "\n" for number in sorted(rows))
    partial = out / f".{LOG}.partial"
    partial.write_text(content, encoding="utf-8")
    os.replace(partial, out / LOG)


def note_skipped(out: Path, step: int, loss: float, norm: float, groups: Sequence[Group]) -> None:
    """Which samples a skipped step held; written through, as such runs often end badly."""
    names = [
        {"picture": group.id, "ids": [pair.example.id for pairs in group.by_source for pair in pairs]}
        for group in groups
    ]
    line = {"step": step, "loss": str(loss), "norm": str(norm), "samples": names}
    out.mkdir(parents=True, exist_ok=True)
    with open(out / SKIPPED, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


class Record:
    """Writes down a run, on its main process.

    Args:
        start: the step that the run continues after.
    """

    def __init__(
        self, config: TrainConfig, accelerator: Accelerator, screen: Screen, start: int, facts: dict[str, Any]
    ) -> None:
        self.config, self.accelerator, self.screen = config, accelerator, screen
        self.out = Path(config.out)
        self.facts = facts
        self.drawn = time.time()
        if accelerator.is_main_process:
            self.out.mkdir(parents=True, exist_ok=True)
            trim_log(self.out, start)
            self._log = open(self.out / LOG, "a", encoding="utf-8")  # noqa: SIM115 (closed by `close`)
        self._start_trackers(start)

    def _start_trackers(self, start: int) -> None:
        chosen = list(self.config.trackers)
        settings = {"tensorboard": {"purge_step": start + 1}} if start and "tensorboard" in chosen else {}
        try:
            keys = {key: str(value) for key, value in flat(to_dict(self.config)).items()}
            self.accelerator.init_trackers("events", config=keys, init_kwargs=settings)
        except ModuleNotFoundError as missing:
            raise ConfigError(f"trackers={chosen} needs the package {missing.name}") from missing

    def __call__(self, step: Step) -> None:
        """Takes down one step."""
        row = asdict(step)
        if not math.isfinite(step.loss) or not math.isfinite(step.norm):
            row |= {"loss": None, "norm": None}  # JSON has no NaN
            self.screen.say(f"step {step.step}: no finite loss; skipped ({SKIPPED} names the samples)")
        self._log.write(json.dumps(row) + "\n")
        self._log.flush()
        config = self.config
        if step.step % config.log_every == 0 or step.step in (1, config.steps):
            values = {"loss": step.loss, "learning rate": step.lr, "gradient norm": step.norm}
            self.accelerator.log(values | step.numbers, step=step.step)
        note = f"loss {step.loss:.3f}  lr {step.lr:.1e}  {step.seconds:.2f} s/step"
        self.screen.progress("training", step.step, config.steps, note)
        if step.step % config.save_every == 0 and time.time() > self.drawn + REDRAW:
            self.draw()

    def draw(self) -> None:
        """Draws the curve anew from the log."""
        self.drawn = time.time()
        draw_curve(read_log(self.out), self.out / CURVE, self.out.name)

    def close(self, **facts: Any) -> None:
        """Writes run.json and the curve."""
        if self.accelerator.is_main_process:
            self.facts |= facts
            self.write_facts()
            self.draw()
            self._log.close()
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def write_facts(self) -> None:
        """What the model card is filled from."""
        partial = self.out / f".{RUN}.partial"
        partial.write_text(json.dumps(self.facts, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, self.out / RUN)


def read_dev(out: Path) -> dict[str, Any] | None:
    """What a finished run measured on the pictures that it set aside; None where there is nothing yet.

    Raises:
        DataError: the file is damaged.
    """
    path = out / DEV
    if not path.is_file():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
        found["loss"] = float(found["loss"])
        found["recipe"] = dict(found["recipe"])
    except (OSError, ValueError, TypeError, KeyError) as problem:
        raise DataError(f"{path} cannot be read: {problem}") from problem
    return found


def machine() -> dict[str, Any]:
    """Where a run was made."""
    import torch
    import transformers

    return {
        "vlm": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
