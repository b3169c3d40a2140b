"""Adapters to the hub and back, over HTTP; and from the hub's cache."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlm import weights_main
from vlm.checkpoint import adapter_folder, save_adapter
from vlm.errors import WeightsError
from vlm.weights_hub import fetch_adapter
from vlm.weights_push import RUN_FILES, push

ROOT = Path(__file__).resolve().parents[2]
READER = "hf_reader"
PUSHED = {"adapter.safetensors", "config.json", "README.md", "run.json", "curve.png", "risk.png"}


@pytest.fixture
def adapter(make_tiny: Callable[..., Any], tmp_path: Path) -> Path:
    """The folder of a run: an adapter, its card, and what must stay at home."""
    folder = tmp_path / "runs" / "mine"
    save_adapter(make_tiny(), folder, card="---\nlicense: apache-2.0\n---\n\n# Mine\n")
    (folder / "run.json").write_text('{"steps_done": 6}\n')
    for name in ("curve.png", "risk.png"):
        (folder / name).write_bytes(b"\x89PNG\r\n" + bytes(range(256)))
    for name in ("state/step-00000006/state.safetensors", "events/run.1", "features/data.mdb", "log.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"not for others")
    return folder


def refused(*args: Any, **keys: Any) -> str:
    with pytest.raises(WeightsError) as caught:
        push(*args, **keys)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- there and back -----------------------------------------------------------------------------------


def test_what_is_pushed_is_what_is_loaded(
    hub: Any, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert weights_main.main(["push", str(adapter), "org/mine", "--message", "First of all"]) == 0
    repository = hub.repositories["org/mine"]
    (sha,) = repository.trees
    assert set(repository.trees[sha]) == PUSHED
    assert repository.messages == ["First of all"]
    assert not repository.private
    printed = capsys.readouterr().out
    assert f"{hub.url}/org/mine/commit/{sha}" in printed
    assert f"--adapter org/mine@{sha}" in printed
    for name in ("org/mine", f"org/mine@{sha}"):
        found = adapter_folder(name)
        for file in ("adapter.safetensors", "config.json", "README.md"):
            assert (found / file).read_bytes() == (adapter / file).read_bytes()
    # Now it is in the cache: nobody needs the hub.
    hub.asked.clear()
    assert fetch_adapter("org/mine", offline=True).name == sha
    assert adapter_folder("org/mine").name == sha
    assert hub.asked == []


def test_the_whole_way_from_the_command_line(
    hub: Any, adapter: Path, tmp_path: Path, draw: Callable[..., Any]
) -> None:
    """A process of its own with HF_ENDPOINT: the pushed adapter answers as the local one does."""
    draw(3).save(tmp_path / "picture.png")
    code = """
import sys
from vlm.cli import main
folder, picture = sys.argv[1:]
assert main(["weights", "push", folder, "org/answers", "--private"]) == 0
from vlm import VLM
for name in (folder, "org/answers"):
    answer = VLM.from_pretrained(name).ask([picture], "What is this?", max_new_tokens=5)
    print(repr((answer.text, answer.logprob)))
"""
    environment = {
        **{k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"},
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "home"),
        "VLM_CACHE": str(tmp_path / "vlm-cache"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code, str(adapter), str(tmp_path / "picture.png")],
        env=environment,
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    *_, local, loaded = done.stdout.splitlines()
    assert local == loaded
    assert hub.repositories["org/answers"].private


def test_a_later_push_is_another_commit_and_an_equal_one_is_none(hub: Any, adapter: Path) -> None:
    first = push(adapter, "org/mine")
    assert push(adapter, "org/mine").commit == first.commit
    (adapter / "run.json").write_text("{}")
    second = push(adapter, "org/mine")
    repository = hub.repositories["org/mine"]
    assert repository.messages == ["Adapter mine"] * 2
    assert repository.trees[first.commit]["run.json"] != repository.trees[second.commit]["run.json"] == b"{}"
    # The weights were there already, and are not sent again.
    weights = [repository.trees[pushed.commit]["adapter.safetensors"] for pushed in (first, second)]
    assert weights[0] is weights[1]


def test_a_branch(hub: Any, adapter: Path) -> None:
    push(adapter, "org/mine")
    (adapter / "README.md").write_text("---\nlicense: mit\n---\n")
    push(adapter, "org/mine", revision="try/two")
    push(adapter, "org/mine", revision="try/two")
    assert b"mit" in (fetch_adapter("org/mine@try/two") / "README.md").read_bytes()
    assert b"apache" in (adapter_folder("org/mine") / "README.md").read_bytes()
    assert adapter_folder("org/mine@try/two") == fetch_adapter("org/mine@try/two", offline=True)


def test_names_are_those_of_a_run() -> None:
    from vlm.train.record import CURVE, RISK, RUN

    assert RUN_FILES == [RUN, CURVE, RISK]


# --- what can be wrong --------------------------------------------------------------------------------


def test_a_folder_that_is_no_adapter(hub: Any, adapter: Path, tmp_path: Path) -> None:
    assert "is no folder" in refused(tmp_path / "nowhere", "org/mine")
    assert "adapter.safetensors is missing" in refused(adapter / "state", "org/mine")
    content = (adapter / "adapter.safetensors").read_bytes()
    (adapter / "adapter.safetensors").write_bytes(content[:100])
    assert "cannot be read" in refused(adapter, "org/mine")
    (adapter / "adapter.safetensors").write_bytes(content)
    (adapter / "config.json").write_text("{}")
    assert "is not of format 1" in refused(adapter, "org/mine")
    assert hub.asked == []


@pytest.mark.parametrize("name", ["mine", "a/b/c", "org/mine@main", "", "../mine/x"])
def test_names_that_are_none(hub: Any, adapter: Path, name: str) -> None:
    assert "not of the form ORG/NAME" in refused(adapter, name)
    assert hub.asked == []


def test_who_pushes(hub: Any, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setenv("HF_TOKEN", READER)
    assert "could not be pushed to org/mine: 403" in refused(adapter, "org/mine")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    assert "set HF_TOKEN" in refused(adapter, "org/mine")
    assert hub.repositories == {}


def test_private_means_private(hub: Any, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push(adapter, "org/public")
    (adapter / "run.json").write_text('{"secret": true}')
    assert "is public: nothing is pushed" in refused(adapter, "org/public", private=True)
    assert len(hub.repositories["org/public"].trees) == 1
    push(adapter, "org/own", private=True)
    push(adapter, "org/own", private=True)
    assert fetch_adapter("org/own").is_dir()
    monkeypatch.delenv("HF_TOKEN")
    shutil.rmtree(os.path.dirname(fetch_adapter("org/own").parent))
    with pytest.raises(WeightsError, match="could not be fetched"):
        fetch_adapter("org/own")


def test_no_network_and_offline(hub: Any, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    assert "the network is off" in refused(adapter, "org/mine", offline=True)
    assert hub.asked == []
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    message = refused(adapter, "org/mine")
    assert "could not be pushed to org/mine: " in message
    assert "onnect" in message
    with pytest.raises(WeightsError, match="could not be fetched"):
        fetch_adapter("org/mine")


def test_a_card_that_the_hub_refuses(hub: Any, adapter: Path) -> None:
    (adapter / "README.md").write_text("---\nlicense: [\n---\n")
    assert "Invalid metadata in README.md" in refused(adapter, "org/mine")
    assert hub.repositories["org/mine"].trees == {}


def test_repositories_without_an_adapter(hub: Any) -> None:
    with pytest.raises(WeightsError, match="org/none could not be fetched"):
        fetch_adapter("org/none")
    hub.hold("org/other", {"config.json": b"{}", "model.safetensors": b"x"})
    with pytest.raises(WeightsError, match="org/other holds no adapter: adapter.safetensors is missing"):
        fetch_adapter("org/other")
    with pytest.raises(WeightsError, match="could not be fetched"):
        fetch_adapter("org/other@gone")


# --- the cache as others have left it -----------------------------------------------------------------


def test_an_adapter_in_the_hubs_cache(hub: Any, adapter: Path, tmp_path: Path) -> None:
    """Files named by hash, a snapshot of links to them, and a branch that names the snapshot."""
    folder = tmp_path / "hub-cache" / "models--org--cached"
    sha = "c" * 40
    snapshot = folder / "snapshots" / sha
    for part in (snapshot, folder / "blobs", folder / "refs"):
        part.mkdir(parents=True)
    (folder / "refs" / "main").write_text(sha)
    for name in ("adapter.safetensors", "config.json", "README.md"):
        blob = folder / "blobs" / hashlib.sha256((adapter / name).read_bytes()).hexdigest()
        shutil.copy(adapter / name, blob)
        (snapshot / name).symlink_to(os.path.relpath(blob, snapshot))
    for name in ("org/cached", "org/cached@main", f"org/cached@{sha}"):
        assert adapter_folder(name, offline=True) == snapshot
    with pytest.raises(WeightsError, match="the network is off"):
        adapter_folder("org/cached@other", offline=True)
    assert hub.asked == []
    (snapshot / "config.json").unlink()
    with pytest.raises(WeightsError, match=r"holds no adapter: config.json is missing"):
        adapter_folder("org/cached", offline=True)
