"""Where in a model a node of a post-grad graph comes from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import takewhile
from typing import Any

from torch.fx import Graph, Node

__all__ = ["Origins"]

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')


class Origins:
    """Module paths and source lines of nodes.

    Post-grad nodes have lost the modules that Dynamo's nodes carry, but keep the names of Dynamo's nodes; so the
    module paths are read from Dynamo's graph before it is compiled.
    """

    def __init__(self, modules: Mapping[str, str]) -> None:
        self._modules = dict(modules)

    @classmethod
    def of_dynamo_graph(cls, graph: Graph) -> Origins:
        modules = {}
        for node in graph.nodes:
            stack = node.meta.get("nn_module_stack")
            if stack:
                modules[node.name] = _tidy(str(next(reversed(stack.values()))[0]))
        return cls(modules)

    def module(self, nodes: Iterable[Node]) -> str:
        """The innermost module that all of ``nodes`` belong to, e.g. ``model.layers.0.self_attn``; "" if unknown."""
        paths = [path.split(".") for node in nodes if (path := self._module_of(node))]
        if not paths:
            return ""
        return ".".join(names[0] for names in takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False)))

    def source(self, nodes: Iterable[Node]) -> str:
        """``file.py:440 in forward``, the line that made the first of ``nodes``; "" if unknown.

        Frames that end the stacks of all nodes alike are left out: the line inside a norm's own ``forward`` says less
        than the line that calls it.
        """
        stacks = [_FRAME.findall(str(node.meta.get("stack_trace") or "")) for node in nodes]
        if not stacks or not stacks[0]:
            return ""
        frames = stacks[0]
        while len(frames) > 1 and len(stacks) > 1 and all(stack and stack[-1] == frames[-1] for stack in stacks[1:]):
            frames = frames[:-1]
            stacks = [frames, *(stack[:-1] for stack in stacks[1:])]
        file, line, function = frames[-1]
        return f"{file.rsplit('/', 1)[-1]}:{line} in {function}"

    def _module_of(self, node: Node) -> str:
        sources: Any = node.meta.get("from_node")
        while sources:
            found = self._modules.get(sources[0].name)
            if found is not None:
                return found
            sources = getattr(sources[0], "from_node", None)
        return ""


def _tidy(path: str) -> str:
    """``L['self'].model.layers[0]`` → ``model.layers.0``, as ``named_modules`` says it."""
    path = re.sub(r"^L\['self'\]\.?", "", path)
    path = re.sub(r"^L\['(\w+)'\]", r"\1", path)
    path = re.sub(r"\._modules\['(\w+)'\]", r".\1", path)
    path = re.sub(r"\[['\"]?(\w+)['\"]?\]", r".\1", path)
    return path.strip(".")
