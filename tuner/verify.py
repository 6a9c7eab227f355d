"""Verification: a config is right before it is timed.

A candidate runs twice on each of several inputs. Its results must be within the op's tolerance of the fp64 reference,
the same bit by bit both times, and written in full: they hold NaN before, and something else before the second run.
Around results, inputs and what the op writes into there are guard zones, and everything that the op does not write must
stay as it was.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from autofuse.ops import FusedOp, Problem
from autofuse.tuner.budgets import VERIFY_MEMORY_SHARE, Effort
from autofuse.tuner.failures import WrongResult
from autofuse.tuner.guards import Answer, Claim, GuardedArgs, GuardedCall, insist, same_bits, told

__all__ = ["Verification", "WrongResult", "verify", "verify_call"]

Call = Callable[..., Any]
_FEW = 3  # tokens: the fewest that show strides, padding and rows of several sizes


class Verification:
    """The inputs of one bucket and their references, for any number of candidates.

    They are the op's ``check_args`` of the bucket's largest, a ragged, a few, and the smallest number of tokens. A few
    even for a bucket of one: a kernel also runs what is larger than the largest bucket. As many as fit into a share of
    the free memory are computed once.
    """

    def __init__(self, op: FusedOp, problem: Problem, tokens: int, device: torch.device, effort: Effort) -> None:
        self._op = op
        self._problem = problem
        self._device = device
        counts = sorted({1, _FEW, max(tokens - tokens // 3, 1), tokens})
        self._wanted = [(seed, count) for seed in range(effort.verify_seeds) for count in counts]
        self._kept: dict[tuple[int, int], _Case] = {}
        self._room_bytes = VERIFY_MEMORY_SHARE * _free_bytes(device)

    def prepare(self) -> None:
        """Computes all inputs and references, and keeps those that there is room for."""
        for _ in self._cases():
            pass

    def check(self, call: Call) -> float:
        """Runs ``call``, a function of the op's arguments.

        Returns: how far the results are from the reference, in units of what the op's tolerance allows (at most 1).
        Raises: WrongResult, for a difference, an unwritten result, a write beside one or beside an input, a changed
            input, or results that differ from run to run; and whatever ``call`` raises.
        """
        worst = 0.0
        for (seed, count), case in self._cases():
            try:
                worst = max(worst, case.check(call))
            except WrongResult as wrong:
                raise WrongResult(f"T={count}, seed {seed}: {wrong}") from None
        return worst

    def _cases(self) -> Iterator[tuple[tuple[int, int], _Case]]:
        for key in self._wanted:
            case = self._kept.get(key)
            if case is None:
                case = self._case(*key)
                if case.kept_bytes <= self._room_bytes:
                    self._room_bytes -= case.kept_bytes
                    self._kept[key] = case
            yield key, case

    def _case(self, seed: int, count: int) -> _Case:
        generator = torch.Generator(self._device).manual_seed(1000 + 7919 * seed + count)
        return _Case(self._op, self._problem, self._op.check_args(self._problem, count, self._device, generator))


class _Case:
    """One set of arguments and what must come of it."""

    def __init__(self, op: FusedOp, problem: Problem, args: tuple[Any, ...]) -> None:
        self._op = op
        self._problem = problem
        self._guarded = GuardedArgs(args, op.mutates)
        self._exact = op.exact(*self._guarded.args)
        self._right: tuple[list[torch.Tensor], float] | None = None  # results that were compared last, and their error

    @property
    def kept_bytes(self) -> int:
        # Those of a candidate as well: a quarter of the reference's fp64.
        return self._guarded.kept_bytes + sum(each.numel() * each.element_size() * 5 // 4 for each in self._exact)

    def check(self, call: Call) -> float:
        try:
            claims: list[Claim] = []
            first, second = self._run(call, claims), self._run(call, claims)
            before, error = self._right or (None, 0.0)
            # All at once: a wait takes a GPU as long as a call.
            unharmed, repeated, known = told(
                [claim.holds for claim in claims],
                _all_same(first, second),
                [] if before is None else _all_same(first, before),
            )
            insist(claims, unharmed)
            if not (known and all(known)):  # most configs compute the same bits: fp64 takes many times as long
                error = self._error(first)
            if not all(repeated):
                raise WrongResult(f"result {repeated.index(False)} differs between two runs on the same inputs")
        except BaseException:
            self._guarded.restore()
            raise
        self._right = first, error
        return error

    def _run(self, call: Call, claims: list[Claim]) -> list[torch.Tensor]:
        """The results. To ``claims`` is added what must hold now: the next run may undo what this one did."""
        if isinstance(call, GuardedCall):
            results = call(*self._guarded.args)
            claims += call.take_claims()
        else:
            with _poisoned_allocations():  # nothing can be put around what a call allocates itself
                results = call(*self._guarded.args)
        taken = self._guarded.take_mutated()
        claims.append(self._guarded.claim())
        return [*results, *taken]

    def _error(self, results: list[torch.Tensor]) -> float:
        worst = 0.0
        for index, (out, right) in enumerate(zip(results, self._exact, strict=True)):
            error = self._op.tolerance(self._problem, index).error(out, right)
            if not error <= 1.0:
                raise WrongResult(f"result {index} is {error:.3g} times the tolerance from the reference")
            worst = max(worst, error)
        return worst


def _all_same(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> list[Answer]:
    return [same_bits(*pair) for pair in zip(some, others, strict=True)]


def verify(op: FusedOp, problem: Problem, tokens: int, call: Call, device: torch.device, effort: Effort) -> float:
    """Verifies one candidate. Returns and raises as ``Verification.check``."""
    return Verification(op, problem, tokens, device, effort).check(call)


def verify_call(op: FusedOp, problem: Problem, args: tuple[Any, ...], call: Call) -> float:
    """Verifies ``call`` on these arguments alone, which stay as they are: it gets copies of them.

    Returns and raises as ``Verification.check``.
    """
    return _Case(op, problem, args).check(call)


@contextmanager
def _poisoned_allocations() -> Iterator[None]:
    """Fresh tensors hold NaN, so whatever a call leaves unwritten shows. The first time takes seconds: it imports
    Inductor.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):  # a system that does not say
        return 1 << 30
