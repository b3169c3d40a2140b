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
        model, language = self.model, self.model.language
        states = self.states(batch)
        visible = batch.layout.visible(batch.groups)
        before = model.adapter.before_layer(visible, conditioning)
        with _passing(language.layers[: self.lowest]):
            hidden = language(states, batch.mask, batch.positions, None, before, model.adapter.at_layers)
        if not self._checked:
            self._check(batch, conditioning, hidden)
        return hidden

    def _check(self, batch: Batch, conditioning: Conditioning, hidden: Tensor) -> None:
        """Some families do more than run their layers; for them this is refused, not wrong.

        Raises:
            ConfigError: the result is not that of the plain path.
        """
        with torch.no_grad():
            plain = self.plain(batch, conditioning)
        real = batch.mask.any(dim=-1)
        error = (plain - hidden.detach())[real].abs().max() / plain[real].abs().max()
        if error > (1e-3 if hidden.dtype == torch.float32 and not _narrow(hidden) else 5e-2):
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


def _narrow(hidden: Tensor) -> bool:
    return torch.is_autocast_enabled(hidden.device.type)


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
