"""Finds quantisations to FP8 and NVFP4: by plain PyTorch, and by vLLM's operators.

Plain ones are found from the cast to FP8: above it stand rows divided by a scale, and above the scale the largest
absolute value of each group. The arithmetic may be written in many ways; what counts is the format that
``autofuse.ops.quant`` defines, and what is off by more than roundings is a near miss. So is what vLLM's own PyTorch
code computes (``QuantFP8.forward_native``): it keeps scales, not amax, from being too small.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph, Node

from autofuse.errors import BadInput
from autofuse.graph.blocks import Found, NearMiss, QuantBlock
from autofuse.graph.recognise.custom_ops import CustomCall, custom_calls
from autofuse.graph.recognise.nodes import (
    cast_source,
    concrete,
    constant,
    dtype_of,
    expression,
    is_call,
    is_getitem,
    keeps_order,
    operands,
    same_size,
    shape,
    tensor,
)
from autofuse.ops.quant import E4M3_MAX, NVFP4, STATIC, QuantFormat, ScaleLayout

__all__ = ["find_quants"]

aten = torch.ops.aten
prims = torch.ops.prims
_E4M3 = torch.float8_e4m3fn
_FP8 = (_E4M3, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
_HALVES = (torch.bfloat16, torch.float16)
_SMALLEST_AMAX = 1e-10
_POWERS_OF_TWO = ["log2", "ceil", "exp2"]
_MULS = (aten.mul.Tensor, aten.mul.Scalar)
_BY_RECIPROCAL = "a product with a reciprocal stands for the division by the scale"
_BY_INVERSE_MAX = "a product with 1/448 stands for the division by 448"
_BY_LOGARITHM = "powers of two are found by a logarithm"
_BY_DIVISION = "a division stands for the product with the scale's reciprocal"
_BY_OP = "as its operator rounds"


class _OffError(Exception):
    """It looked like a quantisation, but the message says what is off."""


def find_quants(graph: Graph) -> Found:
    """All quantisations in a post-grad graph, and what came close to being one."""
    blocks: list[QuantBlock] = []
    near_misses: list[NearMiss] = []
    attempts: list[tuple[Node, Callable[[], QuantBlock | None]]] = [
        *((cast, lambda cast=cast: _match(cast)) for cast in _casts_to_fp8(graph)),
        *((call.node, lambda call=call: _match_op(call)) for call in custom_calls(graph)),
    ]
    for node, attempt in sorted(attempts, key=lambda pair: pair[0]):
        try:
            block = attempt()
        except _OffError as off:
            near_misses.append(NearMiss("quantisation", node, str(off)))
            continue
        if block is not None:
            blocks.append(block)
    return Found(tuple(blocks), tuple(near_misses))


# ---- plain PyTorch --------------------------------------------------------------------------------------------------


def _casts_to_fp8(graph: Graph) -> list[Node]:
    casts = (prims.convert_element_type.default, aten.to.dtype, aten._to_copy.default)
    found = [node for target in casts for node in graph.find_nodes(op="call_function", target=target)]
    return [node for node in found if dtype_of(node) in _FP8 and cast_source(node, dtype_of(node) or _E4M3)]


@dataclass(frozen=True)
class _Quotient:
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
class _Scales:
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


def _match(cast: Node) -> QuantBlock | None:
    """The quantisation that ends in ``cast``; None if it is nothing of the kind. Raises _OffError."""
    below, low, high, clamps = _unclamped(cast.args[0])
    quotient = _quotient(below)
    if quotient is None:
        return None
    scales = _read_scales(quotient)
    if scales is None and concrete(_elements(quotient.divisor)) != 1:
        return None
    # From here on it is a quantisation: whatever is off is worth telling.
    if dtype_of(cast) != _E4M3:
        raise _OffError(f"its values are {dtype_of(cast)}, not {_E4M3}")
    if dtype_of(quotient.node) != torch.float32:
        raise _OffError(f"its arithmetic is in {dtype_of(quotient.node)}, not in float32")
    if narrow := next((node for node in clamps if dtype_of(node) in _HALVES), None):
        raise _OffError(f"its values are rounded to {dtype_of(narrow)} first, at {narrow}")
    for bound, limit in ((low, -E4M3_MAX), (high, E4M3_MAX)):
        if bound not in (None, limit):
            raise _OffError(f"its values are clamped to {bound:g}, not to {limit:g}")
    own = {cast, *clamps, quotient.node}
    if scales is not None:
        return _group_block(cast, own, quotient, scales)
    if low is None or high is None:
        raise _OffError(f"its values are not clamped to {-E4M3_MAX:g} and {E4M3_MAX:g}: those beyond become NaN")
    return _static_block(cast, own, quotient)


def _unclamped(node: Any) -> tuple[Any, float | None, float | None, list[Node]]:
    """What is above views and clamps, the bounds of these, and the nodes passed."""
    low: float | None = None
    high: float | None = None
    passed: list[Node] = []
    while isinstance(node, Node):
        if is_call(node, aten.clamp_min.default) and constant(node.args[1]) is not None:
            low = constant(node.args[1])
        elif is_call(node, aten.clamp_max.default) and constant(node.args[1]) is not None:
            high = constant(node.args[1])
        elif is_call(node, aten.clamp.default) and not node.kwargs and len(node.args) == 3:
            low, high = constant(node.args[1]), constant(node.args[2])
        elif not (keeps_order(node) or _cast(node)):
            break
        passed.append(node)
        node = node.args[0]
    return node, low, high, passed


def _quotient(node: Any) -> _Quotient | None:
    pair = operands(node) if is_call(node, aten.div.Tensor, aten.mul.Tensor) else None
    if pair is None or not all(isinstance(side, Node) for side in pair):
        return None
    if is_call(node, aten.div.Tensor):
        return _Quotient(node, pair[0], pair[1], pair[1])
    for rows, inverse in (pair, pair[::-1]):
        passed: list[Node] = []
        factor, above = 1.0, inverse
        while isinstance(above, Node):
            passed.append(above)
            number = _times_constant(above)
            if number is not None:
                above, factor = number[0], factor * number[1]
            elif is_call(above, aten.reciprocal.default):
                return _Quotient(node, rows, inverse, above.args[0], factor, tuple(passed))  # type: ignore[arg-type]
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


def _elements(node: Node) -> Any:
    value = tensor(node)
    return -1 if value is None else value.numel()


def _read_scales(quotient: _Quotient) -> _Scales | None:
    """Reads a divisor upwards to the amax that it is computed from; None if there is none. Raises _OffError."""
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
        passed += [] if kept is None else _path(kept, steps[0].node)
    reduction = step.node.args[0] if is_getitem(step.node) else step.node
    assert isinstance(reduction, Node)
    dims = reduction.args[1] if len(reduction.args) > 1 else None
    own = frozenset({*passed, reduction})
    return _Scales(kept, step.node, step.above, dims, ue8m0, own, tuple(rounding))


def _step(node: Any) -> _Step | None:
    if not isinstance(node, Node) or node.op != "call_function":
        return None
    above: Any = node.args[0]
    if is_call(node, aten.amax.default):
        return _Step("amax", node, above)
    if is_getitem(node) and is_call(above, aten.max.dim) and node.args[1] == 0:
        return _Step("amax", node, above.args[0])
    if keeps_order(node) or _widened(node) is not None:
        return _Step("view", node, above)
    if (product := _times_constant(node)) is not None:
        return _Step("times", node, *product)
    if _cast(node):
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

    The scales are None if only an inverse of theirs is among the steps. Raises _OffError if they are no such scales.
    """
    kinds = [step.kind for step in steps]
    rounding = [] if factor is None else [_BY_RECIPROCAL]
    ue8m0 = kinds[-3:] == _POWERS_OF_TWO
    if ue8m0:
        rounding.append(_BY_LOGARITHM)
    linear = steps[:-3] if ue8m0 else steps
    kinds = [step.kind for step in linear]
    if narrow := next((step.node for step in steps if dtype_of(step.node) != torch.float32), None):
        raise _OffError(f"its scales are computed in {dtype_of(narrow)}, not in float32, at {_call(narrow)}")
    if set(kinds) & set(_POWERS_OF_TWO):
        raise _OffError(f"how its scales are rounded is not known: {_call(steps[-1].node)}")
    if kinds in (["over", "at least"], ["times", "at least"]):
        raise _OffError(f"its smallest scale is {linear[-1].number:g}, not its smallest amax {_SMALLEST_AMAX:g}")
    if not kinds or kinds[0] != "at least":
        raise _OffError(f"its amax is not kept from 0, but should be {_SMALLEST_AMAX:g} at least")
    if not math.isclose(linear[0].number, _SMALLEST_AMAX, rel_tol=1e-6):
        raise _OffError(f"its smallest amax is {linear[0].number:g}, not {_SMALLEST_AMAX:g}")
    if factor == E4M3_MAX and len(steps) == 1:
        return None, False, rounding  # x * (448 / amax): the scales are another reader of amax
    if factor not in (None, 1.0):
        raise _OffError(f"its rows are multiplied by {factor:g} besides their scales")
    if len(linear) != 2 or not _is_quotient(linear[1]):
        raise _OffError(f"its scale is not amax / {E4M3_MAX:g}: {_call(linear[-1].node)}")
    rounding += [] if linear[1].kind == "over" else [_BY_INVERSE_MAX]
    return steps[-1].node, ue8m0, rounding


def _is_quotient(step: _Step) -> bool:
    """Whether it divides by 448, or multiplies by the inverse."""
    if step.kind == "over":
        return step.number == E4M3_MAX
    return step.kind == "times" and math.isclose(step.number, 1 / E4M3_MAX, rel_tol=1e-6)


def _other_quotient(amax: Node) -> Node | None:
    """The scales ``amax / 448`` beside an inverse; None if nobody keeps them. Raises _OffError."""
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
        raise _OffError(f"its scale is not amax / {E4M3_MAX:g}: {', '.join(_call(step.node) for step in found)}")
    return found[0].node if found else None


def _path(node: Node, above: Node) -> list[Node]:
    """From ``node`` up to ``above``, which is left out, by first arguments."""
    path = []
    while node is not above:
        path.append(node)
        node = node.args[0]  # type: ignore[assignment]
    return path


def _group_block(cast: Node, own: set[Node], quotient: _Quotient, scales: _Scales) -> QuantBlock:
    sizes, divisors = shape(quotient.rows), shape(quotient.operand)
    reduced = shape(scales.absolute)
    if scales.dims not in ([-1], -1, [len(reduced) - 1], len(reduced) - 1):
        raise _OffError(f"its amax is over dimensions {scales.dims}, not over the last")
    group = concrete(reduced[-1])
    if group not in (64, 128):
        raise _OffError(f"its groups have {reduced[-1]} elements, neither 64 nor 128")
    absolute = _climbed(scales.absolute)
    if not is_call(absolute[-1], aten.abs.default):
        raise _OffError(f"its amax is not of absolute values, but of {_call(absolute[-1])}")
    if (
        len(sizes) != len(divisors)
        or (concrete(sizes[-1]), concrete(divisors[-1])) != (group, 1)
        or not all(same_size(a, b) for a, b in zip(sizes[:-1], divisors[:-1], strict=True))
    ):
        raise _OffError(f"its rows {list(sizes)} are not divided by one scale for {group}, but by {list(divisors)}")
    own |= {*scales.own, *absolute}
    divided, measured = _climbed(quotient.rows), _climbed(absolute[-1].args[0])
    if divided[-1] is not measured[-1]:
        raise _OffError(f"the rows that are divided, {divided[0]}, are not those of its amax, {measured[0]}")
    rows, width = _whole_rows(divided, measured, group)
    stored, layout = scales.node, ScaleLayout.ROW_MAJOR
    if stored is not None:
        stored, layout = _stored(stored, own)
        # The rows may be cut into heads already, each as wide as a group; transposed scales tell how wide they are.
        width = width if layout == ScaleLayout.ROW_MAJOR else group * (concrete(shape(stored)[1]) or 1)
        own |= {*_path(stored, scales.node)} if scales.node is not None else set()  # transposing copies
    return _block(
        cast,
        own,
        [*_below(divided, rows), *_below(measured, rows)],
        rows,
        width,
        QuantFormat(group, scales.ue8m0, layout),
        scales=stored,
        rounding=scales.rounding,
    )


def _static_block(cast: Node, own: set[Node], quotient: _Quotient) -> QuantBlock:
    if quotient.factor not in (None, 1.0):
        raise _OffError(f"its rows are multiplied by {quotient.factor:g} besides their scale")
    if dtype_of(quotient.divisor) != torch.float32:
        raise _OffError(f"its scale {quotient.divisor} is {dtype_of(quotient.divisor)}, not float32")
    chain = _climbed(quotient.rows)
    rows = next(node for node in chain if dtype_of(node) == dtype_of(chain[-1]))
    width = concrete(shape(rows)[-1]) if shape(rows) else None
    if width is None:
        raise _OffError(f"the width of its rows {rows} is not known while compiling")
    return _block(
        cast,
        own,
        [*_below(chain, rows), *quotient.between],  # one reciprocal may serve several quantisations
        rows,
        width,
        QuantFormat(STATIC),
        scale=quotient.divisor,
        rounding=(_BY_DIVISION,) if quotient.factor is None else (),
    )


def _cast(node: Any) -> bool:
    """Whether ``node`` casts between dtypes that are computed in."""
    return any(cast_source(node, dtype) is not None for dtype in (*_HALVES, torch.float32))


def _widened(node: Any) -> Node | None:
    """What ``node`` casts to fp32 without loss, or None."""
    source = cast_source(node, torch.float32)
    return source if source is not None and dtype_of(source) in _HALVES else None


def _climbed(node: Any) -> list[Node]:
    """``node`` and what it is a view or a wider copy of, upwards."""
    chain = [node]
    while keeps_order(chain[-1]) or _widened(chain[-1]) is not None:
        chain.append(chain[-1].args[0])
    return chain


def _below(chain: list[Node], node: Node) -> list[Node]:
    return chain[: chain.index(node)]


def _whole_rows(divided: list[Node], measured: list[Node], group: int) -> tuple[Node, int]:
    """The rows that both chains are views of, as near as possible but before they are cut into groups; their width."""
    common = [node for node in divided if node in measured and dtype_of(node) == dtype_of(divided[-1])]
    widths = [(node, concrete(shape(node)[-1])) for node in common if shape(node)]
    for node, width in (*((n, w) for n, w in widths if w != group), *widths):
        if width is not None and width % group == 0:
            return node, width
    raise _OffError(f"its rows {common[0]}, {list(shape(common[0]))}, are no whole number of groups of {group}")


def _stored(scales: Node, own: set[Node]) -> tuple[Node, ScaleLayout]:
    """Where the scales are kept in the end, and how they lie there: they may be transposed in memory on the way."""
    best = (scales, ScaleLayout.ROW_MAJOR)
    node, order = scales, [*range(len(shape(scales)))]
    while True:
        users = [user for user in node.users if user not in own]
        if len(users) != 1:
            return best
        node = users[0]
        if is_call(node, aten.permute.default):
            dims: Any = node.args[1]
            order = [order[dim] for dim in dims]
        elif keeps_order(node) and order == sorted(order):
            order = [*range(len(shape(node)))]
        elif not is_call(node, aten.clone.default):
            return best
        if order == sorted(order):
            layout = _layout(node)
            if layout in (ScaleLayout.COLUMN_MAJOR, ScaleLayout.TMA_ALIGNED):
                best = (node, layout)


def _layout(node: Node) -> ScaleLayout | None:
    """How scales lie in memory; None if in no layout that there is."""
    value = tensor(node)
    if value is None:
        return None
    if value.dim() == 2 and (concrete(value.shape[1]) or 0) > 1 and concrete(value.stride(0)) == 1:
        tokens = value.shape[0]
        if same_size(value.stride(1), tokens):
            return ScaleLayout.COLUMN_MAJOR
        return ScaleLayout.TMA_ALIGNED if _rounds_up(value.stride(1), tokens) else None
    contiguous: Any = 1
    for size, stride in zip(reversed(value.shape), reversed(value.stride()), strict=True):
        if concrete(size) != 1 and not same_size(stride, contiguous):
            return None
        contiguous = contiguous * size
    return ScaleLayout.ROW_MAJOR


def _rounds_up(stride: Any, tokens: Any) -> bool:
    """Whether ``stride`` is ``tokens`` rounded up to a multiple of 4.

    Roundings of a symbol can be written in ways that no simplification makes equal, so values are tried: two periods.
    """
    stride, tokens = expression(stride), expression(tokens)
    if isinstance(tokens, int):
        return bool(stride == -(-tokens // 4) * 4)
    symbols = tokens.free_symbols
    if len(symbols) != 1 or isinstance(stride, int) or stride.free_symbols != symbols:
        return False
    (symbol,) = symbols
    return all(stride.subs(symbol, n) == -(-int(tokens.subs(symbol, n)) // 4) * 4 for n in range(2, 10))


def _block(
    cast: Node,
    own: set[Node],
    optional: Iterable[Node],
    rows: Node,
    width: int,
    scheme: QuantFormat,
    *,
    scales: Node | None = None,
    scale: Node | None = None,
    rounding: Iterable[str] = (),
) -> QuantBlock:
    """The block with these own nodes, and those optional ones that nobody else reads. Raises _OffError."""
    for node in sorted(own - {cast, scales}):
        for user in node.users:
            if user not in own:
                what = "an output of the graph (saved for backward?)" if user.op == "output" else f"used by {user}"
                raise _OffError(f"its intermediate {node} is also {what}")
    own = set(own)
    for node in sorted(optional, reverse=True):
        if all(user in own for user in node.users):
            own.add(node)
    dtype = dtype_of(rows)
    assert dtype is not None
    return QuantBlock(
        output=cast,
        nodes=tuple(sorted(own)),
        input=rows,
        format=scheme,
        scales=scales,
        scale=scale,
        width=width,
        dtype=dtype,
        rounding="; ".join(rounding),
    )


# ---- vLLM's operators -----------------------------------------------------------------------------------------------

_NO_SUCH_FORMAT: Mapping[str, str] = {
    "_C::dynamic_scaled_fp8_quant": "one scale for all rows, found from them",
    "_C::dynamic_per_token_scaled_fp8_quant": "a scale for each row",
    "_C::per_token_group_fp8_quant_packed": "scales of one byte, packed",
    "_C::per_token_group_quant_int8": "int8 values",
}


def _match_op(call: CustomCall) -> QuantBlock | None:
    """The quantisation that an operator is; None if it is another operator. Raises _OffError."""
    if call.name in _NO_SUCH_FORMAT:
        raise _OffError(f"{call.name} has {_NO_SUCH_FORMAT[call.name]}")
    match = _OPS.get(call.name)
    return None if match is None else match(call)


def _group_op(call: CustomCall) -> QuantBlock:
    args = call.args
    for name, wanted in (("eps", _SMALLEST_AMAX), ("fp8_min", -E4M3_MAX), ("fp8_max", E4M3_MAX)):
        if not math.isclose(args[name], wanted, rel_tol=1e-6):
            raise _OffError(f"its {name} is {args[name]:g}, not {wanted:g}")
    values, scales = _result(call, "output_q"), call.written["output_s"]
    assert scales is not None
    node = scales.value()
    if node is None and scales.item is not None:
        raise _OffError(f"its scales are not read as the operator wrote them, from {scales.item}")
    scheme = QuantFormat(args["group_size"], args["scale_ue8m0"])
    return _op_block(call, args["input"], values, scheme, scales=node)


def _ir_group_op(call: CustomCall) -> QuantBlock:
    args, results = call.args, call.results()
    group = args["group_shape"]
    if len(group) != 2 or group[0] != 1:
        raise _OffError(f"its groups are {group}, not of one row")
    if 0 not in results:
        raise _OffError("nobody reads its values")
    scheme = QuantFormat(group[1], args["use_ue8m0"])
    return _op_block(call, args["x"], results[0], scheme, scales=results.get(1))


def _static_op(call: CustomCall) -> QuantBlock:
    if call.args["group_shape"] not in (None, [-1, -1]):
        raise _OffError(f"its groups are {call.args['group_shape']}, not the whole tensor")
    values, scale = _result(call, "result"), call.args["scale"]
    return _op_block(call, call.args["input"], values, QuantFormat(STATIC), scale=scale)


def _ir_static_op(call: CustomCall) -> QuantBlock:
    if call.args["num_token_padding"] is not None:
        raise _OffError("it pads its rows")
    return _op_block(call, call.args["x"], call.node, QuantFormat(STATIC), scale=call.args["scale"])


def _nvfp4_op(call: CustomCall) -> QuantBlock:
    if not call.args["is_sf_swizzled_layout"]:
        raise _OffError("its scales are not swizzled")
    if call.written:
        values: Node | None = _result(call, "output")
        raw: Node | None = _result(call, "output_scale", optional=True)
    else:
        values, raw = (call.results().get(index) for index in range(2))
    if values is None:
        raise _OffError("nobody reads its values")
    users = [] if raw is None else list(raw.users)
    bytes_read = [user for user in users if is_call(user, aten.view.dtype) and user.args[1] == _E4M3]
    if len(users) > 1 or len(bytes_read) != len(users):
        raise _OffError(f"its scales {raw} are not read as {_E4M3}")
    scales = bytes_read[0] if bytes_read else None
    return _op_block(
        call, call.args["input"], values, QuantFormat(NVFP4), scales=scales, scale=call.args["input_scale"]
    )


_OPS: Mapping[str, Callable[[CustomCall], QuantBlock]] = {
    "_C::per_token_group_fp8_quant": _group_op,
    "_C::scaled_fp4_quant": _nvfp4_op,
    "_C::scaled_fp4_quant.out": _nvfp4_op,
    "_C::static_scaled_fp8_quant": _static_op,
    "vllm_ir::dynamic_group_quant_fp8": _ir_group_op,
    "vllm_ir::static_quant_fp8": _ir_static_op,
}


def _result(call: CustomCall, name: str, optional: bool = False) -> Node | None:
    """The whole buffer that was written as argument ``name``."""
    written = call.written[name]
    node = None if written is None else written.item
    if node is None and not optional:
        raise _OffError(f"nobody reads its {name}")
    if written is not None and written.layout is not None:
        raise _OffError(f"its {name} is a part of the buffer {written.before}")
    return node


def _op_block(
    call: CustomCall,
    rows: Any,
    values: Node | None,
    scheme: QuantFormat,
    *,
    scales: Node | None = None,
    scale: Node | None = None,
) -> QuantBlock:
    """Checks what all operators have in common."""
    assert values is not None
    width = concrete(shape(rows)[-1]) if shape(rows) else None
    if width is None:
        raise _OffError(f"the width of its rows {rows} is not known while compiling")
    wanted = torch.uint8 if scheme.group == NVFP4 else _E4M3
    if dtype_of(values) != wanted:
        raise _OffError(f"its values are {dtype_of(values)}, not {wanted}")
    if scales is not None and scheme.group not in (NVFP4, STATIC):
        layout = _layout(scales)
        if layout is None or dtype_of(scales) != torch.float32:
            value = tensor(scales)
            strides = None if value is None else list(value.stride())
            raise _OffError(
                f"its scales, {dtype_of(scales)} {list(shape(scales))} with strides {strides}, are in no layout known"
            )
        scheme = replace(scheme, layout=layout)
    try:
        QuantFormat.checked("quantisation", width, scheme.group, scheme.ue8m0, scheme.layout)
    except BadInput as error:
        raise _OffError(str(error).removeprefix("quantisation: ")) from None
    if scale is not None and (concrete(_elements(scale)) != 1 or dtype_of(scale) != torch.float32):
        raise _OffError(f"its scale {scale} is {dtype_of(scale)} {list(shape(scale))}, not one float32 value")
    own = {*call.own_nodes(), values, *([] if scales is None else [scales])}
    return _block(values, own, (), rows, width, scheme, scales=scales, scale=scale, rounding=(_BY_OP,))


def _call(node: Node) -> str:
    return f"{node} = {getattr(node.target, '__name__', node.target)}({', '.join(map(str, node.args))})"
