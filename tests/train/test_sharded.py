"""Two processes that hold half of the frozen layers each (FSDP2 over gloo) learn what one learns."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlm.config import to_dict
from vlm.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
"""What `accelerate launch --use_fsdp --fsdp_version 2` tells its processes."""


@pytest.mark.parametrize(
    ("adapter", "family", "keys"),
    [
        ("flamingo", "llama", {"micro": 2}),  # one process makes two passes where the other makes one
        ("qformer", "qwen2", {}),
        ("flamingo", "gpt2", {"precision": "bf16"}),
    ],
)
def test_half_the_layers_and_the_same_losses(
    recipe: Any, run: Any, tmp_path: Path, adapter: str, family: str, keys: dict[str, Any]
) -> None:
    # 12 pictures by fives: the last batch of an epoch has two.
    keys = {"family": family, "steps": 5, "batch": 5, "save_every": 5, **keys}
    one = run(recipe(adapter, out=str(tmp_path / "one"), **keys), 1)
    two = run(recipe(adapter, out=str(tmp_path / "two"), **keys), 2, **FSDP)
    assert one["held"] == 1
    assert 0.5 <= two["held"] < 0.56  # norms and biases are whole
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-5 if "precision" not in keys else 2e-2)
    assert two["weights"][0] == two["weights"][1]


def test_a_process_without_a_picture_keeps_step(recipe: Any, run: Any, tmp_path: Path) -> None:
    keys = {"steps": 3, "batch": 1}
    one = run(recipe(out=str(tmp_path / "one"), **keys), 1)
    two = run(recipe(out=str(tmp_path / "two"), **keys), 2, **FSDP)
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-5)


def test_states_are_those_of_whole_layers(recipe: Any, run: Any, tmp_path: Path) -> None:
    """A run goes on with divided layers to the bit, and with whole ones."""
    keys = {"steps": 6, "batch": 4, "save_every": 3, "sizes": {"dropout": 0.2}}
    whole = run(recipe(out=str(tmp_path / "whole"), **keys), 2, **FSDP)
    for name, variables in (("sharded", FSDP), ("plain", {})):
        config = recipe(out=str(tmp_path / name), **keys)
        shutil.copytree(tmp_path / "whole", tmp_path / name)
        shutil.rmtree(tmp_path / name / "state" / "step-00000006")
        again = run(config, 2, **variables)
        if variables:
            assert again["losses"] == whole["losses"][3:]
            assert again["weights"] == whole["weights"]
        assert again["losses"] == pytest.approx(whole["losses"][3:], abs=1e-5)


def test_the_launcher(recipe: Callable[..., Any], tmp_path: Path) -> None:
    """The command as people type it: preflight, training, card, and an adapter that loads."""
    import yaml

    from vlm.checkpoint import load_model

    config = recipe(out=str(tmp_path / "out"), steps=4, batch=3)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(to_dict(config)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "accelerate.commands.launch", "--use_fsdp", "--fsdp_version", "2"]
    command += ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    command += ["--dynamo_backend", "no", "--main_process_port", port]
    command += ["-m", "vlm", "train", str(tmp_path / "recipe.yaml"), "--offline", "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (facts["machine"]["processes"], facts["machine"]["sharded"], facts["steps_done"]) == (2, True, 4)
    assert "# Flamingo adapter" in (tmp_path / "out" / "README.md").read_text()
    assert load_model(tmp_path / "out", offline=True).adapter_name


def test_what_does_not_go_with_it(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from vlm.train.sharded import shard

    class Two:
        """An accelerator of two processes, as far as it is asked before anything is divided."""

        state, num_processes = None, 2

    two: Any = Two()
    model: Any = None
    assert not shard(model, recipe(), two)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(ConfigError, match="give --fsdp_version 2"):
        shard(model, recipe(), two)
    monkeypatch.setenv("FSDP_VERSION", "2")
    fast = recipe().fast
    for name, config in (
        ("objective=cider", recipe(objective="cider")),
        ("fast.lower_cache", recipe(fast=replace(fast, lower_cache=1))),
        ("fast.int8", recipe(fast=replace(fast, int8=True))),
    ):
        with pytest.raises(ConfigError, match=f"{name} does not go with FSDP"):
            shard(model, config, two)
    two.num_processes = 1
    assert not shard(model, recipe(), two)
