"""The state of rows that are being decoded: key/value cache, conditioning, positions.

Rows are aligned on the right, so that every row's newest tokens are last; a mask hides the padding on the
left. A row may go on in several branches (beams, samples), which share its prompt and its pictures: a
branch is nothing but a mask over the row's tokens, so branches change places without a copy. Rows can be
chosen and joined at any step, which is all that continuous batching needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm.adapters import Conditioning, ImageLayout
from vlm.errors import VLMError
from vlm.kvcache import KeyValueCache
from vlm.processor import Row

if TYPE_CHECKING:
    from vlm.model import VLM


@dataclass
class DecoderState:
    """B rows in the middle of their answers, K branches each.

    Attributes:
        cache: (B, H, S, d) keys and values of every layer.
        seen: (B, K, S) bool, which tokens are a branch's own: false on padding and on other branches.
        positions: (B, K) int64 position of the next token.
        groups: (B,) int64 group of images that the next tokens see.
        layout, conditioning: the rows' images.
    """

    model: VLM
    cache: KeyValueCache
    seen: Tensor
    positions: Tensor
    groups: Tensor
    layout: ImageLayout
    conditioning: Conditioning

    def __len__(self) -> int:
        return len(self.positions)

    @classmethod
    @torch.inference_mode()
    def prefill(
        cls, model: VLM, rows: Sequence[Row], features: Tensor, latents: Tensor | None = None
    ) -> tuple[DecoderState, Tensor]:
        """Reads the prompts at once: see `Prefill`."""
        prompts = Prefill(model, rows, features, latents)
        prompts.read(prompts.left)
        return prompts.state()

    @torch.inference_mode()
    def advance(self, tokens: Tensor) -> Tensor:
        """Reads one new token a branch, (B, K) ids, and gives the (B, K, V) logits of the next."""
        language, adapter = self.model.language, self.model.adapter
        rows, branches = tokens.shape
        own = torch.eye(branches, dtype=torch.bool, device=tokens.device)
        self.seen = torch.cat([self.seen, own.expand(rows, -1, -1)], dim=2)
        visible = self.layout.visible(self.groups[:, None].expand(-1, branches))
        hidden = language(
            language.embed(tokens),
            self.seen,
            self.positions,
            self.cache,
            adapter.before_layer(visible, self.conditioning),
            adapter.at_layers,
        )
        self.positions = self.positions + 1
        logits: Tensor = language.logits(hidden)
        return logits

    def follow(self, parents: Tensor) -> None:
        """Goes on with other branches: (B, K') int64, which of its row's branches each continues."""
        width = self.seen.shape[2]
        self.seen = self.seen.gather(1, parents[:, :, None].expand(-1, -1, width))
        self.positions = self.positions.gather(1, parents)

    def keep(self, branches: Sequence[Sequence[int]]) -> tuple[DecoderState, Tensor, Tensor]:
        """The state of some branches of every row; a row of which none is kept leaves.

        Returns:
            the state, its (B',) rows and its (B', K') branches by their places in this one. A row with fewer
            branches than another repeats its last one.
        """
        places = [row for row, kept in enumerate(branches) if kept]
        rows = torch.tensor(places, device=self.positions.device)
        parents = _rectangle([branches[row] for row in places], self.positions.device)
        state = self.select(rows) if len(places) < len(self) else self
        state.follow(parents)
        return state, rows, parents

    def select(self, rows: Tensor) -> DecoderState:
        """The chosen rows (a row may be taken several times), without padding that none of them needs."""
        seen = self.seen[rows]
        first = int(seen.flatten(0, 1).any(dim=0).to(torch.int8).argmax()) if len(rows) else 0
        return DecoderState(
            self.model,
            self.cache.changed(lambda held: held[rows, :, first:]),
            seen[:, :, first:],
            self.positions[rows],
            self.groups[rows],
            self.layout.select(rows),
            self.conditioning.select(rows),
        )

    def join(self, other: DecoderState) -> DecoderState:
        """These rows, then the other's; where one has fewer branches, its last one is repeated."""
        longest = max(self.seen.shape[2], other.seen.shape[2])
        wide = max(self.positions.shape[1], other.positions.shape[1])
        for state in (self, other):
            rows, branches = state.positions.shape
            if branches < wide:
                each = torch.arange(wide, device=state.positions.device).clamp(max=branches - 1)
                state.follow(each.expand(rows, -1))

        def both(mine: Tensor, theirs: Tensor) -> Tensor:
            """Under one another, (B, ., S, ...) or (B, ., S), padded on the left of S."""
            padded = []
            for x in (mine, theirs):
                room = [0, 0] * (x.ndim - 3) + [longest - x.shape[2], 0]
                padded.append(F.pad(x, room))
            return torch.cat(padded)

        return DecoderState(
            self.model,
            self.cache.joined(other.cache, both),
            both(self.seen, other.seen),
            torch.cat([self.positions, other.positions]),
            torch.cat([self.groups, other.groups]),
            ImageLayout.join([self.layout, other.layout]),
            self.conditioning.join([other.conditioning]),
        )


class Prefill:
    """Prompts that are being read, slice by slice along their nodes, so that others need not wait for all.

    A row's nodes stand before those that continue them: what a slice looks at is in the cache already.

    Args:
        features: (I, N, D_v) of the rows' images in reading order.
        latents: (I, L, W) that the adapter makes of them, where they are known already.
    """

    @torch.inference_mode()
    def __init__(
        self, model: VLM, rows: Sequence[Row], features: Tensor, latents: Tensor | None = None
    ) -> None:
        self._model, self._rows = model, rows
        self._batch = model.processor.batch(rows, left=True).to(model.device)
        self._conditioning = model.condition(self._batch, features.to(model.device), latents)
        self._cache = KeyValueCache()
        self._hidden: list[Tensor] = []
        self.left = self._batch.ids.shape[1]
        """Nodes of the longest row that are not read yet."""

    @torch.inference_mode()
    def read(self, most: int) -> None:
        """Reads the next nodes of every row, at most so many."""
        longest = self._batch.ids.shape[1]
        begin = longest - self.left
        end = min(begin + most, longest)
        part = self._batch.slice(begin, end)
        self._hidden.append(self._model.hidden(part, self._conditioning, self._cache))
        self.left = longest - end

    @torch.inference_mode()
    def state(self) -> tuple[DecoderState, Tensor]:
        """When all is read: the state after the prompts and the (B, K, V) next logits.

        Every conversation of a row is a branch; a row with fewer than another repeats its last one.
        """
        model, batch, rows = self._model, self._batch, self._rows
        longest = batch.ids.shape[1]
        ends = _rectangle(
            [[longest - len(row.codes) + end for end in row.ends] for row in rows], model.device
        )
        each = torch.arange(len(rows), device=model.device)[:, None]
        state = DecoderState(
            model,
            self._cache,
            batch.mask[each, ends],
            batch.positions[each, ends] + 1,
            batch.groups[:, -1],
            batch.layout,
            self._conditioning,
        )
        return state, model.language.logits(torch.cat(self._hidden, dim=1)[each, ends])


def _rectangle(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """(B, K) int64 of B lists of at most K numbers; shorter ones repeat their last."""
    most = max(map(len, rows))
    return torch.tensor([[*row, *[row[-1]] * (most - len(row))] for row in rows], device=device)


def finite(logits: Tensor) -> Tensor:
    """The logits as they are.

    Raises:
        VLMError: there are numbers among them that are none, as when float16 overflows.
    """
    if not bool(torch.isfinite(logits.amax(dim=-1)).all()):
        raise VLMError("the model's numbers overflow: use float32 or bfloat16 (--dtype)")
    return logits
