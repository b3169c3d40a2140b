"""`vlm train answers`: which answers are right is learnt, shown to help, and written, or refused."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize

from vlm.adapter_file import read_adapter
from vlm.checkpoint import build_model, load_model, save_abstain, save_adapter
from vlm.config import AbstainConfig
from vlm.errors import DataError, WeightsError
from vlm.known_answers import KnownAnswers, QuestionKernel, joint, standardised, summary
from vlm.train import main
from vlm.train.answers import RIDGE, Answered, _compared, _listed, _regressed, answered_examples, fit, look
from vlm.train.config import SourceConfig
from vlm.train.holdout import EXACT
from vlm.train.run import make_model, train
from vlm.train.screen import Screen

if TYPE_CHECKING:
    from vlm.train.config import TrainConfig

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220), "grey": (120, 120, 120)}
COLOUR, SHAPE = "What colour is it?", "Which shape has the thing?"


def write(folder: Path, rows: list[tuple[str, str, str]]) -> Path:
    with open(folder / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([("file_name", "question", "answer"), *rows])
    return folder


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks that learn little, but soon: what they are worth is tested beside them."""
    monkeypatch.setattr("vlm.train.answer_net.LEAST", 1)


@pytest.fixture
def coloured(tmp_path: Path) -> Path:
    """A folder of 80 pictures of one colour each, with two questions about each."""
    folder = tmp_path / "coloured"
    folder.mkdir()
    rows = []
    for number in range(80):
        name, colour = list(COLOURS.items())[number % len(COLOURS)]
        shade = tuple(min(255, part + number // 4) for part in colour)
        Image.new("RGB", (16, 16), shade).save(folder / f"{number}.png")
        rows += [(f"{number}.png", COLOUR, name), (f"{number}.png", SHAPE, "square")]
    return write(folder, rows)


@pytest.fixture
def adapter(recipe: Callable[..., TrainConfig], tmp_path: Path) -> Path:
    model = build_model(recipe().model)
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def shown(features: torch.Tensor) -> dict[str, Any]:
    """Pictures of these (P, N, D_v) features, as `Answered` takes them."""
    return {"summaries": summary(features), "cells": lambda _, some: features[some]}


def test_it_is_kernel_ridge_regression() -> None:
    """What the textbook's formula says of new questions about new pictures."""
    torch.manual_seed(0)
    features, new = torch.randn(30, 9, 16), torch.randn(6, 9, 16)
    asked = [("what is it", 3), ("what colour is it", 2), ("who is there", 5), ("is it red", 2)] * 30
    pictures = torch.arange(120) % 30
    texts, summaries = [text for text, _ in asked], summary(features)
    right = torch.eye(5)[[int(pictures[i]) % kinds for i, (_, kinds) in enumerate(asked)]]
    known = _compared(summaries)
    known |= _regressed(texts, pictures, known["seen"], right)

    mean, spread = summaries.mean(dim=0), summaries.std(dim=0, correction=0)

    def unit(some: torch.Tensor) -> torch.Tensor:
        return normalize(((summary(some) - mean) / spread).view(-1, 2, 16), dim=2).flatten(1) / math.sqrt(2)

    def groups(text: str) -> set[str]:
        words = ["<", *text.split(), ">"]
        found = {" ".join(words[i : i + n]) for n in (1, 2, 3) for i in range(len(words) - n + 1)}
        return found - {"<", ">"}

    def alike(first: str, second: str) -> float:
        a, b = groups(first), groups(second)
        return math.expm1(2 * len(a & b) / math.sqrt(len(a) * len(b))) / math.expm1(2)

    near = unit(features) @ unit(features).T
    kernel = (
        torch.tensor([[alike(a, b) for b in texts] for a in texts])
        * (1 + 3 * near[pictures][:, pictures])
        / 4
    )
    weigh = torch.linalg.solve(kernel + RIDGE * torch.eye(120), right)
    fresh = (unit(new) @ unit(features).T)[:, pictures]
    for question in ("what is it", "is it green"):
        row = torch.tensor([alike(question, text) for text in texts]) * (1 + 3 * fresh) / 4
        seen = standardised(summary(new), known["mean"], known["spread"]) @ known["turn"] @ known["seen"].T
        share = joint(QuestionKernel(texts)([question]), seen[:, known["pictures"]]) @ known["weigh"]
        torch.testing.assert_close(share, row @ weigh, atol=1e-4, rtol=1e-3)


def test_answers_of_several_people_count_by_their_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm.train.answer_net.LEAST", 300)
    pictures, data = torch.zeros(200, dtype=torch.long), shown(torch.randn(1, 9, 4))
    people = [("yes", "yes", "no", "perhaps not\nat all"), ("rare",)] * 100
    people[1] = ("unique",)
    known = fit(Answered(["is it so", "what is so rare"] * 100, people, pictures, **data))
    assert known.answers == ["yes", "no", "perhaps not at all", "rare"]
    shares = dict(known.expect("is it so", torch.zeros(1, 9, 4)))
    assert shares["yes"] == pytest.approx(2 * shares["no"], rel=0.05)
    with pytest.raises(DataError, match="0 questions whose answer was given 2 times are too few"):
        fit(Answered(["what"] * 200, [(str(i),) for i in range(200)], pictures, **data))


def test_what_a_list_names_is_right_too(monkeypatch: pytest.MonkeyPatch) -> None:
    taught: list[torch.Tensor] = []
    monkeypatch.setattr("vlm.train.answers.learn_nets", lambda questions, right, *_: taught.append(right))
    pictures, data = torch.zeros(300, dtype=torch.long), shown(torch.randn(1, 9, 4))
    answers = [("chair, table",), ("chair", "chair, table"), ("table, table, a rare thing,",)] * 100
    known = fit(Answered(["what is there"] * 300, answers, pictures, **data))
    assert known.answers == ["chair, table", "chair", "table, table, a rare thing,"]
    # "table" and "a rare thing" are no answers elsewhere
    assert _listed("1,000") == ["1,000"] and _listed("cup,1, 2") == ["cup,1, 2", "cup,1", "2"]
    assert taught[0][:3].tolist() == [[0.5, 0.5, 0.0], [0.25, 0.75, 0.0], [0.0, 0.0, 1.0]]


def test_long_questions_and_many_are_bounded(
    coloured: Path,
    recipe: Callable[..., TrainConfig],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[Any],
) -> None:
    model = build_model(recipe().model)
    write(coloured, [("1.png", "why " * 100, "so"), ("2.png", COLOUR, "blue"), ("3.png", SHAPE, "square")])
    examples = answered_examples(coloured, "train")
    assert len(examples) == 3
    found = look(model, examples, {}, Screen())
    assert "1 questions of more than 300 letters are left out" in capsys.readouterr().err
    assert sorted(found.questions) == ["what colour is it", "which shape has the thing"]
    with pytest.raises(DataError, match="no question is left"):
        look(model, [e for e in examples if e.answers == ("so",)], {}, Screen())
    monkeypatch.setattr("vlm.train.answers.MOST", 1)
    found = look(model, examples, {}, Screen())
    assert (len(found.questions), len(found.summaries), found.pictures.tolist()) == (1, 1, [0])


def test_long_and_broken_answers_are_no_known_ones() -> None:
    pictures, data = torch.zeros(300, dtype=torch.long), shown(torch.randn(1, 9, 4))
    answers = [("so " * 40,), ("half \ud83d",), ("",)] * 100
    known = fit(Answered(["what"] * 300, answers, pictures, **data))
    assert known.answers == ["half ?"]


def test_pictures_that_cannot_be_read_are_counted_and_left_out(
    coloured: Path, adapter: Path, capsys: pytest.CaptureFixture[Any]
) -> None:
    held = {str(example.images[0]) for example in answered_examples(coloured, "dev")}
    files = [coloured / f"{number}.png" for number in range(80)]
    spoilt = [next(file for file in files if (str(file) in held) == dev) for dev in (True, False)]
    for file in spoilt:
        file.write_bytes(file.read_bytes()[:50] + file.name.encode())
    assert main.main(["answers", str(adapter), str(coloured), "--offline"]) == 0
    said = capsys.readouterr()
    assert _counts(said.out)[0] == 30
    assert said.err.count("1 pictures cannot be read and are left out") == 2
    assert all(file.name in said.err for file in spoilt)


def test_one_command_writes_them_into_an_adapter(
    coloured: Path, adapter: Path, recipe: Callable[..., TrainConfig], capsys: pytest.CaptureFixture[Any]
) -> None:
    before = read_adapter(adapter)
    assert main.main(["answers", str(adapter), str(coloured), "--offline"]) == 0
    said = capsys.readouterr().out
    asked, after, right = _counts(said)
    assert asked == 32
    assert after > 24 > right
    assert all(torch.equal(t, before.tensors[n]) for n, t in read_adapter(adapter).tensors.items())
    model = load_model(adapter, offline=True)
    assert isinstance(model.known_answers, KnownAnswers)
    assert sorted(model.known_answers.answers) == ["blue", "green", "grey", "red", "square"]
    answer = model.ask([Image.new("RGB", (16, 16), (24, 24, 224))], COLOUR, max_new_tokens=8)
    assert answer.text == "blue"
    assert make_model(replace(recipe(), start=str(adapter)), offline=True).known_answers is None


def test_a_question_is_left_to_the_adapter(
    coloured: Path, adapter: Path, capsys: pytest.CaptureFixture[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlm.train.answers.LEAST", 50)
    words = ["--except", SHAPE.upper(), "--except", "what else"]
    assert main.main(["answers", str(adapter), str(coloured), "--offline", *words]) == 0
    said = capsys.readouterr()
    assert "is not learnt, which is asked 64 times" in said.out + said.err
    assert "'what else' is not learnt, which is asked 0 times" in said.out + said.err
    known = load_model(adapter, offline=True).known_answers
    assert known is not None
    assert "square" not in known.answers
    assert len(known.answers) == 4


def test_a_report_tells_which_pictures_the_answers_were_fitted_to(
    coloured: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[Any]
) -> None:
    from vlm.cli import main as command

    assert command(["train", "answers", str(adapter), str(coloured), "--offline"]) == 0
    other = tmp_path / "other"
    other.mkdir()
    torch.manual_seed(0)
    for number in range(6):
        pixels = torch.randint(256, (16, 16, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(other / f"new{number}.png")
    shutil.copy(coloured / "5.png", other / "known.png")
    names = [*(f"new{number}.png" for number in range(6)), "known.png"]
    write(other, [(name, question, "square") for name in names for question in (COLOUR, SHAPE)])
    capsys.readouterr()
    for data, known, count in ((coloured, 80, 80), (other, 1, 7)):
        out = tmp_path / f"{data.name}.json"
        words = ["folder-vqa", "--data", str(data), "--adapter", str(adapter), "--controls", "none"]
        assert command(["eval", *words, "--out", str(out), "--offline"]) == 0
        found = json.loads(out.read_text())["guide"]
        assert found == {"pictures": known, "of": count, "command": "vlm train answers"}
        line = f"{known} of {count} pictures are among those that the guide of this adapter was fitted to"
        assert line in capsys.readouterr().out
        assert line in out.with_suffix(".html").read_text()


def test_what_is_damaged_is_fitted_anew(coloured: Path, adapter: Path) -> None:
    """As the error tells one to do; so are answers of an earlier version."""
    assert main.main(["answers", str(adapter), str(coloured), "--offline"]) == 0
    whole = (adapter / "adapter.safetensors").read_bytes()
    stored = load_file(adapter / "adapter.safetensors")
    name = KnownAnswers.PREFIX + "turn"
    save_file(stored | {name: stored[name][1:].clone()}, adapter / "adapter.safetensors")
    with pytest.raises(WeightsError, match="`vlm train answers` fits it anew"):
        load_model(adapter, offline=True)
    assert main.main(["answers", str(adapter), str(coloured), "--offline"]) == 0
    assert (adapter / "adapter.safetensors").read_bytes() == whole


def test_a_copy_leaves_the_adapter_as_it_is(
    coloured: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[Any]
) -> None:
    from vlm.cli import main as command

    fitted = AbstainConfig(0.4, "easy-vqa", "test", 0.8, 0.81, 0.3)
    save_abstain(adapter, fitted)
    (adapter / "README.md").write_text(f"made of {read_adapter(adapter).sha256}")
    before = {file.name: file.read_bytes() for file in adapter.iterdir()}
    out = tmp_path / "copy"
    ask = ["train", "answers", str(adapter), str(coloured), "--offline"]
    assert command([*ask, "--out", str(out)]) == 0
    assert f"{out} knows 5 answers" in capsys.readouterr().out
    assert {file.name: file.read_bytes() for file in adapter.iterdir()} == before
    assert sorted(file.name for file in out.iterdir()) == ["adapter.safetensors", "config.json"]
    copy = load_model(out, offline=True)
    assert copy.known_answers is not None
    assert copy.abstain is None
    assert command([*ask, "--out", str(out)]) == 1
    assert "is there already" in capsys.readouterr().err
    assert command(ask) == 0
    model = load_model(adapter, offline=True)
    assert model.known_answers is not None
    assert model.abstain is None
    assert "--abstain is gone" in capsys.readouterr().out
    assert (adapter / "README.md").read_text() == f"made of {read_adapter(adapter).sha256}"


def _counts(said: str) -> tuple[int, int, int]:
    """Asked, right after and right before."""
    asked, after, before, *_ = (int(word) for word in said.replace(",", " ").split() if word.isdigit())
    return asked, after, before


def test_what_does_not_help_is_not_written(
    coloured: Path, adapter: Path, capsys: pytest.CaptureFixture[Any]
) -> None:
    from vlm.cli import main as command

    # An answer that is always another one in the pictures set aside than in those that teach.
    held = {str(example.images[0]) for example in answered_examples(coloured, "dev")}
    rows = []
    for number in range(80):
        name = f"{number}.png"
        kind = "dev" if str(coloured / name) in held else "rest"
        rows += [(name, COLOUR, kind), (name, SHAPE, f"{kind} too")]
    write(coloured, rows)
    content = (adapter / "adapter.safetensors").read_bytes()
    assert command(["train", "answers", str(adapter), str(coloured), "--offline"]) == 1
    assert "nothing is written" in capsys.readouterr().err
    assert (adapter / "adapter.safetensors").read_bytes() == content


@pytest.mark.parametrize(
    ("name", "rows", "reason"),
    [
        ("default", [], "--out DIR says where a copy goes"),
        ("adapter", [("1.png", COLOUR, "red"), ("2.png", COLOUR, "red")], "questions whose answer was given"),
    ],
)
def test_what_cannot_be_learnt_is_said(
    name: str,
    rows: list[tuple[str, str, str]],
    reason: str,
    coloured: Path,
    adapter: Path,
    capsys: pytest.CaptureFixture[Any],
) -> None:
    from vlm.cli import main as command

    if rows:
        write(coloured, rows)
    place = str(adapter) if name == "adapter" else name
    assert command(["train", "answers", place, str(coloured), "--offline"]) == 1
    assert reason in capsys.readouterr().err


def test_a_run_ends_with_answers_where_they_help(
    coloured: Path,
    recipe: Callable[..., TrainConfig],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[Any],
) -> None:
    monkeypatch.setattr("vlm.train.answers.LEAST", 50)
    monkeypatch.setattr("vlm.data.readers.BAD_SHARE", 0.05)
    own = SourceConfig(name="", per_image=2)
    config = replace(recipe(), sources=(own,), data=str(coloured), holdout=0.2, answers=True, steps=2)
    (coloured / "7.png").write_bytes(b"no picture")  # few enough for training, so for this as well
    for _ in range(2):  # the second time nothing is left to do but this, and the report
        (Path(config.out) / "holdout.json").unlink(missing_ok=True)
        assert train(config, offline=True)
        said = capsys.readouterr().err
        assert "5 known answers: of the questions set aside 100.0 % are right with them, 0.0 %" in said
        found = json.loads((Path(config.out) / "holdout.json").read_text())
        assert (found["before"][EXACT], found["after"][EXACT]) == (0.0, 100.0)
        assert load_model(config.out, offline=True).known_answers is not None
        assert read_adapter(Path(config.out)).sha256 in (Path(config.out) / "README.md").read_text()
    config = replace(config, out=f"{config.out}-2", holdout=0.0)
    assert train(config, offline=True)
    assert "answers: none are learnt" in capsys.readouterr().err
    assert load_model(config.out, offline=True).known_answers is None


def test_captions_do_without(
    coloured: Path, recipe: Callable[..., TrainConfig], capsys: pytest.CaptureFixture[Any]
) -> None:
    with open(coloured / "metadata.csv", "w", newline="") as file:
        rows = [(f"{number}.png", "a wall") for number in range(80)]
        csv.writer(file).writerows([("file_name", "caption"), *rows])
    own = SourceConfig(name="", per_image=2)
    config = replace(recipe(), sources=(own,), data=str(coloured), holdout=0.2, answers=True, steps=1)
    assert train(config, offline=True)
    assert "known answers" not in capsys.readouterr().err
    assert load_model(config.out, offline=True).known_answers is None


def test_captions_are_no_questions(coloured: Path, adapter: Path, capsys: pytest.CaptureFixture[Any]) -> None:
    from vlm.cli import main as command

    with open(coloured / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([("file_name", "caption"), ("1.png", "a wall"), ("2.png", "a field")])
    assert command(["train", "answers", str(adapter), str(coloured), "--offline"]) == 1
    assert "holds no questions about one picture" in capsys.readouterr().err
