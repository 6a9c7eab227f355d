"""The languages that kernels are written in, and how a config says which of them it is of."""

from __future__ import annotations

from collections.abc import Mapping

from autofuse.ops.space import Tunable

__all__ = ["CPP", "IN_TRITON", "TRITON", "language_of"]

CPP = "c++"
"""C++ for CUDA, HIP or the CPU, as ``kernels_src`` holds it for every op."""

TRITON = "triton"

IN_TRITON = Tunable(
    "TRITON", (1,), "the kernel is the one in Triton, with warps and blocks as its compiler lays them out"
)
"""The tunable that every search space of a Triton kernel has: a config without it is of the C++ kernel."""


def language_of(config: Mapping[str, int]) -> str:
    """``triton`` or ``c++``.

    Example:
        >>> language_of({"TRITON": 1, "NUM_WARPS": 4}), language_of({"ROWS": 2})
        ('triton', 'c++')
    """
    return TRITON if config.get(IN_TRITON.name) else CPP
