"""The loss as a power law of sizes, and how surely it says what a larger run will read.

    L(x_1, ..., x_A) = e + a_1 x_1^-b_1 + ... + a_A x_A^-b_A,   e, a_j >= 0

With one size this is the law of data or of parameters of Kaplan et al. 2020 with a floor e (Henighan et al.
2020); with two, data and parameters, it is the third approach of Hoffmann et al. 2022. As there, Huber's
loss keeps one bad run from bending the law. For given exponents the law is linear in e and a_j: those are
solved for exactly, and only the exponents are searched (variable projection, Golub and Pereyra 1973).

Intervals are profiles of the likelihood, not of a linearised law. y lies in the interval of a run of size x
if, with (x, y) among the runs, the sum of squares grows by at most (t s)^2, where s is the scatter of the
runs about the law and t the quantile of Student's distribution with as many degrees of freedom as there are
runs more than unknowns. For a linear law this is the textbook's prediction interval. It holds the scatter of
the new run and what the runs leave open of e, a and b. It does not hold that the law may be another one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vlm.errors import DataError

SMALLEST, LARGEST = 0.02, 4.0
"""Exponents that are tried. Published ones lie between 0.05 and 1."""
GRID = {1: 240, 2: 60}
"""Exponents tried on each axis, by the number of axes."""
BEND = 1.345
"""Residuals of so many scatters are where Huber's loss becomes linear: 95 % efficient for normal ones."""
LEVEL = 0.95
ROUNDS = 50
"""Times that the runs are weighed anew, at most."""
NEAR = 2.0
"""Factor within which the exponents are looked for when the runs are weighed anew."""


@dataclass(frozen=True)
class Interval:
    """A value and its interval."""

    value: float
    low: float
    high: float

    def __contains__(self, other: float) -> bool:
        return self.low <= other <= self.high


def unknowns(axes: int) -> int:
    """How many numbers a law of so many sizes has: e, and a and b of each."""
    return 1 + 2 * axes


class PowerLaw:
    """A law fitted to runs.

    Args:
        sizes: (N, A) of each run, above 0; A is 1 or 2.
        losses: (N,) of each run.

    Attributes:
        floor: e. `factors`: a_j. `exponents`: b_j.
        scatter: standard deviation of a run about the law. `freedom`: N less the number of unknowns.
        weights: (N,) of each run: 1, or less where it lies far from the law.

    Raises:
        DataError: no more runs than unknowns, or fewer than three different sizes on an axis.
    """

    def __init__(self, sizes: np.ndarray, losses: np.ndarray) -> None:
        self.losses = np.asarray(losses, float)
        sizes = np.asarray(sizes, float)
        self.axes = sizes.shape[1]
        self.freedom = len(sizes) - unknowns(self.axes)
        if self.freedom < 1:
            raise DataError(
                f"{len(sizes)} runs do not say how far a law of {unknowns(self.axes)} unknowns is off: "
                f"{unknowns(self.axes) + 1} are needed"
            )
        if min(len(set(axis)) for axis in sizes.T) < 3:
            raise DataError("a power law needs at least three different sizes")
        self.units = sizes.min(axis=0)
        self.logs = np.log(sizes / self.units)
        self.weights, self.scatter = np.ones(len(sizes)), 0.0
        self.exponents = np.full(self.axes, math.sqrt(SMALLEST * LARGEST))
        reach = math.sqrt(LARGEST / SMALLEST)
        solved = np.zeros(1 + self.axes)
        for _ in range(ROUNDS):
            self.exponents, solved = self._search(self.exponents, reach)
            reach = NEAR
            residuals = np.abs(self.losses - self._columns(self.exponents[None], self.logs)[0] @ solved)
            self.scatter = _scatter(residuals, self.freedom)
            weights = np.minimum(1.0, BEND * self.scatter / np.maximum(residuals, 1e-300))
            settled = np.allclose(weights, self.weights, atol=1e-4)
            self.weights = weights if self.scatter > 0 else self.weights
            if settled or self.scatter == 0:
                break
        self._solved = solved
        self.floor = float(solved[0])
        self.factors = solved[1:] * self.units**self.exponents

    def __call__(self, *size: float) -> float:
        """The loss at a size."""
        return float(self._columns(self.exponents[None], self._log(size)[None])[0, 0] @ self._solved)

    def predict(self, *size: float, level: float = LEVEL) -> Interval:
        """The loss of a run of this size that is not among those of the fit."""
        logs = self._log(size)
        low, high = self._profile(self._columns(self._grid, logs[None])[:, 0], 1.0, level)
        value = self(*size)
        return Interval(value, min(low, value), max(high, value))

    def floor_interval(self, level: float = LEVEL) -> Interval:
        """e, what no size takes away."""
        at = np.zeros((len(self._grid), 1 + self.axes))
        at[:, 0] = 1
        low, high = self._profile(at, 0.0, level)
        return Interval(self.floor, min(low, self.floor), max(high, self.floor))

    def exponent_interval(self, axis: int, level: float = LEVEL) -> Interval:
        """b of an axis; an end at `SMALLEST` or `LARGEST` is open."""
        best = np.full(len(self._grid), np.inf)
        for solved, squares, _ in self._parts():
            best = np.minimum(best, np.where((solved >= 0).all(axis=1), squares, np.inf))
        found = self._grid[best - best.min() <= self._bound(level), axis]
        value = float(self.exponents[axis])
        return Interval(value, min(float(found.min()), value), max(float(found.max()), value))

    # --- least squares for given exponents -----------------------------------------------------------

    def _log(self, size: Sequence[float]) -> np.ndarray:
        return np.log(np.asarray(size, float) / self.units)

    @staticmethod
    def _columns(exponents: np.ndarray, logs: np.ndarray) -> np.ndarray:
        """(G, A) exponents, (N, A) log sizes -> (G, N, 1 + A)."""
        powers = np.exp(-exponents[:, None, :] * logs)
        return np.concatenate([np.ones((*powers.shape[:2], 1)), powers], axis=2)

    def _solve(self, columns: np.ndarray, chosen: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Weighted least squares with some of the columns, the coefficients of the others being 0.

        Returns:
            (G, 1 + A) coefficients, (G,) sums of squares, (G, 1 + A, 1 + A) inverse of the normal matrix.
        """
        part = columns[:, :, chosen]
        weighted = part * self.weights[:, None]
        inverse = np.linalg.inv(part.transpose(0, 2, 1) @ weighted)
        found = (inverse @ (weighted.transpose(0, 2, 1) @ self.losses)[:, :, None])[:, :, 0]
        residuals = self.losses - (part @ found[:, :, None])[:, :, 0]
        squares = (self.weights * residuals**2).sum(axis=1)
        count = columns.shape[2]
        solved = np.zeros((len(columns), count))
        solved[:, chosen] = found
        wide = np.zeros((len(columns), count, count))
        wide[np.ix_(range(len(columns)), chosen, chosen)] = inverse
        return solved, squares, wide

    def _best(self, exponents: np.ndarray) -> tuple[int, np.ndarray, float]:
        """Of (G, A) exponents those of the smallest sum of squares with no coefficient below 0."""
        columns = self._columns(exponents, self.logs)
        best: tuple[int, np.ndarray, float] = (0, np.zeros(columns.shape[2]), math.inf)
        for chosen in _choices(columns.shape[2]):
            solved, squares, _ = self._solve(columns, chosen)
            squares = np.where((solved >= 0).all(axis=1), squares, np.inf)
            index = int(squares.argmin())
            if squares[index] < best[2]:
                best = (index, solved[index], float(squares[index]))
        return best

    def _search(self, centre: np.ndarray, reach: float) -> tuple[np.ndarray, np.ndarray]:
        """The best exponents within a factor `reach`, by a grid that closes in; their coefficients."""
        count = 81 if self.axes == 1 else 31
        while reach > 1 + 1e-7:
            axes = [np.geomspace(c / reach, c * reach, count).clip(SMALLEST, LARGEST) for c in centre]
            grid = np.array(list(itertools.product(*axes)))
            index, solved, _ = self._best(grid)
            centre, reach = grid[index], reach ** (6 / (count - 1))
        return centre, solved

    # --- profiles --------------------------------------------------------------------------------------

    @cached_property
    def _grid(self) -> np.ndarray:
        """(G, A) exponents, the best ones first."""
        axes = [np.geomspace(SMALLEST, LARGEST, GRID[self.axes])] * self.axes
        return np.concatenate([self.exponents[None], np.array(list(itertools.product(*axes)))])

    def _parts(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """What `_solve` returns for the grid, with each choice of columns."""
        columns = self._columns(self._grid, self.logs)
        for chosen in _choices(columns.shape[2]):
            yield self._solve(columns, chosen)

    def _bound(self, level: float) -> float:
        """How much the sum of squares may grow."""
        return (student(level, self.freedom) * self.scatter) ** 2

    def _profile(self, at: np.ndarray, noise: float, level: float) -> tuple[float, float]:
        """Ends of the values that (G, 1 + A) `at` times the coefficients may have.

        For given exponents, asking for the value y instead of the fitted y0 costs (y - y0)^2 / v squares,
        where v is the value's variance in units of a run's (`noise` more for a run of its own), and moves
        the coefficients in proportion; they may not pass 0.
        """
        smallest = self._best(self._grid)[2]
        low, high = math.inf, -math.inf
        for solved, squares, inverse in self._parts():
            towards = (inverse @ at[:, :, None])[:, :, 0]
            spread = (towards * at).sum(axis=1) + noise
            value = (solved * at).sum(axis=1)
            room = self._bound(level) - (squares - smallest)
            half = np.sqrt(np.maximum(room * spread, 0))
            begin, end = value - half, value + half
            moves = np.divide(towards, spread[:, None], out=np.zeros_like(towards), where=spread[:, None] > 0)
            with np.errstate(divide="ignore", invalid="ignore"):
                zero = value[:, None] - solved / moves
            begin = np.maximum(begin, np.where(moves > 0, zero, -np.inf).max(axis=1))
            end = np.minimum(end, np.where(moves < 0, zero, np.inf).min(axis=1))
            stuck = ((moves == 0) & (solved < 0)).any(axis=1)
            kept = (room >= 0) & (begin <= end) & ~stuck
            if kept.any():
                low, high = min(low, float(begin[kept].min())), max(high, float(end[kept].max()))
        return low, high


def _choices(count: int) -> Iterator[list[int]]:
    """Every choice of at least one column."""
    for size in range(1, count + 1):
        for chosen in itertools.combinations(range(count), size):
            yield list(chosen)


def _scatter(residuals: np.ndarray, freedom: int) -> float:
    """Huber's second proposal (1964): the scatter s with sum min(|r| / s, BEND)^2 = its mean x freedom."""
    density = math.exp(-(BEND**2) / 2) / math.sqrt(2 * math.pi)
    outside = math.erfc(BEND / math.sqrt(2))
    mean = 1 - outside - 2 * BEND * density + BEND**2 * outside
    low, high = 0.0, math.sqrt(float((residuals**2).sum()) / (mean * freedom))
    for _ in range(100):
        middle = (low + high) / 2
        if middle == 0:
            break
        if float((np.minimum(residuals / middle, BEND) ** 2).sum()) > mean * freedom:
            low = middle
        else:
            high = middle
    return high


def student(level: float, freedom: int) -> float:
    """t with P(|T| <= t) = level for Student's T: sqrt(f) tan(u) of a u with the density cos^(f - 1)."""
    angle = np.linspace(0, math.pi / 2, 20001)
    density = np.cos(angle) ** (freedom - 1)
    mass = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return math.sqrt(freedom) * math.tan(float(np.interp(level, mass / mass[-1], angle)))
