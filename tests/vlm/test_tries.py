"""Tries: what samples share is read once in a row, and each still has its own loss; rows make a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.conversation import Conversation, ImageSlot, Turn
from vlm.errors import DataError
from vlm.processor import Processor, Row, ancestors

if TYPE_CHECKING:
    from PIL import Image

    from vlm.model import VLM

Draw = Callable[..., "Image.Image"]


def test_a_trie_shares_beginnings(processor: Processor) -> None:
    asks = ["Who?", "Where?"]
    told = [
        processor.tokens(Conversation.ask([], q), a) for q in asks for a in ("a dog", "a dog runs", "a dog")
    ]
    row = processor.row(told, [1.0, 2.0, 3.0, 1.0, 1.0, 1.0])
    words = processor.encode_text
    shared = len(processor.frame.user_open)
    branch = len(words("Who?")) + 2 + len(processor.frame.assistant_open) + len(words("a dog runs"))
    other = len(words("Where?")) + 2 + len(processor.frame.assistant_open) + len(words("a dog runs"))
    assert len(row.codes) == shared + branch + other
    assert len(row.labels) == sum(sum(t.supervised) for t in told)
    assert sum(weight for _, code, weight in row.labels if code == processor.frame.end) == 9.0
    for node, parent in enumerate(row.parents):
        assert parent < node
        assert row.depths[node] == (row.depths[parent] + 1 if parent >= 0 else 0)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=12))
def test_ancestors(choices: list[int]) -> None:
    parents = [-1] + [min(choice, i) for i, choice in enumerate(choices)]
    seen = ancestors(parents)
    for node in range(len(parents)):
        path, at = set(), node
        while at >= 0:
            path.add(at)
            at = parents[at]
        assert {i for i, sees in enumerate(seen[node].tolist()) if sees} == path


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("adapter", ["flamingo", "qformer"])
def test_a_trie_equals_separate_rows(
    adapter: str, family: str, make_tiny: Callable[..., VLM], draw: Draw
) -> None:
    """The loss of several questions and answers about two pictures, and its gradient."""
    model = make_tiny(adapter, family)
    processor = model.processor
    pairs = [
        ("what?", "a dog"),
        ("what?", "a dog runs"),
        ("what?", "a dog"),
        ("where is it?", "in the water"),
        ("", ""),
    ]
    weights = [1.0, 2.0, 0.5, -1.0, 1.0]
    images = [draw(1), draw(2)]
    told = [processor.tokens(Conversation.ask(images, q), a) for q, a in pairs]
    features = model.encode([_picture(image) for image in images])
    results = []
    for rows in (
        [processor.row(told, weights)],
        [processor.row([t], [w]) for t, w in zip(told, weights, strict=True)],
    ):
        model.zero_grad()
        repeated = features.repeat(len(rows), 1, 1)
        loss, weight = model.loss(processor.batch(rows), repeated, 0.1)
        loss.backward()
        results.append(
            [loss.detach(), weight, *(p.grad.clone() for p in model.trainable() if p.grad is not None)]
        )
    assert len(results[0]) > 10
    torch.testing.assert_close(results[0], results[1], atol=2e-4, rtol=1e-3)


def _picture(image: Image.Image) -> Any:
    from vlm.images import open_picture

    return open_picture(image)


def test_what_cannot_share_a_row(make_tiny: Callable[..., VLM], draw: Draw) -> None:
    processor = make_tiny("flamingo").processor
    one, two = Conversation.ask([draw(1)], "a"), Conversation.ask([draw(1), draw(2)], "a")
    with pytest.raises(DataError, match="same images"):
        processor.row([processor.tokens(one, "x"), processor.tokens(two, "x")])
    apart = Conversation((draw(1), draw(2)), (Turn("user", (ImageSlot(0), "a", ImageSlot(1))),))
    with pytest.raises(DataError, match="same images"):
        processor.row([processor.tokens(apart, "x"), processor.tokens(two, "x")])
    asked = make_tiny("qformer", question_aware=True).processor
    with pytest.raises(DataError, match="row for each question"):
        asked.row([asked.tokens(Conversation.ask([draw(1)], q), "x") for q in ("a", "b")])


def test_batches_pad_on_either_side(processor: Processor) -> None:
    rows: list[Row] = [
        processor.row([processor.tokens(Conversation.ask([], q))]) for q in ("Who is it?", "Who?")
    ]
    right, left = processor.batch(rows), processor.batch(rows, left=True)
    long, short = len(rows[0].codes), len(rows[1].codes)
    assert right.ids[1, :short].tolist() == left.ids[1, long - short :].tolist() == rows[1].codes
    assert left.positions[1, long - short :].tolist() == list(range(short))
    assert left.mask[1, -1].tolist() == [False] * (long - short) + [True] * short
    assert right.labels.numel() == 0


def test_a_sample_without_supervision_is_shown(make_tiny: Callable[..., VLM], draw: Draw) -> None:
    model = make_tiny("flamingo")
    processor = model.processor
    rows = [
        processor.row([processor.tokens(Conversation.ask([], "Who?"), "a dog")]),
        processor.row([processor.tokens(Conversation.ask([draw(1)], "Where was it?"))]),
    ]
    with pytest.raises(DataError, match=r"no supervised token.*Where was it\?"):
        model.loss(processor.batch(rows), model.encode([_picture(draw(1))]))
