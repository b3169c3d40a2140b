"""Other ids: folders, the Hugging Face cache, open_clip's files, their hashes; and what leads nowhere."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from helpers import ENCODER, LANGUAGE, one_line, other
from safetensors.torch import save_file

from vlm import weights_main
from vlm.weights import PINS, Resolved, frozen_hash, resolve


@pytest.mark.parametrize(
    ("model_id", "words"),
    [
        ("no-such-model", "there is no model 'no-such-model'"),
        ("", "there is no model ''"),
        ("a/b/c", "there is no model"),
        ("../nowhere", "there is no folder"),
        ("/nowhere/at/all", "there is no folder"),
        ("org/name", "the network is off"),
        ("org/name@main", "the network is off"),
        ("timm:org/name", "the network is off"),
        ("x" * 5000, "is no folder"),
        ("~nobody-here/model", "is no folder"),
        ("open_clip:ViT-B-32", "names no weights"),
        ("open_clip:ViT-B-32/missing.safetensors", "there is no file"),
    ],
)
def test_ids_that_lead_nowhere(model_id: str, words: str, cache: Path) -> None:
    assert words in one_line(lambda: resolve(model_id, offline=True))


def test_no_command_offers_the_other_project_of_our_name() -> None:
    for pin in PINS.values():
        assert "pip install " + "vlm" not in pin.pip


def test_local_folders(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    assert "no config.json" in one_line(lambda: resolve(str(tmp_path)))
    (tmp_path / "config.json").write_text("[1]")
    assert "no JSON object" in one_line(lambda: resolve(str(tmp_path)))
    (tmp_path / "config.json").write_text("{")
    assert "cannot be read" in one_line(lambda: resolve(str(tmp_path)))
    (tmp_path / "config.json").write_text("{}")
    assert "names neither" in one_line(lambda: resolve(str(tmp_path)))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    found = resolve(str(tmp_path))
    assert (found.kind, found.origin, found.path) == ("language", "folder", tmp_path)
    assert found.frozen_hash == frozen_hash({"a": torch.ones(2)})
    (tmp_path / "config.json").write_text('{"architecture": "resnet18"}')
    found = resolve(str(tmp_path))
    assert (found.kind, found.library, found.model) == ("encoder", "timm", "resnet18")
    assert resolve(f"timm:{tmp_path}").kind == "encoder"


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "no weights" in one_line(lambda: resolve(str(tmp_path)))
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert "a pickle can run code" in one_line(lambda: resolve(str(tmp_path)))
    (tmp_path / "clip.pt").write_bytes(b"x")
    assert "a pickle can run code" in one_line(lambda: resolve(f"open_clip:ViT-B-32/{tmp_path}/clip.pt"))


def test_a_lost_shard_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "two.safetensors is missing" in one_line(lambda: resolve(str(tmp_path)))


def test_a_folder_that_only_shares_a_known_name(
    filled: Resolved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ENCODER.id).mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve(ENCODER.id).path == filled.path


def test_open_clip_files(tmp_path: Path) -> None:
    file = tmp_path / "open_clip_model.safetensors"
    save_file({"a": torch.ones(2)}, file)
    for place in (file, tmp_path):
        found = resolve(f"open_clip:ViT-B-32/{place}")
        assert (found.library, found.model, found.path) == ("open_clip", "ViT-B-32", file)
    assert found.frozen_hash == frozen_hash({"a": torch.ones(2)})


def test_the_hash_of_a_folder_is_remembered_until_it_changes(cache: Path, tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    found = resolve(str(tmp_path))
    assert found.frozen_hash == frozen_hash({"a": torch.ones(2)})
    (note,) = (cache / "hashes").iterdir()
    note.write_text("f" * 64)
    assert found.frozen_hash == "f" * 64
    note.write_text("damaged")
    assert found.frozen_hash == frozen_hash({"a": torch.ones(2)})
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert found.frozen_hash == frozen_hash({"a": torch.zeros(2)})


def hub_copy(root: Path, repository: str, files: dict[str, bytes]) -> Path:
    """A repository as the Hugging Face cache keeps it: files named by hash, a snapshot of links."""
    folder = root / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (folder / "blobs").mkdir()
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    for name, content in files.items():
        blob = folder / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        (snapshot / name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


def test_the_hugging_face_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants
    from safetensors.torch import save

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    tensors = {"a": torch.arange(4.0)}
    files = {"config.json": b'{"model_type": "llama"}', "model.safetensors": save(tensors)}
    snapshot = hub_copy(tmp_path, "org/small", files)
    found = resolve("org/small", offline=True)
    assert (found.origin, found.path, found.kind) == ("hf-cache", snapshot, "language")
    assert found.frozen_hash == frozen_hash(tensors)
    assert weights_main.main(["verify", "org/small"]) == 0
    (snapshot / "model.safetensors").resolve().write_bytes(b"other")
    assert "is damaged" in one_line(lambda: weights_main.main(["verify", "org/small"]))
    hub_copy(tmp_path, "org/half", {"config.json": b"{}"})
    assert "the network is off" in one_line(lambda: resolve("org/half", offline=True))


def test_the_frozen_hash_sees_names_shapes_and_values_only() -> None:
    base = {"b": torch.arange(6.0).view(2, 3), "a": torch.tensor(1.5)}
    same = frozen_hash(base)
    assert frozen_hash(list(reversed(base.items()))) == same
    assert frozen_hash({**base, "steps": torch.tensor(7)}) == same
    assert frozen_hash({k: v.double() for k, v in base.items()}) == same
    assert frozen_hash({**base, "b": base["b"].t().contiguous().t()}) == same
    assert frozen_hash({**base, "b": base["b"].view(3, 2)}) != same
    assert frozen_hash({"c": base["b"], "a": base["a"]}) != same
    changed = base["b"].clone()
    changed[0, 0] = torch.finfo(torch.float32).tiny
    assert frozen_hash({**base, "b": changed}) != same


def test_list_names_states_and_fixes(
    cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    other(LANGUAGE, monkeypatch, package="no_such_package_here")
    assert weights_main.main(["list"]) == 0
    printed = capsys.readouterr().out
    assert ENCODER.id in printed
    assert f"missing: `{LANGUAGE.pip}`" in printed
