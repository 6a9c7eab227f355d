"""Whether a plan's kernels can load a site's tensors: a kernel that cannot leaves the call to the op's reference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from autofuse.graph.recognise.nodes import concrete, expression
from autofuse.ops import FusedOp
from autofuse.ops.problem import Config
from autofuse.runtime.plan import Plan

__all__ = ["Loads", "loads_of", "misalignment"]

Loads = Mapping[int, Mapping[int, tuple[int, Config]]]
"""Of each tensor argument, by its index: how many bytes a plan loads of it at once, and the first bucket that does."""


def loads_of(op: FusedOp, plan: Plan) -> Loads:
    """What the kernels of ``plan`` load at once."""
    found: dict[int, dict[int, tuple[int, Config]]] = {}
    for tokens, config in plan.buckets:
        if config is not None:
            align = op.launch_shape(plan.problem, config).align
            for arg in op.binding(plan.problem).tensors:
                found.setdefault(arg.index, {}).setdefault(arg.align or align, (tokens, config))
    return found


def misalignment(op: FusedOp, loads: Loads, tensors: Mapping[int, torch.Tensor]) -> str | None:
    """Why a kernel that loads so cannot load the tensors, whatever the values of their symbols; None if all can.

    The start of a storage counts as aligned: PyTorch's and Inductor's allocations are, to 16 bytes at least.

    Args:
        tensors: the op's fake tensor arguments, by index; those that are left out are taken to be aligned.
    """
    for index, value in tensors.items():
        for align, (tokens, config) in loads.get(index, {}).items():
            for what, elements in _steps(value):
                if _off(elements, value.element_size(), align):
                    name = torch._C.parse_schema(op.name + op.schema).arguments[index].name
                    return (
                        f"the {what} of {name}, {elements} elements of {value.element_size()} bytes, is not a multiple "
                        f"of the {align} bytes that the config for T={tokens} ({config}) loads at once"
                    )
    return None


def _steps(value: torch.Tensor) -> Iterator[tuple[str, Any]]:
    """What of a tensor's layout decides on the addresses that are loaded from, in elements."""
    yield "storage offset", value.storage_offset()
    for dim, (size, stride) in enumerate(zip(value.shape[:-1], value.stride()[:-1], strict=True)):
        if concrete(size) not in (0, 1):
            yield f"stride in dimension {dim}", stride


def _off(elements: Any, item_bytes: int, align: int) -> bool:
    """Whether that many elements are a multiple of ``align`` bytes for no values of the symbols."""
    remainder = expression(elements) * item_bytes % align
    if isinstance(remainder, int):
        return remainder != 0
    return bool(remainder.is_number and remainder != 0)
