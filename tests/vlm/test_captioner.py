"""The captioner: its network against torch's own parts, its file, and beams that it speaks in."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from helpers import damages
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, softmax

from vlm.adapter_file import read_adapter, shrink
from vlm.beams import _guide
from vlm.captioner import FLOOR, HEADS, WIDTH, Captioner, CaptionNet, _lstm, shapes
from vlm.checkpoint import load_adapter, save_adapter, save_guide
from vlm.config import CAPTION_PROMPT, GenerationConfig
from vlm.consensus import Expectation
from vlm.conversation import Conversation
from vlm.decoder import DecoderState
from vlm.errors import WeightsError
from vlm.features import Seen
from vlm.generation import DecodeRequest
from vlm.images import open_picture
from vlm.processor import Row

if TYPE_CHECKING:
    from PIL import Image

    from vlm.model import VLM

Draw = Callable[..., "Image.Image"]
CELLS, CHANNELS, LABELS, WIDE = 6, 16, 3, 8


def network(count: int = 5, seed: int = 0) -> CaptionNet:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = CaptionNet(tokens=count, wide=WIDE, cells=CELLS, channels=CHANNELS, labels=LABELS)
        nn.init.normal_(net.bias)
        return net.hear(torch.randn(count, WIDE)).eval()


def sight(pictures: int = 1, seed: int = 1) -> Seen:
    chosen = torch.Generator().manual_seed(seed)
    features = torch.randn(pictures, CELLS, CHANNELS, generator=chosen)
    return Seen(features, torch.rand(pictures, LABELS, generator=chosen))


def for_model(model: VLM, tokens: list[int], seed: int = 0, loud: float = 1.0) -> Captioner:
    """An untaught captioner of these tokens of a tiny model."""
    return Captioner.of(network_for(model, len(tokens), seed, loud), tokens)


def network_for(model: VLM, count: int, seed: int = 0, loud: float = 1.0) -> CaptionNet:
    language, encoder = model.language, model.encoder
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = CaptionNet(
            tokens=count,
            wide=language.width,
            cells=encoder.tokens,
            channels=encoder.width,
            labels=len(encoder.labels),
        )
        nn.init.normal_(net.bias, std=loud)
    return net


def test_a_file_is_held_against_the_networks_own_shapes() -> None:
    net = network()
    sizes = {"tokens": 5, "wide": WIDE, "cells": CELLS, "channels": CHANNELS, "labels": LABELS}
    assert shapes(**sizes) == {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}


def test_its_lstm_is_torchs_own() -> None:
    torch.manual_seed(0)
    cell = nn.LSTMCell(5, 7)
    x, hidden, memory = torch.randn(3, 5), torch.randn(3, 7), torch.randn(3, 7)
    gates = x @ cell.weight_ih.T + cell.bias_ih + hidden @ cell.weight_hh.T + cell.bias_hh
    take, forget, new, show = gates.chunk(4, dim=1)
    found = _lstm(torch.cat([take, forget - 1, show, new], dim=1), memory)
    torch.testing.assert_close(found, cell(x, (hidden, memory)))


def test_it_looks_as_attention_does() -> None:
    """Rows of two pictures at once, against torch's attention over each row's own cells."""
    net, seen = network(), sight(2)
    shown = net.see(seen.features, seen.scores)
    word, state = net.read(torch.tensor([1, 2, 3, 4])), net.begin(4)
    looks, _, speaks, _ = net.step(word, state, shown)
    heads = net.query(looks).unflatten(-1, (HEADS, -1))[:, :, None]
    own = [part.repeat_interleave(2, dim=0) for part in (shown.keys.transpose(2, 3), shown.values)]
    found = scaled_dot_product_attention(heads, *own).flatten(1)
    heard = net.speaking(torch.cat([found, looks, torch.zeros(4, WIDTH)], dim=1))
    torch.testing.assert_close(speaks, _lstm(heard, torch.zeros(4, WIDTH))[0])


def test_rows_of_several_pictures_are_what_each_is_alone() -> None:
    net, seen = network(), sight(3)
    words, together = net.read(torch.tensor([1, 2, 3, 4, 1, 2])), net.begin(6)
    shown = net.see(seen.features, seen.scores)
    for _ in range(3):
        together = net.step(words, together, shown)
    for picture in range(3):
        part = slice(picture, picture + 1)
        own, state = net.see(seen.features[part], seen.scores[part]), net.begin(2)
        for _ in range(3):
            state = net.step(words[2 * picture : 2 * picture + 2], state, own)
        torch.testing.assert_close(state[2], together[2][2 * picture : 2 * picture + 2])


def from_the_start(net: CaptionNet, seen: Seen, places: list[int]) -> Tensor:
    """(V,) log-probabilities after a whole beginning, read anew."""
    shown, state = net.see(seen.features, seen.scores), net.begin(1)
    for place in [0, *places]:
        state = net.step(net.read(torch.tensor([place])), state, shown)
    return net.logits(state[2]).log_softmax(dim=-1)[0]


def test_what_it_remembers_of_beginnings_is_what_it_would_read_anew() -> None:
    tokens, embeddings = [9, 3, 5, 7, 11], torch.randn(12, WIDE)
    captioner, seen = Captioner.of(network(), tokens), sight()
    speaker, net = captioner.speaker(seen, embeddings), captioner._net
    assert torch.equal(speaker([[]])[0], from_the_start(net, seen, []))
    # Beams split, change places and end; 8 is a token that it does not know, and so does not hear.
    for said in ([[3], [5], [8]], [[5, 7], [5, 3], [8, 11]], [[5, 3, 3], [8, 11, 8]]):
        heard = [[tokens.index(t) for t in text if t in tokens] for text in said]
        expected = torch.stack([from_the_start(net, seen, places) for places in heard])
        torch.testing.assert_close(speaker(said), expected)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_both_together_are_a_product_of_experts(share: float) -> None:
    tokens = [9, 3, 5, 7, 11]
    captioner, logits = Captioner.of(network(), tokens), torch.randn(1, 12)
    speaker = captioner.speaker(sight(), torch.randn(12, WIDE))
    own = torch.full((12,), math.exp(FLOOR))
    own[tokens] = speaker([[]])[0].exp()
    expected = softmax(logits[0], dim=0) ** (1 - share) * own**share
    found = speaker.join(logits, [[]], share).softmax(dim=1)[0]
    torch.testing.assert_close(found, expected / expected.sum())


def test_a_file_holds_it_beside_the_adapter(make_tiny: Callable[..., VLM], tmp_path: Path) -> None:
    model = make_tiny("flamingo")
    model.hashes = {"encoder": "e", "language_model": "l"}
    save_adapter(model, tmp_path)
    width, cells, labels = model.encoder.width, model.encoder.tokens, len(model.encoder.labels)
    assert read_adapter(tmp_path).captioner(width, cells) is None
    made = for_model(model, [model.language.frame.end, 7, 5, 6])
    save_guide(tmp_path, made)
    shrink(tmp_path)
    load_adapter(model, tmp_path)
    assert model.captioner is not None
    seen = Seen(torch.randn(1, cells, width), torch.rand(1, labels))
    said = [each.speaker(seen, model.language.embeddings)([[]]) for each in (made, model.captioner)]
    assert torch.equal(*said)
    load_adapter(model, tmp_path, guides=False)
    assert model.captioner is None
    assert read_adapter(tmp_path).captioner(width, cells, labels, model.language) is not None
    with pytest.raises(WeightsError, match="`vlm train captioner` teaches one anew"):
        read_adapter(tmp_path).captioner(width, cells + 1, labels, model.language)
    with pytest.raises(WeightsError, match="`vlm train captioner` teaches one anew"):
        read_adapter(tmp_path).captioner(width, cells, labels + 1, model.language)
    for tokens in ([7, 5, 6], [model.language.frame.end, model.language.vocabulary]):
        save_guide(tmp_path, Captioner.of(network_for(model, len(tokens)), tokens))
        with pytest.raises(WeightsError, match="`vlm train captioner` teaches one anew"):
            load_adapter(model, tmp_path)


@pytest.mark.parametrize(
    "name",
    ["tokens", "net.own", "net.own.step", "net.position", "net.bias", "net.whole.weight", "net.said.weight"],
)
def test_a_damaged_one_is_refused(name: str) -> None:
    tensors = Captioner.of(network(), [9, 3, 5, 7, 11]).tensors()
    for damaged in damages(tensors, Captioner.PREFIX + name):
        with pytest.raises(WeightsError, match="is damaged"):
            Captioner.from_tensors(damaged, CHANNELS)


@pytest.mark.parametrize("tokens", [[1, 2, 3, 4, 1], [1, 2, 3, 4, -5], []])
def test_tokens_that_none_can_say_are_refused(tokens: list[int]) -> None:
    tensors = Captioner.of(network(), [9, 3, 5, 7, 11]).tensors()
    tensors["captioner.tokens"] = torch.tensor(tokens, dtype=torch.int32)
    with pytest.raises(WeightsError, match="is damaged"):
        Captioner.from_tensors(tensors, CHANNELS)


@pytest.mark.parametrize(("seed", "share"), [(0, 0.5), (1, 0.9), (2, 0.2)])
def test_wide_enough_beams_find_what_both_like_best(
    seed: int, share: float, speak_few_words: Callable[[int], VLM], draw: Draw
) -> None:
    """Every answer of up to two words, each prompt read anew with what was said so far."""
    model = speak_few_words(seed)
    end, banned = model.language.frame.end, model.language.never_said()
    words = [i for i in range(7) if not banned[i] and i != end]
    model.captioner = for_model(model, [end, *words], seed, loud=2.0)
    ask = Conversation.ask([draw(seed)], CAPTION_PROMPT)
    pictures = [open_picture(image) for image in ask.images]
    seen = model.look(pictures)
    speaker = model.captioner.speaker(seen, model.language.embeddings)
    worth: dict[str, float] = {}
    totals = {(): 0.0}
    for length in range(3):
        some = list(itertools.product(words, repeat=length))
        rows = []
        for text in some:
            tokens = model.processor.tokens(ask, hints=model.told(seen, pictures))
            tokens.add(list(text), supervised=False)
            _, logits = DecoderState.prefill(model, [model.processor.row([tokens])], seen.features)
            rows.append(logits[0])
        both = speaker.join(torch.cat(rows), some, share).log_softmax(dim=1)
        for text, row in zip(some, both, strict=True):
            totals |= {(*text, word): totals[text] + float(row[word]) for word in words}
            worth[model.language.decode(list(text))] = (totals[text] + float(row[end])) / (length + 1)
    found = model.ask_batch([ask], num_beams=90, max_new_tokens=3, captioner=share)[0]
    assert found.text == max(worth, key=lambda text: worth[text])
    assert found.logprob / found.usage.completion_tokens == pytest.approx(worth[found.text], abs=1e-4)


def test_it_says_captions_of_single_pictures_and_nothing_else(
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
    plain = [answer.logprob for answer in model.ask_batch(asks, **options)]
    greedy = model.ask_batch(asks[:1], max_new_tokens=6)[0]
    model.captioner = for_model(model, [model.language.frame.end, 5, 6], loud=3.0)
    both = [answer.logprob for answer in model.ask_batch(asks, **options)]
    same = [a == b for a, b in zip(both, plain, strict=True)]
    assert same == [False, True, True, True]
    assert [answer.logprob for answer in model.ask_batch(asks, captioner=0.0, **options)] == plain
    assert model.ask_batch(asks[:1], max_new_tokens=6)[0].text == greedy.text


def test_what_is_expected_counts_less_where_a_captioner_speaks(
    make_tiny: Callable[..., VLM], draw: Draw
) -> None:
    """In proportion to the language model's share; where that is nothing, not at all."""
    model = make_tiny("flamingo")
    request = DecodeRequest(Row.__new__(Row), torch.zeros(1, 1, 1), expected=Expectation.__new__(Expectation))
    speaker = for_model(model, [model.language.frame.end, 40]).speaker(
        model.features.see([open_picture(draw(1))]), model.language.embeddings
    )
    for share, weight in ((0.5, 1.0), (0.25, 1.5), (1.0, 0.0)):
        config = GenerationConfig(num_beams=3, consensus=2.0, captioner=share)
        assert _guide(model, request, config)[1] == 2.0
        guide, found = _guide(model, replace(request, speaker=speaker), config)
        assert found == weight
        assert (guide is None) == (weight == 0.0)


def test_captions_together_equal_those_alone(make_tiny: Callable[..., VLM], draw: Draw) -> None:
    model = make_tiny("flamingo")
    tokens = [model.language.frame.end, *range(40, 80)]
    model.captioner = for_model(model, tokens, loud=2.0)
    asks = [Conversation.ask([draw(i)], CAPTION_PROMPT if i % 3 else "what?") for i in range(7)]
    options = {"num_beams": 3, "max_new_tokens": 8}
    together = model.ask_batch(asks, batch_size=4, **options)
    alone = [model.ask_batch([ask], **options)[0] for ask in asks]
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    for one, other in zip(together, alone, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-3)
