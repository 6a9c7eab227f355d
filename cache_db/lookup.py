"""Which winners answer for a call, by which rule, and why."""

from __future__ import annotations

import hashlib
import logging
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from autofuse.cache_db.faults import AbsentDatabaseError
from autofuse.cache_db.files import default_path, lower_paths
from autofuse.cache_db.kernels import NO_TRITON, STALE, why_unused
from autofuse.cache_db.layer import InMemory, OnDisk, open_layer
from autofuse.cache_db.records import Winner
from autofuse.errors import BadInput, DatabaseError
from autofuse.ops.buckets import REACH, buckets_serving, within_reach
from autofuse.ops.problem import Problem
from autofuse.targets.base import Target

__all__ = ["LOOKUP_RULES", "Lookup", "Snapshot", "explain_lookup"]

_logger = logging.getLogger("autofuse.cache_db")

LOOKUP_RULES = ("exact", "between", "range", "nearest", "same_arch", "candidate", "stale", "untuned")
"""The better ones first: of two GPUs of an arch, the one whose rule stands first lends its config."""


@dataclass(frozen=True)
class Lookup:
    """The answer for one call.

    Attributes:
        rule: one of ``LOOKUP_RULES``.
        winners: the buckets that answer, the one whose config runs first; ascending for a range; empty where the rule
            is ``same_arch``, ``candidate``, ``stale`` or ``untuned``.
        reason: the same as a sentence, fit for a report.
        layer: which of the snapshot's ``layers`` the answer is from.
        elsewhere: where the rule is ``same_arch``, the buckets that would answer on another GPU of the same arch. Their
            configs are better guesses than the op's default; their times and gains were not measured here, and count
            for nothing.
    """

    rule: str
    winners: tuple[Winner, ...]
    reason: str
    layer: int = 0
    elsewhere: tuple[Winner, ...] = ()

    @property
    def beats_baseline(self) -> bool:
        """Whether there are winners and each beats its baseline by more than the noise."""
        return bool(self.winners) and all(winner.beats_baseline for winner in self.winners)


class Snapshot:
    """One target's winners, as ``torch.compile`` asks for them: those of a database, and below it those of others.

    A problem's winners are read when it is first looked up, and kept. What another process writes between loading and
    that is answered by, too, although ``digest`` is of the moment of loading: a plan holds all that it needs, so a
    graph that is cached under the earlier digest is as right as one under the later.

    Attributes:
        path: the database file.
        present: whether it was there; a snapshot of an absent database is empty.
        target: whose winners these are.
        digest: stands for all that a decision may depend on; see ``winners_digest``.
        below: what is asked where this has no answer.

    Args:
        winners: by problem and tokens, stale ones and candidates too, and those of other GPUs of the target's arch; or
            where they are to be read from.

    Example:
        >>> empty = Snapshot(Path("tuned.db"), False, Target("cpu", "x86-64-v4", "EPYC"), ())
        >>> empty.lookup(Problem("op", (("width", 512),)), 64, 64, "a1b2").reason
        'op(width=512) was never tuned on cpu:x86-64-v4:EPYC: run `autofuse tune`'
    """

    def __init__(
        self,
        path: Path,
        present: bool,
        target: Target,
        winners: Iterable[Winner] | InMemory | OnDisk,
        below: Snapshot | None = None,
    ) -> None:
        self.path, self.present, self.target, self.below = path, present, target, below
        self._layer = winners if isinstance(winners, (InMemory, OnDisk)) else InMemory(winners, target)
        self._winners: dict[Problem, Sequence[Winner]] = {}
        self._answers: dict[tuple[Problem, int, int, tuple[str, ...]], Lookup] = {}
        mine = self._layer.digest
        self.digest: str = mine if below is None else hashlib.sha256(f"{mine}|{below.digest}".encode()).hexdigest()

    @classmethod
    def load(cls, path: Path | None, target: Target, *, alone: bool = False) -> Snapshot:
        """Reads ``path``, else ``default_path()``, over those of ``lower_paths()`` unless it is to be ``alone``.

        An absent file gives an empty snapshot. A lower one that cannot be read is passed over with a warning. Raises
        DatabaseError.
        """
        path = path if path is not None else default_path()
        below: Snapshot | None = None
        for lower in () if alone else reversed(lower_paths()):
            try:
                below = cls(lower, True, target, open_layer(lower, target), below)
            except AbsentDatabaseError:
                _logger.debug("there is no %s", lower)
            except DatabaseError as error:
                _warn_once(f"a database of AUTOFUSE_DB_PATH is passed over: {error}")
        try:
            return cls(path, True, target, open_layer(path, target), below)
        except AbsentDatabaseError:
            return cls(path, False, target, (), below)

    @property
    def winners(self) -> tuple[Winner, ...]:
        """All of this database's winners but candidates, by problem and tokens. Raises DatabaseError."""
        mine = (winner for winner in self._layer.of(None) if winner.target == self.target)
        return tuple(winner for winner in mine if winner.standing != "candidate")

    def layers(self) -> Iterator[Snapshot]:
        """This one, and those below it."""
        layer: Snapshot | None = self
        while layer is not None:
            yield layer
            layer = layer.below

    def buckets(self, problem: Problem, *source_hashes: str) -> list[Winner]:
        """The problem's fresh winners, by tokens: of the uppermost database that has some. Raises DatabaseError."""
        for layer in self.layers():
            if found := layer.own_buckets(problem, *source_hashes):
                return found
        return []

    def own_buckets(self, problem: Problem, *source_hashes: str) -> list[Winner]:
        """The problem's fresh winners in this database alone, by tokens. Raises DatabaseError."""
        return [winner for winner in self._usable(problem, source_hashes) if winner.standing != "candidate"]

    def candidates(self, problem: Problem, *source_hashes: str) -> list[Winner]:
        """The problem's imported winners that are not measured here, by tokens. Raises DatabaseError."""
        return [winner for winner in self._usable(problem, source_hashes) if winner.standing == "candidate"]

    def unused(self, problem: Problem, *source_hashes: str) -> dict[str, list[Winner]]:
        """The problem's winners that answer nothing because of their kernels, each list by tokens, by ``why_unused``:
        those of another version of the kernel, and those in Triton where that is not used.
        """
        found: dict[str, list[Winner]] = {}
        for winner in self._of(problem):
            if why := why_unused(winner, source_hashes):
                found.setdefault(why, []).append(winner)
        return found

    def elsewhere(self, problem: Problem, *source_hashes: str) -> dict[Target, list[Winner]]:
        """The problem's fresh winners on other GPUs of the same arch, by tokens. Raises DatabaseError."""
        found: dict[Target, list[Winner]] = {}
        for winner in self._read(problem):
            if winner.target != self.target and winner.source_hash in source_hashes:
                found.setdefault(winner.target, []).append(winner)
        return found

    def _usable(self, problem: Problem, source_hashes: tuple[str, ...]) -> Iterator[Winner]:
        return (winner for winner in self._of(problem) if why_unused(winner, source_hashes) is None)

    def _of(self, problem: Problem) -> Iterator[Winner]:
        return (winner for winner in self._read(problem) if winner.target == self.target)

    def _read(self, problem: Problem) -> Sequence[Winner]:
        if problem not in self._winners:
            self._winners[problem] = self._layer.of(problem)
        return self._winners[problem]

    def lookup(self, problem: Problem, tokens_low: int, tokens_high: int, *source_hashes: str) -> Lookup:
        """What answers for a call of T tokens, ``tokens_low`` ≤ T ≤ ``tokens_high``; equal for a static T.

        A call of T runs the smallest bucket ≥ T, or the largest. One static T is answered by its own bucket (rule
        ``exact``), by the two on either side, of which the upper one runs (``between``), or by the only one near
        (``nearest``); a range by every bucket that serves some T in it (``range``). Outside of what was tuned, winners
        answer no further than ``within_reach`` says: beyond, the rule is ``untuned`` and the reason names the T to
        tune at. Winners of none of ``source_hashes``, which are those of the op's present kernels, one for each
        language, are passed over (``why_unused``); where there are no others the rule is ``stale``, or ``untuned`` if
        they are of a language that is not used here, and without any ``untuned``; ``candidate`` where another machine's
        are, which decide nothing. Where this database has no winner that answers, those below are asked in turn. Where
        none has, but for another GPU of the same arch one has, the rule is ``same_arch``, which decides nothing either.
        The same question is answered from memory.

        Raises BadInput for a range that is none, DatabaseError.
        """
        asked = (problem, tokens_low, tokens_high, source_hashes)
        answer = self._answers.get(asked)
        if answer is None:
            answer = self._answers[asked] = self._look_up(problem, tokens_low, tokens_high, *source_hashes)
        return answer

    def _look_up(self, problem: Problem, tokens_low: int, tokens_high: int, *source_hashes: str) -> Lookup:
        answers = (
            replace(layer._own_answer(problem, tokens_low, tokens_high, *source_hashes), layer=depth)
            for depth, layer in enumerate(self.layers())
        )
        first = next(answers)
        measured = first if first.winners else next((answer for answer in answers if answer.winners), None)
        return measured or self._on_same_arch(first, problem, tokens_low, tokens_high, *source_hashes)

    def _on_same_arch(
        self, here: Lookup, problem: Problem, tokens_low: int, tokens_high: int, *source_hashes: str
    ) -> Lookup:
        """Of the uppermost database that has some, the GPU whose rule stands first in LOOKUP_RULES; of several the one
        that was measured last. ``here`` where there is none.
        """
        for depth, layer in enumerate(self.layers()):
            others = layer.elsewhere(problem, *source_hashes).items()
            found = (_answer(target, buckets, tokens_low, tokens_high) for target, buckets in others)
            answers = sorted(filter(None, found), key=lambda each: each.winners[0].measured_at, reverse=True)
            best = min(answers, key=lambda each: LOOKUP_RULES.index(each.rule), default=None)
            if best is not None:
                there = f"on another GPU of the same arch, which decides nothing here: {best.reason}"
                return Lookup("same_arch", (), f"{here.reason}; {there}", depth, best.winners)
        return here

    def _own_answer(self, problem: Problem, tokens_low: int, tokens_high: int, *source_hashes: str) -> Lookup:
        if not 0 <= tokens_low <= tokens_high:
            raise BadInput(f"tokens from {tokens_low} to {tokens_high} are not a range from 0 upwards")
        buckets = self.own_buckets(problem, *source_hashes)
        if not buckets:
            return self._without_buckets(problem, *source_hashes)
        answer = _answer(self.target, buckets, tokens_low, tokens_high)
        return answer or self._out_of_reach(problem, buckets, tokens_low, tokens_high)

    def _out_of_reach(self, problem: Problem, buckets: Sequence[Winner], tokens_low: int, tokens_high: int) -> Lookup:
        tuned = {winner.tokens for winner in buckets}
        wanted = ",".join(str(tokens) for tokens in buckets_serving(tokens_low, tokens_high) if tokens not in tuned)
        return Lookup(
            "untuned",
            (),
            f"{_asked(tokens_low, tokens_high)} reaches further than a factor of {REACH} from what was tuned on "
            f"{self.target}, which is {_tokens(buckets)}: run `autofuse tune --problem '{problem}' --tokens {wanted}`",
        )

    def _without_buckets(self, problem: Problem, *source_hashes: str) -> Lookup:
        if candidates := self.candidates(problem, *source_hashes):
            return Lookup(
                "candidate",
                (),
                f"{problem} was imported for {_tokens(candidates)} on {self.target}, but not measured here: run "
                "`autofuse tune`, or import it with --trust",
            )
        unused = self.unused(problem, *source_hashes)
        if stale := unused.get(STALE):
            return Lookup(
                "stale",
                (),
                f"{problem} was tuned at {_tokens(stale)} on {self.target} with another version of its kernel: "
                "run `autofuse tune` again",
            )
        if in_triton := unused.get(NO_TRITON):
            return Lookup(
                "untuned",
                (),
                f"{problem} was tuned at {_tokens(in_triton)} on {self.target} with a kernel in Triton, which is not "
                "used here: `autofuse doctor` says why, and `autofuse tune` measures the one in C++",
            )
        return Lookup("untuned", (), f"{problem} was never tuned on {self.target}: run `autofuse tune`")


def _answer(target: Target, buckets: Sequence[Winner], tokens_low: int, tokens_high: int) -> Lookup | None:
    """What the buckets of one problem on ``target``, ascending, say of a call; None where they are out of its reach."""
    tokens = [winner.tokens for winner in buckets]
    first = min(bisect_left(tokens, tokens_low), len(buckets) - 1)
    last = min(bisect_left(tokens, tokens_high), len(buckets) - 1)
    between = tokens_low == tokens_high and first > 0 and tokens_low < tokens[first]
    if not between and not within_reach(tokens[first], tokens[last], tokens_low, tokens_high):
        return None
    if tokens_low < tokens_high:
        serving = tuple(buckets[first : last + 1])
        each = "; ".join(f"T={winner.tokens}: {_figures(winner)}" for winner in serving)
        reason = f"{_asked(tokens_low, tokens_high)} is served by {_tokens(serving)} on {target}: {each}"
        return Lookup("range", serving, reason)
    runs = buckets[first]
    if runs.tokens == tokens_low:
        return Lookup("exact", (runs,), f"tuned at T={runs.tokens} on {target}: {_figures(runs)}")
    if between:
        below = buckets[first - 1]
        return Lookup(
            "between",
            (runs, below),
            f"T={tokens_low} lies between T={below.tokens} and T={runs.tokens} as tuned on {target} and runs "
            f"as T={runs.tokens}: {_figures(runs)}; T={below.tokens}: {_figures(below)}",
        )
    side = "below" if tokens_low < runs.tokens else "above"
    return Lookup(
        "nearest",
        (runs,),
        f"T={tokens_low} lies {side} all T tuned on {target} and runs as T={runs.tokens}: {_figures(runs)}",
    )


def explain_lookup(
    snapshot: Snapshot, problem: Problem, tokens_low: int, tokens_high: int, *source_hashes: str
) -> list[str]:
    """The way to ``Snapshot.lookup``'s answer, a line a step. Raises BadInput as it does."""
    answer = snapshot.lookup(problem, tokens_low, tokens_high, *source_hashes)
    lines = [
        f"target: {snapshot.target} (digest {snapshot.digest[:10]})",
        f"problem: {problem}",
        f"kernel: source {' or '.join(each[:12] for each in source_hashes)}",
        f"asked: {_asked(tokens_low, tokens_high)}",
    ]
    for layer in snapshot.layers():
        lines.append(f"database: {layer.path}" + ("" if layer.present else " (does not exist)"))
        buckets = layer.own_buckets(problem, *source_hashes)
        lines.append(f"tuned: {_tokens(buckets)}" if buckets else "tuned: nothing with this kernel")
        lines += [f"  T={winner.tokens}: {winner.config}: {_figures(winner)}" for winner in buckets]
        for winner in layer.candidates(problem, *source_hashes):
            lines.append(f"candidate: T={winner.tokens}: {winner.config}, imported, not measured here")
        for target, there in layer.elsewhere(problem, *source_hashes).items():
            lines.append(f"same arch: {_tokens(there)} on {target}, not measured here")
            lines += [f"  T={winner.tokens}: {winner.config}: {_figures(winner)}" for winner in there]
        for why, winners in layer.unused(problem, *source_hashes).items():
            lines.append(why)
            lines += [
                f"  T={winner.tokens}: {winner.config}, measured {winner.measured_at} with source "
                f"{winner.source_hash[:12]}"
                for winner in winners
            ]
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
    if winner.standing == "trusted":
        text += ", as imported"
    if winner.beats_baseline:
        return text
    return f"{text}, not faster beyond the noise ({winner.gain_low:.2f}–{winner.gain_high:.2f}×)"


def _us(time: float) -> str:
    return f"{time:.2f}" if time < 10 else f"{time:.1f}" if time < 100 else f"{time:.0f}"


@cache
def _warn_once(message: str) -> None:
    """Logs ``message`` as a warning, the first time it is given."""
    _logger.warning(message)
