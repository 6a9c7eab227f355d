"""Which axes of a tensor each dimension of a view of it is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from autofuse.graph.recognise.nodes import concrete, same_size

__all__ = ["Axes", "regrouped"]

Axes = tuple[tuple[int, ...], ...]
"""For each dimension the axes that it is made of, the outermost first."""


def regrouped(axes: Sequence[int], sizes: Sequence[Any] | Mapping[int, Any], dims: Sequence[Any]) -> Axes | None:
    """How ``axes``, in this order, make up dimensions of the sizes ``dims``; None if one would have to be cut.

    Args:
        sizes: of each axis.
    """
    made: list[tuple[int, ...]] = []
    left = list(axes)
    for place, size in enumerate(dims):
        dim: list[int] = []
        total: Any = 1
        while not same_size(total, size) or (place == len(dims) - 1 and left):
            if not left:
                return None
            dim.append(left.pop(0))
            total = total * sizes[dim[-1]]
            if (known := concrete(total)) is not None and (limit := concrete(size)) is not None and known > limit:
                return None
        made.append(tuple(dim))
    return None if left else tuple(made)
