"""`vlm weights average`: the mean of adapters of one configuration, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlm.checkpoint import load_model, save_adapter
from vlm.cli import main
from vlm.errors import ConfigError, WeightsError
from vlm.model import VLM
from vlm.weights_average import average


@pytest.fixture
def soup(make_tiny: Callable[..., VLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Three adapters of one configuration, as training saves them, and one of another."""
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))
    names = []
    for seed, name in enumerate(("a", "b", "c", "wide")):
        model = make_tiny("flamingo", seed=seed, **({"width": 32} if name == "wide" else {}))
        tensors = {key: value.half() for key, value in model.adapter.state_dict().items()}
        save_adapter(model, tmp_path / name, tensors=tensors)
        names.append(str(tmp_path / name))
    return names


def tensors_of(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "adapter.safetensors")


def test_the_mean_of_three_answers_and_its_card_says_of_what(
    soup: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mean"
    assert main(["weights", "average", str(out), *soup[:3]]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    parts, mean = [tensors_of(name) for name in soup[:3]], tensors_of(out)
    assert mean.keys() == parts[0].keys()
    for key, value in mean.items():
        wanted = torch.stack([part[key].double() for part in parts]).mean(dim=0)
        assert value.dtype == torch.float16
        torch.testing.assert_close(value.double(), wanted, rtol=2**-11, atol=1e-7)
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: vlm-adapters\n")
    assert "\n# Flamingo adapter, an average of 3\n" in card
    assert "\nvlm ask --adapter mean picture.jpg" in card
    assert str(tmp_path) not in card
    for name in soup[:3]:
        model = load_model(name, offline=True)
        assert f"| {Path(name).name} | 0.3333 | `{model.hashes['adapter']}` |" in card
    assert load_model(out, offline=True).ask([model.blank_image()], "What is it?").text is not None


def test_weights_are_shares(soup: list[str], tmp_path: Path) -> None:
    one, other = tensors_of(soup[0]), tensors_of(soup[1])
    assert main(["weights", "average", str(tmp_path / "x"), *soup[:2], "--weights", "3,1"]) == 0
    for key, value in tensors_of(tmp_path / "x").items():
        wanted = 0.75 * one[key].double() + 0.25 * other[key].double()
        torch.testing.assert_close(value.double(), wanted, rtol=2**-11, atol=1e-7)
    average(tmp_path / "y", soup[:2], [1, 0])
    assert all(torch.equal(value, one[key]) for key, value in tensors_of(tmp_path / "y").items())


def test_other_configurations_are_refused_in_one_line(
    soup: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["weights", "average", str(tmp_path / "x"), soup[0], soup[3]]) == 1
    said = capsys.readouterr().err
    assert "model.flamingo.width (32, 16)" in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_other_frozen_parts_are_refused(soup: list[str], tmp_path: Path) -> None:
    path = Path(soup[1]) / "config.json"
    values = json.loads(path.read_text())
    values["hashes"]["encoder"] = "0" * 64
    path.write_text(json.dumps(values))
    with pytest.raises(WeightsError, match=r"b cannot be averaged with .*a: they differ in hashes\.encoder"):
        average(tmp_path / "x", soup[:2])


def test_what_cannot_be_averaged(soup: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least two"):
        average(tmp_path / "x", soup[:1])
    for weights in ([1.0], [1.0, -1.0], [0.0, 0.0], [1.0, float("nan")], [1.0, float("inf")]):
        with pytest.raises(ConfigError, match="weights"):
            average(tmp_path / "x", soup[:2], weights)
    with pytest.raises(WeightsError, match="name a new folder"):
        average(Path(soup[0]), soup[:2])
    with pytest.raises(WeightsError, match="is no adapter"):
        average(tmp_path / "x", [soup[0], str(tmp_path / "absent")])
    tensors = tensors_of(soup[1])
    name = sorted(tensors)[0]
    save_file({**tensors, name: tensors[name] * float("nan")}, Path(soup[1]) / "adapter.safetensors")
    with pytest.raises(WeightsError, match="not finite"):
        average(tmp_path / "x", soup[:2])
    del tensors[name]
    save_file(tensors, Path(soup[1]) / "adapter.safetensors")
    with pytest.raises(WeightsError, match="tensors differ"):
        average(tmp_path / "x", soup[:2])
    assert not (tmp_path / "x").exists()


def test_weights_that_are_no_numbers(
    soup: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["weights", "average", str(tmp_path / "x"), *soup[:2], "--weights", "1;2"]) == 2
    assert "no numbers" in capsys.readouterr().err
