"""Q-Former (Li et al. 2023): learned queries look at the image and enter the text as soft tokens.

Layers are BERT's (normalisation after each residual), as in BLIP-2; `question_aware` lets the queries
attend to the question's words as well (InstructBLIP, Dai et al. 2023).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm.adapters.base import Adapter, Conditioning, ImageLayout, drop_tokens, zero_linear_init
from vlm.config import QFormerConfig
from vlm.errors import ConfigError


class Attention(nn.Module):
    """Multi-head attention with its residual and norm: (I, L, W), (I, S, C) -> (I, L, W)."""

    def __init__(self, width: int, context: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(context, width)
        self.value = nn.Linear(context, width)
        self.output = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        def split(y: Tensor) -> Tensor:
            return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        mixed = F.scaled_dot_product_attention(
            split(self.query(x)), split(self.key(context)), split(self.value(context)), attn_mask=mask
        )
        out = F.dropout(self.output(mixed.transpose(1, 2).flatten(2)), self.dropout, self.training)
        normed: Tensor = self.norm(x + out)
        return normed


class FeedForward(nn.Module):
    """Widen, GELU, narrow, with residual and norm: (..., W) -> (..., W)."""

    def __init__(self, width: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.widen = nn.Linear(width, inner)
        self.narrow = nn.Linear(inner, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        out = F.dropout(self.narrow(F.gelu(self.widen(x))), self.dropout, self.training)
        normed: Tensor = self.norm(x + out)
        return normed


class Layer(nn.Module):
    """Self-attention among queries (and words), cross-attention to the image, feed-forward."""

    def __init__(self, config: QFormerConfig, features: int, looks: bool) -> None:
        super().__init__()
        width, heads, dropout = config.width, config.heads, config.dropout
        self.self_attention = Attention(width, width, heads, dropout)
        self.cross_attention = Attention(width, features, heads, dropout) if looks else None
        self.feedforward = FeedForward(width, config.feedforward, dropout)
        self.word_feedforward = (
            FeedForward(width, config.feedforward, dropout) if config.question_aware else None
        )

    def forward(self, x: Tensor, queries: int, features: Tensor, mask: Tensor | None) -> Tensor:
        x = self.self_attention(x, x, mask)
        latents, words = x[:, :queries], x[:, queries:]
        if self.cross_attention is not None:
            latents = self.cross_attention(latents, features)
        latents = self.feedforward(latents)
        if self.word_feedforward is None or words.shape[1] == 0:
            return latents
        return torch.cat([latents, self.word_feedforward(words)], dim=1)


@dataclass(frozen=True)
class SoftTokens(Conditioning):
    """(B, M * L, D) soft tokens of each row's images, in reading order."""

    tensors: tuple[Tensor]
    along = 1


class QFormerAdapter(Adapter):
    """Queries, layers and the projection to the language model's width."""

    def __init__(
        self, config: QFormerConfig, *, features: int, positions: int, hidden: int, num_layers: int
    ) -> None:
        super().__init__(config, features=features, positions=positions, hidden=hidden, num_layers=num_layers)
        if config.width % config.heads:
            raise ConfigError("qformer.width must be a multiple of qformer.heads")
        self.soft_tokens = config.queries
        self.question_aware = config.question_aware
        self.dropout = config.dropout
        self.input_norm = nn.LayerNorm(features)
        self.project_in = nn.Linear(features, config.width)
        self.position = nn.Parameter(torch.randn(positions, config.width) * 0.02)
        self.queries = nn.Parameter(torch.randn(config.queries, config.width) * 0.5)
        self.words = nn.Linear(hidden, config.width) if config.question_aware else None
        self.norm = nn.LayerNorm(config.width, eps=1e-12)
        self.layers = nn.ModuleList(
            Layer(config, config.width, looks=i % config.cross_every == 0) for i in range(config.depth)
        )
        self.project = nn.Linear(config.width, hidden)
        zero_linear_init(self)

    def encode(
        self, features: Tensor, question: Tensor | None = None, question_mask: Tensor | None = None
    ) -> Tensor:
        context = self.project_in(self.input_norm(features)) + self.position
        context = drop_tokens(context, self.dropout, self.training)
        words = None
        if self.words is not None and question is not None:
            words = self.words(question.to(self.words.weight.dtype))
        projected: Tensor = self.project(self.query(context, words, question_mask))
        return projected

    def query(self, context: Tensor, words: Tensor | None, words_mask: Tensor | None) -> Tensor:
        """(I, N, W) image tokens [and (I, Q, W) words] -> (I, L, W) query outputs."""
        count, queries = context.shape[0], self.queries.shape[0]
        x = self.queries.expand(count, -1, -1)
        mask = None
        if words is not None:
            assert words_mask is not None
            x = torch.cat([x, words], dim=1)
            mask = torch.cat([words_mask.new_ones(count, queries), words_mask], dim=1)[:, None, None]
        x = F.dropout(self.norm(x), self.dropout, self.training)
        for layer in self.layers:
            x = layer(x, queries, context, mask)
        return x[:, :queries]

    def prepare(self, latents: Tensor, layout: ImageLayout) -> SoftTokens:
        rows, most = layout.image.shape
        if most == 0:
            return SoftTokens((latents.new_zeros(rows, 0, self.project.out_features),))
        return SoftTokens((latents[layout.image.clamp(min=0)].flatten(1, 2),))

    def embed(self, embeddings: Tensor, soft_index: Tensor, conditioning: Conditioning) -> Tensor:
        assert isinstance(conditioning, SoftTokens)
        (tokens,) = conditioning.tensors
        if tokens.shape[1] == 0:
            return embeddings
        index = soft_index.clamp(min=0)[:, :, None].expand(-1, -1, tokens.shape[2])
        soft = tokens.gather(1, index).to(embeddings.dtype)
        return torch.where((soft_index >= 0)[:, :, None], soft, embeddings)
