"""Matrices in 4 or 8 bits a number: close to what they were, smaller, and damage that is named."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlm.adapter_file import read_adapter, shrink
from vlm.checkpoint import load_model, save_adapter
from vlm.cli import main
from vlm.errors import WeightsError
from vlm.quantised import (
    BLOCK,
    LEAST,
    STEP,
    dequantise,
    dequantise_all,
    quantise,
    quantise_large,
    require_quantised,
)

if TYPE_CHECKING:
    from PIL import Image

    from vlm.model import VLM

Draw = Callable[..., "Image.Image"]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(1, 1), (3, 64), (5, 65), (7, 127), (300, 70)])
def test_numbers_come_back_to_within_half_a_step(bits: int, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape) * torch.logspace(-3, 3, shape[0])[:, None]
    held = quantise("w", matrix, bits)
    require_quantised(held, "w", bits, shape)
    back = dequantise(held, "w", bits, shape[1])
    steps = held["w" + STEP].float().repeat_interleave(BLOCK, dim=1)[:, : shape[1]]
    assert back.shape == shape
    assert back.is_contiguous()
    assert back.untyped_storage().nbytes() == 4 * back.numel(), "narrow rows are not filled up"
    # The step itself is rounded to float16, which moves the largest number by 2 ** -11 of itself.
    assert ((back - matrix).abs() <= 0.5 * steps + matrix.abs() * 2**-11).all()
    assert sum(part.numel() * part.element_size() for part in held.values()) <= shape[0] * (
        -(-shape[1] * bits // 8) + 2 * -(-shape[1] // BLOCK)
    )


def test_noughts_stay_noughts() -> None:
    assert not dequantise(quantise("w", torch.zeros(2, 100), 4), "w", 4, 100).any()


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "single": torch.randn(70, 300),
        "half": torch.randn(300, 70).half(),
        "small": torch.randn(8, 8).half(),
        "vector": torch.randn(5000),
    }


def test_only_large_matrices_are_rounded_and_only_once() -> None:
    once = quantise_large(tensors())
    assert once.keys() == tensors().keys() | {"single" + STEP, "half" + STEP}
    assert {name for name, tensor in once.items() if tensor.dtype == torch.uint8} == {"single", "half"}
    twice = quantise_large(once)
    assert all(twice[name] is tensor for name, tensor in once.items())
    back = dequantise_all(once)
    assert back.keys() == tensors().keys()
    assert torch.equal(back["vector"], tensors()["vector"])
    assert (back["half"] - tensors()["half"]).norm() < 0.01 * tensors()["half"].float().norm()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda held: held.pop("half" + STEP), "half is of type torch.uint8 and has no steps"),
        (lambda held: held.update(vector=held["vector"].to(torch.float8_e4m3fn)), "vector is of type"),
        (lambda held: held.pop("half"), "half.step has no levels"),
        (lambda held: held.update(half=held["half"][:, 0]), "half.step has no levels"),
        (lambda held: held.update(half=held["half"][1:]), "half.step is no steps of"),
        (lambda held: held.update(half=held["half"].float()), "half is no .* of 8 bits"),
        (lambda held: held.update({"half.step": held["half.step"].float()}), "half.step is no steps of"),
    ],
)
def test_damage_is_named(spoil: Callable[[dict[str, torch.Tensor]], object], said: str) -> None:
    held = quantise_large(tensors())
    spoil(held)
    with pytest.raises(ValueError, match=said):
        dequantise_all(held)


@pytest.fixture
def large(make_tiny: Callable[..., VLM], tmp_path: Path) -> tuple[VLM, Path]:
    """An adapter with matrices that are worth rounding, and its folder."""
    model = make_tiny("flamingo", feedforward=300)
    folder = tmp_path / "adapter"
    save_adapter(model, folder)
    digest = hashlib.sha256((folder / "adapter.safetensors").read_bytes()).hexdigest()
    (folder / "README.md").write_text(f"# Mine\n\n| adapter | `{digest}` |\n")
    return model, folder


def test_a_shrunk_adapter_answers_as_its_rounded_numbers_do(
    large: tuple[VLM, Path], draw: Draw, capsys: pytest.CaptureFixture[str]
) -> None:
    model, folder = large
    assert main(["weights", "shrink", str(folder)]) == 0
    assert "MB before" in capsys.readouterr().out
    assert any(name.endswith(STEP) for name in load_file(folder / "adapter.safetensors"))
    file = read_adapter(folder)
    state = model.adapter.state_dict()
    assert file.tensors.keys() == state.keys()
    for name, tensor in file.tensors.items():
        assert (tensor - state[name]).norm() <= 0.01 * state[name].norm(), name
    assert f"| `{file.sha256}` |" in (folder / "README.md").read_text(), "the card tells the new file's hash"
    loaded = load_model(folder, offline=True)
    model.adapter.load_state_dict(file.tensors)
    ask = ([draw(1)], "what?")
    assert loaded.ask(*ask, max_new_tokens=6).tokens == model.ask(*ask, max_new_tokens=6).tokens
    once = (folder / "adapter.safetensors").read_bytes()
    shrink(folder)
    assert (folder / "adapter.safetensors").read_bytes() == once, "it is as small as it gets"


def test_a_shrunk_adapter_can_be_resized_and_averaged(large: tuple[VLM, Path], tmp_path: Path) -> None:
    _, folder = large
    shrink(folder)
    own = read_adapter(folder).tensors
    assert any(tensor.dim() == 2 and tensor.shape[1] % BLOCK for tensor in own.values())
    assert main(["weights", "average", str(tmp_path / "mean"), str(folder), str(folder), "--offline"]) == 0
    assert main(["weights", "resize", str(tmp_path / "large"), str(folder), "64", "--offline"]) == 0
    for name, tensor in read_adapter(tmp_path / "mean").tensors.items():
        torch.testing.assert_close(tensor.float(), own[name].float(), atol=1e-3, rtol=1e-3)


def test_what_cannot_be_shrunk_stays(large: tuple[VLM, Path], tmp_path: Path) -> None:
    _, folder = large
    tensors = load_file(folder / "adapter.safetensors")
    name = next(name for name, tensor in tensors.items() if tensor.dim() == 2 and tensor.numel() >= LEAST)
    save_file({**tensors, name: tensors[name] + 1e8}, folder / "adapter.safetensors")
    before = (folder / "adapter.safetensors").read_bytes()
    with pytest.raises(WeightsError, match=f"cannot be shrunk: {name} holds numbers beyond 8e6"):
        shrink(folder)
    assert (folder / "adapter.safetensors").read_bytes() == before
    with pytest.raises(WeightsError, match="cannot be read"):
        shrink(tmp_path / "nowhere")


def test_damaged_levels_are_told_in_one_line(large: tuple[VLM, Path]) -> None:
    _, folder = large
    shrink(folder)
    stored = load_file(folder / "adapter.safetensors")
    name = next(name for name in stored if name.endswith(STEP))
    save_file(stored | {name: stored[name][1:].clone()}, folder / "adapter.safetensors")
    with pytest.raises(WeightsError, match="is damaged, or was shrunk by another version.* is no steps of"):
        load_model(folder, offline=True)
