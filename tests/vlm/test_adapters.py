"""What both adapters promise: frozen parts stay frozen, shut gates are silent, tokens see their images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from vlm.adapters import REGISTRY, ImageLayout, build_adapter
from vlm.adapters.base import drop_tokens
from vlm.config import FlamingoConfig, ModelConfig, QFormerConfig
from vlm.conversation import Conversation, ImageSlot, Turn
from vlm.errors import ConfigError
from vlm.weights import frozen_hash

if TYPE_CHECKING:
    from PIL import Image

    from vlm.model import VLM
    from vlm.processor import Batch

Draw = Callable[..., "Image.Image"]
FAMILIES = ("llama", "qwen2", "qwen3", "gpt2")


def batch_of(model: VLM, *conversations: Conversation, answer: str | None = "a dog") -> tuple[Batch, Tensor]:
    """One row each, with the features of their pictures in reading order."""
    from vlm.answering import shown

    rows, features = zip(*(shown(model, c, [answer]) for c in conversations), strict=True)
    return model.processor.batch(rows), torch.cat(features)


def interleaved(draw: Draw) -> Conversation:
    """Words, a picture, words, two pictures, words: three groups of tokens."""
    parts = ("one ", ImageSlot(0), "two ", ImageSlot(1), ImageSlot(2), "three")
    return Conversation((draw(1), draw(2), draw(3)), (Turn("user", parts),))


# --- the start, and what training moves -----------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_gates_at_zero_are_exactly_the_frozen_model(
    family: str, make_tiny: Callable[..., VLM], draw: Draw
) -> None:
    model = make_tiny("flamingo", family, gate_init=0.0)
    batch, features = batch_of(model, interleaved(draw), Conversation.ask([], "hello"))
    logits = model(batch, features)
    language = model.language
    plain = language.logits(language(language.embed(batch.ids), batch.mask, batch.positions))
    assert torch.equal(logits, plain)
    # And the same by the other library alone, with no code of ours between the ids and the logits.
    lengths = batch.mask.sum(-1).amax(-1)
    for row, length in enumerate(lengths.tolist()):
        theirs = language.model(batch.ids[row : row + 1, :length]).logits[0]
        torch.testing.assert_close(logits[row, :length], theirs, atol=1e-4, rtol=1e-4)


def test_gates_that_open_change_the_logits(make_tiny: Callable[..., VLM], draw: Draw) -> None:
    shut, opened = make_tiny("flamingo", gate_init=0.0), make_tiny("flamingo", gate_init=0.5)
    batch, features = batch_of(shut, Conversation.ask([draw(1)], "hello"))
    assert not torch.allclose(shut(batch, features), opened(batch, features), atol=1e-2)


def test_gates_at_zero_learn_first(make_tiny: Callable[..., VLM], draw: Draw) -> None:
    """At tanh(0) nothing behind a gate has a gradient yet, the gates themselves do."""
    model = make_tiny("flamingo", gate_init=0.0)
    batch, features = batch_of(model, Conversation.ask([draw(1)], "hello"))
    model.loss(batch, features)[0].backward()
    for name, parameter in model.adapter.named_parameters():
        assert parameter.grad is not None, name
        moves = bool(parameter.grad.abs().max() > 0)
        assert moves == name.endswith(("attention_gate", "feedforward_gate")), name


def frozen_state(model: VLM) -> dict[str, str]:
    return {part: frozen_hash(getattr(model, part).state_dict()) for part in ("encoder", "language")}


def test_a_step_moves_the_adapter_and_nothing_else(tiny_model: VLM, draw: Draw) -> None:
    model = tiny_model
    own = {id(parameter) for parameter in model.adapter.parameters()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == own
    assert {id(p) for p in model.trainable()} == own
    before, buffers = frozen_state(model), [b.clone() for b in model.encoder.buffers()]
    adapter = {name: tensor.clone() for name, tensor in model.adapter.state_dict().items()}

    model.train()
    assert model.adapter.training
    assert not any(m.training for part in (model.encoder, model.language) for m in part.modules())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for answer in ("a dog", "a man"):
        batch, features = batch_of(model, Conversation.ask([draw(1), draw(2)], "what?"), answer=answer)
        model.encoder(torch.randn(2, 3, 64, 64))  # batch statistics must not move in training either
        optimizer.zero_grad()
        model.loss(batch, features)[0].backward()
        assert all(p.grad is None for part in (model.encoder, model.language) for p in part.parameters())
        optimizer.step()
    assert frozen_state(model) == before
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.encoder.buffers(), strict=True))
    moved = {
        name for name, tensor in model.adapter.state_dict().items() if not torch.equal(tensor, adapter[name])
    }
    # With one cross-attention for two layers, the words of the last layer lead nowhere.
    assert {n for n in adapter if n not in moved} <= {n for n in adapter if "1.word_feedforward" in n}


def test_everything_of_the_adapter_takes_part(tiny_model: VLM, draw: Draw) -> None:
    batch, features = batch_of(tiny_model, Conversation.ask([draw(1), draw(2)], "what?"))
    tiny_model.loss(batch, features)[0].backward()
    silent = {
        name
        for name, parameter in tiny_model.adapter.named_parameters()
        if parameter.grad is None or not parameter.grad.abs().max() > 0
    }
    assert all("1.word_feedforward" in name for name in silent), silent


def test_no_conditioning_is_left_behind(tiny_model: VLM, draw: Draw) -> None:
    """A call with pictures must not change a later call without any."""
    plain, nothing = batch_of(tiny_model, Conversation.ask([], "hello"))
    before = tiny_model(plain, nothing)
    tiny_model(*batch_of(tiny_model, Conversation.ask([draw(1)], "hello")))
    assert torch.equal(tiny_model(plain, nothing), before)
    assert not any(layer._forward_pre_hooks for layer in tiny_model.language.layers)


# --- who sees what ---------------------------------------------------------------------------------------


def features_gradient(model: VLM, batch: Batch, features: Tensor, node: int) -> list[bool]:
    """Whether the logits of a node depend on each image's features."""
    features = features.clone().requires_grad_()
    model(batch, features)[0, node].square().sum().backward()
    assert features.grad is not None
    return [bool(part.abs().max() > 0) for part in features.grad]


def test_attention_reaches_the_group_before_a_token_and_no_other(
    make_tiny: Callable[..., VLM], draw: Draw
) -> None:
    model = make_tiny("flamingo")
    batch, features = batch_of(model, interleaved(draw), answer=None)
    hidden = torch.randn(1, batch.ids.shape[1], 32)
    expected = {-1: [False, False, False], 0: [True, False, False], 1: [False, True, True]}
    for node, group in enumerate(batch.groups[0].tolist()):
        shown = features.clone().requires_grad_()
        act = model.adapter.before_layer(batch.layout.visible(batch.groups), model.condition(batch, shown))
        assert act is not None
        act(1, hidden)[0, node].square().sum().backward()
        reached = [False] * 3 if shown.grad is None else [bool(g.abs().max() > 0) for g in shown.grad]
        assert reached == expected[group], node


@pytest.mark.parametrize("adapter", ["flamingo", "qformer"])
def test_an_image_never_reaches_back(adapter: str, make_tiny: Callable[..., VLM], draw: Draw) -> None:
    """Through all the layers: what stands before an image cannot know of it."""
    model = make_tiny(adapter)
    batch, features = batch_of(model, interleaved(draw), answer=None)
    groups = batch.groups[0].tolist()
    for node, group in enumerate(groups):
        reached = features_gradient(model, batch, features, node)
        soft = int(batch.soft_index[0, node]) >= 0
        if group == -1:
            assert reached == [False] * 3
        elif group == 0 and not soft:
            assert reached == [True, False, False]
    assert features_gradient(model, batch, features, len(groups) - 1) == [True] * 3


def test_visible() -> None:
    layout = ImageLayout(
        image=torch.tensor([[0, 1, 2], [3, -1, -1]]),
        group=torch.tensor([[0, 1, 1], [0, -1, -1]]),
        place=torch.tensor([[0, 0, 1], [0, 0, 0]]),
    )
    seen = layout.visible(torch.tensor([[-1, 0, 1], [-1, 0, 1]]))
    assert seen.tolist() == [
        [[False, False, False], [True, False, False], [False, True, True]],
        [[False, False, False], [True, False, False], [False, False, False]],
    ]


def test_tokens_before_an_image_are_thought_about_too(make_tiny: Callable[..., VLM]) -> None:
    """The gated feed-forward runs on tokens that see nothing, as in Idefics."""
    shut, opened = make_tiny("flamingo", gate_init=0.0), make_tiny("flamingo", gate_init=0.0)
    with torch.no_grad():
        for block in opened.adapter.blocks:
            block.feedforward_gate.fill_(1.0)
    batch, features = batch_of(shut, Conversation.ask([], "hello"))
    assert not torch.allclose(shut(batch, features), opened(batch, features), atol=1e-2)


def test_swapping_two_pictures_changes_the_logits(tiny_model: VLM, draw: Draw) -> None:
    ask = Conversation.ask([draw(1), draw(2)], "which one is first?")
    swapped = replace(ask, images=ask.images[::-1])
    batch, features = batch_of(tiny_model, ask)
    other_batch, other = batch_of(tiny_model, swapped)
    assert torch.equal(batch.ids, other_batch.ids)
    difference = (tiny_model(batch, features) - tiny_model(other_batch, other)).abs().amax(-1)[0]
    assert difference[batch.groups[0] >= 0].min() > 1e-4
    # A picture alone is a picture alone: the order of the features is what differs, not their values.
    torch.testing.assert_close(features.flip(0), other)


def test_the_place_in_a_group_is_what_tells_two_apart(make_tiny: Callable[..., VLM], draw: Draw) -> None:
    """Without its place embedding the cross-attention is blind to order."""
    model = make_tiny("flamingo")
    with torch.no_grad():
        model.adapter.place.weight.zero_()
    ask = Conversation.ask([draw(1), draw(2)], "which one is first?")
    one = model(*batch_of(model, ask))
    two = model(*batch_of(model, replace(ask, images=ask.images[::-1])))
    torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)


def test_question_aware_queries_read_the_question(make_tiny: Callable[..., VLM], draw: Draw) -> None:
    model = make_tiny("qformer", question_aware=True)
    latents = []
    for question in ("what colour?", "how many dogs?"):
        batch, features = batch_of(model, Conversation.ask([draw(1)], question))
        latents.append(model.latents(features, batch.question_ids, batch.question_mask))
    assert not torch.allclose(*latents, atol=1e-2)
    # Questions of different lengths in one batch: padding has no say.
    both, features = batch_of(
        model, Conversation.ask([draw(1)], "what colour?"), Conversation.ask([draw(1)], "how many dogs?")
    )
    together = model.latents(features, both.question_ids, both.question_mask)
    torch.testing.assert_close(together, torch.cat(latents), atol=1e-5, rtol=1e-4)


def test_an_image_without_words_beside_a_question(make_tiny: Callable[..., VLM], draw: Draw) -> None:
    model = make_tiny("qformer", question_aware=True)
    batch, features = batch_of(model, Conversation.ask([draw(1)], ""))
    assert batch.question_ids is not None and batch.question_ids.shape == (1, 0)
    assert model(batch, features).isfinite().all()


# --- sizes, dropout, errors ------------------------------------------------------------------------------


def test_dropout_acts_in_training_only(make_tiny: Callable[..., VLM], draw: Draw) -> None:
    for adapter in ("flamingo", "qformer"):
        model = make_tiny(adapter, dropout=0.5)
        batch, features = batch_of(model, Conversation.ask([draw(1)], "hello"))
        assert torch.equal(model(batch, features), model(batch, features))
        model.train()
        assert not torch.equal(model(batch, features), model(batch, features))
        model.eval()
        assert torch.equal(model(batch, features), model(batch, features))


def test_drop_tokens_drops_whole_tokens() -> None:
    torch.manual_seed(0)
    dropped = drop_tokens(torch.ones(4, 50, 3), 0.4, training=True)
    assert set(dropped.sum(-1).unique().tolist()) == {0.0, 3.0}
    assert 0.4 < dropped.mean() < 0.8
    assert torch.equal(drop_tokens(torch.ones(2, 3, 4), 0.4, training=False), torch.ones(2, 3, 4))


def test_statistics_name_every_gate(make_tiny: Callable[..., VLM]) -> None:
    numbers = make_tiny("flamingo", gate_init=0.25).adapter.statistics()
    assert set(numbers) == {f"gate/{kind}_{i}" for kind in ("attention", "feedforward") for i in (1, 3)}
    assert all(abs(value - 0.2449) < 1e-4 for value in numbers.values())
    assert make_tiny("qformer").adapter.statistics() == {}


def test_keys_and_values_come_once_an_image(
    make_tiny: Callable[..., VLM], draw: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many tokens are decoded."""
    model = make_tiny("flamingo")
    calls = []
    for block in model.adapter.blocks:
        original = block.keys_values
        monkeypatch.setattr(
            block, "keys_values", lambda latents, original=original: calls.append(1) or original(latents)
        )
    answer = model.ask([draw(1)], "hello", max_new_tokens=5)
    assert answer.usage.completion_tokens == 5
    assert len(calls) == len(model.adapter.blocks)


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (ModelConfig(adapter="nonsense"), "nonsense"),
        (ModelConfig(flamingo=FlamingoConfig(layers=(1, 99))), "0..3"),
        (ModelConfig(flamingo=FlamingoConfig(layers=(1,), block_heads=4, block_kv_heads=3)), "multiple"),
        (ModelConfig(flamingo=FlamingoConfig(layers=(1,), width=10, heads=3)), "multiple"),
        (ModelConfig(adapter="qformer", qformer=QFormerConfig(width=10, heads=3)), "multiple"),
    ],
)
def test_sizes_that_do_not_fit(config: ModelConfig, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        build_adapter(config, features=8, positions=4, hidden=32, num_layers=4)


@pytest.mark.parametrize(
    "build",
    [
        lambda: FlamingoConfig(layers=(2, 2)),
        lambda: FlamingoConfig(heads=0),
        lambda: FlamingoConfig(dropout=1.0),
        lambda: FlamingoConfig(gate_init=float("nan")),
        lambda: QFormerConfig(queries=0),
        lambda: QFormerConfig(cross_every=0),
    ],
)
def test_sizes_that_nobody_can_mean(build: Callable[[], Any]) -> None:
    with pytest.raises(ConfigError, match="out of range"):
        build()


def test_every_registered_adapter_is_exercised_here() -> None:
    assert set(REGISTRY) == {"flamingo", "qformer"}
