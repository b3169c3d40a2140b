"""The caption that is nearest to all others: what the best single guess about an unseen picture says."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence

from vlm.eval.metrics.ptb import tokenize
from vlm.grams import Gram, grams, unit

PICTURES = 6000  # of a larger set as many, chosen by a hash: more change nothing and take minutes


def most_typical(captions: Sequence[Sequence[str]]) -> str:
    """The caption with the highest mean CIDEr (Vedantam et al. 2015) to all captions of a set.

    CIDEr is a mean of cosines of tf-idf vectors, so the mean over all captions is one dot product with the
    sum of their unit vectors.

    Args:
        captions: of every picture, each at least one; pictures are CIDEr's documents.
    """
    kept = sorted(captions, key=lambda each: hashlib.sha256("\0".join(each).encode()).digest())[:PICTURES]
    # Token lists are kept and their groups made anew where they are needed: all of them would take 300 MB.
    words = {text: tokenize(text).split() for each in kept for text in each}
    seen = Counter(gram for each in kept for gram in {g for text in each for g in grams(words[text])})
    rarity = {gram: math.log(len(kept) / number) for gram, number in seen.items()}
    total: dict[Gram, float] = dict.fromkeys(seen, 0.0)

    def vector(text: str) -> dict[Gram, float]:
        return unit(grams(words[text]), rarity.__getitem__)

    for each in kept:
        for text in each:
            for gram, weight in vector(text).items():
                total[gram] += weight

    def nearness(text: str) -> float:
        # Rounded: the last bits of a sum never decide between two captions.
        return round(sum(weight * total[gram] for gram, weight in vector(text).items()), 6)

    return max(sorted(words), key=nearness)
