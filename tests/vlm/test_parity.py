"""The adapters' blocks against transformers' own, with the same weights: outputs and every gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, IdeficsConfig, InstructBlipQFormerConfig
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel
from transformers.models.idefics.modeling_idefics import IdeficsGatedCrossAttentionLayer
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler
from transformers.models.instructblip.modeling_instructblip import InstructBlipQFormerModel

from vlm.adapters.flamingo import GatedBlock
from vlm.adapters.qformer import QFormerAdapter
from vlm.adapters.resampler import Resampler
from vlm.config import FlamingoConfig, QFormerConfig

HIDDEN, WIDTH, HEADS, KV_HEADS, HEAD = 32, 24, 4, 2, 8


def give(theirs: nn.Parameter, ours: Tensor) -> None:
    """Copies a weight into the other library's model."""
    assert theirs.shape == ours.shape
    with torch.no_grad():
        theirs.copy_(ours)


def same_gradients(pairs: dict[str, tuple[Tensor | None, Tensor | None]]) -> None:
    for name, (ours, theirs) in pairs.items():
        assert ours is not None and theirs is not None, name
        assert theirs.abs().max() > 1e-4, f"{name} takes no part"
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def idefics(**changes: object) -> IdeficsConfig:
    config = IdeficsConfig(
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        intermediate_size=20,
        hidden_act="silu",
        rms_norm_eps=1e-6,
        alpha_initializer="ones",
        alpha_type="float",
        vision_config={"embed_dim": WIDTH},
        perceiver_config={"qk_layer_norms_perceiver": False},
        **changes,
    )
    config._attn_implementation = "eager"
    return config


def spread(weight: Tensor, share: int) -> Tensor:
    """(H_kv * d, C) -> (H * d, C): each key/value head repeated for the query heads that it serves."""
    return weight.unflatten(0, (-1, HEAD)).repeat_interleave(share, dim=0).flatten(0, 1)


def gather(gradient: Tensor, share: int) -> Tensor:
    """The gradient of the grouped head: the sum over its repetitions."""
    return gradient.unflatten(0, (-1, share, HEAD)).sum(1).flatten(0, 1)


@pytest.mark.parametrize("kv_heads", [HEADS, KV_HEADS, 1])
def test_gated_block_is_idefics_gated_cross_attention_layer(kv_heads: int) -> None:
    torch.manual_seed(0)
    config = FlamingoConfig(
        width=WIDTH,
        heads=2,
        layers=(0,),
        block_heads=HEADS,
        block_kv_heads=kv_heads,
        head_width=HEAD,
        feedforward=20,
    )
    ours = GatedBlock(config, HIDDEN)
    with torch.no_grad():
        ours.attention_gate.fill_(0.7)
        ours.feedforward_gate.fill_(-0.4)
        ours.attention_norm.weight.uniform_(0.5, 1.5)
        ours.feedforward_norm.weight.uniform_(0.5, 1.5)
    theirs = IdeficsGatedCrossAttentionLayer(idefics(), layer_idx=0)
    share = HEADS // kv_heads
    attention, mlp = theirs.cross_attn, theirs.mlp
    give(attention.k_proj.weight, spread(ours.key.weight, share))
    give(attention.v_proj.weight, spread(ours.value.weight, share))
    pairs = {
        "query": (ours.query.weight, attention.q_proj.weight),
        "output": (ours.output.weight, attention.o_proj.weight),
        "attention_norm": (ours.attention_norm.weight, theirs.input_layernorm.weight),
        "feedforward_norm": (ours.feedforward_norm.weight, theirs.post_attention_layernorm.weight),
        "gate": (ours.gate.weight, mlp.gate_proj.weight),
        "up": (ours.up.weight, mlp.up_proj.weight),
        "down": (ours.down.weight, mlp.down_proj.weight),
        "attention_gate": (ours.attention_gate, theirs.alpha_cross_attn),
        "feedforward_gate": (ours.feedforward_gate, theirs.alpha_dense),
    }
    for mine, other in pairs.values():
        give(other, mine)

    # Two rows of five tokens and two images of three latents; the first two tokens see no image.
    hidden = torch.randn(2, 5, HIDDEN)
    latents = torch.randn(2, 6, WIDTH)
    image_of_token = torch.tensor([[-1, -1, 0, 0, 1], [-1, 0, 0, 1, 1]])
    sees = (image_of_token >= 0)[:, :, None]
    visible = (image_of_token[:, :, None] == torch.arange(2)).repeat_interleave(3, dim=-1)
    mask = torch.zeros(visible.shape).masked_fill(~(visible | ~sees), float("-inf"))[:, None]
    mine, other = (hidden.clone().requires_grad_() for _ in range(2))
    my_latents, other_latents = (latents.clone().requires_grad_() for _ in range(2))
    keys, values = ours.keys_values(my_latents)
    our_output = ours(mine, keys, values, mask, sees.float())
    their_output = theirs(
        other,
        image_hidden_states=other_latents,
        image_attention_mask=mask,
        cross_attention_gate=sees[:, :, 0].float(),
    )
    torch.testing.assert_close(our_output, their_output, atol=1e-5, rtol=1e-5)

    direction = torch.randn_like(our_output)
    (our_output * direction).sum().backward()
    (their_output * direction).sum().backward()
    gradients = {name: (a.grad, b.grad) for name, (a, b) in pairs.items()}
    gradients["hidden"] = mine.grad, other.grad
    gradients["latents"] = my_latents.grad, other_latents.grad
    assert attention.k_proj.weight.grad is not None and attention.v_proj.weight.grad is not None
    gradients["key"] = ours.key.weight.grad, gather(attention.k_proj.weight.grad, share)
    gradients["value"] = ours.value.weight.grad, gather(attention.v_proj.weight.grad, share)
    same_gradients(gradients)


@pytest.mark.parametrize("depth", [1, 3])
def test_resampler_is_idefics_perceiver_resampler(depth: int) -> None:
    torch.manual_seed(1)
    heads, latents = 3, 4
    ours = Resampler(
        features=10, positions=7, width=WIDTH, latents=latents, depth=depth, heads=heads, dropout=0.0
    )
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    theirs = IdeficsPerceiverResampler(idefics(), WIDTH, depth, heads, WIDTH // heads, latents)
    pairs = {
        "latents": (ours.latents, theirs.latents),
        "norm.weight": (ours.norm.weight, theirs.layer_norm.weight),
        "norm.bias": (ours.norm.bias, theirs.layer_norm.bias),
    }
    for i, (attention, mlp) in enumerate(theirs.blocks):
        mine, feedforward = ours.attention[i], ours.feedforward[i]
        pairs |= {
            f"{i}.query": (mine.query.weight, attention.q_proj.weight),
            f"{i}.key": (mine.key.weight, attention.k_proj.weight),
            f"{i}.value": (mine.value.weight, attention.v_proj.weight),
            f"{i}.output": (mine.output.weight, attention.output_proj.weight),
            f"{i}.context_norm.weight": (mine.context_norm.weight, attention.context_layer_norm.weight),
            f"{i}.context_norm.bias": (mine.context_norm.bias, attention.context_layer_norm.bias),
            f"{i}.latents_norm.weight": (mine.latents_norm.weight, attention.latents_layer_norm.weight),
            f"{i}.latents_norm.bias": (mine.latents_norm.bias, attention.latents_layer_norm.bias),
            f"{i}.norm.weight": (feedforward.norm.weight, mlp.ln.weight),
            f"{i}.norm.bias": (feedforward.norm.bias, mlp.ln.bias),
            f"{i}.widen": (feedforward.widen.weight, mlp.fc.weight),
            f"{i}.narrow": (feedforward.narrow.weight, mlp.c_proj.weight),
        }
    for mine, other in pairs.values():
        give(other, mine)
    context = torch.randn(2, 7, WIDTH)
    my_context, other_context = (context.clone().requires_grad_() for _ in range(2))
    our_output, their_output = ours.resample(my_context), theirs(other_context)
    torch.testing.assert_close(our_output, their_output, atol=1e-5, rtol=1e-5)
    direction = torch.randn_like(our_output)
    (our_output * direction).sum().backward()
    (their_output * direction).sum().backward()
    gradients = {name: (a.grad, b.grad) for name, (a, b) in pairs.items()}
    same_gradients(gradients | {"context": (my_context.grad, other_context.grad)})


def attention_pairs(name: str, ours: nn.Module, theirs: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Our attention with its norm against BERT's two modules."""
    pairs = {}
    inner, output = theirs.attention, theirs.output
    for part in ("query", "key", "value"):
        pairs[f"{name}.{part}.weight"] = getattr(ours, part).weight, getattr(inner, part).weight
        if part != "key":  # a key's bias shifts every score alike: its gradient is rounding
            pairs[f"{name}.{part}.bias"] = getattr(ours, part).bias, getattr(inner, part).bias
    for kind in ("weight", "bias"):
        pairs[f"{name}.output.{kind}"] = getattr(ours.output, kind), getattr(output.dense, kind)
        pairs[f"{name}.norm.{kind}"] = getattr(ours.norm, kind), getattr(output.LayerNorm, kind)
    return pairs


def feedforward_pairs(
    name: str, ours: nn.Module, widen: nn.Module, narrow: nn.Module
) -> dict[str, tuple[Tensor, Tensor]]:
    pairs = {}
    for kind in ("weight", "bias"):
        pairs[f"{name}.widen.{kind}"] = getattr(ours.widen, kind), getattr(widen.dense, kind)
        pairs[f"{name}.narrow.{kind}"] = getattr(ours.narrow, kind), getattr(narrow.dense, kind)
        pairs[f"{name}.norm.{kind}"] = getattr(ours.norm, kind), getattr(narrow.LayerNorm, kind)
    return pairs


def qformer(cross_every: int, question_aware: bool) -> QFormerAdapter:
    config = QFormerConfig(
        width=WIDTH,
        queries=3,
        depth=4,
        heads=3,
        feedforward=20,
        cross_every=cross_every,
        question_aware=question_aware,
    )
    adapter = QFormerAdapter(config, features=10, positions=7, hidden=HIDDEN, num_layers=4)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return adapter


def layer_pairs(ours: QFormerAdapter, layers: nn.ModuleList) -> dict[str, tuple[Tensor, Tensor]]:
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for i, (mine, other) in enumerate(zip(ours.layers, layers, strict=True)):
        pairs |= attention_pairs(f"{i}.self", mine.self_attention, other.attention)
        assert (mine.cross_attention is not None) == other.has_cross_attention
        if mine.cross_attention is not None:
            pairs |= attention_pairs(f"{i}.cross", mine.cross_attention, other.crossattention)
        pairs |= feedforward_pairs(
            f"{i}.feedforward", mine.feedforward, other.intermediate_query, other.output_query
        )
        if mine.word_feedforward is not None:
            pairs |= feedforward_pairs(f"{i}.words", mine.word_feedforward, other.intermediate, other.output)
    return pairs


SIZES = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "encoder_hidden_size": WIDTH,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


@pytest.mark.parametrize("cross_every", [1, 2])
def test_qformer_is_blip2s(cross_every: int) -> None:
    torch.manual_seed(2)
    ours = qformer(cross_every, question_aware=False)
    theirs = Blip2QFormerModel(Blip2QFormerConfig(cross_attention_frequency=cross_every, **SIZES))
    pairs = layer_pairs(ours, theirs.encoder.layer)
    pairs["norm.weight"] = ours.norm.weight, theirs.layernorm.weight
    pairs["norm.bias"] = ours.norm.bias, theirs.layernorm.bias
    for mine, other in pairs.values():
        give(other, mine)
    for i, layer in enumerate(theirs.encoder.layer):
        give(layer.attention.attention.key.bias, ours.layers[i].self_attention.key.bias)
        if layer.has_cross_attention:
            give(layer.crossattention.attention.key.bias, ours.layers[i].cross_attention.key.bias)
    context = torch.randn(2, 7, WIDTH)
    my_context, other_context = (context.clone().requires_grad_() for _ in range(2))
    queries = ours.queries.detach().clone().requires_grad_()
    our_output = ours.query(my_context, None, None)
    their_output = theirs(
        query_embeds=queries.expand(2, -1, -1), encoder_hidden_states=other_context
    ).last_hidden_state
    torch.testing.assert_close(our_output, their_output, atol=1e-5, rtol=1e-5)
    direction = torch.randn_like(our_output)
    (our_output * direction).sum().backward()
    (their_output * direction).sum().backward()
    gradients = {name: (a.grad, b.grad) for name, (a, b) in pairs.items()}
    gradients["context"] = my_context.grad, other_context.grad
    gradients["queries"] = ours.queries.grad, queries.grad
    same_gradients(gradients)


def test_question_aware_qformer_is_instructblips() -> None:
    torch.manual_seed(3)
    ours = qformer(cross_every=2, question_aware=True)
    config = InstructBlipQFormerConfig(
        cross_attention_frequency=2, vocab_size=11, max_position_embeddings=16, pad_token_id=0, **SIZES
    )
    theirs = InstructBlipQFormerModel(config)
    pairs = layer_pairs(ours, theirs.encoder.layer)
    pairs["norm.weight"] = ours.norm.weight, theirs.embeddings.layernorm.weight
    pairs["norm.bias"] = ours.norm.bias, theirs.embeddings.layernorm.bias
    # The last layer's words go nowhere, in either model: no gradient tells them apart.
    pairs = {name: pair for name, pair in pairs.items() if not name.startswith("3.words")}
    for mine, other in pairs.values():
        give(other, mine)
    for i, layer in enumerate(theirs.encoder.layer):
        give(layer.attention.attention.key.bias, ours.layers[i].self_attention.key.bias)
        if layer.has_cross_attention:
            give(layer.crossattention.attention.key.bias, ours.layers[i].cross_attention.key.bias)
    with torch.no_grad():  # word positions are the language model's business here
        theirs.embeddings.position_embeddings.weight.zero_()
    ids = torch.tensor([[3, 4, 5, 6], [7, 8, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    words = theirs.embeddings.word_embeddings(ids).detach().clone().requires_grad_()
    context = torch.randn(2, 7, WIDTH)
    my_context, other_context = (context.clone().requires_grad_() for _ in range(2))
    queries = ours.queries.detach().clone().requires_grad_()
    our_output = ours.query(my_context, words, mask.bool())
    their_output = theirs(
        input_ids=ids,
        attention_mask=torch.cat([mask.new_ones(2, 3), mask], dim=1),
        query_embeds=queries.expand(2, -1, -1),
        encoder_hidden_states=other_context,
    ).last_hidden_state[:, :3]
    torch.testing.assert_close(our_output, their_output, atol=1e-5, rtol=1e-5)
    direction = torch.randn_like(our_output)
    (our_output * direction).sum().backward()
    (their_output * direction).sum().backward()
    gradients = {name: (a.grad, b.grad) for name, (a, b) in pairs.items()}
    gradients["context"] = my_context.grad, other_context.grad
    gradients["queries"] = ours.queries.grad, queries.grad
    same_gradients(gradients)
    assert words.grad is not None
    assert words.grad[1, :2].abs().max() > 1e-4
    assert words.grad[1, 2:].abs().max() == 0  # padding has no say
