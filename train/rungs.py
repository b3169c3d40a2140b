"""Runs of one recipe at several sizes: what each is called, how it is made, and what it measured.

Every run makes as many passes over its pictures as the largest one does: steps and warm-up, those of the
stage of words too, are in proportion to its pictures. A run that has measured its loss (`dev.json`) is not
made again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vlm.config import ModelConfig, to_dict
from vlm.errors import ConfigError, DataError
from vlm.train.config import TrainConfig
from vlm.train.holdout import write_report
from vlm.train.mup import at_width


@dataclass(frozen=True)
class LadderConfig:
    """What `vlm train ladder` takes besides the recipe, as `ladder.KEY=VALUE`."""

    pictures: tuple[int, ...] = ()
    """Numbers of pictures to learn, rising."""
    widths: tuple[int, ...] = ()
    """Adapter widths, rising; heads and feed-forwards grow in proportion."""
    dev: int = 100
    """Pictures set aside, whose loss is measured; no run learns from them."""
    seeds: int = 1
    """Runs of each size but the largest, which is made once."""
    rates: int = 5
    """Learning rates of `--sweep`, a factor of 2 apart, around the recipe's."""

    def __post_init__(self) -> None:
        for name in ("pictures", "widths"):
            sizes = list(getattr(self, name))
            if sizes != sorted(set(sizes)) or any(size < 1 for size in sizes):
                raise ConfigError(f"ladder.{name} must be rising numbers of at least 1, not {sizes}")
        for name in ("dev", "seeds", "rates"):
            if getattr(self, name) < 1:
                raise ConfigError(f"ladder.{name} must be at least 1")


@dataclass(frozen=True)
class Rung:
    """One run of a ladder or a sweep.

    Attributes:
        pictures: that it learns; 0: all that there are.
        width: of its adapter; 0: what the recipe says, or starts from.
        trained: parameters; 0 where they are those of every run.
    """

    name: str
    config: TrainConfig = field(repr=False)
    pictures: int = 0
    width: int = 0
    trained: int = 0


def _check_recipe(config: TrainConfig, ladder: LadderConfig) -> None:
    """Raises:
    ConfigError: a recipe whose runs cannot be compared by their loss, or whose widths are given.
    """
    if config.objective != "likelihood":
        raise ConfigError(f"runs are compared by their loss: {config.objective} has another one")
    if ladder.widths and config.start:
        raise ConfigError(f"ladder.widths needs fresh adapters: start={config.start} has a width of its own")


def rung_config(
    config: TrainConfig, ladder: LadderConfig, name: str, *, pictures: int, width: int, seed: int = 0
) -> TrainConfig:
    """The recipe of one run, which leaves its adapter in `out/name`.

    Raises:
        ConfigError: a width that the adapter cannot have.
    """
    share = pictures / ladder.pictures[-1] if pictures else 1.0
    words = config.words
    return replace(
        config,
        out=str(Path(config.out) / name),
        model=at_width(config.model, width) if width else config.model,
        pictures=pictures or config.pictures,
        dev=ladder.dev,
        holdout=0.0,
        seed=config.seed + seed,
        steps=max(1, round(config.steps * share)),
        optim=replace(config.optim, warmup=round(config.optim.warmup * share)),
        words=replace(
            words,
            steps=max(1, round(words.steps * share)) if words.steps else 0,
            warmup=round(words.warmup * share),
        ),
    )


def parameters(config: ModelConfig, offline: bool) -> int:
    """Parameters of a configuration's adapter, from shapes alone."""
    from vlm.train.blueprint import blueprint

    return sum(parameter.numel() for parameter in blueprint(config, offline=offline).trainable())


def finished(rung: Rung) -> dict[str, Any] | None:
    """What a run has measured (`dev.json`); None where it is yet to be made or has stopped on the way.

    Raises:
        ConfigError: the folder holds a run of another recipe.
        DataError: what it measured is damaged.
    """
    from vlm.train.recipe import same_recipe
    from vlm.train.record import read_dev

    out = Path(rung.config.out)
    found = read_dev(out)
    if found is not None and not same_recipe(found["recipe"], rung.config):
        raise ConfigError(f"{out} is of another recipe: choose another out=FOLDER, or give --fresh")
    return found


@dataclass
class Workshop:
    """Makes runs, and keeps the report of what they have measured.

    Attributes:
        path: of the report, JSON.
        report: what it says, `recipe` and `ladder` first; `rungs` are the runs measured so far.
    """

    path: Path
    report: dict[str, Any]
    offline: bool
    fresh: bool
    device: str

    @property
    def main(self) -> bool:
        """Whether this is the first of several processes."""
        from accelerate import PartialState

        from vlm.train.run import on_cpu

        return bool(PartialState(cpu=on_cpu(self.device)).is_main_process)

    @classmethod
    def open(
        cls,
        name: str,
        config: TrainConfig,
        ladder: LadderConfig,
        *,
        offline: bool = False,
        fresh: bool = False,
        device: str = "auto",
    ) -> Workshop:
        """Goes on with the report of this name in the recipe's `out`, or begins one.

        Args:
            fresh: drop the report that is there, and what its runs measured.

        Raises:
            ConfigError: it is of another recipe or of other sizes, or the recipe's runs cannot be compared.
            DataError: it is damaged.
        """
        from vlm.train.recipe import identity, same_recipe

        _check_recipe(config, ladder)
        path = Path(config.out) / name
        head = {"recipe": identity(config), "ladder": to_dict(ladder)}
        shop = cls(path, {**head, "rungs": []}, offline, fresh, device)
        if fresh or not path.is_file():
            return shop
        try:
            report = json.loads(path.read_text("utf-8"))
            same = same_recipe(report["recipe"], config) and report["ladder"] == head["ladder"]
        except (OSError, ValueError, TypeError, KeyError) as problem:
            raise DataError(f"{path} cannot be read: {problem}") from problem
        if not same:
            raise ConfigError(f"{path} is of other sizes or another recipe: choose another out=, or --fresh")
        shop.report = {**report, "rungs": []}
        return shop

    def measure(self, rung: Rung) -> dict[str, Any] | None:
        """A run's row of the report, its loss in it; the run is made, or continued, unless it has finished.

        Returns:
            None where a signal has stopped it.

        Raises:
            DataError: its loss is of other pictures than that of the runs before.
        """
        found = None if self.fresh else finished(rung)
        if found is None:
            from vlm.train.run import train

            self.say(f"{rung.name}: {rung.config.steps} steps")
            if not train(rung.config, offline=self.offline, fresh=self.fresh, device=self.device):
                return None
            found = finished(rung)
            assert found is not None
        return {
            "name": rung.name,
            "pictures": rung.pictures or found["learnt"],
            "width": rung.width,
            "trained": found["trained"],
            "seed": rung.config.seed,
            "rate": rung.config.optim.lr,
            "steps": rung.config.steps,
            "loss": found["loss"],
            "measured_on": found["hash"],
        }

    def measure_all(self, rungs: Sequence[Rung]) -> bool:
        """Every run, each written down as soon as it is measured; whether none was stopped."""
        for rung in rungs:
            row = self.measure(rung)
            if row is None:
                return False
            if any(row["measured_on"] != other["measured_on"] for other in self.report["rungs"]):
                raise DataError(f"{rung.config.out} was measured on other pictures or answers than others")
            self.report["rungs"].append(row)
            self.write()
        return True

    def say(self, text: str) -> None:
        """A line for people on standard error."""
        if self.main:
            print(text, file=sys.stderr, flush=True)

    def write(self) -> None:
        """Writes the report, whole."""
        if self.main:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_report(self.path, self.report)
