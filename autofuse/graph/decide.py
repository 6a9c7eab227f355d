"""Whether a site is fused: allowed by the settings, possible on this target, and measured to be faster."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from autofuse.cache_db import Captured, Lookup, Snapshot, TunedDatabase, default_path
from autofuse.errors import AutofuseError, DatabaseError, TargetUnavailable, UnsupportedCall
from autofuse.graph.fusions import Fusion, Site
from autofuse.graph.notice import warn_once
from autofuse.graph.recognise.nodes import expression
from autofuse.graph.settings import Settings
from autofuse.ops import FusedOp, get_op
from autofuse.ops.problem import Config, Problem
from autofuse.runtime.plan import Plan, buckets_serving
from autofuse.targets import Target, target_of, toolchain

__all__ = [
    "ANY_TOKENS",
    "Decider",
    "Decision",
    "Knowledge",
    "Tuner",
    "describe_tokens",
    "token_range",
]

ANY_TOKENS = 1 << 31
"""The most tokens a call is taken to have where its graph sets no bound."""

Tuner = Callable[[Problem, tuple[int, ...], torch.device, Path], None]
"""Tunes a problem at some T on a device into a database. Raises AutofuseError."""


@dataclass(frozen=True)
class Decision:
    """What becomes of one site, by which rule, and why. ``plan`` is None where it is left alone."""

    plan: Plan | None
    rule: str
    reason: str
    problem: Problem | None = None
    gain: float | None = None
    gain_low: float | None = None


@dataclass(frozen=True)
class Knowledge:
    """What is known of one device: its target and winners, or what keeps us from knowing them."""

    target: Target | None
    snapshot: Snapshot | None
    fault: str = ""

    @classmethod
    def of(cls, device: torch.device, settings: Settings) -> Knowledge:
        try:
            target = target_of(device)
        except TargetUnavailable as error:
            return cls(None, None, str(error))
        try:
            return cls(target, Snapshot.load(settings.database, target))
        except DatabaseError as error:
            return cls(target, None, str(error))

    def __str__(self) -> str:
        return f"{self.target}|{self.snapshot.digest if self.snapshot else self.fault}"


def _tune_site(problem: Problem, tokens: tuple[int, ...], device: torch.device, database: Path) -> None:
    from autofuse.tuner.api import tune_site  # here: without it, whoever compiles a tuned model needs no optuna

    tune_site(problem, tokens, device, database)


def token_range(tokens: int | torch.SymInt) -> tuple[int, int]:
    """(lowest, highest) T that a graph may be called with; equal if T is static."""
    expr = expression(tokens)
    if isinstance(expr, int):
        return expr, expr
    assert isinstance(tokens, torch.SymInt)
    bounds = tokens.node.shape_env.bound_sympy(expr)
    low = min(max(_whole(bounds.lower, 0), 0), ANY_TOKENS)
    return low, max(low, min(_whole(bounds.upper, ANY_TOKENS), ANY_TOKENS))


def _whole(bound: Any, otherwise: int) -> int:
    """A bound of sympy's as an integer; ``otherwise`` if it is infinite."""
    return int(bound) if isinstance(bound, int) or getattr(bound, "is_Integer", False) else otherwise


@dataclass
class Decider:
    """Decides the sites of one graph.

    Attributes:
        settings: the user's.
        known: what is known of each device of the graph.
        tune: measures a problem at some T; for ``untuned="tune"``.
        kernel_seconds: spent so far compiling and tuning kernels.
    """

    settings: Settings
    known: dict[torch.device, Knowledge]
    tune: Tuner = _tune_site
    kernel_seconds: float = 0.0
    _tried: set[tuple[Problem, torch.device, int, int]] = field(default_factory=set)
    _compiled: set[tuple[Problem, Config]] = field(default_factory=set)
    _captured: dict[Captured, None] = field(default_factory=dict)

    def decide(self, fusion: Fusion, site: Site) -> Decision:
        """Never raises for what may be wrong with a machine: it leaves the site alone and says why."""
        on, why = self.settings.switched_on(fusion)
        if not on:
            return Decision(None, "level", why)
        if site.refusal is not None:
            return Decision(None, "refused", site.refusal)
        op = get_op(site.op)
        try:
            problem = op.make_problem(**site.problem_params())
        except UnsupportedCall as error:
            return Decision(None, "unsupported", str(error))
        known = self.known.get(site.device)
        if known is None:
            return Decision(None, "target", f"no input of the graph is on {site.device}", problem)
        if known.target is None:
            warn_once(f"autofuse leaves the graphs on {site.device} as they are: {known.fault}")
            return Decision(None, "target", known.fault, problem)
        try:
            decision = self._by_measurement(op, problem, site, known, known.target)
            return self._with_kernels(op, decision, known.target)
        except AutofuseError as error:
            warn_once(f"autofuse leaves {site.op} unfused: {error}")
            return Decision(None, "target", str(error), problem)

    def _by_measurement(self, op: FusedOp, problem: Problem, site: Site, known: Knowledge, target: Target) -> Decision:
        low, high = token_range(site.tokens)
        lookup = self._lookup(op, problem, known, target, low, high)
        if not lookup.winners and self.settings.untuned == "tune":
            known = self._tuned(problem, site.device, known, low, high)
            lookup = self._lookup(op, problem, known, target, low, high)
        if lookup.winners:
            return _measured(lookup, problem, target, low == high)
        if self.settings.untuned == "fuse":
            plan = Plan(target.arch, problem, _default_buckets(op, target.kind, problem, low, high))
            return Decision(plan, lookup.rule, f"{lookup.reason}; autofuse.untuned is 'fuse': default config", problem)
        if known.snapshot is not None:
            self._captured[Captured(target, problem, low, high)] = None
        return Decision(None, lookup.rule, lookup.reason, problem)

    def _lookup(self, op: FusedOp, problem: Problem, known: Knowledge, target: Target, low: int, high: int) -> Lookup:
        if known.snapshot is None:
            warn_once(f"autofuse cannot read what was tuned: {known.fault}")
            return Lookup("untuned", (), known.fault)
        return known.snapshot.lookup(problem, low, high, op.source_hash(target.kind))

    def _tuned(self, problem: Problem, device: torch.device, known: Knowledge, low: int, high: int) -> Knowledge:
        """Measures a problem, once however many sites of the graph have it, and reads the database again."""
        if (problem, device, low, high) in self._tried:
            return known
        self._tried.add((problem, device, low, high))
        begin = time.perf_counter()
        try:
            self.tune(problem, buckets_serving(low, high), device, self.settings.database or default_path())
        except AutofuseError as error:
            warn_once(f"autofuse could not tune {problem}: {error}")
        self.kernel_seconds += time.perf_counter() - begin
        self.known[device] = Knowledge.of(device, self.settings)
        return self.known[device]

    def _with_kernels(self, op: FusedOp, decision: Decision, target: Target) -> Decision:
        """Compiles the plan's kernels (or finds them compiled): what cannot be compiled must not be fused."""
        if decision.plan is None:
            return decision
        begin = time.perf_counter()
        try:
            for _, config in decision.plan.buckets:
                if (decision.plan.problem, config) not in self._compiled:
                    toolchain(target.kind).compile(op.spec(target.kind, decision.plan.problem, config), target.arch)
                    self._compiled.add((decision.plan.problem, config))
        finally:
            self.kernel_seconds += time.perf_counter() - begin
        return decision

    def remember_untuned(self) -> None:
        """Writes the sites that nobody measured into the database, for ``autofuse tune --captured``."""
        if not self._captured:
            return
        try:
            with TunedDatabase(self.settings.database or default_path()) as database:
                for site in self._captured:
                    database.record_captured(site)
        except DatabaseError as error:
            warn_once(f"autofuse cannot remember the sites that are still to be tuned: {error}")
        self._captured.clear()


def _measured(lookup: Lookup, problem: Problem, target: Target, static: bool) -> Decision:
    worst = min(lookup.winners, key=lambda winner: winner.gain_low)
    plan = None
    if lookup.beats_baseline:
        # One static T runs the first winner; the others only have a say in whether it is faster.
        runs = lookup.winners[:1] if static else lookup.winners
        plan = Plan(target.arch, problem, tuple((winner.tokens, winner.config) for winner in runs))
    return Decision(plan, lookup.rule, lookup.reason, problem, worst.gain, worst.gain_low)


def _default_buckets(op: FusedOp, kind: str, problem: Problem, low: int, high: int) -> tuple[tuple[int, Config], ...]:
    return tuple((bucket, op.default_config(kind, problem, bucket)) for bucket in buckets_serving(low, high))


def describe_tokens(tokens: Any) -> str:
    """``16``, ``2…64`` or ``2…∞``."""
    low, high = token_range(tokens)
    if low == high:
        return str(low)
    return f"{low}…{'∞' if high == ANY_TOKENS else high}"
