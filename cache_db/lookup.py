"""Which winners answer for a call, by which rule, and why."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from autofuse.cache_db.faults import AbsentDatabaseError
from autofuse.cache_db.files import default_path
from autofuse.cache_db.records import Winner, winners_digest
from autofuse.cache_db.store import TunedDatabase
from autofuse.errors import BadInput
from autofuse.ops.buckets import REACH, buckets_serving, within_reach
from autofuse.ops.problem import Problem
from autofuse.targets.base import Target

__all__ = ["LOOKUP_RULES", "Lookup", "Snapshot", "explain_lookup"]

LOOKUP_RULES = ("exact", "between", "nearest", "range", "stale", "untuned")


@dataclass(frozen=True)
class Lookup:
    """The answer for one call.

    Attributes:
        rule: one of ``LOOKUP_RULES``.
        winners: the buckets that answer, the one whose config runs first; ascending for a range; empty where the rule
            is ``stale`` or ``untuned``.
        reason: the same as a sentence, fit for a report.
    """

    rule: str
    winners: tuple[Winner, ...]
    reason: str

    @property
    def beats_baseline(self) -> bool:
        """Whether there are winners and each beats its baseline by more than the noise."""
        return bool(self.winners) and all(winner.beats_baseline for winner in self.winners)


@dataclass(frozen=True)
class Snapshot:
    """One target's winners as they were at one moment, in memory.

    Attributes:
        path: the database file.
        present: whether it was there; a snapshot of an absent database is empty.
        target: whose winners these are.
        winners: by problem and tokens, stale ones too.
        digest: stands for all that a decision may depend on; see ``winners_digest``.

    Example:
        >>> empty = Snapshot(Path("tuned.db"), False, Target("cpu", "x86-64-v4", "EPYC"), ())
        >>> empty.lookup(Problem("op", (("width", 512),)), 64, 64, "a1b2").reason
        'op(width=512) was never tuned on cpu:x86-64-v4:EPYC: run `autofuse tune`'
    """

    path: Path
    present: bool
    target: Target
    winners: tuple[Winner, ...]
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "digest", winners_digest(self.winners))

    @classmethod
    def load(cls, path: Path | None, target: Target) -> Snapshot:
        """Reads ``path``, else ``default_path()``. An absent file gives an empty snapshot. Raises DatabaseError."""
        path = path if path is not None else default_path()
        try:
            with TunedDatabase(path, read_only=True) as database:
                return cls(path, True, target, tuple(database.winners(target)))
        except AbsentDatabaseError:
            return cls(path, False, target, ())

    def buckets(self, problem: Problem, source_hash: str) -> list[Winner]:
        """The problem's fresh winners, by tokens."""
        return [w for w in self.winners if w.problem == problem and w.source_hash == source_hash]

    def stale(self, problem: Problem, source_hash: str) -> list[Winner]:
        """The problem's winners that were measured with another version of the kernel, by tokens."""
        return [w for w in self.winners if w.problem == problem and w.source_hash != source_hash]

    def lookup(self, problem: Problem, tokens_low: int, tokens_high: int, source_hash: str) -> Lookup:
        """What answers for a call of T tokens, ``tokens_low`` ≤ T ≤ ``tokens_high``; equal for a static T.

        A call of T runs the smallest bucket ≥ T, or the largest. One static T is answered by its own bucket (rule
        ``exact``), by the two on either side, of which the upper one runs (``between``), or by the only one near
        (``nearest``); a range by every bucket that serves some T in it (``range``). Outside of what was tuned, winners
        answer no further than ``within_reach`` says: beyond, the rule is ``untuned`` and the reason names the T to
        tune at. Winners of another source hash are passed over; where there are no others the rule is ``stale``, and
        without any ``untuned``.

        Raises BadInput for a range that is none.
        """
        if not 0 <= tokens_low <= tokens_high:
            raise BadInput(f"tokens from {tokens_low} to {tokens_high} are not a range from 0 upwards")
        buckets = self.buckets(problem, source_hash)
        if not buckets:
            return self._without_buckets(problem, source_hash)
        tokens = [winner.tokens for winner in buckets]
        first = min(bisect_left(tokens, tokens_low), len(buckets) - 1)
        last = min(bisect_left(tokens, tokens_high), len(buckets) - 1)
        between = tokens_low == tokens_high and first > 0 and tokens_low < tokens[first]
        if not between and not within_reach(tokens[first], tokens[last], tokens_low, tokens_high):
            return self._out_of_reach(problem, buckets, tokens_low, tokens_high)
        if tokens_low < tokens_high:
            serving = tuple(buckets[first : last + 1])
            each = "; ".join(f"T={winner.tokens}: {_figures(winner)}" for winner in serving)
            return Lookup(
                "range",
                serving,
                f"{_asked(tokens_low, tokens_high)} is served by {_tokens(serving)} on {self.target}: {each}",
            )
        runs = buckets[first]
        if runs.tokens == tokens_low:
            return Lookup("exact", (runs,), f"tuned at T={runs.tokens} on {self.target}: {_figures(runs)}")
        if between:
            below = buckets[first - 1]
            return Lookup(
                "between",
                (runs, below),
                f"T={tokens_low} lies between T={below.tokens} and T={runs.tokens} as tuned on {self.target} and runs "
                f"as T={runs.tokens}: {_figures(runs)}; T={below.tokens}: {_figures(below)}",
            )
        side = "below" if tokens_low < runs.tokens else "above"
        return Lookup(
            "nearest",
            (runs,),
            f"T={tokens_low} lies {side} all T tuned on {self.target} and runs as T={runs.tokens}: {_figures(runs)}",
        )

    def _out_of_reach(self, problem: Problem, buckets: Sequence[Winner], tokens_low: int, tokens_high: int) -> Lookup:
        tuned = {winner.tokens for winner in buckets}
        wanted = ",".join(str(tokens) for tokens in buckets_serving(tokens_low, tokens_high) if tokens not in tuned)
        return Lookup(
            "untuned",
            (),
            f"{_asked(tokens_low, tokens_high)} reaches further than a factor of {REACH} from what was tuned on "
            f"{self.target}, which is {_tokens(buckets)}: run `autofuse tune --problem '{problem}' --tokens {wanted}`",
        )

    def _without_buckets(self, problem: Problem, source_hash: str) -> Lookup:
        if stale := self.stale(problem, source_hash):
            return Lookup(
                "stale",
                (),
                f"{problem} was tuned at {_tokens(stale)} on {self.target} with another version of its kernel: "
                "run `autofuse tune` again",
            )
        return Lookup("untuned", (), f"{problem} was never tuned on {self.target}: run `autofuse tune`")


def explain_lookup(
    snapshot: Snapshot, problem: Problem, tokens_low: int, tokens_high: int, source_hash: str
) -> list[str]:
    """The way to ``Snapshot.lookup``'s answer, a line a step. Raises BadInput as it does."""
    answer = snapshot.lookup(problem, tokens_low, tokens_high, source_hash)
    lines = [
        f"database: {snapshot.path}" + ("" if snapshot.present else " (does not exist)"),
        f"target: {snapshot.target} ({len(snapshot.winners)} winners, digest {snapshot.digest[:10]})",
        f"problem: {problem}",
        f"kernel: source {source_hash[:12]}",
        f"asked: {_asked(tokens_low, tokens_high)}",
    ]
    buckets = snapshot.buckets(problem, source_hash)
    lines.append(f"tuned: {_tokens(buckets)}" if buckets else "tuned: nothing with this kernel")
    lines += [f"  T={winner.tokens}: {winner.config}: {_figures(winner)}" for winner in buckets]
    for winner in snapshot.stale(problem, source_hash):
        lines.append(f"stale: T={winner.tokens}, measured {winner.measured_at} with source {winner.source_hash[:12]}")
    lines += [f"rule: {answer.rule}", f"answer: {answer.reason}"]
    for winner in answer.winners:
        verdict = "beats" if winner.beats_baseline else "does not beat"
        lines.append(
            f"  T={winner.tokens} {verdict} {winner.baseline} by more than the noise: "
            f"{winner.gain:.2f}×, 95 % between {winner.gain_low:.3f}× and {winner.gain_high:.3f}×"
        )
    lines.append(f"faster here: {'yes' if answer.beats_baseline else 'no'}")
    return lines


def _asked(tokens_low: int, tokens_high: int) -> str:
    return f"T={tokens_low}" if tokens_low == tokens_high else f"T={tokens_low}…{tokens_high}"


def _tokens(winners: Sequence[Winner]) -> str:
    return "T=" + ", ".join(str(winner.tokens) for winner in winners)


def _figures(winner: Winner) -> str:
    text = f"{_us(winner.time_us)} µs against {_us(winner.baseline_us)} µs ({winner.baseline}), {winner.gain:.2f}×"
    if winner.beats_baseline:
        return text
    return f"{text}, not faster beyond the noise ({winner.gain_low:.2f}–{winner.gain_high:.2f}×)"


def _us(time: float) -> str:
    return f"{time:.2f}" if time < 10 else f"{time:.1f}" if time < 100 else f"{time:.0f}"
