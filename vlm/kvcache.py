"""The keys and values of tokens read so far, written in place.

`transformers`' own growing cache joins old and new at every token, which copies all of it every time.
Here a layer keeps room for tokens to come, and is copied only when that is used up or when rows change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Self

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

ROOM = 32
"""Tokens that a layer has room for when it was laid out anew."""


class _Growing:
    """A (B, H, S, d) tensor that grows along S: `held` is the first S places of a longer block."""

    def __init__(self, held: Tensor) -> None:
        self.block = self.held = held

    def append(self, new: Tensor) -> Tensor:
        """Everything, the new places last."""
        before, after = self.held.shape[2], self.held.shape[2] + new.shape[2]
        if after > self.block.shape[2]:
            shape = list(self.held.shape)
            shape[2] = after + ROOM
            self.block = self.held.new_empty(shape)
            self.block[:, :, :before] = self.held
        self.block[:, :, before:after] = new
        self.held = self.block[:, :, :after]
        return self.held


class _Layer(DynamicLayer):
    """One layer's keys and values."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.growing: tuple[_Growing, _Growing] | None = None

    def hold(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Begins anew with these."""
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.growing = _Growing(keys), _Growing(values)
        self.keys, self.values = keys, values
        return keys, values

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Adds new tokens' keys and values; returns all of them."""
        if self.growing is None:
            return self.hold(key_states, value_states)
        keys, values = self.growing
        self.keys, self.values = keys.append(key_states), values.append(value_states)
        return self.keys, self.values


class KeyValueCache(Cache):
    """What the language model's layers keep of B rows; also the `transformers` cache that they fill."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=_Layer)

    def changed(self, change: Callable[[Tensor], Tensor]) -> Self:
        """A cache of every (B, H, S, d) tensor as `change` makes it."""
        return self.of((change(layer.keys), change(layer.values)) for layer in self.layers)

    def joined(self, other: KeyValueCache, change: Callable[[Tensor, Tensor], Tensor]) -> Self:
        """A cache of what `change` makes of this cache's tensors and the other's."""
        return self.of(
            (change(mine.keys, theirs.keys), change(mine.values, theirs.values))
            for mine, theirs in zip(self.layers, other.layers, strict=True)
        )

    @classmethod
    def of(cls, pairs: Iterable[tuple[Tensor, Tensor]]) -> Self:
        """A cache of these keys and values, layer after layer."""
        cache = cls()
        for keys, values in pairs:
            layer = _Layer()
            layer.hold(keys, values)
            cache.layers.append(layer)
        return cache
