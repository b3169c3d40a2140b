"""Two processes (gloo) learn what one learns with the same batch."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlm.config import to_dict

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).parent / "two.py"


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`run(config, processes)`: the losses, rewards and weights of a run by so many processes."""

    def start(config: Any, processes: int) -> dict[str, Any]:
        import yaml

        recipe, out = tmp_path / f"{processes}.yaml", tmp_path / f"{processes}.json"
        recipe.write_text(yaml.safe_dump(to_dict(config)))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        children = []
        for rank in range(processes):
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
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


@pytest.mark.parametrize("adapter", ["flamingo", "qformer"])
def test_two_processes_give_the_losses_of_one(recipe: Any, run: Any, tmp_path: Path, adapter: str) -> None:
    # 12 pictures by fives: the last batch of an epoch has two, and then three batches are odd.
    keys = {"steps": 8, "batch": 5, "save_every": 3}
    one = run(recipe(adapter, out=str(tmp_path / "one"), **keys), 1)
    two = run(recipe(adapter, out=str(tmp_path / "two"), **keys), 2)
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-5)
    assert len(two["losses"]) == 8
    assert two["weights"][0] == two["weights"][1]


def test_self_critical_steps_of_two_processes(recipe: Any, run: Any, tmp_path: Path) -> None:
    """Each samples its own captions, so losses differ from one process's; the weights stay one."""
    keys = {"steps": 4, "batch": 3, "objective": "cider", "samples": 2}
    two = run(recipe(out=str(tmp_path / "two"), **keys), 2)
    assert two["weights"][0] == two["weights"][1]
    assert all(abs(loss) < 100 for loss in two["losses"])
    assert all(0 <= reward <= 10 for reward in two["rewards"])


def test_two_processes_go_on_where_they_stopped(recipe: Any, run: Any, tmp_path: Path) -> None:
    keys = {"steps": 6, "batch": 4, "save_every": 3, "sizes": {"dropout": 0.2}}
    whole = run(recipe(out=str(tmp_path / "whole"), **keys), 2)
    config = recipe(out=str(tmp_path / "cut"), **keys)
    run(config, 2)
    import shutil

    shutil.rmtree(tmp_path / "cut" / "state" / "step-00000006")
    again = run(config, 2)
    assert again["losses"] == whole["losses"][3:]
    assert again["weights"] == whole["weights"]


def test_two_processes_on_shards(recipe: Any, run: Any, write_shards: Any, tmp_path: Path) -> None:
    """Each has its own share; both go on with the very next pictures of theirs, and stay one."""
    import shutil

    from vlm.train.config import SourceConfig

    write_shards(tmp_path / "shards", [5, 2, 4])
    keys = {"stream": True, "sources": (SourceConfig(),), "data": str(tmp_path / "shards")}
    keys |= {"steps": 6, "batch": 3, "save_every": 2, "keep": 3}
    whole = run(recipe(out=str(tmp_path / "whole"), **keys), 2)
    assert whole["weights"][0] == whole["weights"][1]
    config = recipe(out=str(tmp_path / "cut"), **keys)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for step in ("00000004", "00000006"):
        shutil.rmtree(tmp_path / "cut" / "state" / f"step-{step}")
    state = json.loads((tmp_path / "cut" / "state" / "step-00000002" / "state.json").read_text())
    assert len(state["extra"]["feeds"]) == 2
    again = run(config, 2)
    assert again["losses"] == whole["losses"][2:]
    assert again["weights"] == whole["weights"]
