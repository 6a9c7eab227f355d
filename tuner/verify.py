"""Verification: a config is right before it is timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from autofuse.errors import AutofuseError
from autofuse.ops import FusedOp, Problem
from autofuse.tuner.budgets import Effort

__all__ = ["WrongResult", "verify", "verify_call"]

_FEW = 3  # tokens: the fewest that show strides, padding and rows of several sizes


class WrongResult(AutofuseError):
    """A kernel ran and computed something else than its op's reference."""


@contextmanager
def _poisoned_allocations() -> Iterator[None]:
    """Fresh tensors hold NaN, so whatever a kernel leaves unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def verify(
    op: FusedOp, problem: Problem, tokens: int, call: Callable[..., Any], device: torch.device, effort: Effort
) -> float:
    """Runs ``call`` on the op's ``check_args`` of the bucket's largest, a ragged, a few, and the smallest number of
    tokens. A few even for a bucket of one: a kernel also runs what is larger than the largest bucket.

    What a kernel writes beside an input shows, since inputs lie inside larger tensors. What it writes beside a result
    is not checked here: results are allocated inside the call, where nothing can be put around them.

    Returns: how far the results are from the fp64 reference, in units of what the op's tolerance allows (at most 1).
    Raises: WrongResult, for a difference, an unwritten output, a changed input, or results that differ from run to run.
    """
    worst = 0.0
    for seed in range(effort.verify_seeds):
        generator = torch.Generator(device).manual_seed(1000 + seed)
        for count in sorted({1, _FEW, max(tokens - tokens // 3, 1), tokens}):
            try:
                worst = max(worst, verify_call(op, problem, op.check_args(problem, count, device, generator), call))
            except WrongResult as wrong:
                raise WrongResult(f"T={count}, seed {seed}: {wrong}") from None
    return worst


def verify_call(op: FusedOp, problem: Problem, args: tuple[Any, ...], call: Callable[..., Any]) -> float:
    """Runs ``call`` on ``args`` twice. What the op writes into its arguments is put back.

    Returns and raises as ``verify``.
    """
    worst = 0.0
    before = [arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in _with_bases(args)]
    exact = op.exact(*args)
    with _poisoned_allocations():
        first = [*call(*args), *_take_mutated(op, args, before)]
        second = [*call(*args), *_take_mutated(op, args, before)]
    for index, (arg, copy) in enumerate(zip(_with_bases(args), before, strict=True)):
        if isinstance(arg, torch.Tensor) and not torch.equal(arg, copy):
            raise WrongResult(f"input {index} was changed")
    for index, (out, again, right) in enumerate(zip(first, second, exact, strict=True)):
        error = op.tolerance(problem, index).error(out, right)
        if not error <= 1.0:
            raise WrongResult(f"result {index} is {error:.3g} times the tolerance from the reference")
        if not torch.equal(out, again):
            raise WrongResult(f"result {index} differs between two runs on the same inputs")
        worst = max(worst, error)
    return worst


def _take_mutated(op: FusedOp, args: tuple[Any, ...], before: list[Any]) -> list[torch.Tensor]:
    """What a call wrote into its arguments, which are put back to what they were."""
    taken = []
    for index in op.mutates:
        if isinstance(args[index], torch.Tensor):
            taken.append(args[index].clone())
            args[index].copy_(before[index])
    return taken


def _with_bases(args: tuple[Any, ...]) -> list[Any]:
    """The arguments, and the whole tensors that they are views of: a kernel must not write beside a view either."""
    return [*args, *(arg._base for arg in args if isinstance(arg, torch.Tensor) and arg._base is not None)]
