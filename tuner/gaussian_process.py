"""A Gaussian process over the configs of a search space, for landscapes of a hundred measured configs at most.

A config is a point: for each tunable, the place of its value among the tunable's sorted values, and more coordinates
whose unit is a step of about that size, such as the logarithm of a size to the base 2. Two configs are alike as
exp(-Σ |difference| / length), a length for each coordinate (the exponential kernel: a doubled tile may change a time
abruptly, so no smoothness is assumed). Formulas: Rasmussen & Williams, "Gaussian Processes for Machine
Learning" (2006), 2.25 and 2.26 for the posterior, 5.8 for the likelihood, in which the signal's variance is replaced by
its most likely value. Everything is in float64 on the CPU.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["GaussianProcess", "Points", "Posterior"]

Array = NDArray[np.float64]
Points = NDArray[np.float64]
"""[points, coordinates]."""

_LENGTHS = np.log(
    [0.3, 0.6, 1.2, 2.4, 5.0, 10.0, 25.0]
)  # far enough to either side that a coordinate may not matter at all
_NOISES = (0.0075, 0.015, 0.03, 0.06, 0.12, 0.24)  # standard deviations, in units of the signal's
_USUAL_LENGTH, _LENGTH_SPREAD = math.log(3.5), 0.8  # a log-normal prior: few points say little about ten lengths
_SWEEPS = 2  # over the lengths, in one fit
_OPTIMISM = 3.0  # standard deviations
_LEAST_VARIANCE = 1e-9  # of the signal's


class GaussianProcess:
    """What a few measured values say about all the others.

    Args: coordinates: how many a point has.
    """

    def __init__(self, coordinates: int) -> None:
        self._lengths = np.full(coordinates, _LENGTHS[3])  # logarithms; they start from what the last fit found
        self._noise = _NOISES[2]

    def fit(self, points: Points, values: Array) -> None:
        """Learns from values ([points]) at distinct points: lengths and noise, some steps up or down from the last
        fit as the likelihood says, and what follows from them.
        """
        self._points = points
        self._mean = float(values.mean())
        centred = values - self._mean
        apart = np.abs(points[:, None, :] - points[None, :, :])

        best = self._likelihood(apart, centred, self._lengths, self._noise)
        for coordinate in list(range(len(self._lengths))) * _SWEEPS:
            for length in _beside(_LENGTHS, self._lengths[coordinate]):
                lengths = self._lengths.copy()
                lengths[coordinate] = length
                if (likelihood := self._likelihood(apart, centred, lengths, self._noise)) > best:
                    best, self._lengths = likelihood, lengths
        for noise in _beside(_NOISES, self._noise):
            if (likelihood := self._likelihood(apart, centred, self._lengths, noise)) > best:
                best, self._noise = likelihood, noise

        self._factor = np.linalg.cholesky(_covariance(apart, self._lengths, self._noise))
        whitened = np.linalg.solve(self._factor, centred)
        self._variance = _variance(whitened)
        self._weights = np.linalg.solve(self._factor.T, whitened)

    def posterior(self, points: Points) -> Posterior:
        """What is believed of other points. Only after ``fit``."""
        alike = self._alike(points, self._points)
        mean = self._mean + alike @ self._weights
        return Posterior(self, points, mean, np.linalg.solve(self._factor, alike.T))

    def _alike(self, some: Points, others: Points) -> Array:
        apart = np.zeros((len(some), len(others)))
        for coordinate, length in enumerate(np.exp(self._lengths)):
            apart += np.abs(some[:, coordinate, None] - others[None, :, coordinate]) / length
        return np.exp(-apart)

    @staticmethod
    def _likelihood(apart: Array, centred: Array, lengths: Array, noise: float) -> float:
        """The logarithm, but for a constant."""
        factor = np.linalg.cholesky(_covariance(apart, lengths, noise))
        variance = _variance(np.linalg.solve(factor, centred))
        prior = -0.5 * float((((lengths - _USUAL_LENGTH) / _LENGTH_SPREAD) ** 2).sum())
        return -0.5 * len(centred) * math.log(variance) - float(np.log(np.diag(factor)).sum()) + prior


class Posterior:
    """What is believed of some points: a mean and a variance for each.

    Attributes:
        mean: [points].
        variance: [points], without the noise of a measurement.
    """

    def __init__(self, process: GaussianProcess, points: Points, mean: Array, whitened: Array) -> None:
        self._process = process
        self._points = points
        self._whitened = whitened
        self.mean = mean
        self.variance = process._variance * np.maximum(1.0 - (whitened**2).sum(0), _LEAST_VARIANCE)

    def believe(self, place: int) -> None:
        """Goes on as if the point at this place had been measured and its mean been right: the "kriging believer"
        (Ginsbourger, Le Riche & Carraro 2010). The means stay; what is like it gets less uncertain.
        """
        process = self._process
        alike = process._alike(self._points, self._points[place : place + 1])[:, 0]
        left = 1.0 + process._noise**2 - float((self._whitened[:, place] ** 2).sum())
        row = (alike - self._whitened.T @ self._whitened[:, place]) / math.sqrt(left)
        self._whitened = np.vstack([self._whitened, row])
        self.variance = np.maximum(self.variance - process._variance * row**2, process._variance * _LEAST_VARIANCE)

    def optimistic(self) -> Array:
        """Values that the points may well be as low as: the lower confidence bound."""
        return self.mean - _OPTIMISM * np.sqrt(self.variance)

    def expected_improvement(self, best: float) -> Array:
        """By how much each point is expected to be below ``best``, where it is (Jones, Schonlau & Welch 1998)."""
        deviation = np.sqrt(self.variance)
        by = (best - self.mean) / deviation
        density = np.exp(-0.5 * by**2) / math.sqrt(2 * math.pi)
        return deviation * (by * _normal_cdf(by) + density)


def _covariance(apart: Array, lengths: Array, noise: float) -> Array:
    """Of the points with these distances by coordinate, the signal's variance being 1."""
    covariance: Array = np.exp(-(apart @ np.exp(-lengths)))
    covariance[np.diag_indices(len(covariance))] += noise**2
    return covariance


def _variance(whitened: Array) -> float:
    """The signal's most likely variance."""
    return max(float(whitened @ whitened) / len(whitened), 1e-12)  # all values may be the same


def _beside(grid: Array | tuple[float, ...], value: float) -> list[float]:
    """The values of the grid next to one of them."""
    at = int(np.argmin(np.abs(np.asarray(grid) - value)))
    return [float(grid[place]) for place in (at - 1, at + 1) if 0 <= place < len(grid)]


_normal_cdf = np.vectorize(lambda z: 0.5 * math.erfc(-z / math.sqrt(2)), otypes=[np.float64])
