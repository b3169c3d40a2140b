"""What captions will say: its arithmetic, its file, and beams that are guided by it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from helpers import damages

from vlm.adapter_file import read_adapter, shrink
from vlm.answering import _captioning
from vlm.beams import TOKEN, WHOLE
from vlm.checkpoint import load_adapter, save_adapter, save_guide
from vlm.config import CAPTION_PROMPT, GenerationConfig
from vlm.consensus import LONGEST, NAMED, Consensus, Expectation, fitting, portrait, word_groups
from vlm.conversation import Conversation
from vlm.errors import WeightsError
from vlm.features import Seen
from vlm.guide import squeezed

if TYPE_CHECKING:
    from PIL import Image

    from vlm.model import VLM

Draw = Callable[..., "Image.Image"]


def letters(width: int, seed: int = 0, scale: float = 1.0, labels: int = 0) -> Consensus:
    """One that expects a and b, alone and in pairs, more in some pictures than in others."""
    torch.manual_seed(seed)
    groups = [("a",), ("b",), ("a", "b"), ("b", "a"), ("a", "a")]
    numbers = {
        "rarity": torch.tensor([1.0, 2.0, 1.5, 1.5, 3.0]),
        "lengths": torch.eye(LONGEST + 1)[4],
        "usual": torch.rand(5) / 20,
        "mean": torch.zeros(width),
        "spread": torch.ones(width),
        "named": torch.full((labels,), 0.1),
        "turn": torch.linalg.qr(torch.randn(width + labels, width + labels)).Q,
        "seen": torch.nn.functional.normalize(torch.randn(7, width + labels), dim=1),
        "weigh": torch.randn(7, 3),
        "say": torch.randn(3, 5),
        "scale": torch.tensor(scale),
    }
    return Consensus.of(groups, numbers)


def sight(features: torch.Tensor) -> Seen:
    """A picture of an encoder without labels."""
    return Seen(features, features.new_zeros(len(features), 0))


def test_groups_are_of_one_to_four_words_without_case_and_marks() -> None:
    assert word_groups("A dog, a DOG!") == {
        ("a",): 2,
        ("dog",): 2,
        ("a", "dog"): 2,
        ("dog", "a"): 1,
        ("a", "dog", "a"): 1,
        ("dog", "a", "dog"): 1,
        ("a", "dog", "a", "dog"): 1,
    }
    assert word_groups("") == {}
    assert ("dog's",) in word_groups("the dog's ball")


def test_expected_cider_is_ten_times_the_mean_of_four_cosines() -> None:
    made = letters(4)
    expected = Expectation(made, [0.5, 0.25, 0.125, 0.0, -0.5])
    # a: 2 x 1.0, b: 1 x 2.0; a b: 1.5, b a: 1.5; "zebra" and what it is part of are not told apart.
    single = (2 * 0.5 + 2 * 0.25) / math.hypot(2, 2)
    pair = (1.5 * 0.125 + 1.5 * 0.0) / math.hypot(1.5, 1.5)
    assert expected("a b a zebra") == pytest.approx(10 * (single + pair) / 4)
    assert expected("zebra") == expected("") == 0
    assert expected("a a") < expected("a")


def test_a_whole_caption_is_as_long_as_others_are() -> None:
    """CIDEr-D multiplies by exp(-d^2 / 72), d words longer or shorter; half of these have 3 words, half 5."""
    lengths = (torch.eye(LONGEST + 1)[3] + torch.eye(LONGEST + 1)[5]) / 2
    fits = fitting(lengths)
    assert float(fits[4]) == float(fits.max()) == 1.0
    raw = [(math.exp(-((n - 3) ** 2) / 72) + math.exp(-((n - 5) ** 2) / 72)) / 2 for n in range(LONGEST + 1)]
    assert fits.tolist() == pytest.approx([each / raw[4] for each in raw], abs=1e-6)
    expected = Expectation(letters(4), [0.5, 0.25, 0.125, 0.0, -0.5])  # the others have four words
    for text, penalty in (("a b a b", 1.0), ("a b a", math.exp(-1 / 72)), ("a", math.exp(-9 / 72))):
        assert expected(text, whole=True) == pytest.approx(penalty * expected(text))
    assert expected("a " * 99, whole=True) == expected("A, " * 200, whole=True) < 1e-6


def test_a_file_holds_it_beside_the_adapter_in_a_few_bits(
    make_tiny: Callable[..., VLM], tmp_path: Path
) -> None:
    model = make_tiny("flamingo")
    model.hashes = {"encoder": "e", "language_model": "l"}
    save_adapter(model, tmp_path)
    width = model.encoder.width
    before = read_adapter(tmp_path)
    assert before.consensus(width) is None
    made = letters(width, scale=0.7)
    save_guide(tmp_path, made)
    after = read_adapter(tmp_path)
    assert before.tensors.keys() == after.tensors.keys()
    assert all(torch.equal(tensor, after.tensors[name]) for name, tensor in before.tensors.items())
    assert before.sha256 != after.sha256
    back = after.consensus(width)
    assert back is not None
    assert (back.groups, back.rarity) == (made.groups, made.rarity)
    features = torch.randn(1, 9, width)
    weights = made.expect(sight(features)).weights
    assert back.expect(sight(features)).weights == weights
    assert math.hypot(*weights) == pytest.approx(0.7, abs=1e-3)
    save_guide(tmp_path, letters(width, seed=1))
    again = read_adapter(tmp_path).consensus(width)
    assert again is not None
    assert again.expect(sight(features)).weights != weights


def test_groups_that_stand_twice_are_refused() -> None:
    tensors = letters(4).tensors()
    tensors["consensus.groups"] = squeezed(["a", "a", "b", "a b", "b a", "a a"])
    with pytest.raises(WeightsError, match="a word group stands twice"):
        Consensus.from_tensors(tensors, 4)


def test_numbers_that_multiply_to_none_are_refused() -> None:
    tensors = letters(4).tensors()
    for name in ("weigh.step", "say.step"):
        tensors[f"consensus.{name}"].fill_(6e4)
    tensors["consensus.usual"].fill_(6e4)
    tensors["consensus.spread"].fill_(1e-9)
    tensors["consensus.mean"].fill_(3e38)
    made = Consensus.from_tensors(tensors, 4)
    assert made is not None
    with pytest.raises(WeightsError, match="what it expects is no number; `vlm train consensus`"):
        made.expect(sight(torch.full((1, 2, 4), -3e38)))


def test_labels_of_another_encoder_are_refused(make_tiny: Callable[..., VLM], tmp_path: Path) -> None:
    model = make_tiny("flamingo")
    model.hashes = {"encoder": "e", "language_model": "l"}
    save_adapter(model, tmp_path)
    save_guide(tmp_path, letters(model.encoder.width, labels=3))
    with pytest.raises(WeightsError, match="3 labels of an encoder, this one has 1000: "):
        load_adapter(model, tmp_path)


def test_a_shrunk_adapter_keeps_it_and_stays_small(make_tiny: Callable[..., VLM], tmp_path: Path) -> None:
    model = make_tiny("flamingo", feedforward=300)
    model.hashes = {"encoder": "e", "language_model": "l"}
    save_adapter(model, tmp_path)
    first, second = (letters(model.encoder.width, seed) for seed in (0, 1))
    save_guide(tmp_path, first)
    whole, small = shrink(tmp_path)
    assert small < 0.6 * whole
    features = torch.randn(1, 9, model.encoder.width)
    for made in (first, second):
        file = read_adapter(tmp_path)
        found = file.consensus(model.encoder.width)
        assert found is not None
        assert found.expect(sight(features)).weights == made.expect(sight(features)).weights
        assert file.size == small
        save_guide(tmp_path, second)


def test_numbers_are_kept_in_a_few_bits() -> None:
    torch.manual_seed(0)
    width, pictures, rank, count = 90, 300, 80, 400
    numbers = {
        "rarity": torch.rand(count),
        "lengths": torch.full((LONGEST + 1,), 1 / (LONGEST + 1)),
        "usual": torch.rand(count) / 50,
        "mean": torch.randn(width),
        "spread": torch.rand(width) + 0.5,
        "named": torch.zeros(0),
        "turn": torch.linalg.qr(torch.randn(width, 80)).Q,
        "seen": torch.nn.functional.normalize(torch.randn(pictures, 80), dim=1),
        "weigh": torch.randn(pictures, rank),
        "say": torch.randn(rank, count),
        "scale": torch.ones(()),
    }
    made = Consensus.of([(f"w{i}",) for i in range(count)], numbers)
    size = sum(t.numel() * t.element_size() for t in made.tensors().values())
    assert size < 0.28 * sum(4 * t.numel() for t in numbers.values())
    pooled = numbers["mean"] + 3 * torch.randn(5, width)
    unit = torch.nn.functional.normalize((pooled - numbers["mean"]) / numbers["spread"], dim=1)
    alike = (torch.exp(4 * (unit @ numbers["turn"]) @ numbers["seen"].T) - 1) / (math.exp(4) - 1)
    said = alike @ numbers["weigh"] @ numbers["say"] + numbers["usual"]
    found = made(pooled, torch.zeros(5, 0))
    assert torch.nn.functional.cosine_similarity(found, said).min() > 0.97
    assert (found != said).any()


def test_a_portrait_is_of_what_is_seen_and_what_it_is_called() -> None:
    """The dot product of two: two thirds the cosine of features, one third that of roots of probabilities."""
    torch.manual_seed(0)
    pooled, scores = torch.randn(2, 6), torch.rand(2, 3).softmax(dim=1)
    usual = {"mean": torch.randn(6), "spread": torch.rand(6) + 0.5, "named": torch.full((3,), 0.4)}
    cosine = torch.nn.functional.cosine_similarity
    seen = cosine(*((pooled - usual["mean"]) / usual["spread"]), dim=0)
    called = cosine(*(scores.sqrt() - usual["named"]), dim=0)
    one, other = portrait(pooled, scores, usual)
    assert one @ other == pytest.approx(float(seen) * 2 / 3 + float(called) / 3, abs=1e-6)
    assert one @ one == pytest.approx(1.0)
    without = portrait(pooled, torch.zeros(2, 0), usual)
    assert without[0] @ without[1] == pytest.approx(float(seen), abs=1e-6)


def test_what_a_picture_is_called_changes_what_is_expected() -> None:
    made, features = letters(4, labels=3), torch.ones(1, 2, 4)
    cat, dog = torch.tensor([[0.9, 0.05, 0.05]]), torch.tensor([[0.05, 0.9, 0.05]])
    assert made.expect(Seen(features, cat)).weights != made.expect(Seen(features, dog)).weights


@pytest.mark.parametrize(
    "name", ["groups", "rarity", "lengths", "say", "say.step", "seen.rest", "mean", "named", "sizes"]
)
def test_a_damaged_one_is_named(name: str) -> None:
    tensors = letters(4).tensors()
    for damaged in damages(tensors, Consensus.PREFIX + name):
        with pytest.raises(WeightsError, match="is damaged"):
            Consensus.from_tensors(damaged, 4)


@pytest.mark.parametrize(("seed", "weight"), [(0, 2.0), (1, 0.5), (2, 5.0)])
def test_wide_enough_beams_find_the_best_of_likely_and_expected(
    seed: int, weight: float, speak_few_words: Callable[[int], VLM], draw: Draw
) -> None:
    model = speak_few_words(seed)
    model.consensus = letters(model.encoder.width, seed, labels=len(model.encoder.labels))
    ask = Conversation.ask([draw(seed)], CAPTION_PROMPT)
    expected = model.consensus.expect(model.look(ask_pictures(ask)))
    end = model.language.frame.end
    words = [i for i in range(7) if i not in model.language.added_ids and i != end]
    said = [list(text) for length in range(3) for text in itertools.product(words, repeat=length)]
    likely = model.score([ask], [[model.language.decode(text) for text in said]])[0]
    worth = [
        total / (len(text) + 1)
        + WHOLE * weight * expected(model.language.decode(text), whole=True)
        - TOKEN * (len(text) + 1)
        for text, total in zip(said, likely, strict=True)
    ]
    best = model.language.decode(said[worth.index(max(worth))])
    found = model.ask_batch([ask], num_beams=90, max_new_tokens=3, consensus=weight)[0]
    assert found.text == best
    assert found.logprob == pytest.approx(likely[worth.index(max(worth))], abs=1e-4)


def ask_pictures(ask: Conversation) -> list:
    from vlm.images import open_picture

    return [open_picture(image) for image in ask.images]


def test_only_the_captions_of_single_pictures_are_guided(
    speak_few_words: Callable[[int], VLM], draw: Draw
) -> None:
    model = speak_few_words(0)
    asks = [
        Conversation.ask([draw(1)], CAPTION_PROMPT),
        Conversation.ask([draw(1)], "a b"),
        Conversation.ask([draw(1), draw(2)], CAPTION_PROMPT),
        Conversation.ask([], CAPTION_PROMPT),
    ]
    options = {"num_beams": 3, "max_new_tokens": 6}
    plain = [answer.text for answer in model.ask_batch(asks, **options)]
    model.consensus = letters(model.encoder.width, scale=30.0, labels=len(model.encoder.labels))
    guided = model.ask_batch(asks, **options)
    assert [answer.text == text for answer, text in zip(guided, plain, strict=True)] == [
        False,
        True,
        True,
        True,
    ]
    assert [answer.text for answer in model.ask_batch(asks, consensus=0.0, **options)] == plain
    greedy = model.ask_batch(asks[:1], max_new_tokens=6)[0]
    model.consensus = None
    assert model.ask_batch(asks[:1], max_new_tokens=6)[0].text == greedy.text


def test_guided_captions_together_equal_those_alone(make_tiny: Callable[..., VLM], draw: Draw) -> None:
    model = make_tiny("flamingo")
    model.consensus = letters(model.encoder.width, scale=5.0, labels=len(model.encoder.labels))
    asks = [Conversation.ask([draw(i)], CAPTION_PROMPT if i % 3 else "what?") for i in range(7)]
    options = {"num_beams": 3, "max_new_tokens": 8}
    together = model.ask_batch(asks, batch_size=4, **options)
    alone = [model.ask_batch([ask], **options)[0] for ask in asks]
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    for one, other in zip(together, alone, strict=True):
        assert one.margin == pytest.approx(other.margin, abs=1e-3)


@pytest.mark.parametrize(("chance", "more"), [(0.69, 0.0), (0.71, NAMED)])
def test_what_the_classifier_is_sure_of_is_named(chance: float, more: float) -> None:
    made, features = letters(4, labels=2), torch.ones(1, 2, 4)
    seen = Seen(features, torch.tensor([[0.1, chance]]))
    plain, named = made.expect(seen), made.expect(seen, ("b", "tabby"))
    assert named.weights == plain.weights
    for text, bonus in (
        ("a Cat sits", more),
        ("two cats", more),
        ("a b", 0.0),
        ("a category", 0.0),
        ("", 0.0),
    ):
        assert named(text) == pytest.approx(plain(text) + bonus)


def test_beams_are_told_what_the_classifier_calls_a_picture(
    make_tiny: Callable[..., VLM], draw: Draw
) -> None:
    model = make_tiny("flamingo")
    model.consensus = letters(model.encoder.width, labels=len(model.encoder.labels))
    ask, scores = Conversation.ask([draw(1)], CAPTION_PROMPT), torch.zeros(1, len(model.encoder.labels))
    scores[0, model.encoder.labels.index("tabby")] = 0.9
    expected, _ = _captioning(
        model, ask, Seen(model.encode(ask_pictures(ask)), scores), GenerationConfig(num_beams=3)
    )
    assert expected is not None
    assert expected("a cat") > expected("a dog") + NAMED / 2
