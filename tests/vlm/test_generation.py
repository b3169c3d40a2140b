"""Decoding: cached as uncached, together as alone, sampled again as before, ended as told."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers import mixed

from vlm.answering import shown
from vlm.config import CAPTION_PROMPT, GenerationConfig
from vlm.conversation import Conversation
from vlm.errors import ConfigError, DataError, VLMError
from vlm.generation import DecodeBatch, DecodeRequest, sample

if TYPE_CHECKING:
    from PIL import Image

    from vlm.model import VLM

Draw = Callable[..., "Image.Image"]
FAMILIES = ("llama", "qwen2", "qwen3", "gpt2")


def request(model: VLM, ask: Conversation, **options: Any) -> DecodeRequest:
    config = GenerationConfig(**{"max_new_tokens": 10, **options})
    return DecodeRequest(*shown(model, ask), config)


def uncached(model: VLM, ask: Conversation, steps: int) -> tuple[list[int], list[float]]:
    """Greedy decoding that reads everything again for every token."""
    tokens = model.processor.tokens(ask)
    features = request(model, ask).features
    banned = model.language.never_said()
    ids, logprobs = [], []
    with torch.inference_mode():
        for _ in range(steps):
            batch = model.processor.batch([model.processor.row([tokens])])
            likely = model(batch, features)[0, -1].log_softmax(-1)
            ids.append(int(likely.masked_fill(banned, -torch.inf).argmax()))
            logprobs.append(float(likely[ids[-1]]))
            if ids[-1] == model.language.frame.end:
                break
            tokens.add(ids[-1:])
    return ids, logprobs


def run(batch: DecodeBatch) -> dict[int, list[tuple[int, float]]]:
    """Steps to the end: the tokens and log-probabilities of each slot."""
    said: dict[int, list[tuple[int, float]]] = {}
    while len(batch):
        for event in batch.step():
            said.setdefault(event.slot, []).append((event.token, event.logprob))
    return said


def same(one: list[tuple[int, float]], other: list[tuple[int, float]]) -> None:
    assert [token for token, _ in one] == [token for token, _ in other]
    assert [p for _, p in one] == pytest.approx([p for _, p in other], abs=1e-3)


# --- cached, batched --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapter", ["flamingo", "qformer"])
def test_cached_equals_uncached(adapter: str, family: str, make_tiny: Callable[..., VLM], draw: Draw) -> None:
    model = make_tiny(adapter, family)
    for ask in mixed(draw)[:5:2]:
        ids, logprobs = uncached(model, ask, 10)
        batch = DecodeBatch(model)
        batch.add([request(model, ask)])
        (said,) = run(batch).values()
        same(said, list(zip(ids, logprobs, strict=True)))


def test_batched_equals_single(tiny_model: VLM, draw: Draw) -> None:
    asks = mixed(draw)
    together = tiny_model.ask_batch(asks, max_new_tokens=10)
    for size in (2, 6):
        assert [a.text for a in tiny_model.ask_batch(asks, max_new_tokens=10, batch_size=size)] == [
            a.text for a in together
        ]
    for ask, answer in zip(asks, together, strict=True):
        alone = tiny_model.ask_batch([ask], max_new_tokens=10)[0]
        assert (answer.text, answer.finish_reason, answer.usage) == (
            alone.text,
            alone.finish_reason,
            alone.usage,
        )
        assert answer.logprob == pytest.approx(alone.logprob, abs=1e-3)
        assert answer.usage.images == len(ask.images)
    assert len({a.text for a in together}) > 3
    assert tiny_model.ask_batch([]) == []


def test_rows_join_and_leave_without_a_trace(tiny_model: VLM, draw: Draw) -> None:
    """As the server does it: prompts with more and fewer images and tokens come while others are decoded."""
    asks = mixed(draw)
    alone = []
    for ask in asks:
        batch = DecodeBatch(tiny_model)
        batch.add([request(tiny_model, ask, max_new_tokens=14)])
        alone.append(next(iter(run(batch).values())))
    chance = random.Random(5)
    batch, slots, said = DecodeBatch(tiny_model), {}, {}
    waiting, removed = list(range(len(asks))), set()
    assert batch.add([]) == []
    while waiting or len(batch):
        if waiting and (not len(batch) or chance.random() < 0.4):
            joining = [waiting.pop(0) for _ in range(min(len(waiting), chance.randint(1, 2)))]
            numbers = batch.add([request(tiny_model, asks[i], max_new_tokens=14) for i in joining])
            slots.update(zip(numbers, joining, strict=True))
        for event in batch.step():
            said.setdefault(slots[event.slot], []).append((event.token, event.logprob))
        if len(removed) < 2 and len(batch) > 2:
            for slot in [slot for slot, i in slots.items() if i not in removed and len(said.get(i, [])) == 3]:
                removed.add(slots[slot])
                batch.remove(slot)
                batch.remove(slot)  # gone already: no error
    assert sorted(said) == list(range(len(asks)))
    for i in range(len(asks)):
        same(said[i], alone[i][:3] if i in removed else alone[i])
    assert removed


def test_slots_and_writers(make_tiny: Callable[..., VLM], draw: Draw) -> None:
    model = make_tiny("flamingo")
    batch = DecodeBatch(model)
    assert batch.step() == []
    first = batch.add([request(model, Conversation.ask([draw(1)], "a"), max_new_tokens=2)])
    second = batch.add([request(model, Conversation.ask([], "b"), max_new_tokens=4)])
    assert [*first, *second] == [0, 1]
    writer = batch.writer(1)
    events = [batch.step() for _ in range(4)]
    assert [[e.slot for e in step] for step in events] == [[0, 1], [0, 1], [1], [1]]
    assert [e.finish_reason for step in events for e in step if e.slot == 0] == [None, "length"]
    assert writer.count == 4
    assert writer.logprob == pytest.approx(sum(e.logprob for step in events for e in step if e.slot == 1))
    assert len(batch) == 0
    assert batch.add([request(model, Conversation.ask([], "b"))]) == [2]


def test_a_prompt_that_fails_leaves_the_batch_as_it_was(make_tiny: Callable[..., VLM], draw: Draw) -> None:
    model = make_tiny("flamingo")
    ask = Conversation.ask([draw(1)], "what?")
    alone, batch = DecodeBatch(model), DecodeBatch(model)
    alone.add([request(model, ask)])
    batch.add([request(model, ask)])
    good = request(model, ask)
    with pytest.raises(RuntimeError):
        batch.add([DecodeRequest(good.row, good.features[..., :1], good.config)])
    same(run(batch)[0], run(alone)[0])


# --- likelihoods ------------------------------------------------------------------------------------------


def test_logprobs_are_the_teacher_forced_ones(tiny_model: VLM, draw: Draw) -> None:
    asks = mixed(draw)
    for options in ({}, {"temperature": 1.5, "seed": 3, "top_p": 0.9}, {"num_beams": 3}):
        for ask, answer in zip(asks, tiny_model.ask_batch(asks, max_new_tokens=8, **options), strict=True):
            batch = DecodeBatch(tiny_model)
            if "num_beams" not in options:
                batch.add([request(tiny_model, ask, max_new_tokens=8, **options)])
                writer = batch.writer(0)
                run(batch)
                ids = writer.ids
                tokens = tiny_model.processor.tokens(ask)
                tokens.add(ids, supervised=True)
                forced = tiny_model.processor.batch([tiny_model.processor.row([tokens])])
                with torch.inference_mode():
                    likely = tiny_model(forced, request(tiny_model, ask).features).log_softmax(-1)
                expected = likely[0, forced.label_nodes].gather(1, forced.labels[:, None])[:, 0]
                assert [t.logprob for t in writer.tokens] == pytest.approx(expected.tolist(), abs=1e-3)
            assert sum(t.logprob for t in answer.tokens) == pytest.approx(answer.logprob, abs=1e-3)


def test_score_is_the_logprob_that_ask_reports(real_model: VLM, samples_dir: Any) -> None:
    asks = [
        Conversation.ask([], "What is the capital of France?"),
        Conversation.ask([samples_dir / "cat.jpg"], "What is in the picture?"),
    ]
    answers = real_model.ask_batch(asks, max_new_tokens=12)
    assert answers[0].finish_reason == "stop"
    for ask, answer in zip(asks, answers, strict=True):
        if answer.finish_reason != "stop":
            continue
        ((score, other),) = real_model.score([ask], [[answer.text, "zebra crossing"]])
        assert score == pytest.approx(answer.logprob, abs=1e-2)
        assert other < score


def test_scores_do_not_depend_on_company(tiny_model: VLM, draw: Draw) -> None:
    asks = mixed(draw)[:3]
    candidates = [["yes", "no", "a dog runs", ""], ["yes"], []]
    together = tiny_model.score(asks, candidates)
    assert [len(scores) for scores in together] == [4, 1, 0]
    for ask, texts, scores in zip(asks, candidates, together, strict=True):
        for text, score in zip(texts, scores, strict=True):
            assert tiny_model.score([ask], [[text]])[0][0] == pytest.approx(score, abs=1e-3)
    assert all(score < 0 for scores in together for score in scores)
    with pytest.raises(ValueError, match="shorter"):
        tiny_model.score(asks, [["yes"]])


def test_probabilities_of_all_next_tokens_sum_to_one(make_tiny: Callable[..., VLM], draw: Draw) -> None:
    """Log-probabilities are the model's own: before any temperature, over the whole vocabulary."""
    model = make_tiny("flamingo")
    ask = Conversation.ask([draw(1)], "what?")
    likely = model.ask_batch([ask], max_new_tokens=1)[0].tokens[0].logprob
    hot = model.ask_batch([ask], max_new_tokens=1, temperature=1e-6, seed=1)[0].tokens[0].logprob
    assert hot == pytest.approx(likely, abs=1e-4)
    batch = model.processor.batch([request(model, ask).row])
    with torch.inference_mode():
        probabilities = model(batch, request(model, ask).features)[0, -1].softmax(-1)
    assert likely == pytest.approx(float(probabilities[~model.language.never_said()].max().log()), abs=1e-4)


# --- sampling ---------------------------------------------------------------------------------------------


def test_a_seed_makes_sampling_repeatable(tiny_model: VLM, draw: Draw) -> None:
    ask = Conversation.ask([draw(1)], "what?")
    options = {"temperature": 1.0, "max_new_tokens": 12}
    one = tiny_model.ask_batch([ask], seed=1, **options)[0]
    assert tiny_model.ask_batch([ask], seed=1, **options)[0].text == one.text
    # In company, and whatever torch's own generator has been through.
    torch.manual_seed(99)
    torch.rand(7)
    company = [Conversation.ask([], "hello"), ask, Conversation.ask([draw(2)], "longer than that")]
    assert tiny_model.ask_batch(company, seed=1, **options)[1].text == one.text
    assert "".join(tiny_model.stream(ask, seed=1, **options)) == one.text
    texts = {tiny_model.ask_batch([ask], seed=seed, **options)[0].text for seed in range(5)}
    assert len(texts) > 3
    assert len({tiny_model.ask_batch([ask], **options)[0].text for _ in range(5)}) > 1


def test_samples_follow_the_probabilities() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -torch.inf])
    generator = torch.Generator().manual_seed(0)
    for temperature, top_p, expected in (
        (1.0, 1.0, logits.softmax(-1)),
        (2.0, 1.0, (logits / 2).softmax(-1)),
        (1.0, 0.8, torch.tensor([0.7311, 0.2689, 0, 0, 0])),
        (1.0, 0.1, torch.tensor([1.0, 0, 0, 0, 0])),
    ):
        config = GenerationConfig(temperature=temperature, top_p=top_p)
        counts = Counter(sample(logits, config, generator) for _ in range(4000))
        shares = torch.tensor([counts[i] / 4000 for i in range(5)])
        torch.testing.assert_close(shares, expected, atol=0.03, rtol=0)
        assert all((shares > 0) == (expected > 0.005))


@pytest.mark.parametrize("temperature", [5e-324, 1e-30, 1e-3, 1e30])
def test_extreme_temperatures(temperature: float) -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(1))
    config = GenerationConfig(temperature=temperature)
    drawn = {sample(logits, config, torch.Generator().manual_seed(seed)) for seed in range(30)}
    assert drawn == {int(logits.argmax())} if temperature < 1 else len(drawn) > 10


# --- ends ---------------------------------------------------------------------------------------------------


def test_finish_reasons(real_model: VLM, samples_dir: Path) -> None:
    """A caption, whatever it says, has several words and an end."""
    asked = Conversation.ask([samples_dir / "cat.jpg"], CAPTION_PROMPT)
    (whole,) = real_model.ask_batch([asked], max_new_tokens=60)
    words = whole.text.split()
    assert (whole.finish_reason, whole.usage.completion_tokens) == ("stop", len(whole.tokens) + 1)
    assert len(words) >= 3
    (cut,) = real_model.ask_batch([asked], max_new_tokens=2)
    assert (cut.finish_reason, cut.usage.completion_tokens, len(cut.tokens)) == ("length", 2, 2)
    assert whole.text.startswith(cut.text)
    (stopped,) = real_model.ask_batch([asked], stop=(words[1],))
    assert stopped.finish_reason == "stop"
    assert stopped.text == whole.text[: whole.text.index(words[1])].strip()
    assert stopped.usage.completion_tokens == len(stopped.tokens)
    (exact,) = real_model.ask_batch([asked], max_new_tokens=whole.usage.completion_tokens - 1)
    assert (exact.text, exact.finish_reason) == (whole.text, "length")


def test_answers_end_where_the_context_does(tiny_model: VLM, draw: Draw) -> None:
    longest = tiny_model.language.max_positions
    shortest = len(tiny_model.processor.tokens(Conversation.ask([draw(1)], "")))
    for left in (0, 3):
        ask = Conversation.ask([draw(1)], "8" * (longest - shortest - left))
        beside = Conversation.ask([], "hello")
        answers = tiny_model.ask_batch([ask, beside], max_new_tokens=8, temperature=3.0, seed=4)
        assert answers[0].usage.prompt_tokens == longest - left
        assert answers[0].usage.completion_tokens <= max(1, left)
        assert answers[1].usage.completion_tokens == 8 or answers[1].finish_reason == "stop"
    with pytest.raises(DataError, match=f"language model reads {longest}"):
        tiny_model.ask([draw(1)], "8" * (longest - shortest + 1))


def test_added_tokens_are_never_said(tiny_model: VLM, draw: Draw) -> None:
    ask, batch = Conversation.ask([draw(1)], "a"), DecodeBatch(tiny_model)
    options = {"temperature": 50.0, "max_new_tokens": 30}
    batch.add([request(tiny_model, ask, seed=seed, **options) for seed in range(24)])
    said = {token for tokens in run(batch).values() for token, _ in tokens}
    assert len(said) > 100
    assert not said & set(tiny_model.language.added_ids)


# --- what cannot be meant -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": 1.5},
        {"max_new_tokens": "5"},
        {"num_beams": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"seed": 2**64},
        {"seed": "x"},
        {"length_penalty": float("nan")},
        {"batch_size": 0},
        {"stop": 5},
        {"stop": [5]},
        {"num_beams": 2, "temperature": 1.0},
        {"no_such_option": 1},
    ],
)
def test_wrong_options(options: dict[str, Any], speaker: VLM) -> None:
    with pytest.raises(ConfigError, match="|".join(options)):
        speaker.ask([], "hello", **options)


def test_a_stop_text_alone_is_one_stop_text(speaker: VLM, draw: Draw) -> None:
    whole = speaker.ask([draw(1)], "what?", max_new_tokens=20)
    rare = next(a + b for a, b in zip(whole.text[2:], whole.text[3:], strict=False) if (a + b).isprintable())
    cut = speaker.ask([draw(1)], "what?", max_new_tokens=20, stop=rare)
    assert cut.text == whole.text[: whole.text.index(rare)].strip()


def test_beams_do_not_stream(speaker: VLM) -> None:
    with pytest.raises(ConfigError, match="stream"):
        next(speaker.stream(Conversation.ask([], "hello"), num_beams=2))


def test_the_users_turn_is_last(speaker: VLM) -> None:
    for conversation in (Conversation.ask([], "hello").answered("hi"), Conversation((), ())):
        with pytest.raises(DataError, match="user's turn"):
            speaker.ask_batch([conversation])
        with pytest.raises(DataError, match="user's turn"):
            list(speaker.stream(conversation))


def test_nine_pictures_side_by_side(make_tiny: Callable[..., VLM], draw: Draw) -> None:
    model = make_tiny("flamingo", max_group=8)
    assert model.ask([draw(i) for i in range(8)], "all?", max_new_tokens=2).usage.images == 8
    with pytest.raises(DataError, match="at most 8 images"):
        model.ask([draw(i) for i in range(9)], "all?")
    assert make_tiny("qformer").ask([draw(i) for i in range(9)], "all?", max_new_tokens=2).usage.images == 9


def test_empty_questions_and_answers(tiny_model: VLM, draw: Draw) -> None:
    assert tiny_model.ask([draw(1)], "", max_new_tokens=3).usage.completion_tokens >= 1
    assert tiny_model.ask([], "", max_new_tokens=3).usage.images == 0


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 1}, {"num_beams": 2}])
def test_numbers_that_overflow_are_told(options: dict[str, Any], make_tiny: Callable[..., VLM]) -> None:
    model = make_tiny("flamingo")
    with torch.no_grad():
        model.language.body.norm.weight.fill_(float("nan"))
    with pytest.raises(VLMError, match="overflow"):
        model.ask([], "hello", **options)
