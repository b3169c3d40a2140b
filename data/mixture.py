"""Several sources mixed by weight: what an epoch holds is a function of the seed and the epoch alone."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, TypeVar

from vlm.errors import ConfigError

T = TypeVar("T")


def rng_of(*key: object) -> random.Random:
    """A generator that is a function of the key, the same on every machine and Python version."""
    digest = hashlib.sha256("\0".join(map(str, key)).encode()).digest()
    return random.Random(int.from_bytes(digest[:8], "big"))


@dataclass(frozen=True)
class Mixture(Generic[T]):
    """Sources drawn from in proportion to their weights.

    Every source is walked through in a shuffled order of its own, again and again with a new shuffle, and
    goes on where the epoch before stopped: over time each of its items is seen equally often, however small
    its weight is.

    Attributes:
        sources: what is mixed; none may be empty.
        weights: shares of an epoch, positive; they need not sum to 1.
        seed: chooses the shuffles.
        size: items in an epoch; 0 means as many as the sources hold together.

    Raises:
        ConfigError: no source, an empty one, or weights that do not fit.
    """

    sources: Sequence[Sequence[T]]
    weights: Sequence[float]
    seed: int = 0
    size: int = 0

    def __post_init__(self) -> None:
        if not self.sources or len(self.sources) != len(self.weights):
            raise ConfigError(
                f"{len(self.sources)} sources and {len(self.weights)} weights: they must be as many"
            )
        for number, (source, weight) in enumerate(zip(self.sources, self.weights, strict=True), start=1):
            if not len(source):
                raise ConfigError(f"source {number} of the mixture is empty")
            if not 0 < weight < float("inf"):
                raise ConfigError(f"weight {weight} of source {number} is not a positive number")
        if self.size < 0:
            raise ConfigError(f"an epoch cannot hold {self.size} items")

    def __len__(self) -> int:
        """Items in an epoch."""
        return self.size or sum(len(source) for source in self.sources)

    @cached_property
    def shares(self) -> tuple[int, ...]:
        """Items that an epoch takes from each source: the weights' shares by largest remainder."""
        total = sum(self.weights)
        exact = [len(self) * weight / total for weight in self.weights]
        floors = [int(share) for share in exact]
        order = sorted(range(len(exact)), key=lambda i: (floors[i] - exact[i], i))
        for index in order[: len(self) - sum(floors)]:
            floors[index] += 1
        return tuple(floors)

    def _walk(self, source: int, start: int, count: int) -> list[int]:
        """Item indices `start` to `start + count` of a source's endless walk."""
        length = len(self.sources[source])
        found: list[int] = []
        while len(found) < count:
            lap, offset = divmod(start + len(found), length)
            order = list(range(length))
            rng_of("mixture", self.seed, source, lap).shuffle(order)
            found += order[offset : offset + count - len(found)]
        return found

    def indices(self, epoch: int) -> list[tuple[int, int]]:
        """(source, item) pairs of an epoch, in the order they are used."""
        chosen = [
            (source, item)
            for source, share in enumerate(self.shares)
            for item in self._walk(source, epoch * share, share)
        ]
        rng_of("order", self.seed, epoch).shuffle(chosen)
        return chosen

    def epoch(self, epoch: int) -> list[T]:
        """The items of an epoch."""
        return [self.sources[source][item] for source, item in self.indices(epoch)]
