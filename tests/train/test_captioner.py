"""`vlm train captioner`: what it learns from, its two ways of learning, and when nothing is written."""

from __future__ import annotations

import csv
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy

from vlm.captioner import CaptionNet
from vlm.checkpoint import load_model
from vlm.errors import DataError
from vlm.train import caption_net, main
from vlm.train.caption_net import LONGEST, Lessons, _batches, spoken, teach
from vlm.train.captioner import known_tokens, lessons

if TYPE_CHECKING:
    from vlm.model import VLM

CELLS, CHANNELS = 4, 8
COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220), "grey": (120, 120, 120)}


def network(tokens: int = 6) -> CaptionNet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = CaptionNet(tokens=tokens, wide=5, cells=CELLS, channels=CHANNELS, labels=0)
        return net.hear(torch.randn(tokens, 5)).eval()


def shown(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures of two kinds, even and odd ones."""
    looks = torch.randn(2, CELLS, CHANNELS, generator=torch.Generator().manual_seed(1))
    return looks[pictures % 2], torch.zeros(len(pictures), 0)


def test_what_is_learnt_of_texts_is_what_would_be_said_token_by_token() -> None:
    """Two pictures with two texts each, of different lengths, against a network that reads one at a time."""
    net, texts = network(), [[1, 2], [3], [], [4, 5, 1] * 7]
    texts[3] = texts[3][:LONGEST]
    features, scores = shown(torch.arange(2))
    logits, tokens = spoken(net, net.see(features, scores), texts)
    expected, said = [], []
    for number, text in enumerate(texts):
        own = net.see(features[number // 2][None], scores[:1])
        state = net.step(net.read(torch.tensor([0])), net.begin(1), own)
        for token in [*text, 0][:LONGEST]:
            expected.append(net.logits(state[2])[0])
            said.append(token)
            state = net.step(net.read(torch.tensor([token])), state, own)
    assert tokens.tolist() == said
    torch.testing.assert_close(logits, torch.stack(expected))


def test_every_picture_comes_once_before_one_comes_again() -> None:
    batches = _batches(5, 2, random.Random(0))
    seen = [picture for _, batch in zip(range(5), batches, strict=False) for picture in batch]
    assert sorted(seen[:5]) == sorted(seen[5:]) == list(range(5))


def likely(net: CaptionNet, picture: int, text: list[int]) -> float:
    logits, tokens = spoken(net, net.see(*shown(torch.tensor([picture]))), [text])
    return float(-cross_entropy(logits, tokens).detach())


def test_captions_are_learnt_and_again_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of even pictures 1 2 is said, of odd ones 3; of odd pictures' mirror images nothing."""
    monkeypatch.setattr(caption_net, "LEAST", 40)
    monkeypatch.setattr(caption_net, "WARMUP", 10)
    monkeypatch.setattr(caption_net, "AVERAGE", 0.9)
    said: list[list[Sequence[int]]] = [[[1, 2]] if number % 2 == 0 else [[3]] for number in range(64)]
    mirror = [texts if number % 2 == 0 else [] for number, texts in enumerate(said)]
    views: dict[int, set[int]] = {0: set(), 1: set()}

    def see(view: int, pictures: Tensor) -> tuple[Tensor, Tensor]:
        views[view] |= set((pictures % 2).tolist())
        return shown(pictures)

    made = Lessons(see, [said, mirror])
    first, again = (teach(network(), made, lambda *_: None) for _ in range(2))
    assert views == {0: {0, 1}, 1: {0}}
    assert not first.training
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    for picture, right, wrong in ((0, [1, 2], [3]), (1, [3], [1, 2])):
        assert likely(first, picture, right) > likely(first, picture, wrong) + 1


def test_lessons_mirror_what_is_said_of_sides(make_tiny: Callable[..., VLM]) -> None:
    model = make_tiny("flamingo")
    captions = {
        "a.jpg": ["a man on the left side", "a man"],
        "b.jpg": ["the man has left", "he turned right behind it"],
    }
    tokens = known_tokens(model.language, [list(captions.values())[0]] * 3 + [captions["b.jpg"]] * 3)
    assert tokens[0] == model.language.frame.end
    seen = {name: (torch.zeros(2, 0), ["", ""], said) for name, said in captions.items()}
    made = lessons(model, seen, tokens)

    def words(view: int, picture: int) -> list[str]:
        texts = made.texts[view][picture]
        return [model.language.decode([tokens[place] for place in text]) for text in texts]

    assert words(0, 0) == captions["a.jpg"]
    assert words(1, 0) == ["a man on the right side", "a man"]
    assert words(1, 1) == []


@pytest.fixture
def coloured(tmp_path: Path) -> Path:
    """A folder of 75 captioned pictures of one colour each, of which one fifth becomes dev."""
    folder = tmp_path / "coloured"
    folder.mkdir()
    rows = [["file_name", "caption"]]
    for number in range(75):
        name, colour = list(COLOURS.items())[number % len(COLOURS)]
        shade = tuple(min(255, part + number // 3) for part in colour)
        Image.new("RGB", (16, 16), shade).save(folder / f"{number}.png")
        rows += [[f"{number}.png", f"a {name} wall"], [f"{number}.png", f"the wall is {name}"]]
    with open(folder / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder


def test_one_command_writes_it_or_nothing(
    coloured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter that ships, its real frozen parts, and a folder that nobody has taught it."""
    for name, value in {"EPOCHS": 0, "LEAST": 60, "WARMUP": 10, "AVERAGE": 0.9, "PICTURES": 16}.items():
        monkeypatch.setattr(caption_net, name, value)
    command = ["captioner", "default", str(coloured), "--offline", "--out"]
    with pytest.raises(DataError, match="60 captioned pictures are too few to learn from: 500 are needed"):
        main.main([*command, str(tmp_path / "few")])
    monkeypatch.setattr("vlm.train.captioner.FEWEST", 40)
    for number in range(0, 75, 5):  # some of dev and some of the rest; the same bytes would stay together
        (coloured / f"{number}.png").write_text(f"no picture, number {number}")
    assert main.main([*command, str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert "has a captioner now" in said.out
    assert said.err.count("pictures cannot be read and are left out") == 2
    taught = load_model(tmp_path / "out", offline=True)
    assert taught.captioner is not None
    captions = [
        answer.text for answer in taught.caption([coloured / f"{number}.png" for number in (1, 2, 3)])
    ]
    assert [("green" in text, "blue" in text, "grey" in text) for text in captions] == [
        (True, False, False),
        (False, True, False),
        (False, False, True),
    ]
    # One that says nothing is no better.
    monkeypatch.setattr("vlm.train.captioner.teach", lambda net, *_: silent(net))
    with pytest.raises(DataError, match=r"have CIDEr 0\.0 with .*: nothing is written"):
        main.main(["captioner", str(tmp_path / "out"), str(coloured), "--offline"])
    assert load_model(tmp_path / "out", offline=True).hashes == taught.hashes


def silent(net: CaptionNet) -> CaptionNet:
    with torch.no_grad():
        net.bias[0] = 1000.0
    return net.eval()
