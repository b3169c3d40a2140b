"""`vlm weights resize`: the same adapter, reading larger pictures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vlm.adapters.positions import at_grid
from vlm.checkpoint import load_model, save_adapter
from vlm.cli import main
from vlm.errors import WeightsError
from vlm.model import VLM
from vlm.weights_resize import resize


@pytest.mark.parametrize("adapter", ["flamingo", "qformer"])
def test_an_adapter_reads_larger_pictures(
    adapter: str, make_tiny: Callable[..., VLM], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_tiny(adapter)
    save_adapter(model, tmp_path / "a")
    path = tmp_path / "a" / "config.json"
    fitted = {"threshold": 0.5, "task": "easy-vqa", "split": "dev", "target": 0.8}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"abstain": fitted}))
    assert main(["weights", "resize", str(tmp_path / "b"), str(tmp_path / "a"), "128"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "b")
    larger = load_model(tmp_path / "b", offline=True)
    at_once = load_model(tmp_path / "a", offline=True, size=128)
    assert at_once.config == larger.config
    assert all(
        torch.equal(at_once.adapter.state_dict()[name], value)
        for name, value in larger.adapter.state_dict().items()
    )
    assert (model.config.vision.size, model.encoder.tokens) == (64, 4)
    assert (larger.config.vision.size, larger.encoder.tokens) == (128, 16)
    assert larger.abstain is None
    assert larger.ask([larger.blank_image()], "What is it?").text is not None
    before, after = (load_file(tmp_path / name / "adapter.safetensors") for name in "ab")
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert [name.rpartition(".")[2] for name in changed] == ["position"]
    card = (tmp_path / "b" / "README.md").read_text()
    assert f"| a | 64 | `{load_model(tmp_path / 'a', offline=True).hashes['adapter']}` |" in card
    assert "\nvlm ask --adapter b picture.jpg" in card


def test_back_at_its_own_size_it_is_itself(make_tiny: Callable[..., VLM], tmp_path: Path) -> None:
    save_adapter(make_tiny(), tmp_path / "a")
    resize(tmp_path / "b", str(tmp_path / "a"), 64)
    before, after = (load_file(tmp_path / name / "adapter.safetensors") for name in "ab")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_positions_lie_between_those_around_them() -> None:
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    grid = torch.stack([rows.flatten(), columns.flatten(), torch.ones(16)], dim=1)
    finer = at_grid(torch.cat([torch.full((1, 3), 9.0), grid]), 65)
    assert torch.equal(finer[0], torch.full((3,), 9.0))  # the class token's stays
    assert torch.equal(finer[1:, 2], torch.ones(64))
    along = finer[1:].reshape(8, 8, 3)[3]
    assert along[:, 1].tolist() == [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]
    assert torch.allclose(along[:, 0], along[0, 0])


def test_what_cannot_be_resized(
    make_tiny: Callable[..., VLM], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_adapter(make_tiny(), tmp_path / "a")
    with pytest.raises(WeightsError, match="name a new folder"):
        resize(tmp_path / "a", str(tmp_path / "a"), 128)
    with pytest.raises(WeightsError, match="no square grids"):
        at_grid(torch.zeros(17, 2), 36)
    assert main(["weights", "resize", str(tmp_path / "b"), str(tmp_path / "a"), "0"]) == 1
    assert "vision.size" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
