"""Whether a site is fused: allowed by the settings, possible on this target, and measured to be faster."""

from __future__ import annotations

import statistics
import time
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from autofuse.cache_db import Captured, Lookup, Snapshot, Winner, default_path
from autofuse.cache_db.notebook import notebook
from autofuse.errors import AutofuseError, BadInput, DatabaseError, TargetUnavailable, UnsupportedCall
from autofuse.graph.alignment import Loads, loads_of, misalignment
from autofuse.graph.compile_tuning import Tuner, tune_in_process, tuning_time
from autofuse.graph.evidence import ANY_TOKENS, Evidence, Key, describe_range, read_shared, read_tuned
from autofuse.graph.fusions import Fusion, Site
from autofuse.graph.notice import warn_once
from autofuse.graph.pinned import pinned_database
from autofuse.graph.ranks import Shared, ranks
from autofuse.graph.recognise.nodes import expression
from autofuse.graph.settings import Settings
from autofuse.ops import FusedOp, get_op
from autofuse.ops.buckets import buckets_serving
from autofuse.ops.problem import Config, Problem
from autofuse.runtime.plan import Plan
from autofuse.targets import Target, target_of, toolchain
from autofuse.tuner.budgets import RANK_WAIT_S, STOP_GRACE_S

__all__ = [
    "ANY_TOKENS",
    "Decider",
    "Decision",
    "Knowledge",
    "describe_tokens",
    "token_range",
]

_MANY_TOKENS = 1 << 20
"""The T for which a config is looked up in its search space: constraints on configs for too few tokens hold there."""


@dataclass(frozen=True)
class Decision:
    """What becomes of one site, by which rule, and why.

    Attributes:
        plan: what the fused op runs; None where the site is left alone, or rewritten without a kernel of ours.
        rule: of the lookup, or what else decided: ``default`` (its config, which nobody measured), ``level``,
            ``refused``, ``split``, ``flag`` (nothing to measure), ``unsupported``, ``target``, ``baseline``,
            ``overlap``, ``cycle``.
        reason: the same as a sentence.
        key: what was looked up; None where nothing was.
        winners: what answered, the bucket whose config runs first.
        saved_us: by how much a call is faster than the baseline, on average over the buckets that serve the site; None
            where nobody measured.
        nearest: for a site that nobody measured, the nearest row and what it differs in.
        rewrites: it is fused without a plan, because no kernel of ours takes part.
    """

    plan: Plan | None
    rule: str
    reason: str
    problem: Problem | None = None
    key: Key | None = None
    winners: tuple[Winner, ...] = ()
    saved_us: float | None = None
    nearest: str = ""
    rewrites: bool = False

    @property
    def fuses(self) -> bool:
        return self.plan is not None or self.rewrites

    @property
    def worst(self) -> Winner | None:
        """Of what answered, the bucket that gains least."""
        return min(self.winners, key=lambda winner: winner.gain_low, default=None)


@dataclass(frozen=True)
class Knowledge:
    """What is known of one device: its target and winners, or what keeps us from knowing them.

    ``shared`` is what the ranks agreed on, which the snapshot was made of. None where this process reads its own
    databases.
    """

    target: Target | None
    snapshot: Snapshot | None
    fault: str = ""
    shared: Shared | None = None

    @classmethod
    def of(cls, device: torch.device, settings: Settings) -> Knowledge:
        try:
            target = target_of(device)
        except TargetUnavailable as error:
            return cls(None, None, str(error))
        try:
            if ranks.several and settings.plan is None:
                path = settings.database or default_path()
                found = ranks.read(target, settings.database, lambda: read_shared(path, target))
                return cls(target, None if found.fault else found.snapshot(path, target), found.fault, found)
            if settings.plan is not None:
                return cls(target, Snapshot.load(pinned_database(settings.plan), target, alone=True))
            return cls(target, Snapshot.load(settings.database, target))
        except (BadInput, DatabaseError) as error:
            return cls(target, None, str(error))

    def __str__(self) -> str:
        return f"{self.target}|{self.snapshot.digest if self.snapshot else self.fault}"


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
        tune: measures a problem at some T, for ``untuned="tune"``; None where nothing is to be tuned.
        kernel_seconds: spent so far compiling and tuning kernels.
    """

    settings: Settings
    known: dict[torch.device, Knowledge]
    tune: Tuner | None = tune_in_process
    kernel_seconds: float = 0.0
    _evidence: Evidence = field(init=False)
    _compiled: set[tuple[Problem, Config]] = field(default_factory=set)
    _captured: dict[Captured, None] = field(default_factory=dict)
    # What all layers of a model share.
    _problems: dict[Hashable, Problem] = field(default_factory=dict)
    _loads: dict[Plan, Loads] = field(default_factory=dict)

    def __post_init__(self) -> None:
        snapshots = (known.snapshot for known in self.known.values() if known.snapshot is not None)
        paths = dict.fromkeys(layer.path for snapshot in snapshots for layer in snapshot.layers())
        self._evidence = Evidence([*paths])

    @property
    def _database(self) -> Path:
        return self.settings.database or default_path()

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
            problem = self._problem(op, site)
        except UnsupportedCall as error:
            return Decision(None, "unsupported", str(error))
        known = self.known.get(site.device)
        if known is None:
            return Decision(None, "target", f"no input of the graph is on {site.device}", problem)
        if known.target is None:
            warn_once(f"autofuse leaves the graphs on {site.device} as they are: {known.fault}")
            return Decision(None, "target", known.fault, problem)
        try:
            decision = self._if_aligned(op, site, self._by_measurement(op, problem, site, known, known.target))
            return self._with_kernels(op, decision, known.target)
        except AutofuseError as error:
            warn_once(f"autofuse leaves {site.op} unfused: {error}")
            return Decision(None, "target", str(error), problem)

    def _problem(self, op: FusedOp, site: Site) -> Problem:
        """Raises UnsupportedCall."""
        key = (op.name, *site.problem_params().items())
        if key not in self._problems:
            self._problems[key] = op.make_problem(**site.problem_params())
        return self._problems[key]

    def _if_aligned(self, op: FusedOp, site: Site, decision: Decision) -> Decision:
        """The decision, unless a kernel of its plan could never run on the site's tensors."""
        plan = decision.plan
        if plan is None:
            return decision
        if plan not in self._loads:
            self._loads[plan] = loads_of(op, plan)
        if (why := misalignment(op, self._loads[plan], site.tensors())) is None:
            return decision
        return replace(decision, plan=None, rule="refused", reason=f"only the op's reference could run here: {why}")

    def _by_measurement(self, op: FusedOp, problem: Problem, site: Site, known: Knowledge, target: Target) -> Decision:
        key = Key(target, problem, *token_range(site.tokens), op.source_hashes(target.kind))
        lookup = self._lookup(known, key)
        if not lookup.winners and self.settings.untuned == "tune":
            lookup = self._tuned(key, site.device, lookup)
        if lookup.winners:
            return self._measured(op, key, lookup, self.known[site.device])
        decision = Decision(None, lookup.rule, lookup.reason, problem, key)
        if self.settings.untuned == "fuse":
            return self._unmeasured(op, key, lookup, decision)
        if known.snapshot is not None:
            self._captured[key.captured] = None
        reason = "; ".join(filter(None, (lookup.reason, self._evidence.failures(key))))
        return replace(decision, reason=reason, nearest=self._evidence.nearest(key))

    def _unmeasured(self, op: FusedOp, key: Key, lookup: Lookup, decision: Decision) -> Decision:
        """What runs where nobody measured and the user wants it fused all the same: what runs on another GPU of the
        same arch, else the default config. Nothing that is known to fail here, or is no config of the op.
        """
        static = key.tokens_low == key.tokens_high
        lent = tuple((w.tokens, w.config) for w in (lookup.elsewhere[:1] if static else lookup.elsewhere))
        default = _default_buckets(op, key.target.kind, key.problem, key.tokens_low, key.tokens_high)
        reasons = [lookup.reason]
        for rule, buckets in (("same_arch", lent), ("default", default)):
            if not buckets:
                continue
            if (why := self._unfit(op, key, buckets)) is None:
                plan = _plan(op, key, buckets)
                whose = "its config" if rule == "same_arch" else "default config"
                reason = "; ".join([*reasons, f"autofuse.untuned is 'fuse': {whose}"])
                return replace(decision, plan=plan, rule=rule, reason=reason)
            reasons.append(why)
        return replace(decision, rule="refused", reason="; ".join(reasons))

    def _unfit(self, op: FusedOp, key: Key, buckets: Iterable[tuple[int, Config]]) -> str | None:
        """Why one of the configs must not run here; None if all may."""
        for _, config in buckets:
            space = op.kernel_source(key.target.kind, config).space
            if (why := space.refusal(config, key.problem, _MANY_TOKENS)) is not None:
                return f"{config} is no config of {op.name} for {key.target.kind} here: {why}"
            if (trial := self._evidence.failed(key, config)) is not None:
                return f"{config} fails here ({trial.status} at T={trial.tokens})"
        return None

    def _measured(self, op: FusedOp, key: Key, lookup: Lookup, known: Knowledge) -> Decision:
        """By what was measured: whether every T that the site may be called with is served by something faster."""
        saved = statistics.mean(winner.baseline_us - winner.time_us for winner in lookup.winners)
        decision = Decision(None, lookup.rule, lookup.reason, key.problem, key, lookup.winners, saved)
        if (why := _outside_space(op, key.problem, key.target.kind, lookup)) is not None:
            return replace(decision, rule="refused", reason=why)
        if (doubtful := self._only_eager(lookup, known)) is not None:
            why = (
                f"at T={doubtful.tokens} it was compared with eager PyTorch alone, and the code that Inductor would "
                f"generate was not measured: run `autofuse tune --retune --problem '{key.problem}' --tokens "
                f"{doubtful.tokens}` where torch.compile works"
            )
            return replace(decision, rule="baseline", reason=why)
        static = key.tokens_low == key.tokens_high
        buckets = _static_bucket(lookup) if static else _range_buckets(op, lookup)
        if buckets is None:
            return decision
        unfused = ", ".join(f"T={tokens}" for tokens, config in buckets if config is None)
        reason = f"{lookup.reason}; unfused where it is not faster: {unfused}" if unfused else lookup.reason
        return replace(decision, plan=_plan(op, key, buckets), reason=reason)

    def _only_eager(self, lookup: Lookup, known: Knowledge) -> Winner | None:
        assert known.snapshot is not None, "winners are of a snapshot"
        layer = next(islice(known.snapshot.layers(), lookup.layer, None))
        compared = None if known.shared is None else known.shared.layers[lookup.layer].compared
        return self._evidence.only_eager(lookup.winners, layer.path, compared)

    def _lookup(self, known: Knowledge, key: Key) -> Lookup:
        if known.snapshot is None:
            warn_once(f"autofuse cannot read what was tuned: {known.fault}")
            return Lookup("untuned", (), known.fault)
        return known.snapshot.lookup(key.problem, key.tokens_low, key.tokens_high, *key.source_hashes)

    def _tuned(self, key: Key, device: torch.device, before: Lookup) -> Lookup:
        """Measures what was not measured, if there is time left for it, and looks again."""
        if self.tune is None:
            return replace(before, reason=f"{before.reason}; autofuse.untuned is 'tune': it is tuned while compiling")
        begin = time.perf_counter()
        why = self._tune(self.tune, key, device)
        self.kernel_seconds += time.perf_counter() - begin
        self.known[device] = known = Knowledge.of(device, self.settings)
        after = self._lookup(known, key)
        if after.winners:
            return after
        return replace(after, reason=f"{after.reason}; {why or 'tuning while compiling found nothing in its time'}")

    def _tune(self, tune: Tuner, key: Key, device: torch.device) -> str:
        """Tunes, or waits for the rank that does. Returns why nothing came of it, "" if something did."""
        budget_s = self.settings.tune_budget

        def here() -> str:
            return tuning_time.tune(
                tune, key.problem, key.tokens_low, key.tokens_high, device, self._database, budget_s
            )

        if not ranks.several:
            return here()

        def work() -> Shared:
            if why := here():
                return Shared(fault=why)
            return read_tuned(self._database, key.target, key.problem)

        wait_s = budget_s + STOP_GRACE_S + RANK_WAIT_S
        return ranks.tune(key.target, self.settings.database, str(key), wait_s, work)

    def _with_kernels(self, op: FusedOp, decision: Decision, target: Target) -> Decision:
        """Compiles the plan's kernels (or finds them compiled): what cannot be compiled must not be fused."""
        if decision.plan is None:
            return decision
        begin = time.perf_counter()
        try:
            for _, config in decision.plan.buckets:
                if config is not None and (decision.plan.problem, config) not in self._compiled:
                    toolchain(target.kind).compile(op.spec(target.kind, decision.plan.problem, config), target.arch)
                    self._compiled.add((decision.plan.problem, config))
        finally:
            self.kernel_seconds += time.perf_counter() - begin
        return decision

    def remember_untuned(self) -> None:
        """Writes the sites that nobody measured into the database, for ``autofuse tune --captured``; with a plan, which
        is to stay as it is, there is nothing to measure.
        """
        wanted = self._captured and self.settings.plan is None
        if wanted and (why := notebook.write(self._database, self._captured)):
            warn_once(why)
        self._captured.clear()


def _plan(op: FusedOp, key: Key, buckets: tuple[tuple[int, Config | None], ...]) -> Plan:
    source = op.plan_source(key.target.kind, (config for _, config in buckets))
    return Plan(key.target.arch, key.problem, buckets, source)


def _static_bucket(lookup: Lookup) -> tuple[tuple[int, Config | None], ...] | None:
    """What one static T runs: the first winner. The others only have a say in whether it is faster."""
    if not lookup.beats_baseline:
        return None
    return ((lookup.winners[0].tokens, lookup.winners[0].config),)


def _range_buckets(op: FusedOp, lookup: Lookup) -> tuple[tuple[int, Config | None], ...] | None:
    """What a range of T runs; None if some T would be slower than without the fusion, or none faster.

    A bucket that is not faster may run unfused where nothing is lost by that: where the op's reference, run eagerly, is
    the fastest that was measured, Inductor's code included.
    """
    eager = type(op).unfused is FusedOp.unfused  # else what was measured is not what a plan would run
    if not any(winner.beats_baseline for winner in lookup.winners):
        return None
    if not all(winner.beats_baseline or (eager and winner.baseline == "eager") for winner in lookup.winners):
        return None
    return tuple((winner.tokens, winner.config if winner.beats_baseline else None) for winner in lookup.winners)


def _outside_space(op: FusedOp, problem: Problem, kind: str, lookup: Lookup) -> str | None:
    """Why a winner's config is none that the op has for this problem, as an imported one may be; None if all are."""
    for winner in lookup.winners:
        space = op.kernel_source(kind, winner.config).space
        if (why := space.refusal(winner.config, problem, _MANY_TOKENS)) is not None:
            return (
                f"the winner at T={winner.tokens}, {winner.config}, is no config of {op.name} for {kind} here: {why}; "
                f"run `autofuse tune --retune --problem '{problem}' --tokens {winner.tokens}`"
            )
    return None


def _default_buckets(op: FusedOp, kind: str, problem: Problem, low: int, high: int) -> tuple[tuple[int, Config], ...]:
    return tuple((bucket, op.default_config(kind, problem, bucket)) for bucket in buckets_serving(low, high))


def describe_tokens(tokens: Any) -> str:
    """``16``, ``2…64`` or ``2…∞``."""
    return describe_range(*token_range(tokens))
