"""The state of rows that are being decoded: key/value cache, conditioning, positions.

Rows are aligned on the right, so that every row's newest token is last; a mask hides the padding on the
left. Rows can be chosen, repeated and joined at any step, which is all that beam search and continuous
batching need.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm.adapters import Conditioning, ImageLayout
from vlm.processor import Row

if TYPE_CHECKING:
    from vlm.model import VLM


@dataclass
class DecoderState:
    """B rows in the middle of their answers.

    Attributes:
        keys, values: one (B, H, S, d) tensor a layer.
        seen: (B, S) bool, false on the padding.
        positions: (B,) int64 position of the next token.
        groups: (B,) int64 group of images that the next token sees.
        layout, conditioning: the rows' images.
    """

    model: VLM
    keys: list[Tensor]
    values: list[Tensor]
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
        """Reads the prompts: the state after them, and the (B, V) logits of the first new token.

        Args:
            features: (I, N, D_v) of the rows' images in reading order.
            latents: (I, L, W) that the adapter makes of them, where they are known already.
        """
        from transformers import DynamicCache

        batch = model.processor.batch(rows, left=True).to(model.device)
        cache = DynamicCache()
        conditioning = model.condition(batch, features.to(model.device), latents)
        hidden = model.hidden(batch, conditioning, cache)
        state = cls(
            model,
            [layer.keys for layer in cache.layers],
            [layer.values for layer in cache.layers],
            batch.mask[:, -1],
            batch.positions[:, -1] + 1,
            batch.groups[:, -1],
            batch.layout,
            conditioning,
        )
        return state, model.language.logits(hidden[:, -1])

    @torch.inference_mode()
    def advance(self, tokens: Tensor) -> Tensor:
        """Reads one new token a row, (B,) ids, and gives the (B, V) logits of the next."""
        language, adapter = self.model.language, self.model.adapter
        self.seen = F.pad(self.seen, (0, 1), value=True)
        visible = self.layout.visible(self.groups[:, None])
        cache = self._cache()
        hidden = language(
            language.embed(tokens[:, None]),
            self.seen[:, None],
            self.positions[:, None],
            cache,
            adapter.before_layer(visible, self.conditioning),
            adapter.at_layers,
        )
        self.keys = [layer.keys for layer in cache.layers]
        self.values = [layer.values for layer in cache.layers]
        self.positions = self.positions + 1
        logits: Tensor = language.logits(hidden[:, -1])
        return logits

    def _cache(self) -> Any:
        from transformers import DynamicCache

        cache = DynamicCache()
        for index, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            cache.update(key, value, index)
        return cache

    def select(self, rows: Tensor, *, same_images: bool = False) -> DecoderState:
        """The chosen rows (a row may be taken several times), without padding that none of them needs.

        Args:
            same_images: row i is to show what it shows already, as when beams of one prompt change places.
        """
        seen = self.seen[rows]
        first = int(seen.any(dim=0).to(torch.int8).argmax()) if len(rows) else 0
        return DecoderState(
            self.model,
            [key[rows, :, first:] for key in self.keys],
            [value[rows, :, first:] for value in self.values],
            seen[:, first:],
            self.positions[rows],
            self.groups[rows],
            self.layout if same_images else self.layout.select(rows),
            self.conditioning if same_images else self.conditioning.select(rows),
        )

    def join(self, other: DecoderState) -> DecoderState:
        """These rows, then the other's."""
        longest = max(self.seen.shape[1], other.seen.shape[1])

        def pad(x: Tensor, axis: int) -> Tensor:
            room = [0, 0] * (x.ndim - 1 - axis) + [longest - x.shape[axis], 0]
            return F.pad(x, room)

        def both(mine: list[Tensor], theirs: list[Tensor]) -> list[Tensor]:
            return [torch.cat([pad(a, 2), pad(b, 2)]) for a, b in zip(mine, theirs, strict=True)]

        return DecoderState(
            self.model,
            both(self.keys, other.keys),
            both(self.values, other.values),
            torch.cat([pad(self.seen, 1), pad(other.seen, 1)]),
            torch.cat([self.positions, other.positions]),
            torch.cat([self.groups, other.groups]),
            ImageLayout.join([self.layout, other.layout]),
            self.conditioning.join([other.conditioning]),
        )
