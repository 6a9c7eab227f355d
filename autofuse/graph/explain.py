"""explain: what autofuse does to a model, site by site, without compiling it to the end."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from autofuse.graph.backend import Watch, autofuse, watching
from autofuse.graph.report import GraphReport
from autofuse.graph.report_html import html_page

__all__ = ["Explanation", "explain"]


@dataclass(frozen=True)
class Explanation:
    """The reports of a model's graphs, in the order in which they were compiled.

    ``str()`` of it is for people, ``to_json`` for programs, ``html`` for a browser.
    """

    graphs: tuple[GraphReport, ...]

    @property
    def sites(self) -> int:
        return sum(len(graph.sites) for graph in self.graphs)

    @property
    def fused(self) -> int:
        return sum(graph.fused for graph in self.graphs)

    def __str__(self) -> str:
        graphs = "1 graph" if len(self.graphs) == 1 else f"{len(self.graphs)} graphs"
        head = f"{self.fused} of {self.sites} sites fused in {graphs}"
        return "\n\n".join([head, *map(str, self.graphs)])

    def to_json(self) -> str:
        """One object: ``graphs``, each with its ``sites`` and ``near_misses``."""
        return json.dumps({"graphs": [graph.as_dict() for graph in self.graphs]}, sort_keys=True, ensure_ascii=False)

    def html(self, title: str = "What autofuse does to this model") -> str:
        """One page that needs nothing else; write it into a file, as UTF-8."""
        return html_page(self.graphs, title)


def explain(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Traces ``model`` on these arguments and says of each site whether it would be fused, and why.

    ``model`` is a module or function, or one compiled by ``torch.compile(..., backend="autofuse")``, whose options then
    count. It is traced anew and runs once, eagerly, so that caches among its arguments are written to; no kernel of
    Inductor is compiled, nothing is tuned, no cache is asked, and what was compiled before stays. What nobody measured
    is remembered as by a compilation.

    Example:
        >>> print(explain(torch.nn.Linear(2, 2), torch.ones(1, 2)))  # doctest: +ELLIPSIS
        0 of 0 sites fused in 1 graph
        ...
    """
    plain, wrapper = _unwrapped(model)
    options = dict(getattr(wrapper, "kwargs", {}))
    dynamic = getattr(wrapper, "dynamic", None)

    def backend(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        # A backend of its own, so that Dynamo takes nothing that it compiled before.
        return autofuse(gm, example_inputs, **options)

    extra: dict[str, Any] = (
        {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}
    )
    watch = Watch(stop=True)
    token = watching.set(watch)
    try:
        with torch._dynamo.config.patch(recompile_limit=1 << 16, accumulated_recompile_limit=1 << 16):
            torch.compile(plain, backend=backend, dynamic=dynamic, **extra)(*args, **kwargs)
    finally:
        watching.reset(token)
    return Explanation(tuple(watch.reports))


def _unwrapped(model: Callable[..., Any]) -> tuple[Callable[..., Any], Any]:
    """What was compiled, and with which backend settings; (model, None) if it is not compiled."""
    if isinstance(model, torch._dynamo.OptimizedModule):
        return model._orig_mod, _wrapper(model.dynamo_ctx)
    plain = getattr(model, "_torchdynamo_orig_callable", None)
    if plain is None:
        return model, None
    context = inspect.getclosurevars(model).nonlocals.get("self")
    return plain, _wrapper(context)


def _wrapper(context: Any) -> Any:
    """The object in which torch.compile keeps mode, options and ``dynamic``, below Dynamo's own wrappers."""
    found = getattr(context, "callback", None)
    while found is not None and not hasattr(found, "kwargs"):
        found = getattr(found, "_torchdynamo_orig_backend", None)
    return found
