"""Training on shards: every process its own share, every picture once a lap, then on with the very next."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from vlm.errors import ConfigError, DataError, VLMError

if TYPE_CHECKING:
    from vlm.data.collate import Group
    from vlm.train.config import TrainConfig
    from vlm.train.streamed import StreamTrainer


class Rank:
    """What `Feed` asks of a process; the gradients of several are not at stake here."""

    def __init__(self, rank: int, count: int) -> None:
        from accelerate import Accelerator

        self.rank, self.count, self.accelerator = rank, count, Accelerator(cpu=True)


@pytest.fixture
def shards(tmp_path: Path, write_shards: Callable[..., list[Path]]) -> Path:
    """Eleven pictures in three shards."""
    write_shards(tmp_path / "shards", [5, 2, 4])
    return tmp_path / "shards"


@pytest.fixture
def streamed(recipe: Callable[..., TrainConfig], shards: Path) -> Callable[..., TrainConfig]:
    """`streamed(**keys)`: a recipe of 6 steps over the shards."""
    from vlm.train.config import SourceConfig

    def make(**keys: Any) -> TrainConfig:
        keys = {"stream": True, "sources": (SourceConfig(),), "data": str(shards), "batch": 3} | keys
        return recipe(**keys)

    return make


@pytest.fixture
def trainer_of_feed() -> Callable[..., tuple[StreamTrainer, list[Any]]]:
    """`trainer_of_feed(config)`: a trainer, and the list that its steps are put into."""

    def make(config: TrainConfig) -> tuple[StreamTrainer, list[Any]]:
        from accelerate import Accelerator

        from vlm.train.processes import Processes
        from vlm.train.run import make_model
        from vlm.train.streamed import Feed, StreamTrainer

        accelerator = Accelerator(cpu=True)
        model = make_model(config, offline=True)
        assert model.features.cache is not None
        model.features.cache.close()
        model.features.cache = None
        steps: list[Any] = []
        feed = Feed(config, model, Processes(accelerator), offline=True)
        return StreamTrainer(model, config, feed, steps.append, accelerator), steps

    return make


def told(groups: list[Group]) -> list[str]:
    return [pair.answer for group in groups for pairs in group.by_source for pair in pairs]


def laps_of(config: TrainConfig, rank: int, count: int, laps: int) -> list[list[str]]:
    """What one process learns in each of its first laps."""
    from vlm.train.run import make_model
    from vlm.train.streamed import Feed, StreamTrainer

    model = make_model(config, offline=True)
    feed = Feed(config, model, Rank(rank, count), offline=True)  # type: ignore[arg-type]
    trainer = StreamTrainer(model, config, feed, lambda _: None, Rank(0, 1).accelerator)
    seen: list[list[str]] = [[] for _ in range(laps)]
    for lap, groups in trainer.batches():
        if lap == laps:
            break
        seen[lap] += told(groups)
        assert len(groups) <= feed.size
    assert model.features.cache is not None
    model.features.cache.close()
    return seen


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_every_picture_once_a_lap(streamed: Any, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three shards for one to five processes, in windows smaller than a share."""
    from vlm.train import streamed as module

    monkeypatch.setattr(module, "BATCHES", 1)
    config = streamed(batch=5)
    everything = Counter(f"picture number {n}" for n in range(11))
    shares = [laps_of(config, rank, count, 2) for rank in range(count)]
    for lap in range(2):
        assert Counter(text for share in shares for text in share[lap]) == everything
    assert all(share[0] for share in shares)


def test_a_run_goes_on_with_the_very_next_picture(
    streamed: Any, trainer_of_feed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut in every place of a window: losses and pictures shown are those of the whole run, to the bit."""
    from vlm.train import streamed as module

    monkeypatch.setattr(module, "BATCHES", 2)
    config = streamed(out=str(tmp_path / "whole"), steps=7, save_every=1, keep=7)
    shown: list[list[str]] = []
    prepare = module.StreamTrainer.prepare

    def watched(self: StreamTrainer, groups: list[Group], epoch: int) -> Any:
        shown.append(told(list(groups)))
        return prepare(self, groups, epoch)

    monkeypatch.setattr(module.StreamTrainer, "prepare", watched)
    trainer, steps = trainer_of_feed(config)
    trainer.run()
    whole, losses = list(shown), [step.loss for step in steps]
    weights = {k: v.clone() for k, v in trainer.adapter.state_dict().items()}
    assert {step.epoch for step in steps} == {0, 1}
    for cut in range(1, 7):
        out = tmp_path / f"cut-{cut}"
        shutil.copytree(tmp_path / "whole", out)
        for later in range(cut + 1, 8):
            shutil.rmtree(out / "state" / f"step-{later:08d}")
        shown.clear()
        again, steps = trainer_of_feed(replace(config, out=str(out)))
        again.resume()
        again.run()
        assert [step.loss for step in steps] == losses[cut:]
        assert shown == whole[cut:]
        assert all(torch.equal(v, weights[k]) for k, v in again.adapter.state_dict().items())


def test_the_whole_command(streamed: Any, tmp_path: Path, shards: Path) -> None:
    from vlm.checkpoint import load_model
    from vlm.train.run import train

    config = streamed(out=str(tmp_path / "out"), steps=5)
    assert train(config, offline=True)
    facts = json.loads((tmp_path / "out" / "run.json").read_text())
    assert facts["streamed"] == {"rows": 22, "unusable": 0, "laps": 1}
    assert "22 rows read from shards" in (tmp_path / "out" / "README.md").read_text()
    assert load_model(tmp_path / "out", offline=True).adapter_name
    # The same shards elsewhere are the same data; others are not.
    shards.rename(tmp_path / "moved")
    assert train(replace(config, data=str(tmp_path / "moved"), out=str(tmp_path / "out")), offline=True)
    (tmp_path / "moved" / "train-001.tar").unlink()
    with pytest.raises(VLMError, match="was trained on other pictures or answers"):
        train(replace(config, data=str(tmp_path / "moved")), offline=True)


def test_what_a_stream_cannot_have(streamed: Any, recipe: Any, tmp_path: Path) -> None:
    from vlm.train.config import SourceConfig

    for keys in (
        {"objective": "cider"},
        {"sources": (SourceConfig(), SourceConfig())},
        {"sources": (SourceConfig(questions=True),)},
        {"holdout": 0.5},
    ):
        with pytest.raises(ConfigError, match="stream"):
            streamed(**keys)
    with pytest.raises(ConfigError, match="batch=1 leaves some of 2 processes nothing"):
        laps_of(streamed(batch=1), 0, 2, 1)
    with pytest.raises(DataError, match="cannot be streamed"):
        laps_of(streamed(data=str(tmp_path / "nowhere")), 0, 1, 1)
    with pytest.raises(DataError, match="the network is off"):
        laps_of(streamed(data="https://host/x-{0..1}.tar"), 0, 1, 1)


def test_unusable_rows_are_counted(streamed: Any, shards: Path) -> None:
    file = shards / "train-001.tar"
    content = file.read_bytes()
    file.write_bytes(content.replace(b"\x89PNG", b"\x00PNG", 1))
    with pytest.raises(DataError, match="1 of 11 rows cannot be used"):
        laps_of(streamed(), 0, 1, 1)


def test_rows_about_no_picture_are_counted_apart(
    streamed: Any, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are no bad rows, and a run that goes on counts on."""
    from vlm.train.run import train

    talk = [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]
    content = json.dumps({"conversations": talk}).encode()
    with tarfile.open(shards / "train-001.tar", "a") as tar:
        info = tarfile.TarInfo("text.json")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    config = streamed(out=str(tmp_path / "out"), steps=4)
    assert train(config, offline=True)
    assert "no picture: 1 rows left out" in capsys.readouterr().err
    facts = json.loads((tmp_path / "out" / "run.json").read_text())
    assert facts["streamed"] == {"rows": 11, "unusable": 0, "laps": 0}
    assert facts["without_picture"] == 1


def test_a_share_with_nothing_in_it(streamed: Any, write_shards: Any, tmp_path: Path) -> None:
    write_shards(tmp_path / "one", [1])
    config = streamed(data=str(tmp_path / "one"))
    shares = []
    for rank in range(2):
        try:
            shares.append(laps_of(config, rank, 2, 1))
        except DataError as problem:
            assert "finds nothing to learn in its share" in str(problem)
    assert shares == [[["picture number 0"]]]


def test_windows_of_any_size_are_held_where_there_is_no_cache(
    streamed: Any, trainer_of_feed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlm.train import prepare
    from vlm.train import streamed as module

    monkeypatch.setattr(prepare, "MEMORY", 1)  # a step's pictures are more than that
    monkeypatch.setattr(module, "MEMORY", 1)
    trainer, steps = trainer_of_feed(streamed(batch=4, steps=4))
    trainer.learn(save=False)
    assert len(steps) == 4
