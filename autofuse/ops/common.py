"""What the search spaces and the checks of several ops share."""

from __future__ import annotations

import torch

from autofuse.cores import usable_cores
from autofuse.ops.space import Constraint, Tunable

__all__ = ["THREADING", "THREADING_CONSTRAINTS", "most_threads", "rows_apart"]


def _thread_counts() -> tuple[int, ...]:
    """Powers of two up to the cores that this process may use, and that number itself."""
    cores = usable_cores()
    return tuple(sorted({min(1 << i, cores) for i in range(cores.bit_length() + 1)}))


def most_threads(tokens: int) -> int:
    """The most threads that a CPU kernel may take, if each is to have a token."""
    return max(count for count in _thread_counts() if count <= max(tokens, 1))


THREADING = (
    Tunable("THREADS", _thread_counts(), "threads: more bandwidth, against microseconds to wake them"),
    Tunable("SERIAL_ROWS", (0, 16), "tokens up to which one thread does it all: no waking, against no help"),
)
"""How a CPU kernel shares its tokens out."""

THREADING_CONSTRAINTS = (
    Constraint(
        "a cut-off means something only for several threads",
        lambda c, p, t: c["THREADS"] > 1 or c["SERIAL_ROWS"] == 0,
    ),
    Constraint(
        "up to SERIAL_ROWS tokens only one thread runs: the same as THREADS=1",
        lambda c, p, t: c["THREADS"] == 1 or t > max(c["SERIAL_ROWS"], 1),
    ),
    Constraint("every thread needs a token", lambda c, p, t: c["THREADS"] <= max(t, 1)),
)


def rows_apart(values: torch.Tensor, vectors: int) -> torch.Tensor:
    """The values as a view [rows, width] of a wider tensor: 16 bytes before each row, ``vectors`` times 16 after it.

    What lies between the rows is large, so that reading it shows. Rows begin at multiples of 16 bytes.
    """
    size = 16 // values.element_size()
    rows, width = values.shape
    wide = torch.full((rows, (-(-width // size) + 1 + vectors) * size), 100.0, device=values.device).to(values.dtype)
    view = wide[:, size : size + width]
    view.copy_(values)
    return view
