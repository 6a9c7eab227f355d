"""An op whose kernels fail, each config in a way of its own. Importing this module makes the op known."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from autofuse.ops import (
    Binding,
    Config,
    Constraint,
    FusedOp,
    KernelSource,
    LaunchShape,
    Problem,
    SearchSpace,
    Tolerance,
    Tunable,
)
from autofuse.ops.base import DTYPES
from autofuse.ops.binding import Field, FieldKind, Result, TensorArg
from autofuse.runtime.dispatch import registry
from autofuse.targets import KernelSpec

CPU_FAULTS = (
    "none",
    "write to address 8",
    "integer division by zero",
    "illegal instruction",
    "endless loop",
    "abort",
    "exit",
    "killed",
    "write after a result",
    "write before a result",
    "write after what it writes into",
    "last row unwritten",
    "NaN",
    "another result each time",
    "changed input",
    "does not compile",
    "dies when the finale has begun",
    "spoils the process",
    "dies in a spoilt process",
    "kills the parent",
)
"""``faulty.cpp`` knows them by their places here."""

GPU_FAULTS = (
    "none",
    "illegal address",
    "misaligned access",
    "trap",
    "endless loop",
    "write after a result",
    "write before a result",
    "write after what it writes into",
    "last row unwritten",
    "NaN",
    "changed input",
    "does not compile",
    "too much shared memory",
)
"""The same for ``faulty.cu``."""

ROWS = 8  # of the cache
_SHARED_BYTES = 1 << 20  # more than any GPU has for a block


def _asked_for() -> set[int]:
    return {int(fault) for fault in os.environ["FAULTY_CONFIGS"].split(",")}


class Faulty(FusedOp):
    """Doubles and negates x [T, width] (fp32), and copies its first rows into a cache of 8 rows."""

    name = "faulty"
    mutates = (1,)
    schema = '(Tensor x, Tensor(a!) cache, str plan="") -> (Tensor, Tensor)'
    kernels = {  # noqa: RUF012
        kind: KernelSource(
            file,
            SearchSpace(
                (Tunable("FAULT", (*range(1, len(faults)), 0), "what goes wrong"),),
                (Constraint("the test asks for others", lambda c, p, t: c["FAULT"] in _asked_for()),),
            ),
            lambda problem, tokens: Config.of(FAULT=0),
        )
        for kind, file, faults in (("cpu", "faulty.cpp", CPU_FAULTS), ("cuda", "faulty.cu", GPU_FAULTS))
    }

    def reference(self, *args: Any) -> tuple[torch.Tensor, ...]:
        x, cache = args
        rows = min(len(x), ROWS)
        cache[:rows] = x[:rows]
        return x * 2, -x

    def exact(self, *args: Any) -> tuple[torch.Tensor, ...]:
        if os.environ.get("FAULTY_REFERENCE") == "dies":
            os.abort()
        x, cache = args
        after = cache.clone()
        return (*self.reference(x, after), after)

    def fake(self, *args: Any) -> tuple[torch.Tensor, ...]:
        return torch.empty_like(args[0]), torch.empty_like(args[0])

    def tolerance(self, problem: Problem, result: int = 0) -> Tolerance:
        return Tolerance(relative=1e-5, absolute=0.0)

    def make_problem(self, **params: Any) -> Problem:
        return Problem(self.name, (("dtype", "fp32"), ("width", int(params["width"]))))

    def model_problems(self, model: Mapping[str, Any], dtype: str) -> Sequence[Problem]:
        return []

    def problem_of(self, *args: Any) -> Problem:
        return self.make_problem(width=args[0].shape[1])

    def example_args(
        self, problem: Problem, tokens: int, device: torch.device, generator: torch.Generator
    ) -> tuple[Any, ...]:
        width = problem.int("width")
        x, cache = (torch.randn(rows, width, device=device, generator=generator) for rows in (tokens, ROWS))
        return x, cache

    def bytes_moved(self, problem: Problem, tokens: int) -> int:
        return 3 * tokens * problem.int("width") * 4

    def spec(self, kind: str, problem: Problem, config: Config) -> KernelSpec:
        fault = (CPU_FAULTS if kind == "cpu" else GPU_FAULTS)[config["FAULT"]]
        return KernelSpec(
            source=self.kernel_source(kind).file,
            entry=self.name,
            defines={"WIDTH": problem.int("width"), **config},
            params_format=self.binding(problem).params_format,
            block=1 if kind == "cpu" else 64,
            shared_bytes=_SHARED_BYTES if fault == "too much shared memory" else 0,
        )

    def binding(self, problem: Problem) -> Binding:
        width = problem.int("width")
        return Binding(
            tensors=(TensorArg(0, DTYPES["fp32"], (None, width)), TensorArg(1, DTYPES["fp32"], (ROWS, width))),
            constants=(),
            fields=(
                Field(FieldKind.POINTER, 0),
                Field(FieldKind.POINTER, 1),
                Field(FieldKind.RESULT, 0),
                Field(FieldKind.RESULT, 1),
                Field(FieldKind.TOKENS),
            ),
            params_format="PPPPi",
            results=(Result(DTYPES["fp32"], (None, width)), Result(DTYPES["fp32"], (None, width))),
        )

    def launch_shape(self, problem: Problem, config: Config) -> LaunchShape:
        return LaunchShape()


registry.add(Faulty())
