"""Mutants of graphs: a post-grad graph with some of its nodes read, moved, exchanged or changed, and what it computes.

Tracing a layer takes a second, changing its graph a millisecond: so each graph that was traced gives many more that
nobody would write, among them those that a fusion must tell from its own. All are functional, as post-grad graphs are,
so any of them may be run as it is.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch.fx import Graph, GraphModule, Interpreter, Node

__all__ = ["arguments_of", "mutated", "run_graph"]

aten = torch.ops.aten
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_FRESH = (aten.empty.memory_format, aten.empty_strided.default, aten.new_empty.default, aten.empty_like.default)
_MOST_CHANGES = 3
_TRIES = 30  # places, for one change
_INDICES = 24  # rows of a table: no index is more


def mutated(graph: Graph, source: random.Random) -> tuple[Graph, list[str]] | None:
    """(a copy of ``graph`` with one to three changes, what they are); None if nothing could be changed."""
    mutant = _Mutant(graph, source)
    try:
        for _ in range(source.randint(1, _MOST_CHANGES)):
            mutant.change()
    except RuntimeError:  # of an operator that takes no such tensor
        return None
    if not mutant.changes:
        return None
    mutant.graph.eliminate_dead_code()
    mutant.graph.lint()
    return mutant.graph, mutant.changes


def arguments_of(graph: Graph, seed: int, highest: int = _INDICES) -> list[torch.Tensor]:
    """Random arguments of a graph of static shapes; indices are all different and below ``highest``."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta["val"]
        if value.dtype == torch.int64:
            order = torch.randperm(max(highest, value.numel()), generator=generator)
            made = order[: value.numel()].reshape(value.shape)
        else:
            made = torch.randn(value.shape, generator=generator)
            if value.dim() == 1:  # a norm's weight, or a scale
                made = 0.5 + made.abs()
            elif value.dim() == 2:
                made = made.clamp(-1, 1)
        whole = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
        found.append(whole.copy_(made))
    return found


def run_graph(graph: Graph, arguments: list[torch.Tensor], noise: torch.Generator | None = None) -> list[torch.Tensor]:
    """The results of a graph; it may change its arguments. Fresh memory holds zeros.

    Args:
        noise: shifts what each operator computes by up to one unit in the last place: twice what rounding does, and so
            more than another order of roundings, or none in between, could (Parker, Monte Carlo arithmetic, 1997).
    """
    results = _Filling(GraphModule({}, graph), noise).run(*arguments)
    return [result for result in results if isinstance(result, torch.Tensor)]


class _Filling(Interpreter):
    """A mutant may read what was never written."""

    def __init__(self, module: GraphModule, noise: torch.Generator | None) -> None:
        super().__init__(module)
        self.noise = noise

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        result = super().call_function(target, args, kwargs)
        if target in _FRESH:
            return result.zero_()
        return result if self.noise is None else self.shifted(result, args)

    def shifted(self, result: Any, args: Any) -> Any:
        """The result with noise, where an operator has rounded it: views and copies have not."""
        computed = isinstance(result, torch.Tensor) and result.dtype in _FLOATS and result._base is None
        if not computed or any(result is arg for arg in args):
            return result
        units = 2 * torch.rand(result.shape, generator=self.noise, dtype=torch.float64) - 1
        return (result.double() * (1 + units * torch.finfo(result.dtype).eps)).to(result.dtype)


class _Mutant:
    """A copy of a graph, being changed."""

    def __init__(self, graph: Graph, source: random.Random) -> None:
        self.graph = Graph()
        result = self.graph.graph_copy(graph, {})
        self.graph.output(result)
        self.source = source
        self.changes: list[str] = []
        copies = self.graph.find_nodes(op="call_function", target=aten.copy_.default)
        self.end: Node = min([*copies, *self.graph.find_nodes(op="output")])
        self.mode = detect_fake_mode([node.meta["val"] for node in graph.find_nodes(op="placeholder")])

    def change(self) -> None:
        ways: list[Callable[[], str]] = [
            *(self.read, self.expose, self.exchange, self.exchange, self.exchange, self.constant, self.interpose),
            *(self.write_again, self.move, self.shift, self.permute),
        ]
        for _ in range(_TRIES):
            what = self.source.choice(ways)()
            if what:
                self.changes.append(what)
                return

    # ---- ways -------------------------------------------------------------------------------------------------------

    def read(self) -> str:
        """Somebody else reads a node, anywhere after it."""
        node = self.a_node(lambda node: _dtype(node) in _FLOATS)
        if node is None:
            return ""
        place = self.source.choice([node, *self.between(node, self.end)])
        with self.graph.inserting_after(self.after(place)):
            reader = self.graph.call_function(aten.mul.Tensor, (node, 2.0))
        self.evaluate(reader)
        self.give(reader)
        return f"{reader} = {node} * 2, after {place}"

    def expose(self) -> str:
        """A node becomes a result."""
        node = self.a_node(lambda node: node.op == "call_function" and _dtype(node) is not None)
        if node is None:
            return ""
        self.give(node)
        return f"{node} is a result"

    def exchange(self) -> str:
        """Somebody reads another node of the same layout."""
        user = self.a_node(lambda node: node.op == "call_function")
        if user is None:
            return ""
        inputs = [node for node in user.all_input_nodes if _dtype(node) is not None]
        if not inputs:
            return ""
        old = self.source.choice(inputs)
        alike = [node for node in self.graph.nodes if node < user and node is not old and _layout(node) == _layout(old)]
        if not alike:
            return ""
        new = self.source.choice(alike)
        if "_all_bases" in user.kwargs and new in user.all_input_nodes:
            return ""  # one base is not two
        user.replace_input_with(old, new)
        self.refresh({user})
        return f"{user} reads {new}, not {old}"

    def constant(self) -> str:
        """A number becomes another."""
        node = self.a_node(lambda node: node.op == "call_function" and any(isinstance(arg, float) for arg in node.args))
        if node is None:
            return ""
        index = self.source.choice([index for index, arg in enumerate(node.args) if isinstance(arg, float)])
        number: Any = node.args[index]
        node.update_arg(index, number * self.source.choice((0.25, 2.0, 1.5)) + self.source.choice((0.0, 0.0, 0.125)))
        return f"{node} has {node.args[index]:g}, not {number:g}"

    def interpose(self) -> str:
        """Something happens between a node and one of its readers."""
        node = self.a_node(lambda node: _dtype(node) in _FLOATS and bool(node.users))
        if node is None:
            return ""
        user = self.source.choice(list(node.users))
        if user.op == "output" or user.target is aten.copy_.default or "_all_bases" in user.kwargs:
            return ""
        target, args = self.source.choice(
            [(aten.mul.Tensor, (node, 1.5)), (aten.clone.default, (node,)), (aten.flip.default, (node, [0]))]
        )
        if not _dims(node) and target is aten.flip.default:
            return ""
        with self.graph.inserting_before(user):
            between = self.graph.call_function(target, args)
        self.evaluate(between)
        user.replace_input_with(node, between)
        self.refresh({user})
        return f"{user} reads {between} = {target}({node})"

    def write_again(self) -> str:
        """What writes rows does it twice, perhaps other rows, or to other places."""
        node = self.a_node(lambda node: node.target is aten.index_put.default)
        if node is None:
            return ""
        rows: Any = node.args[2]
        other = self.source.choice([rows, *(each for each in self.nodes(node) if _layout(each) == _layout(rows))])
        into = self.source.choice([node, node, node.args[0]])
        with self.graph.inserting_after(node):
            again = self.graph.call_function(node.target, (into, node.args[1], other, *node.args[3:]))
        self.evaluate(again)
        users = [user for user in node.users if user is not again]
        if into is not node:
            self.give(again)
            return f"{again} writes {other} into {into} as well"
        if not users:
            return ""
        user = self.source.choice(users)
        user.replace_input_with(node, again)
        self.refresh({user})
        return f"{again} writes {other} again, for {user}"

    def move(self) -> str:
        """Nodes change places."""
        moved = []
        for _ in range(8):
            node = self.a_node(lambda node: node.op == "call_function")
            if node is None:
                break
            inputs = [each for each in node.all_input_nodes if each.op == "call_function"]
            first = max(inputs) if inputs else self.nodes(self.end)[0]
            last = min([*node.users, self.end])
            places = [place for place in self.between(first, last) if place is not node]
            if places:
                self.source.choice(places).append(node)
                moved.append(str(node))
        return f"{', '.join(moved)} are elsewhere" if moved else ""

    def shift(self) -> str:
        """A slice takes other columns, as many."""
        node = self.a_node(lambda node: node.target is aten.slice.Tensor and len(node.args) == 4)
        if node is None:
            return ""
        base, dim, start, end = node.args
        size = base.meta["val"].shape[dim]  # type: ignore[union-attr,index]
        width = node.meta["val"].shape[dim]  # type: ignore[index]
        if not isinstance(start, int) or not isinstance(end, int) or size <= width:
            return ""
        begin = self.source.choice([each for each in range(size - width + 1) if each != start])
        node.args = (base, dim, begin, begin + width)
        self.refresh({node})
        return f"{node} begins at {begin}, not at {start}"

    def permute(self) -> str:
        """Dimensions of one size change places, or the halves that are put together."""
        node = self.a_node(lambda node: node.target is aten.cat.default)
        if node is None:
            return ""
        parts: Any = node.args[0]
        if len({str(_layout(part)[0]) for part in parts}) != 1:
            return ""
        node.update_arg(0, parts[::-1])
        self.refresh({node})
        return f"{node} has its parts the other way round"

    # ---- the graph --------------------------------------------------------------------------------------------------

    def nodes(self, before: Node) -> list[Node]:
        return [node for node in self.graph.nodes if node < before and _dtype(node) is not None]

    def between(self, first: Node, last: Node) -> list[Node]:
        return [node for node in self.graph.nodes if node.op == "call_function" and first < node < last]

    def a_node(self, wanted: Callable[[Node], bool]) -> Node | None:
        found = [node for node in self.graph.nodes if node < self.end and wanted(node)]
        return self.source.choice(found) if found else None

    def after(self, place: Node) -> Node:
        """``place``, or the last placeholder for one of these."""
        return max(self.graph.find_nodes(op="placeholder")) if place.op == "placeholder" else place

    def give(self, node: Node) -> None:
        (output,) = self.graph.find_nodes(op="output")
        output.args = ((*output.args[0], node),)  # type: ignore[misc]

    def evaluate(self, node: Node) -> None:
        """Computes the node on fake tensors. Raises what its target raises."""
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda arg: arg.meta["val"])
        with self.mode:
            node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]

    def refresh(self, changed: set[Node]) -> None:
        """Computes anew what has changed its layout, and what depends on that."""
        for node in self.graph.nodes:
            if node.op == "call_function" and (node in changed or not changed.isdisjoint(node.all_input_nodes)):
                before = _layout(node)
                self.evaluate(node)
                if _layout(node) != before or before is None:
                    changed.add(node)


def _dtype(node: Node) -> torch.dtype | None:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, torch.Tensor) else None


def _dims(node: Node) -> int:
    return int(node.meta["val"].dim())


def _layout(node: Any) -> Any:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return None
    return tuple(value.shape), value.stride(), value.storage_offset(), value.dtype
