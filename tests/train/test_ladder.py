"""Ladders: the same pictures measure every run, the largest is predicted before it is made, runs go on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from vlm.cli import main
from vlm.config import to_dict
from vlm.data.splits import image_key
from vlm.errors import ConfigError, DataError, UsageError
from vlm.train.config import OptimConfig, SourceConfig
from vlm.train.dev import apportion
from vlm.train.ladder import check_sizes, climb, predict, read_settings
from vlm.train.ladder import rungs as ladder_rungs
from vlm.train.loop import Trainer
from vlm.train.record import read_dev
from vlm.train.rungs import LadderConfig, rung_config
from vlm.train.sweep import compare, sweep

PICTURES = LadderConfig(pictures=(4, 8, 16, 24, 32), dev=6)
DRAWN = SourceConfig(name="shapes", limit=48, per_image=3)


@pytest.fixture
def short(recipe: Callable[..., Any]) -> Callable[..., Any]:
    """The tiny recipe, six steps on 32 of 48 drawn pictures."""

    def make(adapter: str = "flamingo", **keys: Any) -> Any:
        defaults: dict[str, Any] = {"sources": (DRAWN,), "flip": 0.0, "optim": OptimConfig(lr=3e-3, warmup=1)}
        return recipe(adapter, **(defaults | keys))

    return make


def keys_of(sources: Any) -> set[str]:
    return {image_key(image) for source in sources for e in source.examples for image in e.images}


# --- the pictures set aside ---------------------------------------------------------------------------


def test_nothing_changes_by_default(short: Any) -> None:
    config = short()
    sources, aside = apportion(config)
    assert aside == []
    assert len(keys_of(sources)) == 48


def test_no_run_learns_what_measures_it(short: Any) -> None:
    found = [apportion(short(dev=6, pictures=count)) for count in (4, 16, 42)]
    learnt = [keys_of(sources) for sources, _ in found]
    aside = [keys_of(held) for _, held in found]
    assert [len(keys) for keys in learnt] == [4, 16, 42]
    assert learnt[0] < learnt[1] < learnt[2]
    assert aside[0] == aside[1] == aside[2]
    assert len(aside[0]) == 6
    assert not aside[0] & learnt[2]


def test_another_seed_is_measured_by_the_same_pictures(short: Any) -> None:
    """Drawn pictures are others for another seed; those set aside stay what they were."""
    (one, aside), (other, same) = (apportion(short(dev=6, pictures=8, seed=seed)) for seed in (0, 3))
    assert [e.id for s in aside for e in s.examples] == [e.id for s in same for e in s.examples]
    assert keys_of(aside) == keys_of(same)
    assert keys_of(one) != keys_of(other)
    assert not keys_of(same) & keys_of(other)


def test_two_sources_of_one_picture_stay_together(short: Any) -> None:
    sources, aside = apportion(short(dev=6, pictures=8, sources=(DRAWN, replace(DRAWN, weight=2.0))))
    assert keys_of(sources[:1]) == keys_of(sources[1:])
    assert keys_of(aside[:1]) == keys_of(aside[1:])
    assert len(keys_of(sources)) == 8


def test_too_few_pictures_are_named(short: Any) -> None:
    with pytest.raises(DataError, match="pictures=43 are more pictures than the 42"):
        apportion(short(dev=6, pictures=43))
    with pytest.raises(DataError, match="dev=49"):
        apportion(short(dev=49))


def test_the_loss_is_the_mean_over_tokens(short: Any, trainer_of: Any) -> None:
    """The same as a training step's over the same rows, however they are cut up."""
    import torch

    from vlm.train.dev import dev_loss

    trainer, _ = trainer_of(short(sources=(replace(DRAWN, limit=11),)))
    trainer.model.eval()
    part = trainer.prepare(trainer.groups, 0)
    with torch.no_grad():
        total = trainer.loss(trainer.model.processor.batch(part.rows), part.features, 0.0)
    loss, weight = dev_loss(trainer, trainer.groups, trainer.store)
    # per_image is 3 of 4, drawn alike: seed and epoch are those of the pictures set aside
    assert weight == trainer.weight(part)
    assert loss == pytest.approx(float(total) / weight, abs=1e-5)


# --- sizes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "sizes are missing"),
        ({"pictures": [100]}, "sizes are missing"),
        ({"pictures": [100, 200, 400]}, "fewer than three rungs below"),
        ({"widths": [16, 32]}, "fewer than three rungs below"),
        ({"pictures": [100, 200, 400, 800]}, "3 runs below the largest.*ladder.seeds=2"),
        ({"pictures": [100, 200, 400], "widths": [16, 32]}, r"ladder.widths has 2 sizes"),
        ({"pictures": [100, 400, 200, 800]}, "rising"),
        ({"pictures": [100, 100, 200, 800]}, "rising"),
        ({"widths": [0, 16, 32, 48]}, "at least 1"),
        ({"pictures": [1, 2, 3, 4, 5], "dev": 0}, "ladder.dev"),
        ({"pictures": "many"}, "must be a list"),
        ({"steps": 3}, "unknown key 'ladder.steps'"),
    ],
    ids=str,
)
def test_sizes_that_make_no_ladder(values: dict[str, Any], said: str) -> None:
    settings = [f"ladder.{key}={json.dumps(value)}" for key, value in values.items()]
    with pytest.raises(UsageError, match=said):
        check_sizes(read_settings("smoke", settings)[1])


def test_sizes_that_make_one() -> None:
    assert check_sizes(PICTURES) == ("pictures",)
    assert check_sizes(LadderConfig(pictures=(1, 2, 3, 4), seeds=2)) == ("pictures",)
    assert check_sizes(LadderConfig(widths=(1, 2, 3, 4, 5), pictures=(7,))) == ("trained",)
    assert check_sizes(LadderConfig(widths=(1, 2, 3), pictures=(1, 2, 3))) == ("pictures", "trained")


def test_rungs_of_both_sizes(short: Any) -> None:
    ladder = LadderConfig(pictures=(8, 16, 32), widths=(16, 32, 64), seeds=2, dev=6)
    made = ladder_rungs(short(steps=40, optim=OptimConfig(warmup=4)), ladder, offline=True)
    assert len(made) == 17
    assert made[0].name == "p8-w16"
    assert made[1].name == "p8-w16-s1"
    assert made[-1].name == "p32-w64"
    assert len({rung.config.out for rung in made}) == 17
    last, first = made[-1].config, made[0].config
    assert (last.steps, last.optim.warmup, first.steps, first.optim.warmup) == (40, 4, 10, 1)
    assert last.model.flamingo.heads == 8
    assert last.steps * last.batch / 32 == first.steps * first.batch / 8
    assert {rung.config.seed for rung in made} == {0, 1}


@pytest.mark.parametrize("adapter", ["flamingo", "qformer"])
def test_parameters_are_counted_without_weights(short: Any, trainer_of: Any, adapter: str) -> None:
    ladder = LadderConfig(widths=(16, 32, 48, 64, 80), dev=6)
    config = short(adapter)
    rung = ladder_rungs(config, ladder, offline=True)[2]
    trainer, _ = trainer_of(rung_config(config, ladder, "w48", pictures=0, width=48))
    assert rung.trained == sum(p.numel() for p in trainer.adapter.parameters())


def test_recipes_whose_losses_cannot_be_compared(short: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cider"):
        climb(short(objective="cider"), PICTURES, offline=True)
    with pytest.raises(ConfigError, match="fresh adapters"):
        climb(short(start="default"), LadderConfig(widths=(16, 32, 48, 64, 80)), offline=True)
    with pytest.raises(DataError, match="pictures=100"):
        climb(short(), LadderConfig(pictures=(1, 2, 3, 4, 100), dev=6), offline=True)
    assert not (tmp_path / "out").exists()


# --- the whole ------------------------------------------------------------------------------------------


class Cut(BaseException):
    """What ends a process in the middle of a step."""


@dataclass
class Watched:
    """Every step that is begun: its run, its number, and whether a prediction was on disk by then.

    Attributes:
        cut: (run, step) that the process ends in.
    """

    steps: list[tuple[str, int, bool]] = field(default_factory=list)
    cut: tuple[str, int] | None = None

    def runs(self, *, predicted: bool) -> set[str]:
        return {name for name, _, said in self.steps if said == predicted}


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    seen = Watched()
    honest = Trainer.one_step

    def one_step(self: Any, *arguments: Any) -> Any:
        out = Path(self.config.out)
        if (out.name, self.step) == seen.cut:
            raise Cut
        report = out.parent / "ladder.json"
        predicted = report.is_file() and "prediction" in json.loads(report.read_text())
        seen.steps.append((out.name, self.step, predicted))
        return honest(self, *arguments)

    monkeypatch.setattr(Trainer, "one_step", one_step)
    return seen


def test_the_largest_run_is_predicted_before_it_is_made(
    short: Any, tmp_path: Path, watched: Watched, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(to_dict(short(save_every=100, steps=16))))
    settings = ["ladder.pictures=[4, 8, 16, 24, 32]", "ladder.dev=6", "--offline", "--device", "cpu"]
    assert main(["train", "ladder", str(path), *settings]) == 0
    out = tmp_path / "out"
    report = json.loads((out / "ladder.json").read_text())
    assert [row["name"] for row in report["rungs"]] == ["p4", "p8", "p16", "p24"]
    assert watched.runs(predicted=True) == {"p32"}
    assert watched.runs(predicted=False) == {"p4", "p8", "p16", "p24"}
    said, found = report["prediction"], report["measured"]
    assert said["before"] is True
    assert said["low"] <= said["loss"] <= said["high"]
    assert found["inside"] == (said["low"] <= found["loss"] <= said["high"])
    assert found["loss"] == json.loads((out / "p32" / "dev.json").read_text())["loss"]
    assert found["loss"] < report["rungs"][0]["loss"]
    assert (out / "ladder.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "p32" / "adapter.safetensors").is_file()
    shown = capsys.readouterr()
    assert "p32 will read" in shown.err
    assert "the 95% interval" in shown.out

    # Everything is there: nothing is trained again, and the prediction stays what was said.
    watched.steps.clear()
    assert main(["train", "ladder", str(path), *settings]) == 0
    assert watched.steps == []
    assert json.loads((out / "ladder.json").read_text()) == report
    # Other sizes are another ladder.
    assert main(["train", "ladder", str(path), "ladder.pictures=[4,8,16,24,30]", "ladder.dev=6"]) == 1
    assert "--fresh" in capsys.readouterr().err


@pytest.mark.parametrize("cut", [("p16", 3), ("p32", 9)], ids=str)
def test_a_ladder_that_is_killed_goes_on(
    short: Any, tmp_path: Path, watched: Watched, cut: tuple[str, int]
) -> None:
    config = short(save_every=1, steps=16)
    whole = climb(replace(config, out=str(tmp_path / "whole")), PICTURES, offline=True, device="cpu")
    unbroken, watched.steps = watched.steps, []
    watched.cut = cut
    with pytest.raises(Cut):
        climb(config, PICTURES, offline=True, device="cpu")
    assert read_dev(tmp_path / "out" / cut[0]) is None
    watched.cut = None
    report = climb(config, PICTURES, offline=True, device="cpu")
    assert watched.steps == unbroken  # each step of each run once, over both calls
    assert report is not None
    assert whole is not None
    assert [row["loss"] for row in report["rungs"]] == [row["loss"] for row in whole["rungs"]]
    assert report["prediction"] == whole["prediction"]
    assert report["measured"]["loss"] == whole["measured"]["loss"]


def test_a_damaged_report_is_named(short: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "ladder.json").write_text("{")
    with pytest.raises(DataError, match="ladder.json cannot be read"):
        climb(short(), PICTURES, offline=True, device="cpu")


def test_what_is_predicted_of_two_sizes(short: Any) -> None:
    """Losses of a known law on a grid: its corner is predicted, and the report holds the law."""
    ladder = LadderConfig(pictures=(8, 16, 32), widths=(16, 32, 64), dev=6)
    *lower, last = ladder_rungs(short(), ladder, offline=True)
    noise = [1e-3, -1e-3, 5e-4, 0.0, -5e-4, 1e-3, -1e-3, 0.0]
    rows = [
        {"pictures": r.pictures, "trained": r.trained, "loss": 1 + 8 / r.pictures + 60 * r.trained**-0.5 + n}
        for r, n in zip(lower, noise, strict=True)
    ]
    found = predict(rows, last, ("pictures", "trained"))
    said = found["prediction"]
    assert said["low"] <= 1 + 8 / 32 + 60 * last.trained**-0.5 <= said["high"]
    assert (said["pictures"], said["trained"]) == (32, last.trained)
    assert found["law"]["terms"][0]["exponent"]["value"] == pytest.approx(1.0, abs=0.15)
    assert json.loads(json.dumps(found)) == found


# --- learning rates -------------------------------------------------------------------------------------


def test_a_sweep_tries_every_rate_at_every_width(short: Any, tmp_path: Path) -> None:
    config = short(steps=3, sources=(replace(DRAWN, limit=16),), optim=OptimConfig(lr=4e-3, mup_base=16))
    ladder = LadderConfig(widths=(16, 32), rates=3, dev=4)
    report = sweep(config, ladder, offline=True, device="cpu")
    assert report is not None
    assert report == json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [found["width"] for found in report["widths"]] == [16, 32]
    assert all(found["rates"] == [2e-3, 4e-3, 8e-3] for found in report["widths"])
    assert len({row["loss"] for row in report["rungs"]}) == 6
    assert len({row["measured_on"] for row in report["rungs"]}) == 1
    assert (tmp_path / "out" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="another recipe"):
        sweep(replace(config, optim=OptimConfig(lr=4e-3)), ladder, offline=True, device="cpu")


def test_optima_are_compared() -> None:
    def row(width: float, rate: float, loss: float) -> dict[str, Any]:
        return {"width": width, "rate": rate, "loss": loss}

    rates = [1e-3, 2e-3, 4e-3, 8e-3, 16e-3]
    near = [row(w, r, abs(i - w) + s) for w in (1, 2) for i, r in enumerate(rates) for s in (0.0, 0.5)]
    found = compare(near, 1)
    assert [(f["best"], f["loss"], f["edge"]) for f in found["widths"]] == [
        (2e-3, 0.25, False),
        (4e-3, 0.25, False),
    ]
    assert (found["apart"], found["carries_over"]) == (1.0, True)
    far = compare([row(w, r, abs(i - 2 * w)) for w in (0.5, 1.5) for i, r in enumerate(rates)], 0)
    assert (far["apart"], far["carries_over"]) == (2.0, False)
    open_end = compare([row(w, r, abs(i - w)) for w in (0, 1) for i, r in enumerate(rates)], 0)
    assert [found["edge"] for found in open_end["widths"]] == [True, False]
    assert open_end["carries_over"] is None


def test_sweeps_that_compare_nothing(short: Any) -> None:
    with pytest.raises(ConfigError, match="widths"):
        sweep(short(), LadderConfig(widths=(16,)))
    with pytest.raises(ConfigError, match="one number of pictures"):
        sweep(short(), LadderConfig(widths=(16, 32), pictures=(8, 16)))
