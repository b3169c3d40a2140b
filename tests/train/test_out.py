"""The folder of a run: never somebody else's, and known to be writable before anything is encoded."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from vlm.errors import ConfigError, WeightsError
from vlm.train.run import open_out, train

if TYPE_CHECKING:
    from vlm.train.config import TrainConfig

Recipe = Callable[..., "TrainConfig"]


@pytest.fixture
def never_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No picture may be seen."""
    from vlm.features import Features

    def see(*_: object, **__: object) -> None:
        raise AssertionError("encoded")

    monkeypatch.setattr(Features, "see", see)


@pytest.mark.usefixtures("never_encoded")
@pytest.mark.parametrize("name", ["README.md", "config.json", "adapter.safetensors"])
def test_a_folder_of_something_else_is_left_alone(recipe: Recipe, tmp_path: Path, name: str) -> None:
    out = tmp_path / "project"
    out.mkdir()
    (out / name).write_text("precious")
    with pytest.raises(ConfigError, match=rf"holds {name} and no run of training"):
        train(recipe(out=str(out)), offline=True)
    assert [path.name for path in out.iterdir()] == [name]
    assert (out / name).read_text() == "precious"


@pytest.mark.usefixtures("never_encoded")
@pytest.mark.parametrize("place", ["file", "file/below", pytest.param("closed", marks=pytest.mark.skipif(
    os.geteuid() == 0, reason="root may write anywhere"))])  # fmt: skip
def test_a_folder_that_cannot_be_written_is_said_at_once(recipe: Recipe, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(ConfigError, match="cannot be written"):
        train(recipe(out=str(tmp_path / place)), offline=True)


@pytest.mark.usefixtures("never_encoded")
def test_the_name_of_an_adapter_that_ships_is_refused(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsError, match="daquar is the name of an adapter that ships"):
        train(recipe(out="daquar"), offline=True)
    open_out(recipe(out=str(tmp_path / "daquar")))


@pytest.mark.parametrize("name", ["state", "run.json", "words", "log.jsonl", "events", ".hidden"])
def test_a_run_of_its_own_or_an_empty_folder_is_taken(recipe: Recipe, tmp_path: Path, name: str) -> None:
    config = recipe(out=str(tmp_path / "new" / "deep"))
    open_out(config)
    (tmp_path / "new" / "deep" / name).mkdir()
    open_out(config)


def test_an_unknown_tracker_is_named(recipe: Recipe) -> None:
    with pytest.raises(ConfigError, match="trackers: nope is no tracker that is installed .*tensorboard"):
        open_out(replace(recipe(), trackers=("nope",)))
    open_out(replace(recipe(), trackers=("tensorboard",)))
