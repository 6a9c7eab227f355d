"""Replaces blocks of a graph by new nodes: all of them or none."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from autofuse.graph.blocks import Block
from autofuse.graph.fakes import compute, fake_mode_of
from autofuse.graph.moves import RefusedError
from autofuse.graph.recognise.nodes import concrete, is_call, same_size, shape
from autofuse.graph.rows import Rows

__all__ = ["Replacement", "rows_as_matrix", "tokens_first"]

aten = torch.ops.aten

_SWAPPED = ([1, 0, 2], [1, 0, -1])

# What a new node takes over from the node it replaces: where it comes from, for profilers and error messages.
_ORIGIN = ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node", "seq_nr", "original_aten")


class Replacement:
    """New nodes before one node of a graph. Leaving the ``with`` block by an exception removes them all again.

    Once the block is left, ``hoist`` and ``replace`` put the new nodes into use; they do not raise.
    """

    def __init__(self, graph: Graph, before: Node, like: Node) -> None:
        self._graph = graph
        self._before = before
        self._mode = fake_mode_of([like.meta["val"]])
        self._origin = {key: like.meta[key] for key in _ORIGIN if key in like.meta}
        self._new: list[Node] = []

    def __enter__(self) -> Replacement:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is not None:
            for node in reversed(self._new):
                self._graph.erase_node(node)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """A new node; its value is computed on fake tensors, without adding guards. Raises what ``target`` raises, and
        RefusedError where an argument is no node of the graph any more: another rewrite has put a new one in its place.
        """
        torch.fx.map_arg((args, kwargs), _check_present)
        with self._graph.inserting_before(self._before):
            node = self._graph.call_function(target, args, kwargs)
        self._new.append(node)
        node.meta.update(self._origin)
        values, named = torch.fx.map_arg((args, kwargs), lambda arg: arg.meta["val"])
        node.meta["val"] = compute(self._mode, target, values, named)
        return node

    def getitem(self, node: Node, index: int) -> Node:
        return self.call(operator.getitem, node, index)

    def reshape_like(self, node: Node, like: Node, sized: Node) -> Node:
        """``node`` in the shape of ``like``. Symbolic sizes are those of ``sized``, which has them and comes before."""
        return self.reshape(node, shape(like), sized)

    def reshape(self, node: Node, sizes: Sequence[Any], sized: Node) -> Node:
        """``node`` with these sizes. Symbolic ones are those of ``sized``, which has them and comes before."""
        now = shape(node)
        if len(now) == len(sizes) and all(same_size(a, b) for a, b in zip(now, sizes, strict=True)):
            return node
        symbolic = [dim for dim, size in enumerate(sizes) if not isinstance(size, int)]
        target: list[Any] = list(sizes)
        for dim in symbolic:
            # One size may be left to reshape to find.
            target[dim] = -1 if dim == symbolic[-1] else self.size(sizes[dim], sized)
        return self.call(aten.reshape.default, node, target)

    def size(self, size: Any, sized: Node) -> Any:
        """``size`` as an argument: a number, or a node that holds it. Raises RefusedError if there is none."""
        if (number := concrete(size)) is not None:
            return number
        for node in self._graph.find_nodes(op="placeholder"):
            if isinstance(node.meta.get("val"), torch.SymInt) and same_size(node.meta["val"], size):
                return node
        value = sized.meta["val"]
        for target, others in ((aten.sym_size.int, value.shape), (aten.sym_stride.int, value.stride())):
            for dim, other in enumerate(others):
                if same_size(other, size):
                    return self.call(target, sized, dim)
        raise RefusedError(f"no node holds the size {size}")

    def numbers(self, sizes: Sequence[Any], sized: Node) -> list[Any]:
        return [self.size(size, sized) for size in sizes]

    @property
    def inputs(self) -> list[Node]:
        """What the new nodes read."""
        return [above for node in self._new for above in node.all_input_nodes]

    def hoist(self, nodes: Iterable[Node]) -> None:
        """Moves ``nodes``, given in graph order, above the new ones."""
        for node in nodes:
            self._new[0].prepend(node)

    def redirect(self, pairs: Iterable[tuple[Node, Node]]) -> None:
        """Gives the users of each first node the second."""
        for old, result in pairs:
            old.replace_all_uses_with(result)

    def erase(self, nodes: Iterable[Node]) -> None:
        """Erases those of ``nodes`` that nobody reads any more, and what only they read."""
        todo = sorted(nodes)
        while todo:
            node = todo.pop()
            if not node._erased and _is_dead(node):
                inputs = node.all_input_nodes
                self._graph.erase_node(node)
                todo += [above for above in inputs if _is_dead(above)]

    def replace(self, block: Block, result: Node, views: Iterable[Node]) -> None:
        """Gives ``block``'s users ``result``; erases the block, and those of ``views`` that nobody reads any more."""
        self.redirect([(block.output, result)])
        self.erase({*block.nodes, *views})


def _check_present(node: Node) -> Node:
    if node._erased:
        raise RefusedError(f"another fusion has replaced {node}, which it reads")
    return node


def _is_dead(node: Node) -> bool:
    """Whether nothing would be missed if ``node`` were gone."""
    if node.users or node.op != "call_function":
        return False
    target = node.target
    return not (isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable)


def rows_as_matrix(new: Replacement, rows: Rows) -> Node:
    """The rows as [T, width], a strided view of their base."""
    node = rows.base
    if len(shape(node)) != 2:
        node = new.call(aten.reshape.default, node, [-1, rows.base_width])
    if not rows.whole:
        node = new.call(aten.slice.Tensor, node, 1, rows.offset, rows.offset + rows.width)
    return node


def tokens_first(new: Replacement, rows: Node) -> Node:
    """[N, T, K] as [T, N, K]: mostly, what was transposed to be multiplied."""
    if is_call(rows, aten.permute.default) and rows.args[1] in _SWAPPED:
        return rows.args[0]  # type: ignore[return-value]
    return new.call(aten.permute.default, rows, [1, 0, 2])
