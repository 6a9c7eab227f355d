"""What was found in a compiled graph, what became of it, and why."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

__all__ = ["GraphReport", "NearMissReport", "SiteReport"]


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
        gain: how many times faster than the baseline, the least of the buckets that serve the site; None if unknown.
        gain_low: the lower end of that gain's 95 % interval.
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
    gain: float | None = None
    gain_low: float | None = None

    def __str__(self) -> str:
        verdict = ("fused" + (f", plan {self.plan}" if self.plan else "")) if self.fused else "left alone"
        place = self.where or self.source or "somewhere"
        lines = [f"{place}: {self.op} {verdict}"]
        if self.where and self.source:
            lines.append(f"  at {self.source}")
        lines.append(f"  {self.problem or 'no problem'}, T={self.tokens}, on {self.device}")
        lines.append(f"  {self.rule}: {self.reason}")
        return "\n".join(lines)


@dataclass(frozen=True)
class NearMissReport:
    """Something that looked like a building block and is none: what, where, at which node, and what is off."""

    block: str
    where: str
    source: str
    node: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where or self.source or self.node}: no {self.block}: {self.reason}"


@dataclass(frozen=True)
class GraphReport:
    """All that the passes have to say of one graph that Dynamo handed over.

    Attributes:
        key: stands for the graph and everything the passes depended on.
        settings: in canonical form.
        sites, near_misses: in graph order.
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

    @property
    def fused(self) -> int:
        """How many sites run the fused op."""
        return sum(site.fused for site in self.sites)

    def __add__(self, other: GraphReport) -> GraphReport:
        """Both of two passes over parts of one graph (subgraphs, forward and backward)."""
        return replace(
            self,
            sites=self.sites + other.sites,
            near_misses=self.near_misses + other.near_misses,
            pass_seconds=self.pass_seconds + other.pass_seconds,
            kernel_seconds=self.kernel_seconds + other.kernel_seconds,
            note="; ".join(filter(None, (self.note, other.note))),
        )

    def __str__(self) -> str:
        cached = ", compiled earlier and taken from Inductor's cache" if self.from_cache else ""
        head = (
            f"graph {self.key[:10]} ({self.settings}): {self.fused} of {len(self.sites)} sites fused, "
            f"{self.pass_seconds * 1e3:.1f} ms in the pass, {self.kernel_seconds:.1f} s for kernels{cached}"
        )
        lines = [head, *([f"note: {self.note}"] if self.note else []), *map(str, self.sites)]
        return "\n".join([*lines, *map(str, self.near_misses)])

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

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
            known = {field.name for field in fields(cls)} - {"sites", "near_misses", "from_cache"}
            return cls(
                **{name: content[name] for name in known},
                sites=tuple(SiteReport(**site) for site in content["sites"]),
                near_misses=tuple(NearMissReport(**miss) for miss in content["near_misses"]),
                from_cache=True,
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a graph report: {error}") from None
