"""Sources mixed by weight."""

from __future__ import annotations

from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from vlm.data.mixture import Mixture
from vlm.errors import ConfigError

sizes = st.lists(st.tuples(st.integers(1, 30), st.floats(0.01, 10)), min_size=1, max_size=4)


@settings(max_examples=60)
@given(sizes, st.integers(0, 5), st.integers(0, 60), st.integers(0, 1000))
def test_an_epoch_is_a_function_of_seed_and_epoch(
    rows: list[tuple[int, float]], epoch: int, size: int, seed: int
) -> None:
    sources = [[f"{n}:{i}" for i in range(length)] for n, (length, _) in enumerate(rows)]
    weights = [weight for _, weight in rows]
    mixture = Mixture(sources, weights, seed, size)
    items = mixture.epoch(epoch)
    assert items == Mixture(sources, weights, seed, size).epoch(epoch)
    assert len(items) == len(mixture) == sum(mixture.shares)
    total = sum(weights)
    for share, weight in zip(mixture.shares, weights, strict=True):
        assert abs(share - len(mixture) * weight / total) < 1


def test_every_item_is_seen_equally_often_across_epochs() -> None:
    mixture = Mixture([list(range(7)), list(range(100, 150))], [1, 4], seed=3, size=25)
    seen = Counter(item for epoch in range(28) for item in mixture.epoch(epoch))
    assert mixture.shares == (5, 20)
    assert {seen[item] for item in range(7)} == {28 * 5 // 7}
    assert {seen[item] for item in range(100, 150)} <= {11, 12}
    assert mixture.epoch(0) != mixture.epoch(1)
    assert mixture.epoch(1) != Mixture(mixture.sources, mixture.weights, 4, 25).epoch(1)


def test_the_order_is_frozen() -> None:
    mixture = Mixture([["a", "b", "c"], ["x", "y"]], [2, 1], seed=1, size=6)
    assert ["".join(mixture.epoch(epoch)) for epoch in range(2)] == ["aybcxa", "cxcbby"]


@pytest.mark.parametrize(
    ("sources", "weights"),
    [([], []), ([[1]], [1, 2]), ([[1], []], [1, 1]), ([[1]], [0]), ([[1]], [float("nan")])],
)
def test_what_cannot_be_mixed(sources: list[list[int]], weights: list[float]) -> None:
    with pytest.raises(ConfigError):
        Mixture(sources, weights)
