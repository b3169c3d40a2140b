"""Networks of known answers: what they tell that a picture's summary cannot, and how they are kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from helpers import damages

from vlm.adapter_file import read_adapter
from vlm.answer_net import AnswerNet, AnswerNets
from vlm.checkpoint import load_adapter, save_adapter, save_guide
from vlm.errors import DataError, WeightsError
from vlm.features import Seen
from vlm.known_answers import KnownAnswers, question_groups, summary
from vlm.train.answer_net import Shown, learn_nets
from vlm.train.answers import Answered, fit

if TYPE_CHECKING:
    from torch import Tensor

    from vlm.model import VLM

THINGS = ("lamp", "sofa", "door", "chair")
LEFT, RIGHT = "what is on the left", "what is on the right"
KEPT = (
    "net.groups",
    "net0.position",
    "net0.cell.weight",
    "net1.position",
    "net1.answer.bias",
    "net1.words.weight.step",
)


def rooms(count: int, seed: int, cells: int = 9) -> tuple[Tensor, list[tuple[str, str]]]:
    """Rooms with one thing in the first cell and another in the last: features, and what each thing is."""
    noise = torch.Generator().manual_seed(seed)
    looks = torch.randn(len(THINGS), 16, generator=torch.Generator().manual_seed(99))
    features = 0.1 * torch.randn(count, cells, 16, generator=noise)
    there = []
    for number in range(count):
        left, right = torch.randperm(len(THINGS), generator=noise)[:2].tolist()
        features[number, 0] += looks[left]
        features[number, -1] += looks[right]
        there.append((THINGS[left], THINGS[right]))
    return features, there


def asked(features: Tensor, there: list[tuple[str, str]]) -> Answered:
    """Both questions about every room."""
    pictures = torch.arange(len(there)).repeat_interleave(2)
    answers = [(name,) for pair in there for name in pair]

    def cells(view: int, some: Tensor) -> Tensor:
        return features[some].flip(1) if view else features[some]

    return Answered([LEFT, RIGHT] * len(there), answers, pictures, summary(features), cells)


@pytest.fixture(scope="module")
def fitted() -> KnownAnswers:
    return fit(asked(*rooms(200, seed=0)))


def test_they_look_where_a_question_tells_them_to(fitted: KnownAnswers) -> None:
    """Means and spreads of a picture are the same when two things change places."""
    features, there = rooms(50, seed=1)
    regression = KnownAnswers.from_tensors(
        {name: tensor for name, tensor in fitted.tensors().items() if ".net" not in name}, 16
    )
    assert regression is not None
    assert (fitted.cells, regression.cells) == (9, 0)

    def right(known: KnownAnswers) -> int:
        return sum(
            known.expect(question, features[i : i + 1])[0][0] == answer
            for i, pair in enumerate(there)
            for question, answer in zip((LEFT, RIGHT), pair, strict=True)
        )

    assert right(regression) < 70
    assert right(fitted) > 90


def test_many_questions_are_left_to_one_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers alone, in a smaller file, and still knows which pictures it was told about."""
    monkeypatch.setattr("vlm.train.answers.REGRESSED", 399)
    features, there = rooms(200, seed=0)
    many = KnownAnswers.from_tensors(fit(asked(features, there)).tensors(), 16)
    assert many is not None
    held = {name.removeprefix(KnownAnswers.PREFIX).partition(".")[0] for name in many.tensors()}
    assert held.isdisjoint({"pictures", "weigh", "net1"})
    new, answers = rooms(50, seed=1)
    said = [many.expect(LEFT, new[i : i + 1])[0][0] for i in range(50)]
    assert sum(word == left for word, (left, _) in zip(said, answers, strict=True)) > 45
    assert many.expect("who paid for all of this", new[:1]) == []
    unlike = torch.randn(5, 9, 16, generator=torch.Generator().manual_seed(2))
    seen = Seen(torch.cat([features[:5], unlike]), torch.zeros(10, 0))
    assert many.fitted_to(seen).tolist() == [True] * 5 + [False] * 5


def test_many_questions_without_a_word_in_common_teach_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm.train.answers.REGRESSED", 99)
    features, there = rooms(50, seed=0)
    data = asked(features, there)
    data.questions = [f"one{i} two{i}" for i in range(100)]
    with pytest.raises(DataError, match="no words stand in several of 100 questions"):
        fit(data)


@pytest.mark.parametrize("lost", [("pictures",), ("weigh",), ("net", "weigh")])
def test_half_a_regression_is_none(lost: tuple[str, ...], fitted: KnownAnswers) -> None:
    begins = tuple(KnownAnswers.PREFIX + name for name in lost)
    held = {name: tensor for name, tensor in fitted.tensors().items() if not name.startswith(begins)}
    with pytest.raises(WeightsError, match="is damaged"):
        KnownAnswers.from_tensors(held, 16)


def test_rooms_together_are_expected_what_they_are_alone(fitted: KnownAnswers) -> None:
    features, _ = rooms(5, seed=2)
    alone = torch.cat([fitted(LEFT, features[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(fitted(LEFT, features), alone, atol=1e-5, rtol=1e-4)


def test_questions_of_one_batch_do_not_mix() -> None:
    torch.manual_seed(0)
    net, cells, whole = AnswerNet(7, 9, 16, 4).eval(), torch.randn(3, 9, 16), torch.randn(3, 32)
    nets = AnswerNets([(letter,) for letter in "abcdefg"], [net])
    questions = [{("a",), ("d",)}, {("unheard",)}, {("b",), ("c",), ("g",)}]
    together = net(*nets.places(questions), cells, whole)
    for i, question in enumerate(questions):
        alone = net(*nets.places([question]), cells[i : i + 1], whole[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone)


def test_the_same_is_learnt_whoever_drew_before() -> None:
    features, there = rooms(60, seed=3)
    data = asked(features, there)
    torch.manual_seed(1)
    one = fit(data).tensors()
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    other = fit(data).tensors()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(other[name], tensor) for name, tensor in one.items())


def test_words_that_stand_in_few_questions_teach_nothing() -> None:
    features, _ = rooms(4, seed=4)
    shown = Shown(lambda _, some: features[some], summary(features), summary(features).mean(dim=0))
    texts = ["one", "two", "three", "four"]
    assert learn_nets(texts, torch.eye(4), torch.arange(4), shown) is None


def test_eight_bits_hold_them(fitted: KnownAnswers) -> None:
    back = KnownAnswers.from_tensors(fitted.tensors(), 16)
    features, _ = rooms(3, seed=5)
    assert back is not None
    assert torch.equal(back(RIGHT, features), fitted(RIGHT, features))
    nets = {name: tensor for name, tensor in fitted.tensors().items() if ".net" in name}
    size = sum(tensor.numel() * tensor.element_size() for tensor in nets.values())
    groups = len({group for question in (LEFT, RIGHT) for group in question_groups(question)})
    numbers = sum(weight.numel() for weight in AnswerNet(groups, 9, 16, len(THINGS)).parameters())
    assert size < 2 * 1.2 * numbers


@pytest.mark.parametrize("name", KEPT)
def test_damaged_ones_are_named(name: str, fitted: KnownAnswers) -> None:
    for damaged in damages(fitted.tensors(), KnownAnswers.PREFIX + name):
        with pytest.raises(WeightsError, match="is damaged"):
            KnownAnswers.from_tensors(damaged, 16)


def test_an_encoder_of_other_cells_is_told_apart(make_tiny: Callable[..., VLM], tmp_path: Path) -> None:
    model = make_tiny("flamingo")
    model.hashes = {"encoder": "e", "language_model": "l"}
    save_adapter(model, tmp_path)
    width, cells = model.encoder.width, model.encoder.tokens
    features = torch.randn(100, cells + 1, width)
    questions, answers = [LEFT, RIGHT] * 50, [("lamp",), ("door",)] * 50
    data = Answered(questions, answers, torch.arange(100), summary(features), lambda _, some: features[some])
    save_guide(tmp_path, fit(data))
    assert read_adapter(tmp_path).known_answers(width, cells + 1) is not None
    with pytest.raises(WeightsError, match=f"{cells + 1} cells of a picture, this encoder sees {cells}"):
        load_adapter(model, tmp_path)
