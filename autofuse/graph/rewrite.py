"""Replaces blocks of a graph by new nodes: all of them or none."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch.fx import Graph, Node

from autofuse.graph.blocks import Block
from autofuse.graph.moves import RefusedError
from autofuse.graph.recognise.nodes import same_size, shape
from autofuse.graph.rows import Rows

__all__ = ["Replacement", "rows_as_matrix"]

aten = torch.ops.aten

# What a new node takes over from the node it replaces: where it comes from, for profilers and error messages.
_ORIGIN = ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node", "seq_nr", "original_aten")


class Replacement:
    """New nodes before one node of a graph. Leaving the ``with`` block by an exception removes them all again.

    Once the block is left, ``hoist`` and ``replace`` put the new nodes into use; they do not raise.
    """

    def __init__(self, graph: Graph, before: Node, like: Node) -> None:
        self._graph = graph
        self._before = before
        self._origin = {key: like.meta[key] for key in _ORIGIN if key in like.meta}
        self._new: list[Node] = []

    def __enter__(self) -> Replacement:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is not None:
            for node in reversed(self._new):
                self._graph.erase_node(node)

    def call(self, target: Any, *args: Any) -> Node:
        """A new node; its value is computed on fake tensors, without adding guards. Raises what ``target`` raises."""
        with self._graph.inserting_before(self._before):
            node = self._graph.call_function(target, args)
        self._new.append(node)
        node.meta.update(self._origin)
        values = torch.fx.map_arg(args, lambda arg: arg.meta["val"])
        mode = detect_fake_mode([arg.meta["val"] for arg in node.all_input_nodes])
        with contextlib.ExitStack() as stack:
            if mode is not None:
                stack.enter_context(mode)
                if mode.shape_env is not None:
                    stack.enter_context(mode.shape_env.suppress_guards())
            node.meta["val"] = target(*values)
        return node

    def getitem(self, node: Node, index: int) -> Node:
        return self.call(operator.getitem, node, index)

    def reshape_like(self, node: Node, like: Node, sized: Node) -> Node:
        """``node`` in the shape of ``like``. Symbolic sizes are those of ``sized``, which has them and comes before."""
        sizes = shape(like)
        now = shape(node)
        if len(now) == len(sizes) and all(same_size(a, b) for a, b in zip(now, sizes, strict=True)):
            return node
        symbolic = [dim for dim, size in enumerate(sizes) if not isinstance(size, int)]
        target: list[Any] = list(sizes)
        for dim in symbolic:
            # One size may be left to reshape to find.
            target[dim] = -1 if dim == symbolic[-1] else self._size(sizes[dim], sized)
        return self.call(aten.reshape.default, node, target)

    def _size(self, size: Any, sized: Node) -> Node:
        for node in self._graph.find_nodes(op="placeholder"):
            if isinstance(node.meta.get("val"), torch.SymInt) and same_size(node.meta["val"], size):
                return node
        for dim, other in enumerate(shape(sized)):
            if same_size(other, size):
                return self.call(aten.sym_size.int, sized, dim)
        raise RefusedError(f"no node holds the size {size}")

    def hoist(self, nodes: Iterable[Node]) -> None:
        """Moves ``nodes``, given in graph order, above the new ones."""
        first = self._new[0]
        for node in nodes:
            first.prepend(node)

    def replace(self, block: Block, result: Node, views: Iterable[Node]) -> None:
        """Gives ``block``'s users ``result``; erases the block, and those of ``views`` that nobody reads any more."""
        block.output.replace_all_uses_with(result)
        for node in sorted({*block.nodes, *views}, reverse=True):
            if not node.users:
                self._graph.erase_node(node)


def rows_as_matrix(new: Replacement, rows: Rows) -> Node:
    """The rows as [T, width], a strided view of their base."""
    node = rows.base
    if len(shape(node)) != 2:
        node = new.call(aten.reshape.default, node, [-1, rows.base_width])
    if not rows.whole:
        node = new.call(aten.slice.Tensor, node, 1, rows.offset, rows.offset + rows.width)
    return node
