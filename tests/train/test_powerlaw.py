"""Power laws: known ones are found again, one bad run bends none, intervals cover as often as they say."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vlm.errors import DataError
from vlm.train.powerlaw import BEND, LARGEST, PowerLaw, _scatter, student

SIZES = np.array([125.0, 250, 500, 1000, 2000, 4000])


def law_of(sizes: np.ndarray, floor: float = 2.0, factor: float = 30.0, exponent: float = 0.6) -> np.ndarray:
    return floor + factor * sizes**-exponent


def test_a_law_without_noise_is_found_again() -> None:
    law = PowerLaw(SIZES[:, None], law_of(SIZES))
    assert law.floor == pytest.approx(2.0, abs=1e-4)
    assert law.factors == pytest.approx([30.0], rel=1e-3)
    assert law.exponents == pytest.approx([0.6], rel=1e-4)
    said = law.predict(16000.0)
    assert said.value == pytest.approx(law_of(np.array([16000.0]))[0], abs=1e-5)
    assert said.high - said.low < 1e-3


def test_data_and_parameters_together() -> None:
    """Hoffmann et al. 2022, the third approach, with the figures they found."""
    grid = np.meshgrid([1e9, 4e9, 2e10, 1e11], [1e7, 1e8, 1e9, 1e10])
    pictures, parameters = (axis.ravel() for axis in grid)
    losses = 1.69 + 406.4 * parameters**-0.34 + 410.7 * pictures**-0.28
    law = PowerLaw(np.stack([parameters, pictures], axis=1), losses)
    assert law.floor == pytest.approx(1.69, rel=1e-2)
    assert law.exponents == pytest.approx([0.34, 0.28], rel=1e-2)
    assert law.factors == pytest.approx([406.4, 410.7], rel=0.1)
    assert law(7e10, 1.4e12) == pytest.approx(1.69 + 406.4 * 7e10**-0.34 + 410.7 * 1.4e12**-0.28, rel=3e-3)


def test_the_size_of_the_units_does_not_matter() -> None:
    losses = law_of(SIZES) + np.array([0.01, -0.02, 0.015, 0.0, -0.01, 0.01])
    one, other = PowerLaw(SIZES[:, None], losses), PowerLaw(SIZES[:, None] * 1e6, losses)
    assert one.predict(8000.0).low == pytest.approx(other.predict(8e9).low, abs=1e-6)
    assert one.exponents == pytest.approx(other.exponents, rel=1e-4)


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_predictions_cover_at_the_rate_they_state(level: float) -> None:
    """The new run's own noise counts too; over 200 laws the rate is known to about 3 % at 80 %."""
    chance = np.random.default_rng(5)
    sizes = np.repeat(SIZES, 2)
    inside, floors, trials = 0, 0, 200
    for _ in range(trials):
        exponent, floor = chance.uniform(0.3, 0.9), chance.uniform(1.0, 2.5)
        factor = chance.uniform(0.5, 2.0) * 125**exponent
        losses = law_of(sizes, floor, factor, exponent) + chance.normal(0, 0.02, len(sizes))
        law = PowerLaw(sizes[:, None], losses)
        measured = law_of(np.array([16000.0]), floor, factor, exponent)[0] + chance.normal(0, 0.02)
        inside += measured in law.predict(16000.0, level=level)
        floors += floor in law.floor_interval(level)
    assert level - 0.07 <= inside / trials <= level + 0.08
    assert level - 0.07 <= floors / trials


def test_an_interval_of_few_runs_is_wide() -> None:
    noise = np.array([0.01, -0.02, 0.015, 0.0, -0.01, 0.01])
    widths = []
    for count in (4, 5, 6):
        said = PowerLaw(SIZES[:count, None], (law_of(SIZES) + noise)[:count]).predict(8000.0)
        widths.append(said.high - said.low)
    assert widths[0] > widths[1] > widths[2]


def test_one_bad_run_hardly_counts() -> None:
    chance = np.random.default_rng(0)
    sizes = np.repeat(SIZES, 3)
    losses = law_of(sizes) + chance.normal(0, 0.005, len(sizes))
    honest = PowerLaw(sizes[:, None], losses)
    spoilt = losses.copy()
    spoilt[12] += 0.5  # a run that has diverged
    robust = PowerLaw(sizes[:, None], spoilt)
    assert robust.weights[12] < 0.1
    assert robust.weights.mean() > 0.8
    assert robust(16000.0) == pytest.approx(honest(16000.0), abs=0.02)
    assert honest.scatter == pytest.approx(0.005, rel=0.5)


def test_a_loss_that_no_size_changes() -> None:
    losses = 3 + np.array([0.01, -0.01, 0.005, -0.008, 0.002, 0.001])
    law = PowerLaw(SIZES[:, None], losses)
    said = law.predict(8000.0)
    assert 3.0 in said
    assert said.high - said.low < 0.1
    assert law.exponent_interval(0).high == pytest.approx(LARGEST)


def test_nothing_falls_below_zero() -> None:
    """Losses that fall as fast as they can: the floor stays a loss."""
    law = PowerLaw(SIZES[:, None], 100 * SIZES**-0.5 + 1e-3 * np.array([1, -1, 1, -1, 1, -1]))
    floor = law.floor_interval()
    assert 0 <= floor.low <= floor.value <= floor.high
    assert law(1e12) >= 0


def test_what_cannot_be_fitted() -> None:
    with pytest.raises(DataError, match="4 are needed"):
        PowerLaw(SIZES[:3, None], law_of(SIZES[:3]))
    with pytest.raises(DataError, match="three different sizes"):
        PowerLaw(np.repeat(SIZES[:2], 3)[:, None], np.ones(6))


@pytest.mark.parametrize(
    ("level", "freedom", "expected"),
    [(0.95, 1, 12.706), (0.95, 2, 4.303), (0.95, 10, 2.228), (0.8, 3, 1.638), (0.99, 30, 2.750)],
)
def test_students_quantiles(level: float, freedom: int, expected: float) -> None:
    """From the printed tables."""
    assert student(level, freedom) == pytest.approx(expected, abs=1e-3)


def test_the_scatter_of_normal_residuals() -> None:
    residuals = np.abs(np.random.default_rng(1).normal(0, 0.3, 20000))
    assert _scatter(residuals, 20000) == pytest.approx(0.3, rel=0.02)
    assert _scatter(np.zeros(5), 2) == 0
    assert math.isfinite(BEND)
