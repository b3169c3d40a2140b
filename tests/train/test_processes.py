"""Two processes (gloo) learn what one learns with the same batch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.parametrize(
    ("objective", "adapter", "batch"),
    [
        # 12 pictures by fives: the last batch of an epoch has two, and then three batches are odd.
        ("recipe", "flamingo", 5),
        ("recipe", "qformer", 5),
        # 10 pictures by threes: the last batch has one, and a process without a picture.
        ("preferring", "flamingo", 3),
    ],
)
def test_two_processes_give_the_losses_of_one(
    request: pytest.FixtureRequest, run: Any, tmp_path: Path, objective: str, adapter: str, batch: int
) -> None:
    recipe = request.getfixturevalue(objective)
    keys = {"steps": 8, "batch": batch, "save_every": 3}
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
    shutil.rmtree(tmp_path / "cut" / "state" / "step-00000006")
    again = run(config, 2)
    assert again["losses"] == whole["losses"][3:]
    assert again["weights"] == whole["weights"]


def test_two_processes_on_shards(recipe: Any, run: Any, write_shards: Any, tmp_path: Path) -> None:
    """Each has its own share; both go on with the very next pictures of theirs, and stay one."""
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


@pytest.mark.timeout(120)
def test_a_signal_to_one_process_ends_both_after_one_step(recipe: Any, run: Any, tmp_path: Path) -> None:
    config = recipe(out=str(tmp_path / "two"), steps=8, batch=4, save_every=100)
    two = run(config, 2, VLM_TEST_SIGNAL="3")
    assert len(two["losses"]) == 3
    assert two["weights"][0] == two["weights"][1]
    assert [path.name for path in (tmp_path / "two" / "state").glob("step-*")] == ["step-00000003"]


def test_more_processes_go_on_with_a_run(recipe: Any, run: Any, tmp_path: Path) -> None:
    keys = {"out": str(tmp_path / "out"), "batch": 4, "save_every": 3}
    whole = run(recipe(steps=6, **keys), 1)
    shutil.rmtree(tmp_path / "out" / "state" / "step-00000006")
    two = run(recipe(steps=6, **keys), 2)
    assert two["losses"] == pytest.approx(whole["losses"][3:], abs=1e-5)
    assert two["weights"][0] == two["weights"][1]


def test_processes_that_find_different_states_do_not_go_on(recipe: Any, run: Any, tmp_path: Path) -> None:
    config = recipe(out=str(tmp_path / "out"), batch=4, save_every=2)
    run(config, 2, VLM_TEST_APART="1")  # each on a disk of its own, and the first one alone saves
    with pytest.raises(AssertionError, match="must lie on a disk that all share"):
        run(config, 2, VLM_TEST_APART="1")
