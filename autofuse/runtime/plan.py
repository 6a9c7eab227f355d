"""Plan: what one fused node of a compiled graph runs."""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property

from autofuse.errors import BadInput
from autofuse.ops.problem import Config, Problem

__all__ = ["Plan"]

_UNFUSED = "unfused"


@dataclass(frozen=True)
class Plan:
    """A config for every tuned bucket of one problem on one arch: all that a fused node needs at run time.

    It travels as text in the graph itself, so a graph that Inductor's cache hands to another process runs the same
    kernels, whatever has become of the database.

    Attributes:
        arch: what the configs were tuned for, e.g. ``sm_90a``.
        problem: the call the configs are for.
        buckets: (tokens, config), ascending. A call of T tokens runs the config of the smallest bucket ≥ T, or the
            largest bucket. A bucket whose config is None runs the op's reference, unfused.
        source: the hash of the kernel's source that the configs were tuned with, or the hashes of several, as
            ``FusedOp.plan_source`` joins them; "" if any will do.

    Example:
        >>> plan = Plan.parse("sm_90a@1f2e3d4c|mla_dual_rms_norm(dtype=bf16)|64:ROWS=1|1024:unfused|2048:ROWS=4")
        >>> str(plan.config_for(1025)), plan.config_for(65), plan.source
        ('ROWS=4', None, '1f2e3d4c')
    """

    arch: str
    problem: Problem
    buckets: tuple[tuple[int, Config | None], ...]
    source: str = ""

    def __str__(self) -> str:
        place = f"{self.arch}@{self.source}" if self.source else self.arch
        buckets = (f"{tokens}:{_UNFUSED if config is None else config}" for tokens, config in self.buckets)
        return "|".join([place, str(self.problem), *buckets])

    @classmethod
    def parse(cls, text: str) -> Plan:
        """Reads the canonical form back. Raises BadInput."""
        place, *rest = text.split("|")
        arch, at, source = place.partition("@")
        if not arch or bool(at) != bool(source) or len(rest) < 2:
            raise BadInput(f"plan {text!r} is not of the form arch@source|problem|tokens:config|...")
        buckets: list[tuple[int, Config | None]] = []
        for bucket in rest[1:]:
            tokens, colon, config = bucket.partition(":")
            if (
                not colon
                or not (tokens.isascii() and tokens.isdecimal() and len(tokens) < 20)
                or (buckets and int(tokens) <= buckets[-1][0])
            ):
                raise BadInput(f"plan {text!r}: {bucket!r} is not tokens:config with ascending tokens")
            buckets.append((int(tokens), None if config == _UNFUSED else Config.parse(config)))
        return cls(arch, Problem.parse(rest[0]), tuple(buckets), source)

    @property
    def configs(self) -> tuple[Config | None, ...]:
        """Of its buckets, in their order."""
        return tuple(config for _, config in self.buckets)

    def made_for(self, source: str) -> bool:
        """Whether its configs were tuned with the present source of their kernels: ``FusedOp.plan_source`` of them."""
        return self.source in ("", source)

    @cached_property
    def name(self) -> str:
        """Ten hexadecimal digits of the plan's content, by which reports name it."""
        return hashlib.sha256(str(self).encode()).hexdigest()[:10]

    def config_for(self, tokens: int) -> Config | None:
        """What a call of so many tokens runs; None for the op's reference."""
        index = bisect_left(self.buckets, tokens, key=lambda bucket: bucket[0])
        return self.buckets[min(index, len(self.buckets) - 1)][1]
