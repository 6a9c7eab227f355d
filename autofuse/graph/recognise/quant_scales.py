"""Reads the scales of a quantisation in plain PyTorch, from what rows are divided by up to the largest of a group."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from autofuse.graph.recognise.nodes import cast_source, constant, dtype_of, is_call, is_getitem, keeps_order, operands
from autofuse.graph.recognise.quant_blocks import SMALLEST_AMAX, OffError, call_text
from autofuse.ops.quant import E4M3_MAX

__all__ = ["HALVES", "Quotient", "Scales", "find_quotient", "is_cast", "path_up", "read_scales", "widened"]

aten = torch.ops.aten
HALVES = (torch.bfloat16, torch.float16)
_POWERS_OF_TWO = ["log2", "ceil", "exp2"]
_MULS = (aten.mul.Tensor, aten.mul.Scalar)
_BY_RECIPROCAL = "a product with a reciprocal stands for the division by the scale"
_BY_INVERSE_MAX = "a product with 1/448 stands for the division by 448"
_BY_LOGARITHM = "powers of two are found by a logarithm"


@dataclass(frozen=True)
class Quotient:
    """``rows / divisor``, or ``rows * (factor / divisor)``.

    Attributes:
        node: the division or product.
        rows: its one operand, views and casts included.
        operand: its other, of which the divisor is above.
        factor: None for a division.
        between: the nodes from operand up to the divisor, which is not among them.
    """

    node: Node
    rows: Node
    operand: Node
    divisor: Node
    factor: float | None = None
    between: tuple[Node, ...] = ()


@dataclass(frozen=True)
class _Step:
    """One operation between amax and what rows are divided by.

    Attributes:
        above: its input.
        number: its constant, if it has one.
    """

    kind: str
    node: Node
    above: Node
    number: float = math.nan


@dataclass(frozen=True)
class Scales:
    """The scales of groups, as they were read.

    Attributes:
        node: that holds them; None if nobody keeps them.
        amax: the reduction.
        absolute: what is reduced.
        dims: over which dimensions.
        ue8m0: whether they are powers of two.
        own: nodes from below amax to the divisor.
        rounding: as in QuantBlock.
    """

    node: Node | None
    amax: Node
    absolute: Node
    dims: Any
    ue8m0: bool
    own: frozenset[Node]
    rounding: tuple[str, ...]


def find_quotient(node: Any) -> Quotient | None:
    pair = operands(node) if is_call(node, aten.div.Tensor, aten.mul.Tensor) else None
    if pair is None or not all(isinstance(side, Node) for side in pair):
        return None
    if is_call(node, aten.div.Tensor):
        return Quotient(node, pair[0], pair[1], pair[1])
    for rows, inverse in (pair, pair[::-1]):
        passed: list[Node] = []
        factor, above = 1.0, inverse
        while isinstance(above, Node):
            passed.append(above)
            number = _times_constant(above)
            if number is not None:
                above, factor = number[0], factor * number[1]
            elif is_call(above, aten.reciprocal.default):
                return Quotient(node, rows, inverse, above.args[0], factor, tuple(passed))  # type: ignore[arg-type]
            elif keeps_order(above):
                above = above.args[0]
            else:
                break
    return None


def _times_constant(node: Node) -> tuple[Node, float] | None:
    """(x, c) if ``node`` is ``x * c`` or ``c * x``."""
    pair = operands(node) if is_call(node, *_MULS) else None
    if pair is not None:
        for one, other in (pair, pair[::-1]):
            number = constant(other)
            if isinstance(one, Node) and number is not None:
                return one, number
    return None


def read_scales(quotient: Quotient) -> Scales | None:
    """Reads a divisor upwards to the amax that it is computed from; None if there is none. Raises OffError."""
    steps: list[_Step] = []
    passed = [*quotient.between]
    node = quotient.divisor
    while (step := _step(node)) is not None:
        passed.append(node)
        if step.kind == "amax":
            break
        if step.kind != "view":
            steps.insert(0, step)
        node = step.above
    if step is None:
        return None
    kept, ue8m0, rounding = _checked_steps(steps, quotient.factor)
    if kept is None:
        kept = _other_quotient(steps[0].node)
        passed += [] if kept is None else path_up(kept, steps[0].node)
    reduction = step.node.args[0] if is_getitem(step.node) else step.node
    assert isinstance(reduction, Node)
    dims = reduction.args[1] if len(reduction.args) > 1 else None
    own = frozenset({*passed, reduction})
    return Scales(kept, step.node, step.above, dims, ue8m0, own, tuple(rounding))


def _step(node: Any) -> _Step | None:
    if not isinstance(node, Node) or node.op != "call_function":
        return None
    above: Any = node.args[0]
    if is_call(node, aten.amax.default):
        return _Step("amax", node, above)
    if is_getitem(node) and is_call(above, aten.max.dim) and node.args[1] == 0:
        return _Step("amax", node, above.args[0])
    if keeps_order(node) or widened(node) is not None:
        return _Step("view", node, above)
    if (product := _times_constant(node)) is not None:
        return _Step("times", node, *product)
    if is_cast(node):
        return _Step("rounded", node, above)
    pair = operands(node)
    number = None if pair is None else _number(pair[1])
    if number is not None and is_call(node, aten.div.Tensor, aten.div.Scalar):
        return _Step("over", node, above, number)
    if number is not None and is_call(node, aten.clamp_min.default, aten.maximum.default, aten.clamp.default):
        return _Step("at least", node, above, number)
    if is_call(node, aten.pow.Scalar) and above == 2:
        return _Step("exp2", node, node.args[1])  # type: ignore[arg-type]
    for kind, target in (("log2", aten.log2), ("ceil", aten.ceil), ("exp2", aten.exp2)):
        if is_call(node, target.default):
            return _Step(kind, node, above)
    return None


def _number(arg: Any) -> float | None:
    """The value of a number, or of a tensor that is filled with one."""
    return constant(arg.args[1] if is_call(arg, aten.full.default) else arg)


def _checked_steps(steps: list[_Step], factor: float | None) -> tuple[Node | None, bool, list[str]]:
    """(the scales, whether they are powers of two, rounding) of the steps from amax down to the divisor.

    The scales are None if only an inverse of theirs is among the steps. Raises OffError if they are no such scales.
    """
    kinds = [step.kind for step in steps]
    rounding = [] if factor is None else [_BY_RECIPROCAL]
    ue8m0 = kinds[-3:] == _POWERS_OF_TWO
    if ue8m0:
        rounding.append(_BY_LOGARITHM)
    linear = steps[:-3] if ue8m0 else steps
    kinds = [step.kind for step in linear]
    if narrow := next((step.node for step in steps if dtype_of(step.node) != torch.float32), None):
        raise OffError(f"its scales are computed in {dtype_of(narrow)}, not in float32, at {call_text(narrow)}")
    if set(kinds) & set(_POWERS_OF_TWO):
        raise OffError(f"how its scales are rounded is not known: {call_text(steps[-1].node)}")
    if kinds in (["over", "at least"], ["times", "at least"]):
        raise OffError(f"its smallest scale is {linear[-1].number:g}, not its smallest amax {SMALLEST_AMAX:g}")
    if not kinds or kinds[0] != "at least":
        raise OffError(f"its amax is not kept from 0, but should be {SMALLEST_AMAX:g} at least")
    if not math.isclose(linear[0].number, SMALLEST_AMAX, rel_tol=1e-6):
        raise OffError(f"its smallest amax is {linear[0].number:g}, not {SMALLEST_AMAX:g}")
    if factor == E4M3_MAX and len(steps) == 1:
        return None, False, rounding  # x * (448 / amax): the scales are another reader of amax
    if factor not in (None, 1.0):
        raise OffError(f"its rows are multiplied by {factor:g} besides their scales")
    if len(linear) != 2 or not _is_quotient(linear[1]):
        raise OffError(f"its scale is not amax / {E4M3_MAX:g}: {call_text(linear[-1].node)}")
    rounding += [] if linear[1].kind == "over" else [_BY_INVERSE_MAX]
    return steps[-1].node, ue8m0, rounding


def _is_quotient(step: _Step) -> bool:
    """Whether it divides by 448, or multiplies by the inverse."""
    if step.kind == "over":
        return step.number == E4M3_MAX
    return step.kind == "times" and math.isclose(step.number, 1 / E4M3_MAX, rel_tol=1e-6)


def _other_quotient(amax: Node) -> Node | None:
    """The scales ``amax / 448`` beside an inverse; None if nobody keeps them. Raises OffError."""
    found: list[_Step] = []
    todo = [amax]
    while todo:
        for user in todo.pop().users:
            step = _step(user)
            if step is not None and step.kind == "view":
                todo.append(user)
            elif step is not None and step.kind in ("over", "times"):
                found.append(step)
    if len(found) > 1 or not all(map(_is_quotient, found)):
        raise OffError(f"its scale is not amax / {E4M3_MAX:g}: {', '.join(call_text(step.node) for step in found)}")
    return found[0].node if found else None


def path_up(node: Node, above: Node) -> list[Node]:
    """From ``node`` up to ``above``, which is left out, by first arguments."""
    path = []
    while node is not above:
        path.append(node)
        node = node.args[0]  # type: ignore[assignment]
    return path


def is_cast(node: Any) -> bool:
    """Whether ``node`` casts between dtypes that are computed in."""
    return any(cast_source(node, dtype) is not None for dtype in (*HALVES, torch.float32))


def widened(node: Any) -> Node | None:
    """What ``node`` casts to fp32 without loss, or None."""
    source = cast_source(node, torch.float32)
    return source if source is not None and dtype_of(source) in HALVES else None
