"""The backend of ``torch.compile(model, backend="autofuse")``: Inductor, with our pass in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._inductor import config as inductor_config
from torch.fx import GraphModule

from autofuse.errors import BadInput
from autofuse.graph.compile_tuning import tune_in_process
from autofuse.graph.decide import Knowledge
from autofuse.graph.graph_pass import FusionPass
from autofuse.graph.origin import Origins
from autofuse.graph.report import GraphReport
from autofuse.graph.report_store import report_key, store, symbol_ranges
from autofuse.graph.settings import Settings, hint_for
from autofuse.graph.specialise import specialise_eps
from autofuse.runtime import layer_ops
from autofuse.runtime.dispatch import registry

__all__ = ["Watch", "autofuse", "watching"]

_PASS = "post_grad_custom_post_pass"


@dataclass
class Watch:
    """Somebody who wants the reports of what is compiled in a context, and perhaps nothing but them.

    Attributes:
        reports: of the graphs so far.
        stop: end each compilation after the pass; the graph then runs eagerly.
    """

    stop: bool = False
    reports: list[GraphReport] = field(default_factory=list)


watching: ContextVar[Watch | None] = ContextVar("autofuse_watching", default=None)


def autofuse(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compiles a graph of Dynamo by Inductor, with the fusions that the database shows to be faster.

    Args:
        mode: as of ``torch.compile``.
        options: those that begin with ``autofuse.`` are ours (see ``Settings``), all others Inductor's.

    Raises: BadInput for an unknown option, before anything is compiled. Nothing else that may be wrong with autofuse,
    its database or the machine's compilers ends a compilation: there is one warning, and the graph runs unfused.

    Example:
        >>> torch.compile(torch.nn.Linear(2, 2), backend="autofuse", options={"autofuse.level": "O1"})
        OptimizedModule(
          (_orig_mod): Linear(in_features=2, out_features=2, bias=True)
        )
    """
    from torch._inductor.compile_fx import compile_fx

    settings, others = Settings.parse(options)
    patches = _inductor_options(mode, {**settings.inductor_options, **others})
    layer_ops.define()
    specialise_eps(gm.graph)
    watch = watching.get()
    stop = watch is not None and watch.stop
    collected = _Collected()
    ours = FusionPass(
        settings=settings,
        known={device: Knowledge.of(device, settings) for device in _devices(example_inputs)},
        origins=Origins.of_dynamo_graph(gm.graph),
        theirs=_passes(patches.pop(_PASS, getattr(inductor_config, _PASS))),
        key_of=lambda identity: report_key(gm, example_inputs, identity),
        reported=collected.add,
        ranges=symbol_ranges(example_inputs),
        tune=None if stop else tune_in_process,
        stop=stop,
    )
    # What is only looked at is decided anew. What a budget of time left untuned is tried again.
    ours.cached = not stop and not (settings.untuned == "tune" and _left_untuned(ours.key))
    compiled: Any
    try:
        compiled = compile_fx(gm, example_inputs, config_patches={**patches, _PASS: ours})
    except Exception:
        if not stop or collected.report is None:
            raise
        compiled = gm.forward
    collected.finish(ours.key, settings)
    if collected.report is not None and collected.report.fused:
        registry.go_native()
    if watch is not None:
        watch.reports.append(collected.report or GraphReport(ours.key, str(settings)))
    return compiled


def _reset() -> None:
    """What ``torch.compiler.reset`` does for Inductor, asked of us as well: CUDA graphs are let go."""
    if torch.cuda.is_available():
        from torch._inductor.cudagraph_trees import reset_cudagraph_trees

        reset_cudagraph_trees()


autofuse.reset = _reset  # type: ignore[attr-defined]


@dataclass
class _Collected:
    """The report of one graph, as its passes run; a backward may be compiled long after the forward."""

    report: GraphReport | None = None

    def add(self, report: GraphReport) -> None:
        self.report = report if self.report is None else self.report + report
        self._keep(self.report)

    def finish(self, key: str, settings: Settings) -> None:
        """After compiling: if no pass ran, Inductor had the graph in its cache, and the report is kept with us."""
        if self.report is None:
            kept = store.load(key)
            lost = "compiled earlier, and its report is not kept any more; autofuse.explain(model, *inputs) makes one"
            self.report = kept or GraphReport(key, str(settings), from_cache=True, note=lost)
            store.remember(self.report)

    @staticmethod
    def _keep(report: GraphReport) -> None:
        store.remember(report)
        store.save(report)


def _left_untuned(key: str) -> bool:
    """Whether the graph was compiled before and has sites that nobody had measured."""
    kept = store.load(key)
    return kept is not None and any(site.verdict in ("untuned", "stale") for site in kept.sites)


def _devices(example_inputs: Sequence[Any]) -> list[torch.device]:
    devices = {value.device for value in example_inputs if isinstance(value, torch.Tensor)}
    return sorted((device for device in devices if device.type != "meta"), key=str)


def _inductor_options(mode: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """Inductor's settings for a mode and a user's options. Raises BadInput for an option that Inductor lacks."""
    patches: dict[str, Any] = {}
    if mode is not None and mode != "default":
        from torch._inductor import list_mode_options

        patches.update(list_mode_options(mode))
    known = inductor_config.get_config_copy()
    for key, value in options.items():
        name = key.replace("-", "_")
        if name not in known:
            raise BadInput(f"unknown option {key}: {hint_for(key)}")
        patches[name] = value
    return patches


def _passes(configured: Any) -> list[Callable[..., None]]:
    if configured is None:
        return []
    return list(configured) if isinstance(configured, (list, tuple)) else [configured]
