"""Groups of adjacent words and their tf-idf vectors, as CIDEr has them (Vedantam et al. 2015)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

ORDER = 4
Gram = tuple[str, ...]


def grams(words: Sequence[str], order: int = ORDER) -> Counter[Gram]:
    """How often every group of one to `order` words stands in a text."""
    return Counter(
        tuple(words[at : at + size]) for size in range(1, order + 1) for at in range(len(words) - size + 1)
    )


def unit(counts: Mapping[Gram, int], rarity: Callable[[Gram], float]) -> dict[Gram, float]:
    """The tf-idf vector of a text, each of its four parts (by group size) of length one, or nought."""
    weights = {gram: count * rarity(gram) for gram, count in counts.items()}
    squares = [0.0] * (ORDER + 1)
    for gram, weight in weights.items():
        squares[len(gram)] += weight * weight
    return {gram: weight / math.sqrt(squares[len(gram)]) for gram, weight in weights.items() if weight}
