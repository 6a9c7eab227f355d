"""What the columns of one tensor are made of: each is a sum of one or two terms."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

__all__ = [
    "COLUMN",
    "FACTOR",
    "FACTOR_COLUMN",
    "SIGN",
    "SOURCE",
    "Reading",
    "alike_terms",
    "different_pairs",
    "plain_terms",
    "product_of",
    "sum_of",
]

# Fields of a term.
SIGN, SOURCE, COLUMN, FACTOR, FACTOR_COLUMN = range(5)


@dataclass(frozen=True)
class Reading:
    """The columns of a node.

    Attributes:
        terms: int32 [*dims, 1 or 2, 5]: each column is the sum of terms (sign, source, column, source, column): a
            product of a source's column and of another's, or of nothing (0). A term of sign 0 is none. ``dims`` are the
            node's last dimensions, one or two; of a complex node there is one more, real and imaginary part.
        lead: how many of the node's dimensions come before those.
        is_complex: whether the node is.
        alone: the source that all columns are of, each as it is; None if there are several, or if it is not known.
    """

    terms: np.ndarray
    lead: int
    is_complex: bool = False
    alone: int | None = None

    @property
    def dims(self) -> tuple[int, ...]:
        """The sizes of the dimensions that were read."""
        return self.terms.shape[: -3 if self.is_complex else -2]

    @cached_property
    def is_plain(self) -> bool:
        """Whether each column is a source's, and nothing else."""
        return self.alone is not None or (self.terms.shape[-2] == 1 and not self.terms[..., FACTOR].any())

    def rearranged(self, terms: np.ndarray) -> Reading:
        """A reading of some of the same columns, in any order and any dimensions."""
        return Reading(terms, self.lead, self.is_complex, self.alone)

    def two_terms(self) -> np.ndarray:
        """The terms, two for each column."""
        if self.terms.shape[-2] == 2:
            return self.terms
        return np.concatenate([self.terms, np.zeros_like(self.terms)], axis=-2)


def plain_terms(source: int, columns: np.ndarray) -> np.ndarray:
    """The terms of columns of a source, as they are: [width, 1, 5]."""
    terms = np.zeros((len(columns), 1, 5), np.int32)
    terms[:, 0, SIGN] = 1
    terms[:, 0, SOURCE] = source
    terms[:, 0, COLUMN] = columns
    return terms


def product_of(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The products of plain terms, column by column."""
    terms = one.copy()
    terms[..., SIGN] *= other[..., SIGN]
    terms[..., FACTOR] = other[..., SOURCE]
    terms[..., FACTOR_COLUMN] = other[..., COLUMN]
    return terms


def sum_of(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The sums of single terms, column by column."""
    return np.concatenate([one, other], axis=-2)


def alike_terms(*readings: Reading) -> list[np.ndarray]:
    """The terms of all, with as many for each column as any of them has."""
    if len({reading.terms.shape[-2] for reading in readings}) == 1:
        return [reading.terms for reading in readings]
    return [reading.two_terms() for reading in readings]


def different_pairs(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The different pairs of elements: [pairs, 2]."""
    first = (one.flat[0], other.flat[0])
    if (one == first[0]).all() and (other == first[1]).all():
        return np.array([first])
    return np.unique(np.stack([one.ravel(), other.ravel()], axis=1), axis=0)
