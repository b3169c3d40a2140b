"""Known answers: which are expected, the file that holds them, and decoding that is guided by them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from helpers import damages
from torch.nn.functional import normalize

from vlm.adapter_file import read_adapter
from vlm.checkpoint import load_adapter, save_adapter, save_guide
from vlm.config import CAPTION_PROMPT
from vlm.conversation import Conversation
from vlm.errors import ConfigError, WeightsError
from vlm.features import Seen
from vlm.guide import squeezed
from vlm.known_answers import (
    FAMILIAR,
    NOTHING,
    STRANGE,
    AnswerGuide,
    KnownAnswers,
    QuestionKernel,
    joint,
    plain,
    question_groups,
    standardised,
    summary,
)

if TYPE_CHECKING:
    from PIL import Image

    from vlm.model import VLM

Draw = Callable[..., "Image.Image"]
PREFIX = KnownAnswers.PREFIX
QUESTIONS = ["what is this", "what colour is the wall", "how many chairs are there"]


def known(width: int, answers: tuple[str, ...] = ("a", "a b", "b b a"), scale: float = 1.0) -> KnownAnswers:
    """One that has seen a picture for each of three questions."""
    torch.manual_seed(0)
    numbers = {
        "mean": torch.zeros(2 * width),
        "spread": torch.ones(2 * width),
        "turn": torch.linalg.qr(torch.randn(2 * width, 5)).Q,
        "seen": normalize(torch.randn(3, 5), dim=1) / 3,
        "weigh": scale * torch.eye(3)[:, : len(answers)],
        "pictures": torch.tensor([0, 1, 2]),
    }
    return KnownAnswers.of(QUESTIONS, answers, numbers)


def test_groups_of_a_question_know_where_it_begins_and_ends() -> None:
    assert question_groups(plain("What is... IT?")) == {
        ("what",),
        ("is",),
        ("it",),
        ("<", "what"),
        ("what", "is"),
        ("is", "it"),
        ("it", ">"),
        ("<", "what", "is"),
        ("what", "is", "it"),
        ("is", "it", ">"),
    }
    assert plain("Wie groß ist Zoës Hund?") == "wie groß ist zoës hund"
    assert question_groups("") == {("<", ">")}


def test_questions_are_alike_by_their_words() -> None:
    kernel = QuestionKernel(QUESTIONS)
    alike = kernel([*QUESTIONS, "what is that", "quo vadis", ""])
    torch.testing.assert_close(alike[:3].diagonal(), torch.ones(3))
    # "what is this" and "what is that" share 4 of 10 groups: what, is, < what, what is, < what is.
    cosine = 5 / 10
    assert alike[3, 0] == pytest.approx((math.exp(2 * cosine) - 1) / (math.exp(2) - 1))
    assert alike[3, 0] > alike[3, 1] > 0
    assert alike[4].tolist() == alike[5].tolist() == [0.0, 0.0, 0.0]


def test_a_summary_tells_what_is_there_and_how_much_it_varies() -> None:
    torch.manual_seed(0)
    features = torch.randn(2, 9, 4)
    torch.testing.assert_close(summary(features)[:, :4], features.mean(dim=1))
    torch.testing.assert_close(summary(features)[:, 4:], features.std(dim=1, correction=0))
    assert summary(features[:, :1])[:, 4:].tolist() == [[0.0] * 4] * 2


def test_like_questions_about_like_pictures_decide() -> None:
    made = known(8)
    features = torch.randn(2, 9, 8)
    share = made("what is this?", features)
    unit = summary(features).chunk(2, dim=1)
    seen = torch.cat([normalize(half, dim=1) for half in unit], dim=1) / math.sqrt(2)
    numbers = made._numbers
    near = (seen @ numbers["turn"]) @ numbers["seen"].T
    alike = QuestionKernel(QUESTIONS)(["what is this"])
    torch.testing.assert_close(share, alike * (1 + 3 * near) / 4 @ numbers["weigh"])
    assert share.argmax(dim=1).tolist() == [0, 0]
    assert [answer for answer, _ in made.expect("What is this?", features[:1])][0] == "a"
    assert made.expect("quo vadis?", features[:1]) == []


def test_what_merely_begins_alike_is_not_guided() -> None:
    made = known(8)
    features = torch.randn(1, 9, 8)
    kernel = QuestionKernel(QUESTIONS)
    for question, trust in (("what is the capital of France?", 0.0), ("what is this?", 1.0)):
        alike = kernel([plain(question)])
        assert ((alike.max() - STRANGE) / (FAMILIAR - STRANGE)).clamp(0, 1) == trust
        assert bool(made(question, features).any()) == bool(trust)
        assert bool(made.expect(question, features)) == bool(trust)
    half = "what colour is the old door"
    trust = float((kernel([half]).max() - STRANGE) / (FAMILIAR - STRANGE))
    assert 0 < trust < 1
    unit = standardised(summary(features), torch.zeros(16), torch.ones(16))
    near = unit @ made._numbers["turn"] @ made._numbers["seen"].T
    whole = joint(kernel([half]), near) @ made._numbers["weigh"]
    torch.testing.assert_close(made(half, features), trust * whole)


def test_a_guide_raises_the_tokens_that_lead_to_an_answer() -> None:
    guide = AnswerGuide([([5, 6, 0], 0.3), ([5, 7, 0], 0.6), ([8, 0], 0.1)])
    low, high, third = (math.log1p(share / NOTHING) for share in (0.3, 0.6, 0.1))
    assert guide([]) == {5: high, 8: third}
    assert guide([5]) == {6: low, 7: high}
    assert guide([5, 6]) == {0: low}
    assert guide([6]) == guide([8, 0]) == {}


def answered(model: VLM, asks: list[Conversation], **options: object) -> list[str]:
    return [answer.text for answer in model.ask_batch(asks, max_new_tokens=6, **options)]


def test_only_greedy_answers_to_one_question_about_one_picture_are_guided(
    speak_few_words: Callable[[int], VLM], draw: Draw
) -> None:
    model = speak_few_words(0)
    asks = [
        Conversation.ask([draw(1)], "what is this?"),
        Conversation.ask([draw(1)], "how many chairs are there?"),
        Conversation.ask([draw(1)], "quo vadis?"),
        Conversation.ask([draw(1)], CAPTION_PROMPT),
        Conversation.ask([draw(1), draw(2)], "what is this?"),
        Conversation.ask([], "what is this?"),
    ]
    before = answered(model, asks)
    assert before[0] != "a"
    model.known_answers = known(model.encoder.width)
    guided = answered(model, asks, known_answers=30.0)
    assert guided == ["a", "b b a", *before[2:]]
    assert answered(model, asks, known_answers=0.0) == before
    assert answered(model, asks[:1], known_answers=30.0, num_beams=2) == answered(
        model, asks[:1], num_beams=2
    )
    sampled = {"temperature": 1.0, "seed": 3}
    drawn = answered(model, asks[:1], known_answers=30.0, **sampled)
    model.known_answers = None
    assert answered(model, asks[:1], **sampled) == drawn
    assert answered(model, asks) == before
    with pytest.raises(ConfigError, match="known_answers"):
        model.ask_batch(asks, known_answers=-1.0)


def test_a_little_weight_leaves_the_language_model_its_say(
    speak_few_words: Callable[[int], VLM], draw: Draw
) -> None:
    """Of all answers that are known, the best by log-probability and weighted expectation is said."""
    model = speak_few_words(0)
    ask = Conversation.ask([draw(4)], "what is this?")
    said = ("a", "b")
    weight = 0.5
    model.known_answers = known(model.encoder.width, said, scale=0.2)
    shares = dict(model.known_answers.expect("what is this?", model.encode([_open(ask)])))
    likely = model.score([ask], [list(said)])[0]
    free = model.ask_batch([ask], max_new_tokens=6, known_answers=0.0)[0]
    guided = model.ask_batch([ask], max_new_tokens=6, known_answers=weight)[0]
    worth = {
        text: total + weight * math.log1p(shares.get(text, 0.0) / NOTHING)
        for text, total in zip(said, likely, strict=True)
    }
    assert guided.text in {free.text, max(worth, key=worth.__getitem__)}
    # Its probability is the model's own, whatever made it the answer.
    strong = model.ask_batch([ask], max_new_tokens=6, known_answers=50.0)[0]
    assert strong.text == "a"
    assert strong.logprob == pytest.approx(likely[0], abs=1e-4)


def _open(ask: Conversation) -> object:
    from vlm.images import open_picture

    return open_picture(ask.images[0])


def test_guided_answers_together_streamed_and_alone_are_equal(
    make_tiny: Callable[..., VLM], draw: Draw
) -> None:
    model = make_tiny("flamingo")
    model.known_answers = known(model.encoder.width, ("red", "two", "a"))
    pictures = [draw(i) for i in range(3)]
    asks = [
        Conversation.ask([pictures[i % 3]], question)
        for i, question in enumerate([*QUESTIONS, "what is on the wall", "why", *QUESTIONS])
    ]
    options = {"max_new_tokens": 8, "known_answers": 20.0}
    together = model.ask_batch(asks, **options)
    alone = [model.ask_batch([ask], **options)[0] for ask in asks]
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    assert {"red", "two"} <= {answer.text for answer in together}
    for ask, answer in zip(asks, together, strict=True):
        assert "".join(model.stream(ask, **options)) == answer.text
    for one, other in zip(together, alone, strict=True):
        assert one.margin == pytest.approx(other.margin, abs=1e-3)


def test_a_file_holds_them_beside_the_adapter_and_its_consensus(
    make_tiny: Callable[..., VLM], tmp_path: Path
) -> None:
    from test_consensus import letters

    model = make_tiny("flamingo")
    model.hashes = {"encoder": "e", "language_model": "l"}
    save_adapter(model, tmp_path)
    width, labels, cells = model.encoder.width, len(model.encoder.labels), model.encoder.tokens
    assert read_adapter(tmp_path).known_answers(width, cells) is None
    made, captions = known(width), letters(width, seed=1, labels=labels)
    for guide in (letters(width, labels=labels), made, captions):
        save_guide(tmp_path, guide)
    file = read_adapter(tmp_path)
    back, consensus = file.known_answers(width, cells), file.consensus(width)
    assert back is not None
    assert consensus is not None
    features = torch.randn(1, 9, width)
    assert back.expect("what is this?", features) == made.expect("what is this?", features)
    seen = Seen(features, torch.rand(1, labels).softmax(dim=1))
    assert consensus.expect(seen).weights == captions.expect(seen).weights
    load_adapter(model, tmp_path)
    assert model.known_answers is not None
    load_adapter(model, tmp_path, guides=False)
    assert model.known_answers is None


def test_numbers_are_kept_in_a_few_bits() -> None:
    torch.manual_seed(0)
    width, count = 40, 300
    numbers = {
        "mean": torch.randn(2 * width),
        "spread": torch.rand(2 * width) + 0.5,
        "turn": torch.linalg.qr(torch.randn(2 * width, 60)).Q,
        "seen": normalize(torch.randn(90, 60), dim=1),
        "weigh": torch.randn(count, 50),
        "pictures": torch.arange(count) % 90,
    }
    questions = [f"what is {i} of {i % 7} and {i % 11}" for i in range(count)]
    made = KnownAnswers.of(questions, [f"answer {i}" for i in range(50)], numbers)
    size = sum(t.numel() * t.element_size() for t in made.tensors().values())
    assert size < 0.35 * sum(4 * t.numel() for t in numbers.values())
    for name in ("turn", "seen", "weigh"):
        held = made._numbers[name]
        assert (held != numbers[name]).any()
        assert torch.cosine_similarity(held.flatten(), numbers[name].flatten(), dim=0) > 0.99


@pytest.mark.parametrize(
    "name", ["answers", "questions", "pictures", "mean", "turn", "seen.step", "weigh", "sizes"]
)
def test_damaged_ones_are_named(name: str) -> None:
    tensors = known(4).tensors()
    for damaged in damages(tensors, KnownAnswers.PREFIX + name):
        with pytest.raises(WeightsError, match="is damaged"):
            KnownAnswers.from_tensors(damaged, 4)
    with pytest.raises(WeightsError, match="of another encoder"):
        KnownAnswers.from_tensors(tensors, 5)


def test_what_points_nowhere_is_refused() -> None:
    tensors = known(4).tensors()
    for place in (-1, 3):
        wrong = tensors | {f"{PREFIX}pictures": torch.tensor([0, 1, place], dtype=torch.int32)}
        with pytest.raises(WeightsError, match="one that is not there"):
            KnownAnswers.from_tensors(wrong, 4)
    cut = tensors | {f"{PREFIX}questions": tensors[f"{PREFIX}questions"][:-6]}
    with pytest.raises(WeightsError, match="cut off"):
        KnownAnswers.from_tensors(cut, 4)
    spoilt = tensors | {f"{PREFIX}mean": torch.full((8,), math.inf)}
    with pytest.raises(WeightsError, match="not finite"):
        KnownAnswers.from_tensors(spoilt, 4)
    for spread in (0.0, -1.0, 1e-20):
        with pytest.raises(WeightsError, match="spread holds a number below"):
            KnownAnswers.from_tensors(tensors | {f"{PREFIX}spread": torch.full((8,), spread)}, 4)
    for sizes in ([2**28, 0], [3, -1], [0, 0]):  # of the first, one question would fill a gigabyte
        with pytest.raises(WeightsError, match="sizes holds a number below"):
            KnownAnswers.from_tensors(tensors | {f"{PREFIX}sizes": torch.tensor(sizes)}, 4)
    for name in ("mean", "weigh.step"):
        with pytest.raises(WeightsError, match="is damaged"):
            KnownAnswers.from_tensors(tensors | {PREFIX + name: tensors[PREFIX + name].double()}, 4)
    long = {f"{PREFIX}questions": squeezed(["what", "why", "so " * 200])}
    with pytest.raises(WeightsError, match="longer than 300 letters"):
        KnownAnswers.from_tensors(tensors | long, 4)
