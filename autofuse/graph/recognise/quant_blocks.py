"""What the recognisers of quantisations have in common: how a block is made, and how scales lie in memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Node

from autofuse.graph.blocks import QuantBlock
from autofuse.graph.recognise.nodes import concrete, dtype_of, expression, same_size, tensor
from autofuse.ops.quant import QuantFormat, ScaleLayout

__all__ = ["E4M3", "SMALLEST_AMAX", "OffError", "call_text", "elements", "quant_block", "scale_layout"]

E4M3 = torch.float8_e4m3fn
SMALLEST_AMAX = 1e-10


class OffError(Exception):
    """It looked like a quantisation, but the message says what is off."""


def quant_block(
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
    """The block with these own nodes, and those optional ones that nobody else reads. Raises OffError."""
    for node in sorted(own - {cast, scales}):
        for user in node.users:
            if user not in own:
                what = "an output of the graph (saved for backward?)" if user.op == "output" else f"used by {user}"
                raise OffError(f"its intermediate {node} is also {what}")
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


def scale_layout(node: Node) -> ScaleLayout | None:
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


def elements(node: Node) -> Any:
    value = tensor(node)
    return -1 if value is None else value.numel()


def call_text(node: Node) -> str:
    return f"{node} = {getattr(node.target, '__name__', node.target)}({', '.join(map(str, node.args))})"
