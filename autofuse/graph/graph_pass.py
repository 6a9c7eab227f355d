"""The pass itself: recognise, match, decide, rewrite, report."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch._inductor import custom_graph_pass
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph

from autofuse.graph.blocks import Found
from autofuse.graph.compile_tuning import Tuner, tune_in_process
from autofuse.graph.conflicts import Decided, without_conflicts
from autofuse.graph.decide import Decider, Decision, Knowledge, describe_tokens
from autofuse.graph.fakes import fake_mode_of, on_fakes
from autofuse.graph.fusions import FUSIONS, Fusion, Site
from autofuse.graph.notice import logger, warn_once
from autofuse.graph.origin import Origins
from autofuse.graph.recognise import recognise
from autofuse.graph.report import GraphReport, Measured, NearMissReport, SiteReport, count_blocks
from autofuse.graph.settings import PREFIX, Settings
from autofuse.graph.sources import sources_hash
from autofuse.runtime.vllm_context import head_cache_kinds, output_formats

__all__ = ["FusionPass", "StoppedError"]

# PyTorch 2.12 and later tell such passes whether the graph is for inference; a user's pass may want to know.
_AwarePass: Any = getattr(custom_graph_pass, "CustomInferenceAwareGraphPass", CustomGraphPass)


_CANNOT = ("refused", "split", "unsupported")
"""The rules by which a site is left alone whatever was measured."""


class StoppedError(Exception):
    """Ends a compilation whose report is all that is wanted."""


class FusionPass(_AwarePass):
    """Inductor's ``post_grad_custom_post_pass`` for one graph of Dynamo.

    Args:
        settings: the user's.
        known: what is known of each device of the graph.
        origins: where its nodes come from.
        theirs: the user's own passes, which run first.
        key_of: from this pass's identity to the report's key.
        reported: receives a report each time the pass has run: once for a graph without subgraphs or backward.
        ranges: of the graph's symbols, in canonical form.
        tune: what tunes for ``untuned="tune"``; None if nothing is to be tuned.
        stop: raise StoppedError after reporting.

    Attributes:
        cached: whether Inductor may keep the graph in its caches, and take it from there.
    """

    def __init__(
        self,
        settings: Settings,
        known: Mapping[torch.device, Knowledge],
        origins: Origins,
        theirs: Sequence[Callable[..., None]],
        key_of: Callable[[str], str],
        reported: Callable[[GraphReport], None],
        ranges: str = "",
        tune: Tuner | None = tune_in_process,
        stop: bool = False,
    ) -> None:
        self._settings = settings
        self._known = dict(known)
        self._origins = origins
        self._theirs = tuple(theirs)
        self._reported = reported
        self._tune = tune
        self.cached = True
        self._stop = stop
        facts = (f"{device}={fact}" for device, fact in self._known.items())
        # Inductor's own key does not hold the ranges of symbols, on which the choice of buckets depends.
        self.identity = "|".join(["autofuse", sources_hash(), str(settings), ranges, *facts, *_layer_facts()])
        self.key = key_of(self.identity)

    def uuid(self) -> Any | None:
        """Covers all that the pass depends on; None switches Inductor's caches off, as where a user's pass has none."""
        theirs = [one.uuid() if isinstance(one, CustomGraphPass) else None for one in self._theirs]
        return None if not self.cached or not all(theirs) else (self.identity, *theirs)

    def __call__(self, graph: Graph, is_inference: bool = True) -> None:
        for one in self._theirs:
            if _AwarePass is not CustomGraphPass and isinstance(one, _AwarePass):
                one(graph, is_inference)
            else:
                one(graph)
        report = self._run(graph)
        self._reported(report)
        if self._stop:
            raise StoppedError

    def _run(self, graph: Graph) -> GraphReport:
        begin = time.perf_counter()
        decider = Decider(self._settings, dict(self._known), self._tune)
        sites: list[SiteReport] = []
        found, note = Found(), ""
        unmatched: tuple[str, ...] = ()
        mode = None
        try:
            found, mode = recognise(graph), _fake_mode(graph)
            with on_fakes(mode):
                matched = [(fusion, site) for fusion in FUSIONS for site in fusion.match(found)]
            note = self._split_note()
            every = [(fusion, site, decider.decide(fusion, site)) for fusion, site in matched]
            decided, order = without_conflicts(graph, every)
            unmatched = self._unmatched(decided)
            found += Found(near_misses=tuple(miss for f in FUSIONS for miss in f.near_misses(found)))
        except Exception as error:  # a user's compilation must not end for want of a fusion
            note = _failure("leaves a graph as it is", error)
            decided, order = [], []
        self._warn_of_flags(decided)
        # What the reports say of a site is read before the rewrite erases its nodes.
        sites = [self._site_report(site, decision) for _, site, decision in decided]
        near_misses = tuple(self._near_miss_reports(found))
        with on_fakes(mode):
            for index in order:
                fusion, site, decision = decided[index]
                if (why := _rewrite(graph, fusion, site, str(decision.plan or ""))) is not None:
                    left = replace(decision, plan=None, rewrites=False, rule="refused", reason=why)
                    sites[index] = self._site_report(site, left)
        decider.remember_untuned()
        return GraphReport(
            key=self.key,
            settings=str(self._settings),
            sites=tuple(sites),
            near_misses=near_misses,
            pass_seconds=time.perf_counter() - begin - decider.kernel_seconds,
            kernel_seconds=decider.kernel_seconds,
            note=note,
            blocks=count_blocks(found),
            unmatched=unmatched,
        )

    def _unmatched(self, decided: Sequence[Decided]) -> tuple[str, ...]:
        """The fusions that are on and have no site."""
        matched = {(site.fusion, site.op) for _, site, _ in decided}
        on = [f for f in FUSIONS if self._settings.switched_on(f)[0] and (f.name, f.op) not in matched]
        return tuple(f"{fusion.name} ({fusion.op})" for fusion in on)

    def _split_note(self) -> str:
        """Which fusions may find nothing because an operator that they need is between graphs."""
        reasons = {
            f"{fusion.name}: {why}"
            for fusion in FUSIONS
            if (why := self._settings.split_at(fusion.needs)) is not None and self._settings.switched_on(fusion)[0]
        }
        return "; ".join(sorted(reasons))

    def _warn_of_flags(self, decided: Sequence[Decided]) -> None:
        """Who switches a fusion on by hand wants to know that it cannot fire; whether it is faster is another thing."""
        for name in (name for name, on in self._settings.flags if on):
            if all(decision.rule in _CANNOT for fusion, _, decision in decided if fusion.name == name):
                warn_once(
                    f"{PREFIX}{name} is set, but there is a graph in which it can fuse nothing; autofuse.explain says "
                    "what was found there"
                )

    def _site_report(self, site: Site, decision: Decision) -> SiteReport:
        plan, worst = decision.plan, decision.worst
        return SiteReport(
            fusion=site.fusion,
            op=site.op,
            problem=str(decision.problem or ""),
            where=self._origins.module(node for block in site.blocks for node in block.nodes),
            source=self._origins.source([block.output for block in site.blocks]),
            device=str(site.device),
            tokens=describe_tokens(site.tokens),
            fused=decision.fuses,
            plan=plan.name if plan else "",
            plan_text=str(plan or ""),
            rule=decision.rule,
            reason="; ".join(filter(None, (decision.reason, site.note() if decision.fuses else ""))),
            node=str(site.anchor),
            dialect=self._origins.dialect(node for block in site.blocks for node in block.nodes),
            looked_up=str(decision.key or ""),
            nearest=decision.nearest,
            measured=tuple(map(Measured.of, decision.winners)),
            **({"gain": worst.gain, "gain_low": worst.gain_low, "gain_high": worst.gain_high} if worst else {}),
        )

    def _near_miss_reports(self, found: Found) -> list[NearMissReport]:
        return [
            NearMissReport(
                block=miss.block,
                where=self._origins.module([miss.node]),
                source=self._origins.source([miss.node]),
                node=str(miss.node),
                reason=miss.reason,
            )
            for miss in found.near_misses
        ]


def _fake_mode(graph: Graph) -> FakeTensorMode | None:
    """The mode that all fake tensors of ``graph`` belong to."""
    values = (node.meta.get("val") for node in graph.nodes)
    return fake_mode_of(next((value for value in values if isinstance(value, torch.Tensor)), None))


def _layer_facts() -> list[str]:
    """What decisions depend on that only vLLM's layers know."""
    facts = [f"{name}={sorted(groups)}" for name, groups in sorted((output_formats() or {}).items())]
    return facts + [f"{name}={cache}" for name, cache in sorted((head_cache_kinds() or {}).items())]


def _rewrite(graph: Graph, fusion: Fusion, site: Site, plan: str) -> str | None:
    """Rewrites one site; the reason if that is not possible, in which case the graph is as it was."""
    try:
        fusion.rewrite(graph, site, plan)
    except Exception as error:  # as above
        return _failure(f"leaves a site of {site.op} as it is", error)
    return None


def _failure(what: str, error: Exception) -> str:
    text = f"autofuse {what}: {type(error).__name__}: {' '.join(str(error).split())}"
    logger.debug(text, exc_info=error)
    warn_once(text)
    return text
