"""What is remembered: trials, baselines, winners, and sites still to be measured.

A record checks itself when it is made, so that whatever is in the database or in an import is sound. Times are in
microseconds, sizes in bytes, compile times in seconds.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from autofuse.errors import BadInput
from autofuse.ops.problem import Config, Problem
from autofuse.targets.base import Target

__all__ = [
    "BASELINE_KINDS",
    "NO_WINNERS",
    "STANDINGS",
    "TRIAL_STATUSES",
    "Baseline",
    "Captured",
    "Trial",
    "Winner",
    "changed_digest",
    "now",
    "parse_time",
    "printable",
    "winners_digest",
]

TRIAL_STATUSES = ("ok", "pruned", "compile_error", "launch_error", "wrong", "crashed", "timed_out", "out_of_memory")
"""``ok`` was verified and timed; ``pruned`` was verified, and timed until it was clear that another is much faster, so
its time is of fewer rounds; or, without a time, was not worth a run. It is no failure, and cannot win. The others
failed: ``wrong`` differs from the reference by more than the tolerance, or wrote where it must not; ``crashed`` took
its process or its device's context down; ``timed_out`` did not end."""

BASELINE_KINDS = ("eager", "compile", "graph")
"""The reference run eagerly; through plain ``torch.compile`` as a user calls it; and, on a CPU only, as the code that
Inductor generated, called without Dynamo's guards."""

STANDINGS = ("own", "disputed", "trusted", "candidate")
"""``own`` was measured with this database; ``disputed`` was, too, and did not agree with what was recorded before: it
decides, but is tuned again; ``trusted`` was imported and taken as if it were measured here; ``candidate`` was imported
and decides nothing: it only says what is worth measuring."""

TIME_FORMAT = "%Y-%m-%dT%H:%M:%SZ"
"""ISO 8601, UTC, whole seconds: as text it sorts as time does."""

NO_WINNERS = "0" * 64
"""The digest of no winners."""

_LARGEST_INTEGER = 2**63 - 1  # SQLite's
_LARGEST_NUMBER = 1e15  # whatever the unit, more was never measured


@dataclass(frozen=True)
class Trial:
    """One config measured on one problem, bucket and target, or why it failed.

    Attributes:
        tokens: the bucket's T, at least 1.
        source_hash: of the kernel's source, headers included.
        status: one of ``TRIAL_STATUSES``.
        message: what went wrong, for a person; of an ``ok`` trial, that its time is another one's.
        time_us: median time of one call; every ``ok`` trial has it.
        spread_us: interquartile range of that time.
        error: largest difference from the reference, in units of the allowed tolerance: right up to 1. A result with
            NaN where the reference has none counts as infinitely wrong.
        compile_s: how long the compiler took.
        registers, spill_bytes, shared_bytes: per thread, per thread, per block; None where the compiler did not say.
        provenance: what ``TunedDatabase.record_provenance`` returned, or empty.
        measured_at: UTC, in ``TIME_FORMAT``; the store fills it in where it is empty.
        standing: one of ``STANDINGS``.

    Raises BadInput for values that no measurement can give.
    """

    target: Target
    problem: Problem
    tokens: int
    config: Config
    source_hash: str
    status: str
    message: str = ""
    time_us: float | None = None
    spread_us: float | None = None
    error: float | None = None
    compile_s: float | None = None
    registers: int | None = None
    spill_bytes: int | None = None
    shared_bytes: int | None = None
    provenance: str = ""
    measured_at: str = ""
    standing: str = "own"

    def __post_init__(self) -> None:
        _check_key(self)
        _check_word(self, "source_hash")
        _check_choice(self, "status", TRIAL_STATUSES)
        _set(self, "message", printable(_text(self, "message")))
        _check_number(self, "time_us", positive=True, optional=self.status != "ok")
        _check_number(self, "spread_us", optional=True)
        if isinstance(self.error, float) and math.isnan(self.error):
            _set(self, "error", math.inf)
        _check_number(self, "error", optional=True, infinite=True)
        _check_number(self, "compile_s", optional=True)
        for name in ("registers", "spill_bytes", "shared_bytes"):
            _check_count(self, name, 0, optional=True)
        _check_origin(self)

    @property
    def failed(self) -> bool:
        """Whether it is neither ``ok`` nor ``pruned``."""
        return self.status not in ("ok", "pruned")


@dataclass(frozen=True)
class Baseline:
    """How long the unfused reference took: median ``time_us``, interquartile range ``spread_us``.

    ``kind`` is one of ``BASELINE_KINDS``; the other attributes are those of Trial.
    """

    target: Target
    problem: Problem
    tokens: int
    kind: str
    time_us: float
    spread_us: float
    provenance: str = ""
    measured_at: str = ""
    standing: str = "own"

    def __post_init__(self) -> None:
        _check_key(self)
        _check_choice(self, "kind", BASELINE_KINDS)
        _check_number(self, "time_us", positive=True)
        _check_number(self, "spread_us")
        _check_origin(self)


@dataclass(frozen=True)
class Winner:
    """The best verified trial of a bucket, beside the better of the baselines.

    Attributes:
        baseline: the better baseline's kind.
        baseline_us: its median time.
        gain: baseline time ÷ winner's time, median over interleaved rounds; above 1 the kernel is faster.
        gain_low, gain_high: the 95 % interval of ``gain``.

    The other attributes are those of Trial.
    """

    target: Target
    problem: Problem
    tokens: int
    config: Config
    source_hash: str
    time_us: float
    spread_us: float
    baseline: str
    baseline_us: float
    gain: float
    gain_low: float
    gain_high: float
    provenance: str = ""
    measured_at: str = ""
    standing: str = "own"

    def __post_init__(self) -> None:
        _check_key(self)
        _check_word(self, "source_hash")
        _check_choice(self, "baseline", BASELINE_KINDS)
        _check_number(self, "spread_us")
        for name in ("time_us", "baseline_us", "gain", "gain_low", "gain_high"):
            _check_number(self, name, positive=True)
        if self.gain_low > self.gain_high:
            raise BadInput(f"winner: gain_low {self.gain_low:g} is above gain_high {self.gain_high:g}")
        _check_origin(self)

    @property
    def beats_baseline(self) -> bool:
        """Whether it is faster than the better baseline by more than the noise."""
        return self.gain_low > 1.0


@dataclass(frozen=True)
class Captured:
    """A site of a compiled graph that was left unfused for want of a measurement.

    ``tokens_low`` and ``tokens_high`` are the range of T it was compiled for, equal for a static shape. ``seen_at`` is
    filled in by the store where it is empty.
    """

    target: Target
    problem: Problem
    tokens_low: int
    tokens_high: int
    seen_at: str = ""

    def __post_init__(self) -> None:
        _check_names(self)
        _check_count(self, "tokens_low", 0)
        _check_count(self, "tokens_high", self.tokens_low)
        _check_time(self, "seen_at")


def now() -> str:
    """The present, in ``TIME_FORMAT``."""
    return datetime.now(timezone.utc).strftime(TIME_FORMAT)


def parse_time(text: str) -> datetime:
    """Reads ``TIME_FORMAT``. Raises ValueError."""
    time = datetime.strptime(text, TIME_FORMAT).replace(tzinfo=timezone.utc)
    if time.strftime(TIME_FORMAT) != text:
        raise ValueError(f"time {text!r} is not written as {TIME_FORMAT}")
    return time


def printable(text: str) -> str:
    """``text`` with a space for every character that could upset a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else " " for c in text)


def winners_digest(winners: Iterable[Winner]) -> str:
    """64 hexadecimal digits that stand for all that a decision may depend on; the order of ``winners`` does not matter.

    Configs, source hashes, times and gains count; when and by which driver they were measured does not. It is the sum
    of each winner's own digest modulo 2²⁵⁶, so that the database keeps it up to date without reading all winners.
    """
    return changed_digest(NO_WINNERS, added=winners)


def changed_digest(digest: str, *, added: Iterable[Winner] = (), removed: Iterable[Winner] = ()) -> str:
    """``digest`` of some winners, after these were added and removed."""
    total = int(digest, 16) + sum(map(_winner_digest, added)) - sum(map(_winner_digest, removed))
    return f"{total % (1 << 256):064x}"


def _winner_digest(w: Winner) -> int:
    line = (
        f"{w.target}|{w.problem}|{w.tokens}|{w.config}|{w.source_hash}|{w.time_us!r}"
        f"|{w.baseline}|{w.baseline_us!r}|{w.gain!r}|{w.gain_low!r}|{w.gain_high!r}"
    )
    return int.from_bytes(hashlib.sha256(line.encode()).digest(), "big")


def _set(record: object, name: str, value: object) -> None:
    object.__setattr__(record, name, value)


def _reject(record: object, name: str, expected: str) -> BadInput:
    return BadInput(f"{type(record).__name__.lower()}: {name} must be {expected}, not {getattr(record, name)!r}")


def _text(record: object, name: str) -> str:
    value = getattr(record, name)
    if not isinstance(value, str):
        raise _reject(record, name, "text")
    return value


def _check_word(record: object, name: str) -> None:
    value = _text(record, name)
    if not value or not value.isprintable() or " " in value:
        raise _reject(record, name, "one printable word")


def _check_choice(record: object, name: str, choices: tuple[str, ...]) -> None:
    if _text(record, name) not in choices:
        raise _reject(record, name, f"one of {', '.join(choices)}")


def _check_count(record: object, name: str, minimum: int, *, optional: bool = False) -> None:
    value = getattr(record, name)
    if value is None and optional:
        return
    if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= _LARGEST_INTEGER:
        raise _reject(record, name, f"a whole number from {minimum}")


def _check_number(
    record: object, name: str, *, positive: bool = False, optional: bool = False, infinite: bool = False
) -> None:
    value = getattr(record, name)
    if value is None and optional:
        return
    finite = isinstance(value, int | float) and not isinstance(value, bool) and value <= _LARGEST_NUMBER
    unbounded = infinite and isinstance(value, float)
    if not (finite or unbounded) or not (value > 0 if positive else value >= 0):
        raise _reject(record, name, f"a finite {'positive' if positive else 'non-negative'} number")
    _set(record, name, float(value))


def _check_names(record: Any) -> None:
    for kind, value in ((Target, record.target), (Problem, record.problem), (Config, getattr(record, "config", None))):
        if value is None:
            continue
        if not isinstance(value, kind) or kind.parse(str(value)) != value or not str(value).isprintable():
            raise BadInput(
                f"{type(record).__name__.lower()}: {kind.__name__.lower()} {str(value)!r} does not read back as it was"
            )


def _check_key(record: Any) -> None:
    _check_names(record)
    _check_count(record, "tokens", 1)


def _check_time(record: object, name: str) -> None:
    value = _text(record, name)
    if value:
        try:
            parse_time(value)
        except ValueError:
            raise _reject(record, name, "a UTC time like 2026-01-31T12:00:00Z") from None


def _check_origin(record: object) -> None:
    if _text(record, "provenance"):
        _check_word(record, "provenance")
    _check_time(record, "measured_at")
    _check_choice(record, "standing", STANDINGS)
