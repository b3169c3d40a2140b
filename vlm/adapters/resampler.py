"""Perceiver resampler (Jaegle et al. 2021; Alayrac et al. 2022): N image tokens -> L latents."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm.adapters.base import drop_tokens, zero_linear_init


class PerceiverAttention(nn.Module):
    """Latents attend to [image tokens; latents]: (I, N, W), (I, L, W) -> (I, L, W)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.context_norm = nn.LayerNorm(width)
        self.latents_norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, context: Tensor, latents: Tensor) -> Tensor:
        latents = self.latents_norm(latents)
        seen = torch.cat([self.context_norm(context), latents], dim=1)

        def split(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        mixed = F.scaled_dot_product_attention(
            split(self.query(latents)), split(self.key(seen)), split(self.value(seen))
        )
        attended: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return attended


class FeedForward(nn.Module):
    """Norm, widen, ReLU, narrow: (..., W) -> (..., W)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.widen = nn.Linear(width, inner, bias=False)
        self.narrow = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        narrowed: Tensor = self.narrow(F.relu(self.widen(self.norm(x))))
        return narrowed


class Resampler(nn.Module):
    """(I, N, D_v) -> (I, L, W).

    Image tokens are normalised, projected to the latents' width and given a learned position, since a
    CNN's map says nothing of where its cells lie.
    """

    def __init__(
        self,
        *,
        features: int,
        positions: int,
        width: int,
        latents: int,
        depth: int,
        heads: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.input_norm = nn.LayerNorm(features)
        self.project = nn.Linear(features, width)
        self.position = nn.Parameter(torch.randn(positions, width) * 0.02)
        self.latents = nn.Parameter(torch.randn(latents, width) * 0.5)
        self.attention = nn.ModuleList(PerceiverAttention(width, heads) for _ in range(depth))
        self.feedforward = nn.ModuleList(FeedForward(width, 4 * width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        zero_linear_init(self)

    def forward(self, features: Tensor) -> Tensor:
        context = self.project(self.input_norm(features)) + self.position
        return self.resample(drop_tokens(context, self.dropout, self.training))

    def resample(self, context: Tensor) -> Tensor:
        """(I, N, W) tokens of the latents' own width -> (I, L, W)."""
        latents = self.latents.expand(context.shape[0], -1, -1)
        for attention, feedforward in zip(self.attention, self.feedforward, strict=True):
            latents = latents + F.dropout(attention(context, latents), self.dropout, self.training)
            latents = latents + F.dropout(feedforward(latents), self.dropout, self.training)
        normed: Tensor = self.norm(latents)
        return normed
