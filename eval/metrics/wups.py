"""WUPS, the soft accuracy of DAQUAR (Malinowski and Fritz, NIPS 2014), as its authors' script computes it.

Answers are sets, written as comma-separated words. Below the threshold a word's similarity counts a tenth.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from vlm.eval.metrics.wordnet import word_similarity

DOWNWEIGHT = 0.1


def items(answer: str) -> list[str]:
    """The words of a comma-separated answer; the script keeps an empty one for an empty answer."""
    return [item.strip() for item in answer.split(",")]


def wups(answer: str, reference: str, threshold: float) -> float:
    """min over both directions of the product, over one set's words, of the best match in the other set.

    Args:
        threshold: 0.9 and 0.0 are the published ones; -1 compares words for equality ("accuracy").

    Returns:
        0 to 1.
    """

    def alike(first: str, second: str) -> float:
        if threshold == -1 or first == second:
            return float(first == second)
        similarity = word_similarity(first, second)
        return similarity if similarity >= threshold else similarity * DOWNWEIGHT

    return set_score(items(answer), items(reference), alike)


def set_score(first: list[str], second: list[str], alike: Callable[[str, str], float]) -> float:
    """The script's fuzzy score of two lists of words."""
    forward = math.prod(max(alike(word, other) for other in second) for word in first)
    backward = math.prod(max(alike(word, other) for other in first) for word in second)
    return min(forward, backward)
