"""Finds quantisations to FP8 and NVFP4: by plain PyTorch here, by vLLM's operators in ``quant_operators``.

Plain ones are found from the cast to FP8: above it stand rows divided by a scale, and above the scale the largest
absolute value of each group. The arithmetic may be written in many ways; what counts is the format that
``autofuse.ops.quant`` defines, and what is off by more than roundings is a near miss. So is what vLLM's own PyTorch
code computes (``QuantFP8.forward_native``): it keeps scales, not amax, from being too small.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

from autofuse.graph.blocks import Found, NearMiss, QuantBlock
from autofuse.graph.recognise.custom_ops import custom_calls
from autofuse.graph.recognise.nodes import (
    cast_source,
    concrete,
    constant,
    dtype_of,
    is_call,
    keeps_order,
    same_size,
    shape,
)
from autofuse.graph.recognise.quant_blocks import E4M3, OffError, call_text, elements, quant_block, scale_layout
from autofuse.graph.recognise.quant_operators import match_operator
from autofuse.graph.recognise.quant_scales import (
    HALVES,
    Quotient,
    Scales,
    find_quotient,
    is_cast,
    path_up,
    read_scales,
    widened,
)
from autofuse.ops.quant import E4M3_MAX, STATIC, QuantFormat, ScaleLayout

__all__ = ["find_quants"]

aten = torch.ops.aten
prims = torch.ops.prims
_FP8 = (E4M3, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
_BY_DIVISION = "a division stands for the product with the scale's reciprocal"


def find_quants(graph: Graph) -> Found:
    """All quantisations in a post-grad graph, and what came close to being one."""
    blocks: list[QuantBlock] = []
    near_misses: list[NearMiss] = []
    attempts: list[tuple[Node, Callable[[], QuantBlock | None]]] = [
        *((cast, lambda cast=cast: _match(cast)) for cast in _casts_to_fp8(graph)),
        *((call.node, lambda call=call: match_operator(call)) for call in custom_calls(graph)),
    ]
    for node, attempt in sorted(attempts, key=lambda pair: pair[0]):
        try:
            block = attempt()
        except OffError as off:
            near_misses.append(NearMiss("quantisation", node, str(off)))
            continue
        if block is not None:
            blocks.append(block)
    return Found(tuple(blocks), tuple(near_misses))


def _casts_to_fp8(graph: Graph) -> list[Node]:
    casts = (prims.convert_element_type.default, aten.to.dtype, aten._to_copy.default)
    found = [node for target in casts for node in graph.find_nodes(op="call_function", target=target)]
    return [node for node in found if dtype_of(node) in _FP8 and cast_source(node, dtype_of(node) or E4M3)]


def _match(cast: Node) -> QuantBlock | None:
    """The quantisation that ends in ``cast``; None if it is nothing of the kind. Raises OffError."""
    below, low, high, clamps = _unclamped(cast.args[0])
    quotient = find_quotient(below)
    if quotient is None:
        return None
    scales = read_scales(quotient)
    if scales is None and concrete(elements(quotient.divisor)) != 1:
        return None
    # From here on it is a quantisation: whatever is off is worth telling.
    if dtype_of(cast) != E4M3:
        raise OffError(f"its values are {dtype_of(cast)}, not {E4M3}")
    if dtype_of(quotient.node) != torch.float32:
        raise OffError(f"its arithmetic is in {dtype_of(quotient.node)}, not in float32")
    if narrow := next((node for node in clamps if dtype_of(node) in HALVES), None):
        raise OffError(f"its values are rounded to {dtype_of(narrow)} first, at {narrow}")
    for bound, limit in ((low, -E4M3_MAX), (high, E4M3_MAX)):
        if bound not in (None, limit):
            raise OffError(f"its values are clamped to {bound:g}, not to {limit:g}")
    own = {cast, *clamps, quotient.node}
    if scales is not None:
        return _group_block(cast, own, quotient, scales)
    if low is None or high is None:
        raise OffError(f"its values are not clamped to {-E4M3_MAX:g} and {E4M3_MAX:g}: those beyond become NaN")
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
        elif not (keeps_order(node) or is_cast(node)):
            break
        passed.append(node)
        node = node.args[0]
    return node, low, high, passed


def _group_block(cast: Node, own: set[Node], quotient: Quotient, scales: Scales) -> QuantBlock:
    sizes, divisors = shape(quotient.rows), shape(quotient.operand)
    reduced = shape(scales.absolute)
    if scales.dims not in ([-1], -1, [len(reduced) - 1], len(reduced) - 1):
        raise OffError(f"its amax is over dimensions {scales.dims}, not over the last")
    group = concrete(reduced[-1])
    if group not in (64, 128):
        raise OffError(f"its groups have {reduced[-1]} elements, neither 64 nor 128")
    absolute = _climbed(scales.absolute)
    if not is_call(absolute[-1], aten.abs.default):
        raise OffError(f"its amax is not of absolute values, but of {call_text(absolute[-1])}")
    if (
        len(sizes) != len(divisors)
        or (concrete(sizes[-1]), concrete(divisors[-1])) != (group, 1)
        or not all(same_size(a, b) for a, b in zip(sizes[:-1], divisors[:-1], strict=True))
    ):
        raise OffError(f"its rows {list(sizes)} are not divided by one scale for {group}, but by {list(divisors)}")
    own |= {*scales.own, *absolute}
    divided, measured = _climbed(quotient.rows), _climbed(absolute[-1].args[0])
    if divided[-1] is not measured[-1]:
        raise OffError(f"the rows that are divided, {divided[0]}, are not those of its amax, {measured[0]}")
    rows, width = _whole_rows(divided, measured, group)
    stored, layout = scales.node, ScaleLayout.ROW_MAJOR
    if stored is not None:
        stored, layout = _stored(stored, own)
        # The rows may be cut into heads already, each as wide as a group; transposed scales tell how wide they are.
        width = width if layout == ScaleLayout.ROW_MAJOR else group * (concrete(shape(stored)[1]) or 1)
        own |= {*path_up(stored, scales.node)} if scales.node is not None else set()  # transposing copies
    return quant_block(
        cast,
        own,
        [*_below(divided, rows), *_below(measured, rows)],
        rows,
        width,
        QuantFormat(group, scales.ue8m0, layout),
        scales=stored,
        rounding=scales.rounding,
    )


def _static_block(cast: Node, own: set[Node], quotient: Quotient) -> QuantBlock:
    if quotient.factor not in (None, 1.0):
        raise OffError(f"its rows are multiplied by {quotient.factor:g} besides their scale")
    if dtype_of(quotient.divisor) != torch.float32:
        raise OffError(f"its scale {quotient.divisor} is {dtype_of(quotient.divisor)}, not float32")
    chain = _climbed(quotient.rows)
    rows = next(node for node in chain if dtype_of(node) == dtype_of(chain[-1]))
    width = concrete(shape(rows)[-1]) if shape(rows) else None
    if width is None:
        raise OffError(f"the width of its rows {rows} is not known while compiling")
    return quant_block(
        cast,
        own,
        [*_below(chain, rows), *quotient.between],  # one reciprocal may serve several quantisations
        rows,
        width,
        QuantFormat(STATIC),
        scale=quotient.divisor,
        rounding=(_BY_DIVISION,) if quotient.factor is None else (),
    )


def _climbed(node: Any) -> list[Node]:
    """``node`` and what it is a view or a wider copy of, upwards."""
    chain = [node]
    while keeps_order(chain[-1]) or widened(chain[-1]) is not None:
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
    raise OffError(f"its rows {common[0]}, {list(shape(common[0]))}, are no whole number of groups of {group}")


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
            layout = scale_layout(node)
            if layout in (ScaleLayout.COLUMN_MAJOR, ScaleLayout.TMA_ALIGNED):
                best = (node, layout)
