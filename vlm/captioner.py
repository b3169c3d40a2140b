"""A small captioner that was taught nothing but captions: it speaks with the language model, word by word.

Of two LSTMs the first looks at the picture's cells and the second chooses words (Anderson et al. 2018). It
says captions about as well as an adapter does, and errs elsewhere: while captions are searched for, the
probabilities of both are multiplied (a product of experts, Hinton 2002).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm.features import Seen
from vlm.guide import Guide, load_module, module_tensors, require, require_finite, require_module

WIDTH, HEADS = 352, 4
"""Of its states; places that it looks at."""
DROPOUT, LOST = 0.5, 0.2
"""While it learns: of states, and of a picture's cells."""
FLOOR = -14.0
"""Log-probability of a token that it does not know, before all are brought to a sum of one."""
LOUD, NAMED, WORD = 3.0, 10.0, 0.5
"""What mean features and roots of label probabilities are multiplied by, and the root mean square of the
language model's embeddings."""

State = tuple[Tensor, Tensor, Tensor, Tensor]
"""Hidden and cell states, (R, W) each, of the LSTM that looks and of the one that speaks."""


@dataclass(frozen=True)
class Sight:
    """What P pictures show: (P, H, d, N) keys and (P, H, N, d) values of their cells, (P, W) of the whole."""

    keys: Tensor
    values: Tensor
    whole: Tensor


class CaptionNet(nn.Module):
    """What P pictures show and what was said so far -> the next of V tokens, of which the first is the end.

    Shapes: R rows, as many of each picture in turn; N cells, D_v channels, C labels, E the language model's
    width.

    Before it reads or says anything it must `hear` the language model's embeddings: they are frozen, and no
    part of its state.
    """

    embeddings: Tensor

    def __init__(self, *, tokens: int, wide: int, cells: int, channels: int, labels: int) -> None:
        super().__init__()
        self.register_buffer("embeddings", torch.zeros(0, wide), persistent=False)
        self.embed = nn.Linear(wide, WIDTH)
        self.own = nn.Parameter(torch.randn(tokens, WIDTH) * 0.02)
        self.cell = nn.Linear(channels, WIDTH)
        self.cell_norm = nn.LayerNorm(WIDTH)
        self.position = nn.Parameter(torch.randn(cells, WIDTH) * 0.02)
        self.whole = nn.Linear(channels + labels, WIDTH)
        self.whole_norm = nn.LayerNorm(WIDTH)
        self.looking = nn.Linear(4 * WIDTH, 4 * WIDTH)
        self.speaking = nn.Linear(3 * WIDTH, 4 * WIDTH)
        self.query = nn.Linear(WIDTH, WIDTH)
        self.key = nn.Linear(WIDTH, WIDTH)
        self.said = nn.Linear(WIDTH, wide)
        self.said_own = nn.Linear(WIDTH, WIDTH)
        self.bias = nn.Parameter(torch.zeros(tokens))
        self.dropout = DROPOUT

    def hear(self, embeddings: Tensor) -> CaptionNet:
        """Takes its tokens' (V, E) embeddings from the language model that it is to speak with."""
        own = embeddings.detach().float()
        self.embeddings = (own * (WORD / own.square().mean().sqrt())).to(self.bias.device)
        return self

    def _drop(self, x: Tensor, share: float = 1.0) -> Tensor:
        return F.dropout(x, share * self.dropout, self.training)

    def see(self, features: Tensor, scores: Tensor) -> Sight:
        """(P, N, D_v) features and (P, C) label probabilities -> what it looks at while it speaks."""
        features = F.layer_norm(features.float(), features.shape[-1:])
        told = torch.cat([LOUD * features.mean(dim=1), NAMED * scores.float().sqrt()], dim=1)
        cells = F.gelu(self.cell_norm(self.cell(features))) + self.position
        if self.training:
            cells = cells * (torch.rand(cells.shape[:2], device=cells.device) >= LOST)[..., None]
        cells = self._drop(cells, 0.6)

        def split(x: Tensor) -> Tensor:
            return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)

        keys = split(self.key(cells)).transpose(2, 3).contiguous()
        whole = self._drop(F.gelu(self.whole_norm(self.whole(told))))
        return Sight(keys, split(cells).to(keys.dtype).contiguous(), whole)

    def begin(self, rows: int) -> State:
        """The states before anything is read."""
        nothing = self.bias.new_zeros(rows, WIDTH)
        return nothing, nothing, nothing, nothing

    def read(self, tokens: Tensor) -> Tensor:
        """(...) places of tokens -> (..., W)."""
        return self._drop(F.gelu(self.embed(self.embeddings[tokens]) + self.own[tokens]))

    def step(self, word: Tensor, state: State, sight: Sight) -> State:
        """The states after one more token, (R, W) as `read` gives it; the first one read is the end's."""
        looks, looks_cell, speaks, speaks_cell = state
        rows, pictures = len(word), len(sight.keys)
        whole = sight.whole.repeat_interleave(rows // pictures, dim=0)
        looks, looks_cell = _lstm(self.looking(torch.cat([word, whole, speaks, looks], dim=1)), looks_cell)
        query = self.query(looks).view(pictures, -1, HEADS, WIDTH // HEADS).transpose(1, 2)
        weights = (query @ sight.keys.to(query.dtype) / math.sqrt(WIDTH // HEADS)).float().softmax(dim=-1)
        found = (weights.to(sight.values.dtype) @ sight.values).transpose(1, 2).reshape(rows, WIDTH)
        heard = torch.cat([found.to(looks.dtype), looks, speaks.to(looks.dtype)], dim=1)
        speaks, speaks_cell = _lstm(self.speaking(heard), speaks_cell)
        return looks, looks_cell, speaks, speaks_cell

    def logits(self, speaks: Tensor) -> Tensor:
        """(..., W) states of the LSTM that speaks -> (..., V)."""
        speaks = self._drop(speaks)
        own: Tensor = self.said_own(speaks) @ self.own.T
        return self.said(speaks) @ self.embeddings.T + own + self.bias


def _lstm(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """(R, 4 * W) inputs of the gates, (R, W) -> the new hidden and cell state; it forgets little at first."""
    take, forget, show, new = gates.chunk(4, dim=1)
    cell = torch.sigmoid(forget + 1) * cell + torch.sigmoid(take) * torch.tanh(new)
    return torch.sigmoid(show) * torch.tanh(cell), cell


def shapes(*, tokens: int, wide: int, cells: int, channels: int, labels: int) -> dict[str, tuple[int, ...]]:
    """What a `CaptionNet` of these sizes is made of: to make one only to learn that costs 15 MB and more."""
    linear = {
        "embed": (WIDTH, wide),
        "cell": (WIDTH, channels),
        "whole": (WIDTH, channels + labels),
        "looking": (4 * WIDTH, 4 * WIDTH),
        "speaking": (4 * WIDTH, 3 * WIDTH),
        "query": (WIDTH, WIDTH),
        "key": (WIDTH, WIDTH),
        "said": (wide, WIDTH),
        "said_own": (WIDTH, WIDTH),
    }
    found: dict[str, tuple[int, ...]] = {
        "own": (tokens, WIDTH),
        "position": (cells, WIDTH),
        "bias": (tokens,),
    }
    for name, shape in linear.items():
        found |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in ("cell_norm", "whole_norm"):
        found |= {f"{name}.weight": (WIDTH,), f"{name}.bias": (WIDTH,)}
    return found


class Captioner(Guide):
    """A captioner as a file holds it: its network in 8 bits a number, and which tokens it knows.

    Attributes:
        tokens: (V,) the language model's ids; the first is its end.
        cells: N, of a picture.
        labels: C, of the encoder's classifier; 0 where it has none.
        wide: E, of the language model's embeddings.
    """

    PREFIX = "captioner."
    COMMAND = "vlm train captioner"

    def __init__(self, held: Mapping[str, Tensor], width: int) -> None:
        super().__init__(held, width)
        require(held, "tokens", torch.int32, (-1,))
        self.tokens = held["tokens"].long()
        if not len(self.tokens) or int(self.tokens.min()) < 0 or len(self.tokens.unique()) < len(self.tokens):
            raise ValueError("tokens are none, or one stands twice")
        sizes = [held[name].shape for name in ("net.position", "net.said.weight", "net.whole.weight")]
        if any(len(size) != 2 for size in sizes):
            raise ValueError("a matrix is none")
        self.cells, self.wide, self.labels = sizes[0][0], sizes[1][0], sizes[2][1] - width
        if self.labels < 0:
            raise ValueError("net.whole.weight is too narrow")
        self._sizes = {
            "tokens": len(self.tokens),
            "wide": self.wide,
            "cells": self.cells,
            "channels": width,
            "labels": self.labels,
        }
        require_module(held, "net.", shapes(**self._sizes))
        require_finite(held)
        self._places = {token: place for place, token in enumerate(self.tokens.tolist())}

    @classmethod
    def of(cls, net: CaptionNet, tokens: Sequence[int]) -> Captioner:
        """One with this network, rounded to what a file holds."""
        held = module_tensors("net.", net) | {"tokens": torch.tensor(list(tokens), dtype=torch.int32)}
        return cls(held, net.cell.in_features)

    @cached_property
    def _net(self) -> CaptionNet:
        """Unpacked when the first caption is wanted: who only asks questions spends nothing on it."""
        with torch.random.fork_rng(devices=[]):
            return load_module(self._held, "net.", CaptionNet(**self._sizes))

    @torch.inference_mode()
    def speaker(self, seen: Seen, embeddings: Tensor) -> Speaker:
        """Who captions the one picture seen.

        Args:
            embeddings: (V', E) of all the language model's tokens.
        """
        net = self._net
        if not len(net.embeddings):
            net.hear(embeddings[self.tokens.to(embeddings.device)])
        return Speaker(self, net, net.see(seen.features.cpu(), seen.scores.cpu()))

    def place(self, token: int) -> int:
        """Where a token stands among those that it knows; -1 where it does not."""
        return self._places.get(token, -1)


class Speaker:
    """What a captioner says of one picture: it remembers what it has read of every beginning."""

    def __init__(self, captioner: Captioner, net: CaptionNet, sight: Sight) -> None:
        self._captioner, self._net, self._sight = captioner, net, sight
        self._read: dict[tuple[int, ...], State] = {(): self._step([0], net.begin(1))}

    def _step(self, places: Sequence[int], state: State) -> State:
        return self._net.step(self._net.read(torch.tensor(places)), state, self._sight)

    @torch.inference_mode()
    def __call__(self, beginnings: Sequence[Sequence[int]]) -> Tensor:
        """Log-probabilities (K, V) of the next token after each of K beginnings, all as long.

        They must be those of the last call with one token more. A token that it does not know it does not
        hear.
        """
        texts = [tuple(beginning) for beginning in beginnings]
        if texts != [()]:
            before = [self._read[text[:-1]] for text in texts]
            held = [torch.cat(parts) for parts in zip(*before, strict=True)]
            places = [self._captioner.place(text[-1]) for text in texts]
            heard = torch.tensor([place >= 0 for place in places])[:, None]
            old = (held[0], held[1], held[2], held[3])
            new = self._step([max(place, 0) for place in places], old)
            states = [torch.where(heard, a, b) for a, b in zip(new, old, strict=True)]
            rows = zip(*(state.split(1) for state in states), strict=True)
            self._read = {text: (a, b, c, d) for text, (a, b, c, d) in zip(texts, rows, strict=True)}
        spoken = torch.cat([self._read[text][2] for text in texts])
        return self._captioner.finite(self._net.logits(spoken).log_softmax(dim=-1))

    def join(self, logits: Tensor, beginnings: Sequence[Sequence[int]], share: float) -> Tensor:
        """(K, V') logits of the language model after K beginnings -> those of both together.

        Args:
            share: of the captioner in the mean of log-probabilities, 0 to 1.
        """
        said = self(beginnings).to(logits)
        both = logits.log_softmax(dim=-1).mul_(1 - share).add_(share * FLOOR)
        tokens = self._captioner.tokens.to(logits.device)
        return both.index_add_(1, tokens, (said - FLOOR).clamp_(min=0) * share)
