"""Flamingo (Alayrac et al. 2022): gated cross-attention in front of chosen frozen layers.

Each text token sees the latents of the latest group of adjacent images before it, and a hint, which stands
behind its own image, those of the whole group; tokens before any image pass the cross-attention untouched
but not the gated feed-forward (as in Idefics).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm.adapters.base import Adapter, Conditioning, ImageLayout, zero_linear_init
from vlm.adapters.resampler import Resampler
from vlm.config import FlamingoConfig
from vlm.errors import ConfigError
from vlm.language import BeforeLayer


def upper_layers(num_layers: int) -> tuple[int, ...]:
    """Where blocks stand unless a recipe says otherwise: every second layer of the upper three fifths.

    Of 30 layers these are 12, 14, ... 28. What lies below depends on text alone: its gradient is never
    computed, and its hidden states can be kept.
    """
    return tuple(range(round(0.4 * num_layers), num_layers, 2))


class GatedBlock(nn.Module):
    """tanh-gated cross-attention and tanh-gated feed-forward, with grouped key/value heads.

    Shapes: hidden (B, T, D); keys and values (B, H_kv, S, d) for the S = M * L latents of a row.
    """

    def __init__(self, config: FlamingoConfig, hidden: int) -> None:
        super().__init__()
        heads, kv_heads, head_width = config.block_heads, config.block_kv_heads, config.head_width
        self.heads, self.kv_heads, self.dropout = heads, kv_heads, config.dropout
        self.attention_norm = nn.RMSNorm(hidden, eps=1e-6)
        self.query = nn.Linear(hidden, heads * head_width, bias=False)
        self.key = nn.Linear(config.width, kv_heads * head_width, bias=False)
        self.value = nn.Linear(config.width, kv_heads * head_width, bias=False)
        self.output = nn.Linear(heads * head_width, hidden, bias=False)
        self.feedforward_norm = nn.RMSNorm(hidden, eps=1e-6)
        self.gate = nn.Linear(hidden, config.feedforward, bias=False)
        self.up = nn.Linear(hidden, config.feedforward, bias=False)
        self.down = nn.Linear(config.feedforward, hidden, bias=False)
        self.attention_gate = nn.Parameter(torch.full((1,), config.gate_init))
        self.feedforward_gate = nn.Parameter(torch.full((1,), config.gate_init))

    def keys_values(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S, W) -> two of (B, H_kv, S, d)."""

        def split(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)

        return split(self.key(latents)), split(self.value(latents))

    def forward(self, hidden: Tensor, keys: Tensor, values: Tensor, mask: Tensor, sees: Tensor) -> Tensor:
        """Adds what the tokens see.

        Args:
            mask: (B, 1, T, S) additive; all zeros in the rows of tokens that see nothing.
            sees: (B, T, 1) one for tokens that see an image, zero for the others.
        """
        query = self.query(self.attention_norm(hidden)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        share = self.heads // self.kv_heads
        mixed = F.scaled_dot_product_attention(
            query,
            keys.repeat_interleave(share, dim=1),
            values.repeat_interleave(share, dim=1),
            attn_mask=mask.to(query.dtype),
        )
        attended = self.output(mixed.transpose(1, 2).flatten(2)) * sees
        attended = F.dropout(attended, self.dropout, self.training)
        hidden = hidden + torch.tanh(self.attention_gate) * attended
        normed = self.feedforward_norm(hidden)
        thought = self.down(F.silu(self.gate(normed)) * self.up(normed))
        thought = F.dropout(thought, self.dropout, self.training)
        return hidden + torch.tanh(self.feedforward_gate) * thought


@dataclass(frozen=True)
class FlamingoConditioning(Conditioning):
    """Keys and values of every block in turn, (B, H_kv, M * L, d) each."""

    tensors: tuple[Tensor, ...]
    latents: int
    along = 2

    def block(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one block."""
        return self.tensors[2 * index], self.tensors[2 * index + 1]


class FlamingoAdapter(Adapter):
    """Resampler, group index embedding and gated blocks."""

    def __init__(
        self, config: FlamingoConfig, *, features: int, positions: int, hidden: int, num_layers: int
    ) -> None:
        super().__init__(config, features=features, positions=positions, hidden=hidden, num_layers=num_layers)
        layers = config.layers or upper_layers(num_layers)
        if not all(0 <= i < num_layers for i in layers):
            raise ConfigError(f"flamingo.layers {layers} must lie within 0..{num_layers - 1}; [] places them")
        if config.block_heads % config.block_kv_heads:
            raise ConfigError("flamingo.block_heads must be a multiple of flamingo.block_kv_heads")
        if config.width % config.heads:
            raise ConfigError("flamingo.width must be a multiple of flamingo.heads")
        self.at_layers = layers
        self.max_group = config.max_group
        self.latents = config.latents
        self.resampler = Resampler(
            features=features,
            positions=positions,
            width=config.width,
            latents=config.latents,
            depth=config.depth,
            heads=config.heads,
            dropout=config.dropout,
        )
        self.place = nn.Embedding(config.max_group, config.width)
        self.blocks = nn.ModuleList(GatedBlock(config, hidden) for _ in layers)
        for block in self.blocks:
            zero_linear_init(block)
        nn.init.normal_(self.place.weight, std=0.02)

    def encode(
        self, features: Tensor, question: Tensor | None = None, question_mask: Tensor | None = None
    ) -> Tensor:
        latents: Tensor = self.resampler(features)
        return latents

    def prepare(self, latents: Tensor, layout: ImageLayout) -> FlamingoConditioning:
        rows, most = layout.image.shape
        if most == 0:
            empty = latents.new_zeros(rows, 0, self.place.embedding_dim)
            pairs = [block.keys_values(empty) for block in self._blocks()]
        else:
            # The group index is added per place, so one picture can stand first here and second there.
            placed = latents[layout.image.clamp(min=0)] + self.place(layout.place)[:, :, None]
            pairs = [block.keys_values(placed.flatten(1, 2)) for block in self._blocks()]
        return FlamingoConditioning(tuple(tensor for pair in pairs for tensor in pair), self.latents)

    def before_layer(self, visible: Tensor, conditioning: Conditioning) -> BeforeLayer:
        assert isinstance(conditioning, FlamingoConditioning)
        sees = visible.any(dim=-1, keepdim=True)
        seen = visible.repeat_interleave(conditioning.latents, dim=-1)
        # A token that sees nothing would make the softmax 0/0: let it look anywhere, then drop the result.
        mask = torch.zeros(seen.shape, device=seen.device).masked_fill_(~(seen | ~sees), float("-inf"))[
            :, None
        ]
        number = {layer: i for i, layer in enumerate(self.at_layers)}

        def act(layer: int, hidden: Tensor) -> Tensor:
            block = self._block(number[layer])
            keys, values = conditioning.block(number[layer])
            # The language model may run in half precision; the adapter keeps its own.
            own = hidden.to(block.attention_gate.dtype)
            if keys.shape[2] == 0:
                # No image in the whole batch: one all-zero latent stands in, and `sees` drops it.
                keys = values = keys.new_zeros(*keys.shape[:2], 1, keys.shape[3])
                plain = mask.new_zeros(*mask.shape[:3], 1)
                out = block(own, keys, values, plain, sees.to(own.dtype))
            else:
                out = block(own, keys, values, mask, sees.to(own.dtype))
            return out.to(hidden.dtype)

        return act

    def _block(self, index: int) -> GatedBlock:
        block = self.blocks[index]
        assert isinstance(block, GatedBlock)
        return block

    def _blocks(self) -> list[GatedBlock]:
        return [self._block(i) for i in range(len(self.blocks))]

    def statistics(self) -> dict[str, float]:
        numbers = {}
        for layer, block in zip(self.at_layers, self._blocks(), strict=True):
            numbers[f"gate/attention_{layer}"] = torch.tanh(block.attention_gate).item()
            numbers[f"gate/feedforward_{layer}"] = torch.tanh(block.feedforward_gate).item()
        return numbers
