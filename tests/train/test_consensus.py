"""`vlm train consensus`: what captions of a picture will say is learnt, measured and written, or refused."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from vlm.adapter_file import read_adapter
from vlm.checkpoint import build_model, load_model, save_adapter
from vlm.consensus import likeness
from vlm.data.remember import captions_by_picture
from vlm.errors import DataError
from vlm.features import Seen
from vlm.images import open_picture
from vlm.train import main
from vlm.train.consensus import RIDGE, Captioned, Targets, _regressed, learn
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
    captions = [told(list(COLOURS)[kind], n) for n, kind in enumerate(kinds.tolist())]
    return Captioned(pooled, torch.zeros(count, 0), captions)


def test_targets_are_mean_unit_vectors() -> None:
    targets = Targets([["a dog", "a dog"], ["a cat"]])
    vector = targets.vector(["a dog", "a dog"])
    assert vector == pytest.approx({("dog",): 1.0, ("a", "dog"): 1.0})
    assert targets.vector(["a zebra"])[("zebra",)] == pytest.approx(1.0)


def test_what_features_tell_is_learnt_and_what_they_do_not_is_refused() -> None:
    learnt = learn(drawn(600, 8.0))
    assert learnt.cosine > learnt.guess + 0.2
    again = learn(drawn(600, 8.0)).consensus.tensors()
    assert all(torch.equal(tensor, again[name]) for name, tensor in learnt.consensus.tensors().items())
    expected = learnt.consensus.expect(Seen(8.0 * torch.eye(32)[2].expand(1, 5, -1), torch.zeros(1, 0)))
    assert expected("a blue wall") > expected("a green wall") + 0.3
    assert expected("a blue wall") > expected("wall a")
    with pytest.raises(DataError, match="foretold no better"):
        learn(drawn(600, 0.0))
    with pytest.raises(DataError, match="499 captioned pictures are too few"):
        learn(drawn(499, 8.0))


def test_it_knows_the_pictures_that_it_was_fitted_to() -> None:
    data = drawn(600, 8.0)
    consensus = learn(data).consensus
    others = data.pooled[:50] + 2 * torch.randn(50, 1, 32)
    seen = Seen(torch.cat([data.pooled[:50], others]), torch.zeros(100, 0))
    assert consensus.fitted_to(seen).tolist() == [True] * 50 + [False] * 50


def test_a_picture_without_words_does_not_hide_that_nothing_is_foretold() -> None:
    data = drawn(600, 0.0)
    data.captions[::10] = [["???"]] * 60
    with pytest.raises(DataError, match="foretold no better"):
        learn(data)


@pytest.mark.parametrize("level", [0.1, 3.3, 1000.0])
def test_a_feature_that_never_changes_does_no_harm(level: float) -> None:
    data = drawn(600, 8.0)
    data.pooled[:, :, -4:] = level
    learnt = learn(data)
    assert learnt.cosine > learnt.guess + 0.2


def test_it_is_kernel_ridge_regression() -> None:
    """With every direction and every rank: what the textbook's formula says of new pictures."""
    torch.manual_seed(0)
    pooled, targets, new = torch.randn(120, 32), torch.randn(120, 50), torch.randn(7, 32)
    known = _regressed(pooled, torch.zeros(120, 0), targets)
    mean, spread = pooled.mean(dim=0), pooled.std(dim=0)
    unit, fresh = (normalize((some - mean) / spread, dim=1) for some in (pooled, new))
    alike, near = (((4 * some @ unit.T).exp() - 1) / (math.exp(4) - 1) for some in (unit, fresh))
    expected = near @ torch.linalg.solve(alike + RIDGE * torch.eye(120), targets)
    said = likeness(fresh @ known["turn"], known["seen"]) @ known["weigh"] @ known["say"]
    torch.testing.assert_close(said, expected, atol=1e-4, rtol=1e-3)


def test_captions_are_foretold_from_what_the_classifier_says() -> None:
    """The features tell nothing, the labels everything."""
    data, called = drawn(600, 0.0), torch.eye(len(COLOURS))[torch.arange(600) % len(COLOURS)]
    learnt = learn(replace(data, scores=called))
    assert learnt.cosine > learnt.guess + 0.1
    assert learnt.consensus.labels == len(COLOURS)


def test_what_differs_most_is_kept_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what is said of the taught pictures, a lower rank keeps as much as any matrix of that rank can."""
    torch.manual_seed(0)
    pooled, targets = torch.randn(120, 32), torch.randn(120, 4) @ torch.randn(4, 50)
    targets += torch.randn(120, 50) / 10
    monkeypatch.setattr("vlm.train.consensus.RANK", 4)
    known = _regressed(pooled, torch.zeros(120, 0), targets)
    alike = likeness(known["seen"], known["seen"])
    whole = alike @ torch.linalg.solve(alike + RIDGE * torch.eye(120), targets)
    left = whole - alike @ known["weigh"] @ known["say"]
    best = torch.linalg.svdvals(whole)[4:].norm()
    assert left.norm() < 1.02 * best


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
    found = read_adapter(folder).consensus(model.encoder.width)
    assert found is not None
    further = make_model(replace(recipe(), start=str(folder)), offline=True)
    assert further.consensus is None
    assert load_model(folder, offline=True).consensus is not None
    seen = model.features.see([open_picture(coloured / "2.png")])
    assert found.labels == len(model.encoder.labels) == seen.scores.shape[1]
    assert found.expect(seen)("a blue square") > found.expect(seen)("a red square")


def test_several_parts_are_one(tmp_path: Path) -> None:
    for part, numbers in (("train", range(3)), ("dev", range(3, 5))):
        (tmp_path / part).mkdir()
        with open(tmp_path / part / "metadata.csv", "w", newline="") as file:
            rows = [(f"{n}.png", f"a thing of number {n}") for n in numbers for _ in range(2)]
            csv.writer(file).writerows([("file_name", "caption"), *rows])
        for number in numbers:
            Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / part / f"{number}.png")
    found = {part: captions_by_picture(tmp_path, part) for part in ("train", "dev", "train+dev")}
    assert found["train+dev"] == found["train"] | found["dev"]
    assert [len(part) for part in found.values()] == [3, 2, 5]
    assert all(len(captions) == 2 for _, captions in found["train+dev"].values())
    with pytest.raises(DataError, match="unknown split 'deve'"):
        captions_by_picture(tmp_path, "train+deve")


def test_an_adapter_that_ships_is_not_written_to(coloured: Path, capsys: pytest.CaptureFixture[Any]) -> None:
    from vlm.cli import main as command

    assert command(["train", "consensus", "default", str(coloured)]) == 1
    assert "--out DIR says where a copy goes" in capsys.readouterr().err
