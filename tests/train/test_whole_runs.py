"""Whole runs: what a command leaves that is repeated, goes on with other data, or is cut short."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlm.train.record import read_log


def test_a_command_repeated_after_its_end_leaves_the_adapter_alone(
    recipe: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from vlm.adapter_file import read_adapter, shrink
    from vlm.checkpoint import read_config, save_abstain
    from vlm.config import AbstainConfig
    from vlm.train.run import train

    config = recipe(steps=2, holdout=0.25)
    out = Path(config.out)
    assert train(config, offline=True)
    table = capsys.readouterr().out
    save_abstain(out, AbstainConfig(threshold=0.4, task="t", split="dev", target=0.8))
    shrink(out)
    (out / "README.md").write_text("mine")
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    assert train(config, offline=True)
    said = capsys.readouterr()
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    assert "has made all of its 2 steps and stays as it is" in said.err
    assert said.out in table
    assert train(config, offline=True, fresh=True)
    assert "abstain" not in read_config(out)
    (out / "adapter.safetensors").unlink()
    assert train(config, offline=True)
    assert read_adapter(out).tensors


def test_other_examples_set_aside_are_said_before_the_first_step(
    recipe: Any, tmp_path: Path, draw: Callable[..., Any]
) -> None:
    from vlm.errors import ConfigError
    from vlm.train.config import SourceConfig
    from vlm.train.run import train

    for part, first in (("train", 0), ("val", 20)):
        folder = tmp_path / "own" / part
        folder.mkdir(parents=True)
        rows = ["file_name,question,answer"]
        for number in range(first, first + 6):
            draw(number).save(folder / f"{number}.png")
            rows.append(f"{number}.png,What is it?,dog")
        (folder / "metadata.csv").write_text("\n".join(rows) + "\n")
    config = recipe(sources=(SourceConfig(),), data=str(tmp_path / "own"), holdout=0.2, steps=4)
    assert train(config, offline=True)
    for later in ("state/step-00000004", "holdout.json"):  # as if it had been interrupted
        place = Path(config.out) / later
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    with open(tmp_path / "own" / "val" / "metadata.csv", "a") as file:
        file.write("20.png,And this?,man\n")
    with pytest.raises(ConfigError, match="begun with other examples set aside"):
        train(config, offline=True)


def test_the_log_has_every_step_whatever_ends_the_run(recipe: Any, trainer_of: Any) -> None:
    from accelerate import Accelerator

    from vlm.train.record import Record
    from vlm.train.screen import Screen

    config = recipe(steps=5, log_every=10)
    trainer, _ = trainer_of(config)
    record = Record(config, Accelerator(cpu=True), Screen(enabled=False), 0, {})
    steps = []

    def report(step: Any) -> None:
        record(step)
        steps.append(len(read_log(Path(config.out))))  # what a kill would leave

    trainer.report = report
    trainer.learn(save=False)
    record.close()
    assert steps == [1, 2, 3, 4, 5]
