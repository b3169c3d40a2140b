"""95 % intervals by the bootstrap, and paired comparison of two runs.

What is resampled are items (pictures or questions), 1,000 times, with one seed, so the interval of a report
never depends on the day. A corpus score such as BLEU is recomputed from summed counts in every resample.
Items that are no independent draws (six drawings of one scene) are resampled by the group they belong to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000
SEED = 20150
LEVEL = 95.0
_BLOCK = 64  # resamples at once: bounds memory at 64 x items

Statistic = Callable[[np.ndarray], np.ndarray]


def interval(
    values: np.ndarray, resamples: int = RESAMPLES, seed: int = SEED, groups: Sequence[str] = ()
) -> tuple[float, float]:
    """The 95 % interval of the mean of (n,) item scores; `groups`: of each item, what is resampled whole."""
    if groups:
        counts = np.stack([_by_group(values, groups), _by_group(np.ones(len(values)), groups)], axis=1)
        ((low, high),) = corpus_interval(counts, lambda sums: sums[:, :1] / sums[:, 1:], resamples, seed)
        return float(low), float(high)
    low, high = np.percentile(_means(values[None], resamples, seed)[:, 0], _tails())
    return float(low), float(high)


def _by_group(values: np.ndarray, groups: Sequence[str]) -> np.ndarray:
    """(n,) -> (groups,) sums, in the order in which the groups come."""
    place = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    return np.bincount([place[group] for group in groups], weights=values, minlength=len(place))


def _means(rows: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """(metrics, n) item scores -> (resamples, metrics) means of resamples."""
    chance = np.random.default_rng(seed)
    count = rows.shape[1]
    found = np.empty((resamples, len(rows)))
    for start in range(0, resamples, _BLOCK):
        size = min(_BLOCK, resamples - start)
        picks = chance.integers(0, count, (size, count))
        found[start : start + size] = rows[:, picks].mean(axis=2).T
    return found


def corpus_interval(
    counts: np.ndarray, score: Statistic, resamples: int = RESAMPLES, seed: int = SEED
) -> np.ndarray:
    """The 95 % intervals of a score of summed counts.

    Args:
        counts: (n, c) what each item adds.
        score: (r, c) sums -> (r, k) scores.

    Returns:
        (k, 2) lower and upper ends.
    """
    chance = np.random.default_rng(seed)
    sums = []
    for start in range(0, resamples, _BLOCK):
        size = min(_BLOCK, resamples - start)
        picks = chance.integers(0, len(counts), (size, len(counts)))
        sums.append(counts[picks].sum(axis=1))
    return np.asarray(np.percentile(score(np.concatenate(sums)), _tails(), axis=0).T)


def _tails() -> list[float]:
    return [(100 - LEVEL) / 2, (100 + LEVEL) / 2]


@dataclass(frozen=True)
class Comparison:
    """B minus A on the same items.

    Attributes:
        difference: of the means.
        interval: its 95 % interval, by resampling items, or the groups of them.
        p_value: share of sign flips of what is resampled at least as far from 0 (two-sided).
        better: places of the items that B scores higher, `worse` lower; none of corpus scores.
    """

    difference: float
    interval: tuple[float, float]
    p_value: float
    better: tuple[int, ...] = ()
    worse: tuple[int, ...] = ()


def compare(
    first: Sequence[float], second: Sequence[float], seed: int = SEED, groups: Sequence[str] = ()
) -> Comparison:
    """Paired comparison of two runs' item scores, in the same order; `groups` as for `interval`."""
    differences = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    observed = abs(float(differences.mean()))
    flipped = _by_group(differences, groups) if groups else differences
    chance = np.random.default_rng(seed)
    extreme = 0
    for start in range(0, RESAMPLES, _BLOCK):
        size = min(_BLOCK, RESAMPLES - start)
        signs = chance.choice((-1.0, 1.0), (size, len(flipped)))
        extreme += int((np.abs((signs * flipped).sum(axis=1)) / len(differences) >= observed - 1e-12).sum())
    return Comparison(
        float(differences.mean()),
        interval(differences, seed=seed, groups=groups),
        (extreme + 1) / (RESAMPLES + 1),
        tuple(np.flatnonzero(differences > 0).tolist()),
        tuple(np.flatnonzero(differences < 0).tolist()),
    )


def compare_corpus(
    first: np.ndarray, second: np.ndarray, score: Statistic, seed: int = SEED
) -> list[Comparison]:
    """Paired comparison of two runs' scores of summed counts: `compare` for what is no mean of items.

    The interval resamples items, with both runs' counts of each. For the p-value the runs change places in
    items that chance picks: of a mean this is the sign flip of `compare`.

    Args:
        first, second: (n, c) what each item adds, in the same order.
        score: (r, c) sums -> (r, k) scores.

    Returns:
        k comparisons.
    """

    def gap(theirs: np.ndarray, ours: np.ndarray) -> np.ndarray:
        return score(theirs) - score(ours)

    chance, count = np.random.default_rng(seed), len(first)
    observed = gap(second.sum(axis=0)[None], first.sum(axis=0)[None])[0]
    resampled, extreme = [], np.zeros(len(observed))
    for start in range(0, RESAMPLES, _BLOCK):
        size = min(_BLOCK, RESAMPLES - start)
        picks = chance.integers(0, count, (size, count))
        resampled.append(gap(second[picks].sum(axis=1), first[picks].sum(axis=1)))
        moved = chance.integers(0, 2, (size, count)) @ (second - first)
        swapped = gap(second.sum(axis=0) - moved, first.sum(axis=0) + moved)
        extreme += (np.abs(swapped) >= np.abs(observed) - 1e-12).sum(axis=0)
    ends = np.percentile(np.concatenate(resampled), _tails(), axis=0).T
    return [
        Comparison(float(difference), (float(low), float(high)), float((more + 1) / (RESAMPLES + 1)))
        for difference, (low, high), more in zip(observed, ends, extreme, strict=True)
    ]
