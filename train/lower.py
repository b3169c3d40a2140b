"""The hidden states below the lowest gated block depend on the words alone, so they need computing once.

A Flamingo adapter leaves the layers below its first block as they are; what they make of a caption is the
same in every epoch. The states of each conversation are computed by itself and kept in float32, so that a
value does not depend on what else was in its batch, and a resumed run sees the very same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vlm.adapters import Conditioning
from vlm.errors import ConfigError
from vlm.model import VLM
from vlm.processor import Batch

ERROR, NARROW_ERROR = 1e-3, 5e-2
"""Largest difference from the plain path, as a share of its largest value; in float32, in bfloat16."""


class _Reached(Exception):
    """Ends a forward pass at the layer where its states are wanted."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class LowerStates:
    """The states that enter layer `lowest`, by the token ids that lead to them.

    Args:
        room: bytes of states that are kept; what comes later is computed each time.

    Raises:
        ConfigError: the adapter's first layer leaves nothing to keep, or the states depend on pictures.
    """

    def __init__(self, model: VLM, lowest: int, room: int) -> None:
        if lowest < 1 or model.adapter.soft_tokens:
            raise ConfigError("fast.lower_cache needs an adapter whose first block stands above layer 0")
        self.model, self.lowest, self.room = model, lowest, room
        self.kept: dict[tuple[int, ...], Tensor] = {}
        self.plain = model.hidden
        self._checked = False

    def install(self) -> None:
        """Makes the model use these states wherever a whole batch is read without a cache of its own."""
        object.__setattr__(self.model, "hidden", self.hidden)

    def hidden(self, batch: Batch, conditioning: Conditioning, cache: Any = None) -> Tensor:
        """As `VLM.hidden`."""
        if cache is not None:
            return self.plain(batch, conditioning, cache)
        if not self._checked:
            self._check(batch, conditioning)
        return self._above(batch, conditioning)

    def _above(self, batch: Batch, conditioning: Conditioning) -> Tensor:
        """Runs the layers from `lowest` on."""
        language, adapter = self.model.language, self.model.adapter
        before = adapter.before_layer(batch.layout.visible(batch.groups), conditioning)
        states = self.states(batch)  # needs the lower layers, so before they are passed by
        with _passing(language.layers[: self.lowest]):
            hidden: Tensor = language(states, batch.mask, batch.positions, None, before, adapter.at_layers)
        return hidden

    @torch.no_grad()
    def _check(self, batch: Batch, conditioning: Conditioning) -> None:
        """Some families do more than run their layers; for them this is refused, not wrong.

        Raises:
            ConfigError: the result is not that of the plain path.
        """
        training = self.model.adapter.training
        self.model.adapter.eval()  # dropout would tell them apart
        kept, short = self._above(batch, conditioning), self.plain(batch, conditioning)
        self.model.adapter.train(training)
        real = batch.mask.sum(dim=-1) > 1
        error = (kept - short)[real].abs().max() / short[real].abs().max()
        narrow = torch.is_autocast_enabled(kept.device.type) or kept.dtype != torch.float32
        if error > (NARROW_ERROR if narrow else ERROR):
            raise ConfigError("fast.lower_cache does not fit this language model: set it to 0")
        self._checked = True

    def states(self, batch: Batch) -> Tensor:
        """(B, T, D) states that enter layer `lowest`; zeros on padding."""
        rows = [(row, path) for row in range(len(batch.ids)) for path in _paths(batch.mask[row])]
        size = self.model.language.width
        result = torch.zeros(*batch.ids.shape, size, device=batch.ids.device)
        for row, path in rows:
            result[row, path] = self._of(batch.ids[row, path])
        return result

    def _of(self, ids: Tensor) -> Tensor:
        """(T, D) states of one conversation."""
        key = tuple(ids.tolist())
        found = self.kept.get(key)
        if found is None:
            found = self._compute(ids)
            if self.room >= found.nbytes:
                self.room -= found.nbytes
                self.kept[key] = found
        return found

    @torch.no_grad()
    def _compute(self, ids: Tensor) -> Tensor:
        language = self.model.language
        count = len(ids)
        mask = torch.ones(1, count, count, dtype=torch.bool, device=ids.device).tril()
        positions = torch.arange(count, device=ids.device)[None]

        def stop(_layer: int, hidden: Tensor) -> Tensor:
            raise _Reached(hidden)

        try:
            language(language.embed(ids[None]), mask, positions, None, stop, (self.lowest,))
        except _Reached as reached:
            return reached.hidden[0].float()
        raise AssertionError("the layer was not reached")


def _paths(mask: Tensor) -> list[Tensor]:
    """Nodes of every conversation of a row, first to last, from its (T, T) mask of what each node sees."""
    sees = mask & mask.any(dim=-1)[:, None]
    # A leaf is seen by nobody but itself.
    leaves = (sees.sum(dim=0) == 1) & sees.diagonal()
    return [sees[leaf].nonzero()[:, 0] for leaf in leaves.nonzero()[:, 0].tolist()]


@contextmanager
def _passing(layers: Sequence[nn.Module] | nn.ModuleList) -> Iterator[None]:
    """Makes layers hand on what they are given."""

    def forward(hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        return hidden_states

    before = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        object.__setattr__(layer, "forward", forward)
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            object.__delattr__(layer, "forward")
            if own is not None:
                object.__setattr__(layer, "forward", own)
