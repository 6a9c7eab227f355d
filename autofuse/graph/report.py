"""What was found in a compiled graph, what became of it, and why."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypeVar

from autofuse.cache_db import Winner
from autofuse.graph.blocks import Found

__all__ = ["VERDICTS", "GraphReport", "Measured", "NearMissReport", "SiteReport", "count_blocks"]

VERDICTS: Mapping[str, str] = {
    "fused": "fused",
    "slower": "tuned, but not faster",
    "untuned": "not tuned",
    "stale": "tuned with another version of its kernel",
    "baseline": "tuned, but never compared with Inductor's code",
    "off": "switched off",
    "refused": "refused",
    "split": "an operator of it splits the graph",
    "unsupported": "no kernel computes it",
    "target": "no kernel runs here",
    "overlap": "another fusion takes its nodes",
    "cycle": "it and other fusions need each other's results",
}
"""What becomes of a site, in a word and in a few. Something that is no site at all is a near miss."""

_VERDICT_OF_RULE = {
    **dict.fromkeys(("exact", "between", "nearest", "range"), "slower"),
    **dict.fromkeys(("candidate", "same_arch"), "untuned"),
    "level": "off",
}

_T = TypeVar("_T")


@dataclass(frozen=True)
class Measured:
    """One bucket that answered for a site; times in µs.

    Attributes:
        tokens: the T that was tuned.
        config: the winner's.
        time_us, spread_us: its median time, and the interquartile range.
        baseline: the fastest unfused code, ``eager``, ``compile`` or ``graph``.
        baseline_us: its median time.
        gain: baseline ÷ time, the median of interleaved rounds.
        gain_low, gain_high: its 95 % interval.
    """

    tokens: int
    config: str
    time_us: float
    spread_us: float
    baseline: str
    baseline_us: float
    gain: float
    gain_low: float
    gain_high: float

    @classmethod
    def of(cls, winner: Winner) -> Measured:
        values = {field.name: getattr(winner, field.name) for field in fields(cls)}
        return cls(**{**values, "config": str(winner.config)})

    def __str__(self) -> str:
        return (
            f"T={self.tokens}: {self.time_us:.2f} ± {self.spread_us / 2:.2f} µs against {self.baseline_us:.2f} µs "
            f"({self.baseline}), {self.gain:.2f}×, 95 % in [{self.gain_low:.2f}, {self.gain_high:.2f}]; {self.config}"
        )


@dataclass(frozen=True)
class SiteReport:
    """One site.

    Attributes:
        fusion: the fusion that matched, e.g. ``fuse_mla_dual_rms_norm``.
        op: the fused op.
        problem: in canonical form; "" where there is none.
        where: the module, e.g. ``model.layers.0.self_attn``; "" if unknown.
        source: the line of the model's source that made it; "" if unknown.
        device: e.g. ``cuda:0``.
        tokens: T, ``16`` or ``2…∞``.
        fused: whether the fused op runs.
        plan: the plan's name, "" if it is left alone, or if no kernel of ours takes part.
        plan_text: the whole plan.
        rule: by which rule the database answered, or which other thing decided: ``level``, ``refused``, ``target``, …
        reason: why, as a sentence.
        node: the node of the graph that stands for it.
        dialect: what it is written in: ``plain PyTorch``, or the names of the operators.
        looked_up: what the database was asked for; "" if it was not asked.
        nearest: where it has no answer, the nearest row and what that differs in.
        measured: the buckets that answered, the one whose config runs first.
        gain: how many times faster than the baseline, the least of the buckets that serve the site; None if unknown.
        gain_low, gain_high: that gain's 95 % interval.
    """

    fusion: str
    op: str
    problem: str
    where: str
    source: str
    device: str
    tokens: str
    fused: bool
    plan: str
    plan_text: str
    rule: str
    reason: str
    node: str = ""
    dialect: str = ""
    looked_up: str = ""
    nearest: str = ""
    measured: tuple[Measured, ...] = ()
    gain: float | None = None
    gain_low: float | None = None
    gain_high: float | None = None

    @property
    def verdict(self) -> str:
        """One of ``VERDICTS``."""
        return "fused" if self.fused else _VERDICT_OF_RULE.get(self.rule, self.rule)

    @property
    def place(self) -> str:
        return self.where or self.source or self.node or "somewhere"

    def __str__(self) -> str:
        fused = f"fused, plan {self.plan}" if self.plan else "fused"
        verdict = fused if self.fused else f"left alone, {VERDICTS[self.verdict]}"
        lines = [f"{self.place}: {self.op} {verdict}"]
        origin = [f"at {self.source}"] if self.where and self.source else []
        origin += [f"node {self.node}"] if self.node else []
        origin += [f"written as {self.dialect}"] if self.dialect else []
        if origin:
            lines.append(f"  {', '.join(origin)}")
        lines.append(f"  {self.problem or 'no problem'}, T={self.tokens}, on {self.device}")
        lines.append(f"  {self.rule}: {self.reason}")
        if self.looked_up:
            lines.append(f"  looked up: {self.looked_up}")
        lines += [f"  {self.nearest}"] if self.nearest else []
        lines += [f"  measured at {each}" for each in self.measured]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict}


@dataclass(frozen=True)
class NearMissReport:
    """Something that looked like a building block and is none: what, where, at which node, and what is off."""

    block: str
    where: str
    source: str
    node: str
    reason: str

    @property
    def place(self) -> str:
        return self.where or self.source or self.node

    def __str__(self) -> str:
        at = f", at {self.source}" if self.where and self.source else ""
        return f"{self.place}: near miss, no {self.block}: {self.reason} (node {self.node}{at})"


@dataclass(frozen=True)
class GraphReport:
    """All that the passes have to say of one graph that Dynamo handed over.

    Attributes:
        key: stands for the graph and everything the passes depended on.
        settings: in canonical form.
        sites, near_misses: in graph order.
        blocks: (building block, how many of it were recognised).
        unmatched: the fusions that are on and matched nothing in this graph.
        pass_seconds: spent to recognise, match, decide and rewrite.
        kernel_seconds: spent compiling kernels, or tuning them.
        from_cache: Inductor had the compiled graph in its cache; the rest is as when it was compiled.
        note: what keeps this report from being complete; "" if nothing does.
    """

    key: str
    settings: str
    sites: tuple[SiteReport, ...] = ()
    near_misses: tuple[NearMissReport, ...] = ()
    pass_seconds: float = 0.0
    kernel_seconds: float = 0.0
    from_cache: bool = False
    note: str = ""
    blocks: tuple[tuple[str, int], ...] = ()
    unmatched: tuple[str, ...] = ()

    @property
    def fused(self) -> int:
        """How many sites run the fused op."""
        return sum(site.fused for site in self.sites)

    @property
    def summary(self) -> str:
        """What became of the sites, e.g. ``2 of 3 sites fused, 1 not tuned; 1 near miss``."""
        counts = Counter(site.verdict for site in self.sites if not site.fused)
        left = "".join(f", {counts[verdict]} {words}" for verdict, words in VERDICTS.items() if counts[verdict])
        misses = len(self.near_misses)
        missed = f"; {misses} near miss{'es' if misses > 1 else ''}" if misses else ""
        return f"{self.fused} of {len(self.sites)} sites fused{left}{missed}"

    @property
    def recognised(self) -> str:
        """The building blocks, and the fusions that are on but have no site."""
        blocks = ", ".join(f"{count} {name}" for name, count in self.blocks) or "no building block"
        return f"recognised: {blocks}; matched nothing: {', '.join(self.unmatched) or 'no fusion that is on'}"

    def __add__(self, other: GraphReport) -> GraphReport:
        """Both of two passes over parts of one graph (subgraphs, forward and backward)."""
        counts = Counter(dict(self.blocks))
        counts.update(dict(other.blocks))
        return replace(
            self,
            sites=self.sites + other.sites,
            near_misses=self.near_misses + other.near_misses,
            pass_seconds=self.pass_seconds + other.pass_seconds,
            kernel_seconds=self.kernel_seconds + other.kernel_seconds,
            note="; ".join(filter(None, (self.note, other.note))),
            blocks=tuple(sorted(counts.items())),
            unmatched=tuple(name for name in self.unmatched if name in other.unmatched),
        )

    def __str__(self) -> str:
        cached = ", compiled earlier and taken from Inductor's cache" if self.from_cache else ""
        head = (
            f"graph {self.key[:10]} ({self.settings}): {self.summary}; "
            f"{self.pass_seconds * 1e3:.1f} ms in the pass, {self.kernel_seconds:.1f} s for kernels{cached}"
        )
        lines = [head, *([f"note: {self.note}"] if self.note else []), *map(str, self.sites)]
        return "\n".join([*lines, *map(str, self.near_misses), self.recognised])

    def as_dict(self) -> dict[str, Any]:
        """For programs: every field, and of each site its verdict."""
        return {**asdict(self), "sites": [site.as_dict() for site in self.sites]}

    def to_json(self) -> str:
        """Canonical: sorted keys, no spaces. Whether it came from a cache is no part of it."""
        content = self.as_dict()
        del content["from_cache"]
        return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> GraphReport:
        """Reads ``to_json`` back, as a report from the cache. Raises ValueError."""
        try:
            content = json.loads(text)
            report = _from(cls, {**content, "from_cache": True})
            return replace(
                report,
                sites=tuple(
                    _from(SiteReport, {**site, "measured": tuple(Measured(**each) for each in site["measured"])})
                    for site in content["sites"]
                ),
                near_misses=tuple(_from(NearMissReport, miss) for miss in content["near_misses"]),
                blocks=tuple((name, count) for name, count in content["blocks"]),
                unmatched=tuple(content["unmatched"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"not a graph report: {error}") from None


def count_blocks(found: Found) -> tuple[tuple[str, int], ...]:
    """(building block, how many of it were recognised), by name."""
    counts = Counter(type(block).__name__.removesuffix("Block") for block in found.blocks)
    return tuple(sorted(counts.items()))


def _from(kind: type[_T], content: Mapping[str, Any]) -> _T:
    """A dataclass from those of the content's values that are its fields, all of which must be there."""
    return kind(**{field.name: content[field.name] for field in fields(kind)})  # type: ignore[arg-type]
