"""Whether a site is fused: allowed by the settings, possible on this target, and measured to be faster."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from autofuse.cache_db import Captured, Lookup, Snapshot, TunedDatabase, default_path
from autofuse.errors import AutofuseError, DatabaseError, TargetUnavailable, UnsupportedCall
from autofuse.graph.alignment import misalignment
from autofuse.graph.fusions import Fusion, Site
from autofuse.graph.notice import warn_once
from autofuse.graph.recognise.nodes import expression
from autofuse.graph.settings import Settings
from autofuse.ops import FusedOp, get_op
from autofuse.ops.buckets import buckets_serving
from autofuse.ops.problem import Config, Problem
from autofuse.runtime.plan import Plan
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

_MANY_TOKENS = 1 << 20
"""The T for which a config is looked up in its search space: constraints on configs for too few tokens hold there."""

_REMEMBER_TIMEOUT_S = 0.2
"""How long a compilation waits for the database to take a note that it can do without."""

Tuner = Callable[[Problem, tuple[int, ...], torch.device, Path], None]
"""Tunes a problem at some T on a device into a database. Raises AutofuseError."""


@dataclass(frozen=True)
class Decision:
    """What becomes of one site, by which rule, and why. ``plan`` is None where it is left alone.

    ``saved_us``: by how much a call is faster than the baseline, on average over the buckets that serve the site; None
    where nobody measured. ``rewrites``: it is fused without a plan, because no kernel of ours takes part.
    """

    plan: Plan | None
    rule: str
    reason: str
    problem: Problem | None = None
    gain: float | None = None
    gain_low: float | None = None
    saved_us: float | None = None
    rewrites: bool = False

    @property
    def fuses(self) -> bool:
        return self.plan is not None or self.rewrites


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
        if (split := self.settings.split_at(site.operators)) is not None:
            return Decision(None, "split", split)
        if not fusion.op:
            reason = f"{why}; no kernel of ours takes part, so nothing was measured"
            return Decision(None, "flag", reason, rewrites=True)
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
            decision = _if_aligned(op, site, self._by_measurement(op, problem, site, known, known.target))
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
            if (why := _outside_space(op, problem, target.kind, lookup)) is not None:
                return Decision(None, "refused", why, problem)
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
        if self._captured:
            _notebook.write(self.settings.database or default_path(), self._captured)
        self._captured.clear()


class _Notebook:
    """Untuned sites, written into databases. One that would not take them is left alone for the rest of the process:
    no graph waits for it again.
    """

    def __init__(self) -> None:
        self._given_up: set[Path] = set()

    def write(self, path: Path, sites: Iterable[Captured]) -> None:
        """Never raises: there is one warning, and the sites are found again by the next process."""
        if path in self._given_up:
            return
        try:
            with TunedDatabase(path, busy_timeout_s=_REMEMBER_TIMEOUT_S) as database, database.transaction():
                for site in sites:
                    database.record_captured(site)
        except DatabaseError as error:
            self._given_up.add(path)
            warn_once(f"autofuse cannot remember the sites that are still to be tuned: {error}")


_notebook = _Notebook()


def _measured(lookup: Lookup, problem: Problem, target: Target, static: bool) -> Decision:
    worst = min(lookup.winners, key=lambda winner: winner.gain_low)
    plan = None
    if lookup.beats_baseline:
        # One static T runs the first winner; the others only have a say in whether it is faster.
        runs = lookup.winners[:1] if static else lookup.winners
        plan = Plan(target.arch, problem, tuple((winner.tokens, winner.config) for winner in runs))
    saved = statistics.mean(winner.baseline_us - winner.time_us for winner in lookup.winners)
    return Decision(plan, lookup.rule, lookup.reason, problem, worst.gain, worst.gain_low, saved)


def _outside_space(op: FusedOp, problem: Problem, kind: str, lookup: Lookup) -> str | None:
    """Why a winner's config is none that the op has for this problem, as an imported one may be; None if all are."""
    space = op.kernel_source(kind).space
    for winner in lookup.winners:
        if (why := space.refusal(winner.config, problem, _MANY_TOKENS)) is not None:
            return (
                f"the winner at T={winner.tokens}, {winner.config}, is no config of {op.name} for {kind} here: {why}; "
                f"run `autofuse tune --retune --problem '{problem}' --tokens {winner.tokens}`"
            )
    return None


def _if_aligned(op: FusedOp, site: Site, decision: Decision) -> Decision:
    """The decision, unless a kernel of its plan could never run on the site's tensors."""
    if decision.plan is None or (why := misalignment(op, decision.plan, site.tensors())) is None:
        return decision
    return Decision(None, "refused", f"only the op's reference could run here: {why}", decision.problem)


def _default_buckets(op: FusedOp, kind: str, problem: Problem, low: int, high: int) -> tuple[tuple[int, Config], ...]:
    return tuple((bucket, op.default_config(kind, problem, bucket)) for bucket in buckets_serving(low, high))


def describe_tokens(tokens: Any) -> str:
    """``16``, ``2…64`` or ``2…∞``."""
    low, high = token_range(tokens)
    if low == high:
        return str(low)
    return f"{low}…{'∞' if high == ANY_TOKENS else high}"
