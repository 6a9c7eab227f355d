"""Finds MLA's products per head, of which W_UV's is the attention's output: ``bmm``, then heads side by side.

``torch.bmm`` between transposes and ``torch.einsum`` come here as one ``bmm`` among different views, so its result is
followed by its axes (heads N, tokens T, columns V) through whatever views there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from autofuse.graph.blocks import Found, HeadwiseLinearBlock
from autofuse.graph.recognise.axes import Axes, regrouped
from autofuse.graph.recognise.nodes import (
    concrete,
    is_call,
    is_getitem,
    keeps_order,
    shape,
    tensor,
)

__all__ = ["find_headwise_linears"]

aten = torch.ops.aten
_HEADS, _TOKENS, _COLUMNS = range(3)
_IN_ORDER = (_TOKENS, _HEADS, _COLUMNS)


def find_headwise_linears(graph: Graph) -> Found:
    """All products per head, of a weight, in a post-grad graph.

    What looks like one and is none (attention over several heads, say) is no near miss: such products are everywhere.
    """
    nodes = graph.find_nodes(op="call_function", target=aten.bmm.default)
    return Found(tuple(block for node in nodes if (block := _match(node)) is not None))


def _match(product: Node) -> HeadwiseLinearBlock | None:
    rows, weight = product.args
    left, right, result = tensor(rows), tensor(weight), tensor(product)
    if left is None or right is None or result is None or not _is_weight(weight):
        return None
    heads, inner, outer = (concrete(size) for size in right.shape)
    if heads is None or inner is None or outer is None:
        return None
    passed: list[Node] = []
    in_order: list[Node] = []
    for node, axes in _followed(product):
        if tuple(axis for dim in axes for axis in dim) == _without_ones(_IN_ORDER, _sizes(product)):
            in_order.append(node)
        elif in_order:
            break
        else:
            passed.append(node)
    if not in_order:
        return None
    return HeadwiseLinearBlock(
        output=in_order[0],
        nodes=(*passed, in_order[0]),
        product=product,
        in_order=tuple(in_order),
        tokens=result.shape[1],
        heads=heads,
        inner=inner,
        outer=outer,
        dtype=right.dtype,
    )


def _is_weight(node: Any) -> bool:
    """Whether ``node`` is an input of the graph, or a part, view or cast of one."""
    while isinstance(node, Node) and node.op == "call_function":
        casts = (torch.ops.prims.convert_element_type.default, aten._to_copy.default)
        views = (aten.permute.default, aten.slice.Tensor, aten.split_with_sizes.default, aten.split.Tensor)
        if not (keeps_order(node) or is_getitem(node) or is_call(node, *casts, *views, aten.select.int)):
            return False
        node = node.args[0]
    return isinstance(node, Node) and node.op in ("placeholder", "get_attr")


def _sizes(product: Node) -> dict[int, Any]:
    heads, tokens, columns = shape(product)
    return {_HEADS: heads, _TOKENS: tokens, _COLUMNS: columns}


def _without_ones(axes: Sequence[int], sizes: dict[int, Any]) -> tuple[int, ...]:
    return tuple(axis for axis in axes if concrete(sizes[axis]) != 1)


def _followed(product: Node) -> Iterator[tuple[Node, Axes]]:
    """The product and the views after it, as long as each has but one reader, with their axes but those of size 1."""
    sizes = _sizes(product)
    axes: Axes | None = tuple(_without_ones((axis,), sizes) for axis in (_HEADS, _TOKENS, _COLUMNS))
    node = product
    while axes is not None:
        yield node, axes
        users = list(node.users)
        if len(users) != 1:
            return
        node = users[0]
        if is_call(node, aten.permute.default):
            order: Any = node.args[1]
            axes = tuple(axes[dim] for dim in order)
        elif keeps_order(node):
            axes = regrouped([axis for dim in axes for axis in dim], sizes, shape(node))
        else:
            return
