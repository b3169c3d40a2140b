"""Half-precision matrices in two parts: the same bits, fewer bytes, and damage that is named."""

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
from vlm.planes import LOWER, UPPER, joined, split

if TYPE_CHECKING:
    from PIL import Image

    from vlm.model import VLM

Draw = Callable[..., "Image.Image"]


def matrices() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16).view(256, 256)
    return {
        "every": every,  # zeros of both signs, the smallest and the infinite among them
        "weights": (torch.randn(300, 70) / 20).half(),
        "turned": (torch.randn(70, 300) / 20).half().T,
        "small": torch.randn(8, 8).half(),
        "single": torch.randn(70, 300),
        "vector": torch.randn(5000).half(),
    }


def test_every_bit_comes_back() -> None:
    tensors = matrices()
    parts = split(tensors)
    assert parts.keys() == {"small", "single", "vector"} | {
        name + end for name in ("every", "weights", "turned") for end in (UPPER, LOWER)
    }
    back = joined(parts)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert back[name].shape == tensor.shape
        if tensor.dtype == torch.float16:
            tensor, back[name] = tensor.contiguous().view(torch.int16), back[name].view(torch.int16)
        assert torch.equal(back[name], tensor)


def test_weights_take_a_sixth_less() -> None:
    weights = {"weights": (torch.randn(1000, 600) / 20).half()}
    size = sum(part.numel() for part in split(weights).values())
    assert size < 0.87 * 2 * 600_000


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda parts: parts.pop("weights" + UPPER), "weights.lower has no other half"),
        (lambda parts: parts.pop("weights" + LOWER), "weights.upper has no other half"),
        (lambda parts: parts.update({"weights.lower": parts["weights.lower"][1:]}), "holds"),
        (lambda parts: parts.update({"weights.lower": parts["weights.lower"].float()}), "no other half"),
        (lambda parts: parts.update({"weights.upper": parts["weights.upper"][:-100]}), "holds"),
        (lambda parts: parts["weights.upper"].fill_(7), "weights.upper is damaged"),
    ],
)
def test_damage_is_named(spoil: Callable[[dict[str, torch.Tensor]], object], said: str) -> None:
    parts = split(matrices())
    spoil(parts)
    with pytest.raises(ValueError, match=said):
        joined(parts)


@pytest.fixture
def large(make_tiny: Callable[..., VLM], tmp_path: Path) -> tuple[VLM, Path]:
    """An adapter with matrices that are worth halving, and its folder."""
    model = make_tiny("flamingo", feedforward=300)
    folder = tmp_path / "adapter"
    save_adapter(model, folder)
    digest = hashlib.sha256((folder / "adapter.safetensors").read_bytes()).hexdigest()
    (folder / "README.md").write_text(f"# Mine\n\n| adapter | `{digest}` |\n")
    return model, folder


def test_a_shrunk_adapter_answers_the_same(
    large: tuple[VLM, Path], draw: Draw, capsys: pytest.CaptureFixture[str]
) -> None:
    model, folder = large
    assert main(["weights", "shrink", str(folder)]) == 0
    assert "MB before" in capsys.readouterr().out
    stored = load_file(folder / "adapter.safetensors")
    assert any(name.endswith(UPPER) for name in stored)
    file = read_adapter(folder)
    own = file.tensors
    state = model.adapter.state_dict()
    assert own.keys() == state.keys()
    assert all(torch.equal(own[name], state[name].half()) for name in own)
    assert f"| `{file.sha256}` |" in (folder / "README.md").read_text(), "the card tells the new file's hash"
    loaded = load_model(folder, offline=True)
    with torch.no_grad():
        for name, tensor in model.adapter.state_dict().items():
            tensor.copy_(own[name])
    ask = ([draw(1)], "what?")
    assert loaded.ask(*ask, max_new_tokens=6).text == model.ask(*ask, max_new_tokens=6).text
    once = (folder / "adapter.safetensors").read_bytes()
    shrink(folder)
    assert (folder / "adapter.safetensors").read_bytes() == once, "it is as small as it gets"


def test_what_cannot_be_shrunk_stays(large: tuple[VLM, Path], tmp_path: Path) -> None:
    _, folder = large
    tensors = load_file(folder / "adapter.safetensors")
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name] + 1e5}, folder / "adapter.safetensors")
    before = (folder / "adapter.safetensors").read_bytes()
    with pytest.raises(WeightsError, match=f"cannot be halved: {name} has numbers beyond 65504"):
        shrink(folder)
    assert (folder / "adapter.safetensors").read_bytes() == before
    with pytest.raises(WeightsError, match="cannot be read"):
        shrink(tmp_path / "nowhere")


def test_a_damaged_half_is_told_in_one_line(large: tuple[VLM, Path]) -> None:
    _, folder = large
    shrink(folder)
    stored = load_file(folder / "adapter.safetensors")
    name = next(name for name in stored if name.endswith(UPPER))
    save_file(stored | {name: stored[name][:-9].clone()}, folder / "adapter.safetensors")
    with pytest.raises(WeightsError, match="adapter.safetensors is damaged: .* bytes"):
        load_model(folder, offline=True)
