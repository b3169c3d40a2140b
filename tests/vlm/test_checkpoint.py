"""An adapter on disk: all of it or nothing, on the weights it was trained with, and never a pickle."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlm.adapter_file import replace_files
from vlm.checkpoint import ASSETS, adapter_folder, load_adapter, load_model, save_adapter
from vlm.config import ModelConfig, from_dict, to_dict
from vlm.errors import ConfigError, WeightsError
from vlm.model import VLM
from vlm.weights import frozen_hash

Draw = Callable[..., Any]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Hashes of the little frozen parts do not belong into the user's cache."""
    if "real_model" not in request.fixturenames:
        monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def saved(make_tiny: Callable[..., VLM], tmp_path: Path) -> tuple[VLM, Path]:
    model = make_tiny("flamingo")
    folder = tmp_path / "adapter"
    save_adapter(model, folder, card="# A tiny adapter\n")
    return model, folder


def change_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def one_line(run: Callable[[], object], word: str) -> str:
    with pytest.raises((WeightsError, ConfigError), match=word) as caught:
        run()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- there and back --------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ["flamingo", "qformer"])
def test_there_and_back(adapter: str, make_tiny: Callable[..., VLM], draw: Draw, tmp_path: Path) -> None:
    model = make_tiny(adapter)
    save_adapter(model, tmp_path / "adapter", card="card")
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "README.md",
        "adapter.safetensors",
        "config.json",
    ]
    loaded = VLM.from_pretrained(tmp_path / "adapter", offline=True)
    assert loaded.config == model.config
    state, again = model.adapter.state_dict(), loaded.adapter.state_dict()
    assert all(torch.equal(state[name], again[name]) for name in state)
    assert loaded.adapter_name == str(tmp_path / "adapter")
    assert loaded.hashes.keys() == {"encoder", "language_model", "adapter"}
    assert not loaded.training
    ask = ([draw(1)], "what?")
    answer = loaded.ask(*ask, max_new_tokens=6)
    assert answer.text == model.ask(*ask, max_new_tokens=6).text
    assert answer.adapter == str(tmp_path / "adapter")


def test_only_the_adapter_is_saved(saved: tuple[VLM, Path]) -> None:
    model, folder = saved
    tensors = load_file(folder / "adapter.safetensors")
    assert set(tensors) == set(dict(model.adapter.named_parameters()))
    values = json.loads((folder / "config.json").read_text())
    assert values["hashes"] == {
        "encoder": frozen_hash(model.encoder.backbone.state_dict()),
        "language_model": values["hashes"]["language_model"],
    }
    assert from_dict(ModelConfig, values["model"]) == model.config
    assert values["features"] == {"tokens": 4, "width": 96}
    assert (folder / "README.md").read_text() == "# A tiny adapter\n"


def test_half_precision_files_load_as_float32(saved: tuple[VLM, Path]) -> None:
    model, folder = saved
    save_adapter(model, folder, tensors={k: v.half() for k, v in model.adapter.state_dict().items()})
    loaded = load_model(folder, offline=True)
    for name, tensor in loaded.adapter.state_dict().items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, model.adapter.state_dict()[name], atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("sizes", [("flamingo", {}), ("qformer", {}), ("qformer", {"question_aware": True})])
def test_frozen_parts_in_half_precision(
    dtype: str, sizes: tuple[str, dict[str, Any]], make_tiny: Callable[..., VLM], draw: Draw, tmp_path: Path
) -> None:
    model = make_tiny(sizes[0], **sizes[1])
    save_adapter(model, tmp_path / "adapter")
    half = load_model(tmp_path / "adapter", dtype=dtype, offline=True)
    assert next(half.language.parameters()).dtype == getattr(torch, dtype)
    assert {p.dtype for p in half.adapter.parameters()} == {torch.float32}
    from vlm.conversation import Conversation

    asks = [Conversation.ask([draw(1)], "what?"), Conversation.ask([], "hello")]
    for ask in asks:
        assert half.ask_batch([ask], max_new_tokens=4)[0].usage.completion_tokens
        assert half.ask_batch([ask], max_new_tokens=4, num_beams=2)[0].usage.completion_tokens
    ((one,), (two,)) = half.score(asks, [["a dog"], ["a dog"]])
    ((exact,), (other,)) = model.score(asks, [["a dog"], ["a dog"]])
    assert (one, two) == pytest.approx((exact, other), abs=0.5)


def test_other_dtypes_are_refused(saved: tuple[VLM, Path]) -> None:
    one_line(lambda: load_model(saved[1], dtype="int8", offline=True), "none of float32")
    one_line(lambda: load_model(saved[1], dtype="__class__", offline=True), "none of float32")


# --- strictness ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["missing", "extra", "shape", "nan", "inf"])
def test_tensors_fit_exactly(damage: str, saved: tuple[VLM, Path]) -> None:
    _, folder = saved
    tensors = load_file(folder / "adapter.safetensors")
    name = "blocks.0.query.weight"
    if damage == "missing":
        del tensors[name]
    elif damage == "extra":
        tensors["blocks.9.query.weight"] = torch.zeros(2)
    elif damage == "shape":
        tensors[name] = tensors[name][:-1].clone()
    else:
        tensors[name][3, 3] = float(damage)
    save_file(tensors, folder / "adapter.safetensors")
    message = one_line(lambda: load_model(folder, offline=True), "does not fit|not finite")
    assert "blocks." in message


@pytest.mark.parametrize(
    "content",
    [b"", b"\x80\x04\x95garbage", b"\xff" * 100, b'{"not": "safetensors"}', (200).to_bytes(8, "little")],
)
def test_a_damaged_file(content: bytes, saved: tuple[VLM, Path]) -> None:
    (saved[1] / "adapter.safetensors").write_bytes(content)
    one_line(lambda: load_model(saved[1], offline=True), "adapter.safetensors cannot be read")


def test_a_file_cut_off(saved: tuple[VLM, Path]) -> None:
    file = saved[1] / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    one_line(lambda: load_model(saved[1], offline=True), "adapter.safetensors cannot be read")


class Trap:
    """A pickle that leaves a mark where it is opened."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {ROOT / 'SPRUNG'}",)


def test_a_pickle_is_never_opened(saved: tuple[VLM, Path]) -> None:
    _, folder = saved
    torch.save({"adapter": Trap()}, folder / "adapter.safetensors")
    one_line(lambda: load_model(folder, offline=True), "cannot be read")
    (folder / "adapter.safetensors").rename(folder / "adapter.bin")
    one_line(lambda: load_model(folder, offline=True), "give a folder with adapter.safetensors")
    assert not (ROOT / "SPRUNG").exists()


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "cannot be read"),
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[]", "not of format"),
        ('{"format": 99}', "not of format 1: install the version"),
        ('{"format": 1}', "which frozen parts"),
        ('{"format": 1, "hashes": []}', "which frozen parts"),
        ('{"format": 1, "hashes": {"encoder": "x"}}', "which frozen parts"),
        ('{"format": 1, "hashes": {"encoder": "x", "language_model": "y"}}', "which features"),
        (
            '{"format": 1, "hashes": {"encoder": "x", "language_model": "y"}, '
            '"features": {"tokens": 4, "width": 8}}',
            "not usable",
        ),
    ],
)
def test_a_damaged_config(text: str, word: str, saved: tuple[VLM, Path]) -> None:
    (saved[1] / "config.json").write_text(text)
    one_line(lambda: load_model(saved[1], offline=True), word)


@pytest.mark.parametrize(
    ("section", "key", "value", "word"),
    [
        ("flamingo", "width", "wide", "flamingo.width must be int"),
        ("flamingo", "layers", [1, 99], "must lie within"),
        ("flamingo", "layers", ["one"], "must be int"),
        ("flamingo", "layers", 3, "must be a list"),
        ("flamingo", "heads", 0, "out of range"),
        ("flamingo", "nonsense", 1, "unknown key"),
        ("flamingo", "latents", 5, "does not fit"),
        ("vision", "size", -1, "out of range"),
        ("vision", "size", 96, "does not fit"),
        ("vision", "stages", [77], "stages"),
        ("vision", "encoder", "nobody/has-this", "not on this machine"),
        ("vision", "encoder", "smollm2-135m-instruct", "wants an encoder"),
    ],
)
def test_a_config_that_cannot_be(
    section: str, key: str, value: object, word: str, saved: tuple[VLM, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    if value == "smollm2-135m-instruct":
        monkeypatch.delenv("VLM_CACHE")
    change_config(saved[1], lambda values: values["model"][section].__setitem__(key, value))
    one_line(lambda: load_model(saved[1], offline=True), word)


def test_a_config_of_the_wrong_kinds(saved: tuple[VLM, Path]) -> None:
    for value in (None, 3, "flamingo", [1]):
        change_config(saved[1], lambda values, v=value: values.__setitem__("model", v))
        one_line(lambda: load_model(saved[1], offline=True), "not usable")


# --- the frozen parts ------------------------------------------------------------------------------------


def test_other_frozen_weights_stop(
    saved: tuple[VLM, Path], tiny_parts: Any, tmp_path: Path, draw: Draw
) -> None:
    model, folder = saved
    # The same encoder, one number of which has changed.
    other = tmp_path / "other-encoder"
    shutil.copytree(tiny_parts.encoder, other)
    state = load_file(other / "model.safetensors")
    state["bn1.bias"][0] += 1e-3
    save_file(state, other / "model.safetensors")
    change_config(folder, lambda values: values["model"]["vision"].__setitem__("encoder", str(other)))
    message = one_line(lambda: load_model(folder, offline=True), "another encoder than the one found")
    assert "--allow-different-frozen" in message
    with pytest.warns(UserWarning, match="another encoder"):
        loaded = load_model(folder, offline=True, allow_different_frozen=True)
    assert loaded.ask([draw(1)], "what?", max_new_tokens=2).usage.images == 1


def test_both_other(saved: tuple[VLM, Path]) -> None:
    change_config(
        saved[1], lambda values: values.__setitem__("hashes", {"encoder": "x", "language_model": "y"})
    )
    one_line(lambda: load_model(saved[1], offline=True), "another encoder and language model than")


def test_the_right_weights_warn_of_nothing(saved: tuple[VLM, Path]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(saved[1], offline=True, allow_different_frozen=True)


def test_another_precision_on_disk_is_the_same_network(
    saved: tuple[VLM, Path], tiny_parts: Any, tmp_path: Path
) -> None:
    """The hash is of tensors, not of files: how a file orders or names its metadata does not matter."""
    _, folder = saved
    other = tmp_path / "other-encoder"
    shutil.copytree(tiny_parts.encoder, other)
    state = load_file(other / "model.safetensors")
    save_file(dict(reversed(state.items())), other / "model.safetensors", metadata={"by": "another tool"})
    change_config(folder, lambda values: values["model"]["vision"].__setitem__("encoder", str(other)))
    load_model(folder, offline=True)


# --- finding ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["", "no-such-adapter", "/no/such/folder", "a" * 5000, "bad\0name", "a/b/c", "."],
)
def test_what_is_no_adapter(name: str) -> None:
    message = one_line(lambda: adapter_folder(name, offline=True), "is no adapter")
    assert "one that ships" in message


def test_a_hub_adapter_that_is_not_here() -> None:
    one_line(lambda: adapter_folder("nobody/nothing", offline=True), "not on this machine")
    one_line(lambda: adapter_folder("~nobody/adapter", offline=True), "neither an adapter's folder")


def test_shipped_adapters_are_found_by_name() -> None:
    shipped = (
        [folder for folder in ASSETS.iterdir() if (folder / "config.json").is_file()]
        if ASSETS.is_dir()
        else []
    )
    for folder in shipped:
        assert adapter_folder(folder.name) == folder
        size = (folder / "adapter.safetensors").stat().st_size
        assert size <= 40_000_000, "what ships stays small"
        assert (folder / "README.md").stat().st_size > 500


def test_the_default_model(real_model: VLM, samples_dir: Path) -> None:
    for part in ("encoder", "language_model"):
        assert len(real_model.hashes[part]) == 64
    answer = real_model.ask([samples_dir / "cat.jpg"], "What is in the picture?", max_new_tokens=12)
    assert answer.text
    assert answer.logprob < 0


# --- writing ---------------------------------------------------------------------------------------------


def test_a_save_replaces_whole_files(saved: tuple[VLM, Path]) -> None:
    model, folder = saved
    (folder / "other.txt").write_text("of somebody else")
    with torch.no_grad():
        model.adapter.place.weight.fill_(0.25)
    save_adapter(model, folder, card="new")
    assert (load_file(folder / "adapter.safetensors")["place.weight"] == 0.25).all()
    assert (folder / "README.md").read_text() == "new"
    assert (folder / "other.txt").exists()
    assert not [p for p in folder.iterdir() if p.name.startswith(".saving")]


def test_a_failed_save_leaves_the_old_files(saved: tuple[VLM, Path]) -> None:
    """A limit on the size of files stands for a full disk."""
    _, folder = saved
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    code = (
        "import resource, signal, sys\nfrom pathlib import Path\n"
        "from vlm.adapter_file import replace_files\nfrom vlm.errors import WeightsError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        "files = {'README.md': b'new', 'config.json': b'{}', 'adapter.safetensors': b'x' * 100_000}\n"
        "try: replace_files(Path(sys.argv[1]), files)\n"
        "except WeightsError as problem: print('told:', problem)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.startswith(f"told: {folder} cannot be written"), done.stderr
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_a_place_that_cannot_be_written(saved: tuple[VLM, Path], tmp_path: Path) -> None:
    model, _ = saved
    (tmp_path / "file").write_text("no folder")
    one_line(lambda: save_adapter(model, tmp_path / "file" / "adapter"), "cannot be written")


def test_a_reader_never_finds_half_a_file(saved: tuple[VLM, Path]) -> None:
    """While one process writes again and again, another reads."""
    model, folder = saved
    code = (
        "import sys\nfrom pathlib import Path\nfrom vlm.adapter_file import replace_files\n"
        "content = (Path(sys.argv[1]) / 'adapter.safetensors').read_bytes()\n"
        "for _ in range(60): replace_files(Path(sys.argv[1]), {'adapter.safetensors': content})\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(folder)], cwd=ROOT)
    try:
        reads = 0
        while writer.poll() is None or reads == 0:
            load_adapter(model, folder)
            reads += 1
    finally:
        assert writer.wait(60) == 0
    assert reads > 3


def test_replacing_needs_no_files(tmp_path: Path) -> None:
    replace_files(tmp_path / "new" / "folder", {})
    assert (tmp_path / "new" / "folder").is_dir()


def test_configs_survive_json() -> None:
    config = ModelConfig()
    config = replace(config, flamingo=replace(config.flamingo, layers=(3, 5), dropout=0.1))
    assert from_dict(ModelConfig, json.loads(json.dumps(to_dict(config)))) == config
