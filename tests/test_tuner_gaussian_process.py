"""The Gaussian process against the formulas written out, and against values that it was not told."""

from __future__ import annotations

import math

import numpy as np
import pytest

from autofuse.tuner.gaussian_process import GaussianProcess, Posterior

GRID = np.array([[x, y, z] for x in range(6) for y in range(5) for z in range(2)])


def values_at(points: np.ndarray) -> np.ndarray:
    """Depends on the first two coordinates, not on the third."""
    return 0.3 * np.abs(points[:, 0] - 2) + 0.1 * points[:, 1] ** 1.5


def learnt(count: int, seed: int = 0) -> tuple[GaussianProcess, np.ndarray, np.ndarray]:
    order = np.random.default_rng(seed).permutation(len(GRID))
    told, others = GRID[order[:count]], GRID[order[count:]]
    process = GaussianProcess(3)
    for _ in range(5):  # each fit goes on where the last one was
        process.fit(told, values_at(told))
    return process, told, others


def test_it_predicts_what_it_was_not_told_and_knows_how_well() -> None:
    process, _, others = learnt(30)
    posterior = process.posterior(others)
    wrong = np.abs(posterior.mean - values_at(others))
    assert wrong.mean() < 0.15 * values_at(GRID).std()
    assert (wrong < 3 * np.sqrt(posterior.variance)).mean() > 0.9


def test_it_is_sure_of_what_it_was_told_and_unsure_of_what_is_far() -> None:
    process, told, others = learnt(8)
    at_told, elsewhere = process.posterior(told), process.posterior(others)
    assert np.abs(at_told.mean - values_at(told)).max() < 0.05
    assert at_told.variance.max() < elsewhere.variance.min()


def test_the_mean_and_the_variance_are_those_of_the_textbook() -> None:
    process, told, others = learnt(12)
    lengths, noise = np.exp(process._lengths), process._noise

    def alike(one: np.ndarray, other: np.ndarray) -> float:
        return math.exp(-sum(abs(a - b) / length for a, b, length in zip(one, other, lengths, strict=True)))

    inverse = np.linalg.inv([[alike(a, b) + noise**2 * (a == b).all() for b in told] for a in told])
    values, posterior = values_at(told), process.posterior(others)
    centred = values - values.mean()
    signal = centred @ inverse @ centred / len(values)
    for place, point in enumerate(others):
        row = np.array([alike(point, each) for each in told])
        assert posterior.mean[place] == pytest.approx(values.mean() + row @ inverse @ centred)
        assert posterior.variance[place] == pytest.approx(signal * (1 - row @ inverse @ row), rel=1e-6, abs=1e-9)


def test_to_believe_a_point_is_to_be_told_its_mean() -> None:
    process, told, others = learnt(12)
    believed = process.posterior(others)
    mean = believed.mean.copy()
    for place in (3, 20):
        believed.believe(place)
    assert np.array_equal(believed.mean, mean)

    longer = np.vstack([told, others[[3, 20]]])
    lengths = np.exp(process._lengths)
    covariance = np.exp(-(np.abs(longer[:, None] - longer[None]) / lengths).sum(2))
    covariance += process._noise**2 * np.eye(len(longer))
    rows = np.exp(-(np.abs(others[:, None] - longer[None]) / lengths).sum(2))
    variance = process._variance * (1 - (rows @ np.linalg.inv(covariance) * rows).sum(1))
    assert believed.variance == pytest.approx(variance, rel=1e-6, abs=1e-9 * process._variance * 2)


def test_the_expected_improvement_is_that_of_samples() -> None:
    process, _, others = learnt(10)
    posterior: Posterior = process.posterior(others)
    best = float(posterior.mean.mean())
    expected = posterior.expected_improvement(best)
    samples = np.random.default_rng(1).normal(posterior.mean, np.sqrt(posterior.variance), (200_000, len(others)))
    assert expected == pytest.approx(np.maximum(best - samples, 0).mean(0), abs=0.01 * float(expected.max()))


def test_equal_values_are_no_trouble() -> None:
    process = GaussianProcess(3)
    process.fit(GRID[:10], np.full(10, 2.0))
    posterior = process.posterior(GRID[10:])
    assert np.allclose(posterior.mean, 2.0)
    assert np.isfinite(posterior.expected_improvement(2.0)).all()
