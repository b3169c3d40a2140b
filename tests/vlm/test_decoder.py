"""Branches of a row: each reads what its own conversation would, whatever branches stand beside it."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch

from vlm.answering import shown
from vlm.conversation import Conversation
from vlm.decoder import DecoderState, Prefill

if TYPE_CHECKING:
    from PIL import Image

    from vlm.model import VLM

Draw = Callable[..., "Image.Image"]
STEPS = 40
"""More than a cache has room for when it is laid out."""


def test_a_branch_reads_what_it_would_read_alone(tiny_model: VLM, draw: Draw) -> None:
    """Branches that change places, end and multiply, in rows that leave, against everything read anew."""
    asks = [
        Conversation.ask([draw(1)], "what is on the grass?"),
        Conversation.ask([], "a"),
        Conversation.ask([draw(2), draw(3)], "two dogs, " * 6),
    ]
    told = [shown(tiny_model, ask) for ask in asks]
    chance = random.Random(3)
    state, _ = DecoderState.prefill(
        tiny_model, [row for row, _ in told], torch.cat([features for _, features in told])
    )
    alive = [0, 1, 2]
    said: list[list[list[int]]] = [[[]], [[]], [[]]]
    for step in range(STEPS):
        if step == STEPS // 2:
            alive = [0, 2]
            state, said = state.select(torch.tensor(alive)), [said[0], said[2]]
        wide = chance.choice([1, 3, 3, 4])
        parents = [[chance.randrange(len(paths)) for _ in range(wide)] for paths in said]
        tokens = [[chance.randrange(3, 200) for _ in range(wide)] for _ in said]
        state.follow(torch.tensor(parents))
        logits = state.advance(torch.tensor(tokens))
        said = [
            [[*paths[parent], token] for parent, token in zip(*pair, strict=True)]
            for paths, pair in zip(said, zip(parents, tokens, strict=True), strict=True)
        ]
    assert logits.shape[:2] == (len(alive), wide)
    for row, index in enumerate(alive):
        for branch, path in enumerate(said[row]):
            whole = tiny_model.processor.tokens(asks[index])
            whole.add(path)
            batch = tiny_model.processor.batch([tiny_model.processor.row([whole])])
            with torch.inference_mode():
                alone = tiny_model(batch, told[index][1])[0, -1]
            assert torch.allclose(logits[row, branch], alone, atol=1e-3)
    apart = (logits[0][:, None] - logits[0][None]).abs().amax(dim=-1)
    assert wide == 1 or bool((apart[~torch.eye(wide, dtype=torch.bool)] > 0).any())


@pytest.mark.parametrize("most", [1, 7, 32])
def test_prompts_read_in_slices_are_the_prompts_read_at_once(tiny_model: VLM, draw: Draw, most: int) -> None:
    asks = [Conversation.ask([draw(2), draw(3)], "two dogs, " * 6), Conversation.ask([draw(1)], "what?")]
    told = [shown(tiny_model, ask) for ask in asks]
    rows, features = [row for row, _ in told], torch.cat([features for _, features in told])
    whole, logits = DecoderState.prefill(tiny_model, rows, features)
    prompts = Prefill(tiny_model, rows, features)
    slices = 0
    while prompts.left:
        prompts.read(most)
        slices += 1
    state, sliced = prompts.state()
    assert slices == -(-max(len(row.codes) for row in rows) // most)
    assert torch.allclose(logits, sliced, atol=1e-3)
    assert torch.equal(whole.seen, state.seen) and torch.equal(whole.positions, state.positions)
    following = torch.tensor([[5], [9]])
    assert torch.allclose(whole.advance(following), state.advance(following), atol=1e-3)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_captions_are_sampled_as_the_model_thinks(
    temperature: float, make_tiny: Callable[..., VLM], draw: Draw
) -> None:
    """First words come as often as their probabilities say; nothing banned is ever said."""
    from vlm.train.selfcritical import sample_captions

    model = make_tiny("flamingo")
    row, features = shown(model, Conversation.ask([draw(1)], "what?"))
    _, logits = DecoderState.prefill(model, [row], features)
    wanted = (logits[0, 0] / temperature).softmax(dim=-1)
    wanted[list(model.language.added_ids)] = 0
    wanted /= wanted.sum()
    torch.manual_seed(0)
    count = 20_000
    (drawn,) = sample_captions(model, [row], features, count, temperature, longest=1)
    found = torch.bincount(torch.tensor([ids[0] for ids in drawn]), minlength=len(wanted)) / count
    assert float(found[wanted == 0].sum()) == 0
    # The statistic of Pearson's test, a sum over the words, has their number as its mean.
    likely = wanted > 0
    statistic = float(((found - wanted)[likely] ** 2 / wanted[likely]).sum()) * count
    words = int(likely.sum()) - 1
    assert abs(statistic - words) < 5 * (2 * words) ** 0.5


def test_samples_end_with_the_end_or_are_cut(make_tiny: Callable[..., VLM], draw: Draw) -> None:
    """Near zero temperature every sample of a picture is its greedy answer."""
    from vlm.train.selfcritical import sample_captions

    model = make_tiny("flamingo")
    asks = [Conversation.ask([draw(n)], "what?") for n in range(3)]
    told = [shown(model, ask) for ask in asks]
    features = torch.cat([features for _, features in told])
    rows = [row for row, _ in told]
    drawn = sample_captions(model, rows, features, 4, 1e-6, longest=6)
    for ask, samples in zip(asks, drawn, strict=True):
        answer = model.ask_batch([ask], max_new_tokens=6)[0]
        assert {model.language.decode(ids).strip() for ids in samples} == {answer.text}
    end = model.language.frame.end
    model.language.added_ids = ()
    for samples in sample_captions(model, rows, features, 50, 3.0, longest=30):
        assert all(end not in ids[:-1] and 0 < len(ids) <= 30 for ids in samples)
        assert len({len(ids) for ids in samples}) > 1
