"""Beam search against the enumeration of everything that can be said, and against transformers' generate."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch

from vlm.beams import _Beams
from vlm.conversation import Conversation
from vlm.generation import DecodeRequest

if TYPE_CHECKING:
    from PIL import Image

    from vlm.model import VLM

Draw = Callable[..., "Image.Image"]
WORDS = ["<unk>", "<|im_start|>", "<|im_end|>", "user", "assistant", "a", "b"]


def totals(model: VLM, ask: Conversation, longest: int) -> dict[tuple[int, ...], float]:
    """Log-probability of every answer of at most `longest` tokens that ends, by plain forward passes."""
    end = model.language.frame.end
    sayable = [i for i in range(len(WORDS)) if i not in model.language.added_ids and i != end]
    answers = [
        (*words, end) for length in range(longest) for words in itertools.product(sayable, repeat=length)
    ]
    told = []
    for answer in answers:
        tokens = model.processor.tokens(ask)
        tokens.add(answer, supervised=True)
        told.append(tokens)
    row = model.processor.row(told)
    batch = model.processor.batch([row])
    from vlm.answering import shown

    with torch.inference_mode():
        logits = model(batch, shown(model, ask)[1])
    likely = logits.log_softmax(-1)[0, batch.label_nodes].gather(1, batch.labels[:, None])[:, 0]
    parts = likely.split([len(answer) for answer in answers])
    return {answer: float(part.sum()) for answer, part in zip(answers, parts, strict=True)}


@pytest.mark.parametrize(("seed", "penalty"), [(0, 0.0), (1, 0.6), (2, 1.0), (3, 1.0), (4, 2.0)])
def test_wide_enough_beams_find_the_best_of_all(
    seed: int, penalty: float, speak_few_words: Callable[[int], VLM], draw: Draw
) -> None:
    model = speak_few_words(seed)
    ask = Conversation.ask([draw(seed)], "a b")
    everything = totals(model, ask, longest=3)
    assert len(everything) == 1 + 4 + 16
    best = max(everything, key=lambda answer: everything[answer] / len(answer) ** penalty)
    found = model.ask_batch([ask], num_beams=90, max_new_tokens=3, length_penalty=penalty)[0]
    assert found.text == model.language.decode(list(best))
    assert found.logprob == pytest.approx(everything[best], abs=1e-4)
    assert found.finish_reason == "stop"
    assert found.usage.completion_tokens == len(best)


def test_narrow_beams_are_no_worse_than_greedy(speak_few_words: Callable[[int], VLM], draw: Draw) -> None:
    better = 0
    for seed in range(4):
        model = speak_few_words(seed)
        ask = Conversation.ask([draw(seed)], "b a")
        greedy, beams = (
            model.ask_batch([ask], num_beams=n, max_new_tokens=6, length_penalty=0.0)[0] for n in (1, 4)
        )
        assert beams.logprob >= greedy.logprob - 1e-4
        better += beams.logprob > greedy.logprob + 1e-3
    assert better > 0


@pytest.mark.parametrize(("beams", "penalty"), [(2, 1.0), (3, 0.0), (3, 1.0), (5, 1.7)])
def test_beams_are_transformers_beams(
    beams: int, penalty: float, speak_few_words: Callable[[int], VLM]
) -> None:
    """Text alone with shut gates, where `generate` can do the same.

    A beam that the length limit cuts counts as ended there; here an answer that ended is preferred.
    """
    ended, cut = 0, 0
    for seed, longest in itertools.product(range(3), (3, 16)):
        model = speak_few_words(seed)
        language = model.language
        with torch.no_grad():
            for name, parameter in model.adapter.named_parameters():
                if name.endswith("_gate"):
                    parameter.zero_()
        ask = Conversation.ask([], "a b a")
        prompt = model.processor.tokens(ask).codes
        with torch.inference_mode():
            theirs = language.model.generate(
                torch.tensor([prompt]),
                num_beams=beams,
                max_new_tokens=longest,
                do_sample=False,
                length_penalty=penalty,
                early_stopping=False,
                eos_token_id=language.frame.end,
                pad_token_id=language.frame.end,
                suppress_tokens=list(language.added_ids),
                return_dict_in_generate=True,
                output_scores=True,
            )
        said = theirs.sequences[0, len(prompt) :].tolist()
        ours = model.ask_batch([ask], num_beams=beams, max_new_tokens=longest, length_penalty=penalty)[0]
        if said[-1] != language.frame.end and ours.finish_reason == "stop":
            continue
        assert ours.text == language.decode(said)
        length = ours.usage.completion_tokens
        theirs_score = float(theirs.sequences_scores[0])
        assert ours.logprob / length**penalty == pytest.approx(theirs_score, abs=1e-4)
        ended += ours.finish_reason == "stop"
        cut += ours.finish_reason == "length"
    assert ended >= 1
    assert ended + cut >= 3


@pytest.mark.parametrize("adapter", ["flamingo", "qformer"])
def test_prompts_searched_together_equal_prompts_alone(
    adapter: str, make_tiny: Callable[..., VLM], draw: Draw
) -> None:
    model = make_tiny(adapter)
    asks = [
        Conversation.ask([draw(1)], "what is on the grass?"),
        Conversation.ask([], "a"),
        Conversation.ask([draw(2), draw(3)], "two dogs, " * 6),
        Conversation.ask([draw(4)], "a very long one " * 12),
    ]
    together = model.ask_batch(asks, num_beams=3, max_new_tokens=12)
    for ask, answer in zip(asks, together, strict=True):
        alone = model.ask_batch([ask], num_beams=3, max_new_tokens=12)[0]
        assert (answer.text, answer.finish_reason, answer.usage) == (
            alone.text,
            alone.finish_reason,
            alone.usage,
        )
        assert answer.logprob == pytest.approx(alone.logprob, abs=1e-3)


def test_one_beam_is_greedy(make_tiny: Callable[..., VLM], draw: Draw) -> None:
    """Through the search's own code."""
    from vlm.beams import beam_search
    from vlm.config import GenerationConfig

    model = make_tiny("flamingo")
    ask = Conversation.ask([draw(1)], "what?")
    from vlm.answering import shown

    config = GenerationConfig(max_new_tokens=10)
    request = DecodeRequest(*shown(model, ask), config)
    greedy = model.ask_batch([ask], max_new_tokens=10)[0]
    writer = beam_search(model, [request], config)[0]
    assert (writer.text, writer.count) == (greedy.text, greedy.usage.completion_tokens)
    assert writer.logprob == pytest.approx(greedy.logprob, abs=1e-4)


def test_little_room_in_the_context_ends_that_prompt_alone(make_tiny: Callable[..., VLM], draw: Draw) -> None:
    model = make_tiny("flamingo")
    room = 256 - len(model.processor.tokens(Conversation.ask([], "")))
    for left in (0, 1, 3):
        crowded = Conversation.ask([], "8" * (room - left))
        assert len(model.processor.tokens(crowded)) == 256 - left
        roomy = Conversation.ask([draw(1)], "what?")
        answers = model.ask_batch([crowded, roomy], num_beams=2, max_new_tokens=9)
        assert answers[0].usage.completion_tokens <= max(1, left)
        assert answers[0].finish_reason in ("length", "stop")
        alone = model.ask_batch([roomy], num_beams=2, max_new_tokens=9)[0]
        assert answers[1].text == alone.text


def test_the_end_among_the_lower_candidates_is_no_end() -> None:
    """Half of the candidates stand by for ended beams; an end among those does not count."""
    beams = _Beams(2, penalty=1.0)
    going = beams.take(
        [(-1.0, 0, 5, -1.0), (-1.5, 0, 6, -1.5), (-2.0, 0, 9, -2.0), (-9.0, 0, 7, -9.0)], end=9
    )
    assert [token for _, token, _ in going] == [5, 6]
    assert beams.ended == []
    going = beams.take(
        [(-1.2, 0, 9, -0.2), (-1.3, 1, 5, -0.3), (-1.4, 0, 6, -0.4), (-9.0, 0, 7, -9.0)], end=9
    )
    assert [(beam, token) for beam, token, _ in going] == [(1, 5), (0, 6)]
    assert beams.ended == [(-0.6, [5, 9], [-1.0, -0.2])]
    assert not beams.done


def test_impossible_candidates_never_end_an_answer() -> None:
    beams = _Beams(2, penalty=1.0)
    assert beams.take([(-math.inf, 1, 9, -math.inf)], end=9) == []
    assert beams.ended == []
    assert beams.done


def test_stop_texts_cut_a_beams_answer(make_tiny: Callable[..., VLM], draw: Draw) -> None:
    model = make_tiny("flamingo")
    ask = Conversation.ask([draw(1)], "what?")
    whole = model.ask_batch([ask], num_beams=3, max_new_tokens=12)[0]
    middle = whole.tokens[len(whole.tokens) // 2].text.strip() or whole.text[len(whole.text) // 2]
    cut = model.ask_batch([ask], num_beams=3, max_new_tokens=12, stop=[middle])[0]
    assert cut.text == whole.text[: whole.text.index(middle)].strip()
    assert cut.finish_reason == "stop"
