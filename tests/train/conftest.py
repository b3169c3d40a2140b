"""Tiny runs: a model of a few thousand parameters on drawn shapes, in a second or two."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from vlm.features import FeatureCache
    from vlm.model import VLM
    from vlm.train.config import TrainConfig
    from vlm.train.loop import Step, Trainer

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).parent / "two.py"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def train_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A feature cache that the tests of training share."""
    return tmp_path_factory.mktemp("train-cache")


@pytest.fixture
def recipe(
    tiny_config: Callable[..., Any],
    train_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., TrainConfig]:
    """`recipe("flamingo" | "qformer", sizes={...}, **keys)`: a recipe of 6 steps over 12 drawn pictures."""
    monkeypatch.setenv("VLM_CACHE", str(train_cache / "weights"))

    def make(
        adapter: str = "flamingo", *, family: str = "llama", sizes: dict[str, Any] | None = None, **keys: Any
    ) -> TrainConfig:
        from vlm.train.config import OptimConfig, SourceConfig, TrainConfig

        config = TrainConfig(
            model=tiny_config(adapter, family, **(sizes or {})),
            sources=(SourceConfig(name="shapes", limit=12, per_image=3),),
            out=str(tmp_path / "out"),
            steps=6,
            batch=4,
            optim=OptimConfig(lr=3e-3, warmup=2),
            save_every=2,
            log_every=1,
            trackers=(),
            feature_cache=str(train_cache / "features"),
        )
        return replace(config, **keys)

    return make


@pytest.fixture
def begin(
    make_tiny: Callable[..., VLM], tiny_config: Callable[..., Any], tmp_path: Path
) -> Callable[..., Path]:
    """`begin("flamingo", **sizes)`: the folder of an adapter to start from, with dropout."""
    from vlm.checkpoint import save_adapter
    from vlm.config import HintsConfig

    def make(adapter: str = "flamingo", hints: int = 0, **sizes: Any) -> Path:
        model = make_tiny(adapter, **{"dropout": 0.3, **sizes})
        model.config = replace(model.config, hints=HintsConfig(count=hints, least=0.0))
        save_adapter(model, tmp_path / "start")
        return tmp_path / "start"

    return make


@pytest.fixture
def pairs_file(tmp_path: Path, draw: Callable[..., Any]) -> Callable[..., Path]:
    """`pairs_file(count, chosen, rejected)`: so many pictures with a pair each, some with two."""

    def make(count: int = 10, chosen: str = "a dog", rejected: str = "the man") -> Path:
        folder = tmp_path / "pairs"
        folder.mkdir(exist_ok=True)
        lines = []
        for number in range(count):
            draw(number).save(folder / f"{number}.png")
            row = {"images": [f"{number}.png"], "question": "What is it?"}
            lines.append({**row, "chosen": chosen, "rejected": rejected, "id": f"p{number}"})
            if number % 3 == 0:
                lines.append({**row, "question": "Who?", "chosen": "the dog runs", "rejected": "no"})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "pairs.jsonl").write_text(text)
        return folder / "pairs.jsonl"

    return make


@pytest.fixture
def preferring(
    recipe: Callable[..., TrainConfig], begin: Callable[..., Path], pairs_file: Callable[..., Path]
) -> Callable[..., TrainConfig]:
    """`preferring(...)`: as `recipe`, of the objective `preference`, over 14 pairs of 10 pictures."""

    def make(
        adapter: str = "flamingo", hints: int = 0, sizes: dict[str, Any] | None = None, **keys: Any
    ) -> Any:
        start, data = begin(adapter, hints, **(sizes or {})), keys.pop("data", None) or pairs_file()
        defaults = {"objective": "preference", "sources": (), "start": str(start), "data": str(data)}
        return recipe(adapter, **(defaults | keys))

    return make


@pytest.fixture
def trainer_of() -> Iterator[Callable[[TrainConfig], tuple[Trainer, list[Step]]]]:
    """`trainer_of(config)`: a trainer ready to run, and the list that its steps are put into.

    One at a time can read features that are not in memory: the cache of the one before is closed.
    """
    caches: list[FeatureCache] = []

    def make(config: TrainConfig) -> tuple[Trainer, list[Step]]:
        import torch
        from accelerate import Accelerator

        from vlm.train.loop import Trainer
        from vlm.train.prepare import groups_of, read_sources
        from vlm.train.run import TRAINERS, make_model, prepare
        from vlm.train.screen import Screen

        accelerator = Accelerator(cpu=True)
        torch.manual_seed(config.seed)
        if caches:
            caches.pop().close()
        model = make_model(config, offline=True)
        assert model.features.cache is not None
        caches.append(model.features.cache)
        groups, store = prepare(
            config, model, groups_of(read_sources(config)), Screen(enabled=False), accelerator
        )
        steps: list[Step] = []
        kind = TRAINERS.get(config.objective, Trainer)
        return kind(model, config, groups, store, steps.append, accelerator), steps

    yield make
    for cache in caches:
        cache.close()


@pytest.fixture
def losses_of(
    trainer_of: Callable[[TrainConfig], tuple[Trainer, list[Step]]],
) -> Callable[[TrainConfig], list[float]]:
    """`losses_of(config)`: the loss of every step of a run that saves nothing."""

    def run(config: TrainConfig) -> list[float]:
        trainer, steps = trainer_of(config)
        trainer.learn(save=False)
        return [step.loss for step in steps]

    return run


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`run(config, processes, **environment)`: losses, rewards, weights of a run by so many processes."""

    def start(config: Any, processes: int, **variables: str) -> dict[str, Any]:
        import yaml

        from vlm.config import to_dict

        recipe, out = tmp_path / f"{processes}.yaml", tmp_path / f"{processes}.json"
        recipe.write_text(yaml.safe_dump(to_dict(config)))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        children = []
        for rank in range(processes):
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
            if processes > 1:
                environment |= {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(processes),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port,
                }
            children.append(
                subprocess.Popen(
                    [sys.executable, str(PROGRAM), str(recipe), str(out)],
                    env=environment,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        said = [child.communicate(timeout=200)[1] for child in children]
        assert [child.returncode for child in children] == [0] * processes, said
        found: dict[str, Any] = json.loads(out.read_text())
        return found

    return start
