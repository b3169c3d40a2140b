"""`vlm train consensus`: what captions of a picture will say is learnt, measured and written, or refused."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image

from vlm.adapter_file import load_consensus
from vlm.checkpoint import build_model, load_model, save_adapter
from vlm.errors import DataError
from vlm.images import open_picture
from vlm.train import main
from vlm.train.consensus import Captioned, Targets, learn
from vlm.train.run import make_model

if TYPE_CHECKING:
    from vlm.train.config import TrainConfig

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220), "grey": (120, 120, 120)}


def told(name: str, number: int) -> list[str]:
    thing = ("wall", "field", "square")[number % 3]
    return [f"a {name} {thing}", f"the {thing} is {name}"]


def drawn(count: int, signal: float) -> Captioned:
    """Features that say by `signal` which of four captions a picture has."""
    torch.manual_seed(0)
    kinds = torch.arange(count) % len(COLOURS)
    pooled = torch.randn(count, 1, 32) + signal * torch.eye(32)[kinds][:, None]
    return Captioned(pooled, [told(list(COLOURS)[kind], n) for n, kind in enumerate(kinds.tolist())])


def test_targets_are_mean_unit_vectors() -> None:
    targets = Targets([["a dog", "a dog"], ["a cat"]])
    vector = targets.vector(["a dog", "a dog"])
    assert vector == pytest.approx({("dog",): 1.0, ("a", "dog"): 1.0})
    assert targets.vector(["a zebra"])[("zebra",)] == pytest.approx(1.0)


def test_what_features_tell_is_learnt_and_what_they_do_not_is_refused() -> None:
    learnt = learn(drawn(600, 8.0))
    assert learnt.cosine > learnt.guess + 0.2
    again = learn(drawn(600, 8.0))
    assert torch.equal(learnt.consensus.say.weight, again.consensus.say.weight)
    expected = learnt.consensus.expect(8.0 * torch.eye(32)[2].expand(1, 5, -1))
    assert expected("a blue wall") > expected("a green wall") + 0.3
    assert expected("a blue wall") > expected("wall a")
    with pytest.raises(DataError, match="foretold no better"):
        learn(drawn(600, 0.0))
    with pytest.raises(DataError, match="499 captioned pictures are too few"):
        learn(drawn(499, 8.0))


@pytest.fixture
def coloured(tmp_path: Path) -> Path:
    """A folder of 500 captioned pictures of one colour each."""
    folder = tmp_path / "coloured"
    folder.mkdir()
    rows = [["file_name", "caption"]]
    for number in range(500):
        name, colour = list(COLOURS.items())[number % len(COLOURS)]
        shade = tuple(min(255, part + number // 16) for part in colour)
        Image.new("RGB", (16, 16), shade).save(folder / f"{number}.png")
        rows += [[f"{number}.png", text] for text in told(name, number)]
    with open(folder / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder


def test_one_command_writes_it_into_an_adapter(
    coloured: Path, recipe: Callable[..., TrainConfig], tmp_path: Path, capsys: pytest.CaptureFixture[Any]
) -> None:
    model = build_model(recipe().model)
    folder = tmp_path / "adapter"
    save_adapter(model, folder)
    assert main.main(["consensus", str(folder), str(coloured), "--offline"]) == 0
    assert "one guess for all" in capsys.readouterr().out
    found = load_consensus(folder, model.encoder.width)
    assert found is not None
    further = make_model(replace(recipe(), start=str(folder)), offline=True)
    assert further.consensus is None
    assert load_model(folder, offline=True).consensus is not None
    seen = model.encode([open_picture(coloured / "2.png")])
    assert found.expect(seen)("a blue square") > found.expect(seen)("a red square")


def test_an_adapter_that_ships_is_not_written_to(coloured: Path, capsys: pytest.CaptureFixture[Any]) -> None:
    from vlm.cli import main as command

    assert command(["train", "consensus", "default", str(coloured)]) == 1
    assert "name your own copy" in capsys.readouterr().err
