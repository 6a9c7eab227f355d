"""Chains: the op between matrix products, as in a model, where programmatic dependent launch shows what it saves."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from autofuse.ops import Config, FusedOp, Problem, get_op
from autofuse.ops.binding import ROWS
from autofuse.runtime.plan import Plan
from autofuse.targets import target_of
from autofuse.tuner.budgets import Effort
from autofuse.tuner.measure import Ring, interleave, runner

__all__ = ["Chain", "chain_times", "launched_plainly"]

MOST_COLUMNS = 1024  # of the op's result that the next product reads
MANY_TOKENS = 1 << 20  # so many that no constraint about too few tokens stands in the way


class Chain:
    """GEMM → op → GEMM → op …: products of the op's first result are written into what the op reads next.

    All the op's activations are written by such a product (into the whole tensor that they are views of), and all
    calls read the same memory, so a kernel that touches it before its predecessor is through computes something else.

    Args:
        links: GEMM → op pairs.
    """

    def __init__(self, problem: Problem, tokens: int, device: torch.device, *, seed: int = 0, links: int = 4) -> None:
        self.op: FusedOp = get_op(problem.op)
        self.problem, self.tokens, self.device, self.links = problem, tokens, device, links
        generator = torch.Generator(device).manual_seed(seed)
        self.args = self.op.example_args(problem, tokens, device, generator)
        self._inputs = self._activations()
        dtype = self._inputs[0].dtype
        result = self.op.reference(*self.args)[0]
        self._columns = min(result[:tokens].flatten(1).shape[1], MOST_COLUMNS)
        self.start = torch.randn(tokens, self._columns, device=device, generator=generator).to(dtype)
        self._weights = [
            torch.randn(self._columns, base.shape[1], device=device, generator=generator).mul_(self._columns**-0.5)
            .to(dtype)
            for base in self._inputs
        ]  # fmt: skip

    def run(self, config: Config | None) -> list[torch.Tensor]:
        """Launches the chain; ``config`` None leaves the op out.

        Returns: the last call's results, and what it wrote into its arguments.
        """
        overload = getattr(torch.ops.autofuse, self.op.name).default
        plan = config and str(Plan(target_of(self.device).arch, self.problem, ((1, config),)))
        results: Sequence[torch.Tensor] = ()
        activations = self.start
        for _ in range(self.links):
            for base, weight in zip(self._inputs, self._weights, strict=True):
                torch.mm(activations, weight, out=base)
            if plan:
                results = overload(*self.args, plan)
                activations = results[0][: self.tokens].flatten(1)[:, : self._columns].to(self.start.dtype)
        return [*results, *(self.args[i] for i in self.op.mutates if isinstance(self.args[i], torch.Tensor))]

    def _activations(self) -> list[torch.Tensor]:
        """Where the op reads its floating-point activations, as [T, columns]: memory to write them into."""
        bases: dict[int, torch.Tensor] = {}
        for tensor in self.op.binding(self.problem).tensors:
            arg = self.args[tensor.index]
            if {None, ROWS} & set(tensor.sizes or ()) and arg.is_floating_point():
                base: Any = arg if arg._base is None else arg._base
                bases[base.data_ptr()] = base.view(self.tokens, -1)
        return list(bases.values())


def launched_plainly(op: FusedOp, problem: Problem, config: Config) -> Config:
    """``config`` without programmatic launch and whatever needs that: with the fewest changes that the space allows.

    Raises ValueError if there is no such config.
    """
    space = op.kernel_source("cuda", config).space
    others = [tunable for tunable in space.tunables if tunable.name != "PDL"]
    for count in range(len(others) + 1):
        for changed in itertools.combinations(others, count):
            for values in itertools.product(*(tunable.values for tunable in changed)):
                changes = {tunable.name: value for tunable, value in zip(changed, values, strict=True)}
                plain = Config.of(config, PDL=0, **changes)
                if space.refusal(plain, problem, MANY_TOKENS) is None:
                    return plain
    raise ValueError(f"{op.name} has no config without programmatic launch for {problem}")


def chain_times(problem: Problem, tokens: int, config: Config, device: torch.device, effort: Effort) -> dict[str, Any]:
    """Device time in µs of one call of the op in a chain: the chain's less that of its products alone, ÷ the calls;
    with ``config``, and with it launched plainly.
    """
    chain = Chain(problem, tokens, device)
    plain = launched_plainly(chain.op, problem, config)
    variants = {"gemm": None, "plain": plain, "pdl": config}
    ring = Ring.of([()], device)
    with torch.no_grad():
        prepared = [
            runner(lambda variant=variant: chain.run(variant), ring, device, effort) for variant in variants.values()
        ]
        gemm, *others = (timing.median_us for timing in interleave(prepared, effort.final_rounds))
    times = {name: (time_us - gemm) / chain.links for name, time_us in zip(["plain", "pdl"], others, strict=True)}
    return {
        "us": {**times, "gemm": gemm / chain.links},
        "plain_config": str(plain),
        "config": str(config),
        "links": chain.links,
    }
