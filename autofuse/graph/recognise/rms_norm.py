"""Finds RMSNorm: ``x * rsqrt(mean(x²) + eps) * weight``, in the dialects of PyTorch, Hugging Face and vLLM.

Each search starts from an anchor, the reciprocal root or a call of one of vLLM's operators, and looks at a handful of
nodes around it; so its time grows with the number of anchors in a graph, not with the graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from autofuse.graph.blocks import Found, NearMiss, RMSNormBlock
from autofuse.graph.recognise.custom_ops import CustomCall, custom_calls
from autofuse.graph.recognise.nodes import (
    cast_source,
    concrete,
    constant,
    dtype_of,
    expression,
    is_call,
    operands,
    scaled_by,
    shape,
    tensor,
)

__all__ = ["find_rms_norms"]

aten = torch.ops.aten
_MULS = (aten.mul.Tensor, aten.mul.Scalar)
_EPS_ADVICE = (
    "eps {node} is an input of the graph, not a constant: set torch._dynamo.config.specialize_float = True, "
    "or mark the dynamic dimensions with torch._dynamo.mark_dynamic instead of dynamic=True"
)


class _OffError(Exception):
    """It looked like an RMSNorm, but the message says what is off."""


def find_rms_norms(graph: Graph) -> Found:
    """All RMSNorms with a weight in a post-grad graph, and what came close to being one."""
    blocks: list[RMSNormBlock] = []
    near_misses: list[NearMiss] = []
    calls = {call.node: call for call in custom_calls(graph) if call.name in (*_OPS, *_ADDING_OPS)}
    for node in sorted([*_anchors(graph), *calls]):
        try:
            block = _match_op(calls[node]) if node in calls else _match(node)
        except _OffError as off:
            near_misses.append(NearMiss("RMSNorm", node, str(off)))
            continue
        if block is not None:
            blocks.append(block)
    return Found(tuple(blocks), tuple(near_misses))


def _anchors(graph: Graph) -> list[Node]:
    return [
        *graph.find_nodes(op="call_function", target=aten.rsqrt.default),
        *graph.find_nodes(op="call_function", target=aten.sqrt.default),
        *(
            node
            for node in graph.find_nodes(op="call_function", target=aten.pow.Tensor_Scalar)
            if node.args[1] in (-0.5, 0.5)
        ),
    ]


_OPS = ("vllm_ir::rms_norm", "_C::rms_norm")
"""vLLM's operators; both cast before they multiply by the weight."""
_ADDING_OPS = ("vllm_ir::fused_add_rms_norm", "_C::fused_add_rms_norm")


def _match_op(call: CustomCall) -> RMSNormBlock:
    """The RMSNorm that an operator is. Raises _OffError."""
    if call.name in _ADDING_OPS:
        raise _OffError(f"{call.name} adds the residual first, and returns the sum too")
    rows, output = call.args.get("x", call.args.get("input")), call.node
    dtype, width = dtype_of(rows), concrete(shape(rows)[-1])
    if width is None or dtype is None:
        raise _OffError(f"the width of its rows, {shape(rows)[-1]}, is not known while compiling")
    if call.args.get("variance_size") not in (None, width):
        raise _OffError(f"its mean is over {call.args['variance_size']} of {width} columns")
    if call.args["weight"] is None:
        raise _OffError("it has no weight")
    eps = constant(call.args["epsilon"])
    if eps is None:
        raise _OffError(_EPS_ADVICE.format(node=call.args["epsilon"]))
    result = call.written.get("result")
    if result is not None:
        if result.item is None or result.layout is not None:
            raise _OffError(f"it writes to a part of the buffer {result.before}")
        output = result.item
    before = dtype != torch.float32
    return _checked(rows, call.args["weight"], eps, before, width, dtype, output, rows, call.own_nodes())


def _match(anchor: Node) -> RMSNormBlock | None:
    """The RMSNorm around ``anchor``; None if it is nothing of the kind. Raises _OffError."""
    variance = anchor.args[0]
    if not isinstance(variance, Node):
        return None
    below = _sum_of_squares(variance)
    if below is None:
        return None
    # From here on it is the root of a mean of squares: whatever is off is worth telling.
    wide, eps, inner = below
    scale, inner_scale = _reciprocal(anchor)
    normed = _normalised(wide, scale)
    inner += [*inner_scale, normed]
    return _finish(wide, normed, eps, inner)


def _sum_of_squares(variance: Node) -> tuple[Node, float, list[Node]] | None:
    """Reads ``mean(x * x) + eps`` backwards: (x, eps, the nodes between). None if no squares are averaged there."""
    mean, eps, inner = variance, None, [variance]
    if is_call(variance, aten.add.Tensor, aten.add.Scalar):
        pair = operands(variance)
        sides = [] if pair is None else [side for side in pair if isinstance(side, Node)]
        means = [side for side in sides if _squares(side) is not None]
        if not means:
            return None
        mean, inner = means[0], [variance, means[0]]
        assert pair is not None
        eps = pair[1] if pair[0] is mean else pair[0]
    read = _squares(mean)
    if read is None:
        # Such as clamp(mean(x²), eps): squares one step further down.
        if variance.args and isinstance(variance.args[0], Node) and _squares(variance.args[0]) is not None:
            raise _OffError(f"eps is not added to the mean of squares: {_call(variance)}")
        return None
    wide, total, squares = read
    if variance is mean:
        raise _OffError("no eps is added to the mean of squares")
    value = constant(eps)
    if value is None:
        node = cast_source(eps, torch.float32) or eps
        if isinstance(node, Node) and node.op == "placeholder":
            raise _OffError(_EPS_ADVICE.format(node=node))
        raise _OffError(f"eps {node} is not a constant")
    dims = total.args[1] if len(total.args) > 1 else None
    keepdim = total.args[2] if len(total.args) > 2 else False
    if dims not in ([-1], [len(shape(wide)) - 1]):
        raise _OffError(f"the mean is over dimensions {dims}, not over the last")
    if not keepdim or total.kwargs:
        raise _OffError(f"unexpected arguments of the mean: {_call(total)}")
    inner += [node for node in (total, squares) if node not in inner]
    return wide, value, inner


def _squares(mean: Node) -> tuple[Node, Node, Node] | None:
    """(x, the reduction, the squares) if ``mean`` averages x² by ``mean``, ``sum / N`` or ``sum * (1 / N)``."""
    total: Any = mean
    if is_call(mean, aten.div.Tensor, aten.div.Scalar, *_MULS):
        pair = operands(mean)
        total = None if pair is None else next((side for side in pair if is_call(side, aten.sum.dim_IntList)), None)
    if not is_call(total, aten.mean.dim, aten.sum.dim_IntList):
        return None
    squares = total.args[0]
    if not _is_square(squares):
        return None
    wide = squares.args[0]
    if is_call(total, aten.sum.dim_IntList) and not _divides_by_width(mean, total, shape(wide)[-1]):
        raise _OffError(f"the sum of squares is not divided by the width of its rows: {_call(mean)}")
    return wide, total, squares


def _is_square(node: Any) -> bool:
    return (
        (is_call(node, aten.pow.Tensor_Scalar) and node.args[1] == 2)
        or (is_call(node, aten.mul.Tensor) and _same(node.args[0], node.args[1]))
        or is_call(node, aten.square.default)
    )


def _same(one: Any, other: Any) -> bool:
    """Whether both are one node, or casts of one node: nobody merges ``x.float()`` written twice before us."""
    source = cast_source(one, torch.float32)
    return one is other or (source is not None and source is cast_source(other, torch.float32))


def _divides_by_width(mean: Node, total: Node, width: Any) -> bool:
    if mean is total:
        return False
    if is_call(mean, *_MULS):
        number = concrete(width)
        return number is not None and scaled_by(mean, 1.0 / number) is total
    by = mean.args[1]
    size = by.meta.get("val") if isinstance(by, Node) else by
    return mean.args[0] is total and bool(expression(size) == expression(width))


def _reciprocal(anchor: Node) -> tuple[Node, list[Node]]:
    """From the root to the node x is multiplied by (or, for ``x / sqrt``, divided by), with the nodes between."""
    inner = [anchor]
    scale = anchor
    if is_call(anchor, aten.sqrt.default) or (is_call(anchor, aten.pow.Tensor_Scalar) and anchor.args[1] == 0.5):
        users = list(anchor.users)
        if len(users) == 1 and is_call(users[0], aten.reciprocal.default):
            scale = users[0]
            inner.append(scale)
    only = list(scale.users)
    if scale is not anchor and len(only) == 1 and scaled_by(only[0], 1.0) is scale:
        scale = only[0]  # ``1 / y`` decomposes to ``reciprocal(y) * 1``
        inner.append(scale)
    return scale, inner


def _normalised(wide: Node, scale: Node) -> Node:
    """``wide * scale``, or ``wide / scale`` for a square root."""
    inverse = is_call(scale, aten.sqrt.default) or (is_call(scale, aten.pow.Tensor_Scalar) and scale.args[1] == 0.5)
    for user in scale.users:
        pair = operands(user) if isinstance(user, Node) else None
        if pair is None:
            continue
        if inverse and is_call(user, aten.div.Tensor) and pair[1] is scale and _same(pair[0], wide):
            return user
        if not inverse and is_call(user, aten.mul.Tensor) and any(_same(side, wide) for side in pair):
            return user
    raise _OffError(f"the rows that are squared, {wide}, are not what {scale} scales")


def _finish(wide: Node, normed: Node, eps: float, inner: list[Node]) -> RMSNormBlock:
    """Reads forward from the normed rows to the weighted result."""
    value = tensor(wide)
    if value is None or value.dtype != torch.float32:
        raise _OffError(f"its arithmetic is in {dtype_of(wide)}, not in float32")
    width = concrete(value.shape[-1])
    if width is None:
        raise _OffError(f"the width of its rows, {value.shape[-1]}, is not known while compiling")
    narrow = cast_source(wide, torch.float32)
    dtype = dtype_of(narrow) or torch.float32
    if dtype == torch.float32:
        narrow = None
    only = _sole_user(normed)

    cast = dtype_of(only)
    if narrow is not None and cast_source(only, dtype) is normed:
        # Hugging Face, vLLM: (x.float() * r).to(dtype) * weight
        output = _sole_user(only)
        weight = _weight_of(output, only)
        block_input, before = narrow, True
        inner += [only, output]
    elif cast is not None and cast != torch.float32:
        raise _OffError(f"the normed rows become {cast} at {only}, the input is {dtype}")
    else:
        weight = _weight_of(only, normed)
        rounded = _rounded(only, dtype) if narrow is not None else None
        if rounded is not None:
            # PyTorch: (x.float() * r * weight).to(dtype)
            assert narrow is not None
            source = cast_source(weight, torch.float32)
            if source is not None and dtype_of(source) == dtype:
                inner += [weight] if len(weight.users) == 1 else []
                weight = source
            block_input, before, output = narrow, False, rounded
            inner += [only, rounded]
        else:
            block_input, before, output, dtype = wide, False, only, torch.float32
            inner.append(only)

    return _checked(block_input, weight, eps, before, width, dtype, output, wide, inner)


def _checked(
    block_input: Node,
    weight: Node,
    eps: float,
    before: bool,
    width: int,
    dtype: torch.dtype,
    output: Node,
    wide: Node,
    inner: list[Node],
) -> RMSNormBlock:
    scale = tensor(weight)
    if scale is None or scale.dim() != 1 or concrete(scale.shape[0]) != width:
        raise _OffError(f"its weight {weight} has shape {list(shape(weight))}, not [{width}]")
    if scale.dtype != dtype:
        raise _OffError(f"its weight {weight} is {scale.dtype}, its input {dtype}")
    if dtype_of(output) != dtype:
        raise _OffError(f"its result {output} is {dtype_of(output)}, its input {dtype}")
    own = set(inner)
    for node in own - {output}:
        for user in node.users:
            if user not in own:
                what = "an output of the graph (saved for backward?)" if user.op == "output" else f"used by {user}"
                raise _OffError(f"its intermediate {node} is also {what}")
    if block_input is not wide:
        casts = [user for user in block_input.users if cast_source(user, torch.float32) is block_input]
        own.update(cast for cast in casts if cast.users and all(user in own for user in cast.users))
    return RMSNormBlock(
        output=output,
        nodes=tuple(sorted(own)),
        input=block_input,
        weight=weight,
        eps=eps,
        cast_before_weight=before,
        width=width,
        dtype=dtype,
    )


def _rounded(node: Node, dtype: torch.dtype) -> Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 and cast_source(users[0], dtype) is node else None


def _sole_user(node: Node) -> Node:
    users = list(node.users)
    if len(users) != 1:
        what = ", ".join(map(str, users))
        if any(user.op == "output" for user in users):
            what += " (the graph's output: saved for backward?)"
        raise _OffError(f"its intermediate {node} has {len(users)} users: {what}")
    return users[0]


def _weight_of(node: Node, normed: Node) -> Node:
    """The other factor of ``normed * weight``."""
    pair = operands(node) if is_call(node, aten.mul.Tensor) else None
    if pair is not None:
        for one, other in (pair, pair[::-1]):
            if one is normed and isinstance(other, Node) and other is not normed:
                return other
    raise _OffError(f"the normed rows {normed} are not multiplied by a weight, but go to {_call(node)}")


def _call(node: Node) -> str:
    if node.op == "output":
        return "the graph's output"
    return f"{node} = {getattr(node.target, '__name__', node.target)}({', '.join(map(str, node.args))})"
