"""Small questions about FX nodes, asked by every recogniser and fusion."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

__all__ = [
    "cast_source",
    "concrete",
    "constant",
    "dtype_of",
    "expression",
    "is_call",
    "is_getitem",
    "is_view",
    "keeps_order",
    "operands",
    "product",
    "same_size",
    "same_sizes",
    "same_value",
    "scaled_by",
    "shape",
    "tensor",
]

aten = torch.ops.aten
prims = torch.ops.prims

# Views that leave each row (the last dimension) whole; reshape may copy, which changes nothing in a functional graph.
_RESHAPES = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)
_VIEWS = (*_RESHAPES, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.alias.default)


def is_call(node: Any, *targets: Any) -> bool:
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def is_getitem(node: Any) -> bool:
    return is_call(node, operator.getitem)


def tensor(node: Any) -> torch.Tensor | None:
    """The fake tensor that ``node`` computes, or None if it is no tensor."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return value if isinstance(value, torch.Tensor) else None


def dtype_of(node: Any) -> torch.dtype | None:
    value = tensor(node)
    return None if value is None else value.dtype


def shape(node: Any) -> tuple[Any, ...]:
    """The shape of a tensor node, () for anything else; sizes are integers or SymInts."""
    value = tensor(node)
    return () if value is None else tuple(value.shape)


def expression(size: Any) -> Any:
    """``size`` with the shape environment's replacements made: an int or a sympy expression; compares by value."""
    if not isinstance(size, torch.SymInt):
        return size
    expr = size.node.shape_env.replace(size.node.expr)
    return int(expr) if expr.is_number else expr


def concrete(size: Any) -> int | None:
    """``size`` if it is known while compiling, else None. Adds no guard."""
    if type(size) is int:
        return size
    expr = expression(size)
    return expr if isinstance(expr, int) else None


def keeps_order(node: Any) -> bool:
    """Whether ``node`` holds all elements of its input in their order, whatever its shape and strides."""
    if is_call(node, aten.expand.default):  # as matmul has it, to no avail
        before, after = shape(node.args[0]), shape(node)
        return len(before) == len(after) and all(map(same_size, before, after))
    return is_call(node, *_VIEWS, aten.clone.default)


def product(sizes: Sequence[Any]) -> Any:
    total: Any = 1
    for size in sizes:
        total = total * size
    return total


def same_size(left: Any, right: Any) -> bool:
    """Whether two sizes are equal for every value of their symbols, as far as simplifying tells."""
    if type(left) is int and type(right) is int:
        return left == right
    left, right = expression(left), expression(right)
    return bool(left == right or (left - right) == 0)


def same_sizes(left: Sequence[Any], right: Sequence[Any]) -> bool:
    """Whether two shapes are equal, for every value of their symbols."""
    return len(left) == len(right) and all(same_size(a, b) for a, b in zip(left, right, strict=True))


def same_value(one: Any, other: Any, depth: int = 8) -> bool:
    """Whether two nodes are one, or the same functions of the same nodes: nobody merges these before us."""
    if one is other:
        return True
    if not (isinstance(one, Node) and isinstance(other, Node)) or depth == 0:
        return not isinstance(one, (Node, torch.SymInt)) and type(one) is type(other) and bool(one == other)
    if one.op != "call_function" or one.target is not other.target or not _is_function(one.target):
        return False
    if len(one.args) != len(other.args) or one.kwargs.keys() != other.kwargs.keys():
        return False
    pairs = [*zip(one.args, other.args, strict=True), *((one.kwargs[key], other.kwargs[key]) for key in one.kwargs)]
    return all(_same_argument(a, b, depth - 1) for a, b in pairs)


def _same_argument(one: Any, other: Any, depth: int) -> bool:
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(same_value(a, b, depth) for a, b in zip(one, other, strict=True))
    return same_value(one, other, depth)


def _is_function(target: Any) -> bool:
    """Whether an operator gives the same result for the same arguments, and does nothing else."""
    if target is operator.getitem:
        return True
    return isinstance(target, torch._ops.OpOverload) and not (
        target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags
    )


def constant(arg: Any) -> float | None:
    """The value of a plain Python number, else None."""
    return float(arg) if isinstance(arg, (int, float)) and not isinstance(arg, bool) else None


def operands(node: Node) -> tuple[Any, Any] | None:
    """Both operands of a binary node that has no further arguments (such as ``alpha``), else None."""
    return (node.args[0], node.args[1]) if len(node.args) == 2 and not node.kwargs else None


def cast_source(node: Any, to: torch.dtype) -> Node | None:
    """What ``node`` casts to ``to``, or None if it is no such cast."""
    if is_call(node, prims.convert_element_type.default, aten.to.dtype) and node.args[1] == to:
        return node.args[0]
    if is_call(node, aten._to_copy.default) and node.kwargs == {"dtype": to}:
        return node.args[0]
    return None


def scaled_by(node: Any, factor: float) -> Node | None:
    """``x`` if ``node`` is ``x * factor`` or ``factor * x`` with a plain number, else None."""
    if is_call(node, aten.mul.Tensor, aten.mul.Scalar):
        pair = operands(node)
        if pair is not None:
            for one, other in (pair, pair[::-1]):
                if isinstance(one, Node) and constant(other) == factor:
                    return one
    return None


def is_view(node: Any) -> bool:
    """Whether ``node`` only rearranges the leading dimensions of its input: its rows stay whole and in order."""
    if not is_call(node, *_VIEWS):
        return False
    before, after = shape(node.args[0]), shape(node)
    return bool(before) and bool(after) and same_size(before[-1], after[-1])
