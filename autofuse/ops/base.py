"""FusedOp: all that autofuse needs to know of one fused operator."""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar

import torch

from autofuse.errors import BadInput, UnsupportedCall
from autofuse.kernels_src import source_hash
from autofuse.ops.binding import Binding, IndexBound, LaunchShape
from autofuse.ops.languages import CPP, TRITON, language_of
from autofuse.ops.problem import Config, Problem
from autofuse.ops.space import SearchSpace
from autofuse.targets import KernelSpec
from autofuse.targets.triton import triton_unavailable

__all__ = ["DTYPES", "FusedOp", "KernelSource", "Tolerance", "dtype_name"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_UNUSUAL = 0.01  # share of the elements that may be beyond a tolerance's usual bound
_FEW_UNUSUAL = 2  # of few elements, so many may be: one tie among 60 says nothing


def dtype_name(dtype: torch.dtype) -> str:
    """``bf16``, ``fp16`` or ``fp32``. Raises UnsupportedCall."""
    try:
        return _NAMES[dtype]
    except KeyError:
        raise UnsupportedCall(f"dtype {dtype} is none of {', '.join(map(str, _NAMES))}") from None


@dataclass(frozen=True)
class KernelSource:
    """A kernel for one kind of target, in one language.

    Attributes:
        file: in ``kernels_src``: C++, or Python for Triton.
        space: its tunables.
        default: what runs where nobody has tuned: sound everywhere, best nowhere.
        guess: values of the tunables in which what is likely fast differs from the default, by the winners of tunings
            elsewhere; some GPUs cannot run that. None where nobody knows.
    """

    file: str
    space: SearchSpace
    default: Callable[[Problem, int], Config]
    guess: Callable[[Problem, int], Mapping[str, int]] | None = None

    @property
    def language(self) -> str:
        """``c++`` or ``triton``."""
        return TRITON if self.file.endswith(".py") else CPP

    def first_configs(self, problem: Problem, tokens: int) -> list[Config]:
        """What a tuner tries before anything else: the default, and the guess as far as the space allows it."""
        default = self.default(problem, tokens)
        if self.guess is None:
            return [default]
        guessed = self.space.towards(default, self.guess(problem, tokens), problem, tokens)
        return list(dict.fromkeys([default, guessed]))


@dataclass(frozen=True)
class Tolerance:
    """|out - reference| ≤ absolute + relative · |reference|, elementwise, the reference computed in fp64.

    Attributes:
        usual: a tighter relative bound that 99 % of the elements must meet; None asks for nothing. ``relative`` has to
            allow for fp32 arithmetic that lands on the other side of a tie, which is rare. A kernel that leaves out
            one of several roundings stays within that as well, but does so everywhere.
        usual_absolute: what ``usual`` is added to, if it is less than ``absolute``: where sums of what was rounded
            nearly cancel, a tie shows as much more than a unit of the result.
    """

    relative: float
    absolute: float
    usual: float | None = None
    usual_absolute: float | None = None

    def error(self, out: torch.Tensor, reference: torch.Tensor) -> float:
        """How wrong ``out`` is, right up to 1; infinite for NaN where the reference has none.

        The larger of two ratios: the largest difference to what is allowed, and the number of elements beyond the
        usual bound to those that may be (1 %, and two among the first 200).
        """
        if out.numel() == 0:
            return 0.0
        reference = reference.double()
        difference, size = (out.double() - reference).abs(), reference.abs()
        worst = (difference / (self.absolute + self.relative * size)).max().item()
        if worst != worst:
            return float("inf")
        if self.usual is None:
            return worst
        absolute = self.absolute if self.usual_absolute is None else self.usual_absolute
        beyond = (difference > absolute + self.usual * size).sum().item()
        return max(worst, beyond / max(out.numel() * _UNUSUAL, _FEW_UNUSUAL))


class FusedOp(ABC):
    """One fused operator: its schema, meaning, problem, kernels and costs.

    A subclass in a file of its own, listed in ``autofuse.ops.OPS``, and its kernel sources are a whole op: the
    registration with PyTorch, dispatch, tuner, database and command line work from what is declared here.

    ``args`` below are the op's arguments in the schema's order, without ``plan``.
    """

    name: ClassVar[str]
    mutates: ClassVar[tuple[int, ...]] = ()
    """Indices of the arguments that the op writes into; ``exact`` returns their expected contents after its results."""
    schema: ClassVar[str]
    """PyTorch's schema of arguments and results. The last argument is ``str plan=""``."""
    shared: ClassVar[tuple[int, ...]] = ()
    """Indices of the arguments that all layers of a model share, and that therefore stay in the caches."""
    bounds: ClassVar[tuple[IndexBound, ...]] = ()
    """What the values of integer arguments may be. The first is of one that has as many as there are tokens.

    Values are looked at on a CPU in every call; on a GPU, which has to be waited for, in the first call of a kind, or
    in each with AUTOFUSE_CHECK_INDICES=1.
    """
    kernels: ClassVar[Mapping[str, KernelSource]]
    """Kind of target → its kernel, in C++."""
    triton_kernels: ClassVar[Mapping[str, KernelSource]] = MappingProxyType({})
    """Kind of target → the same in Triton, whose configs are tuned beside those of ``kernels`` where Triton is."""

    # ---- meaning ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def reference(self, *args: Any) -> tuple[torch.Tensor, ...]:
        """The op in plain PyTorch: the unfused baseline, and the fallback for whatever no kernel handles."""

    def unfused(self, *args: Any) -> tuple[torch.Tensor, ...]:
        """What a model would run in place of the op where nothing is padded: the baseline. The reference, unless that
        has to take more care.
        """
        return self.reference(*args)

    @abstractmethod
    def exact(self, *args: Any) -> tuple[torch.Tensor, ...]:
        """The op computed in fp64, with the roundings that its semantics ask for: what kernels are checked against.

        Returns: the results, then the contents that each of ``mutates`` must have afterwards. Changes nothing.
        """

    @abstractmethod
    def fake(self, *args: Any) -> tuple[torch.Tensor, ...]:
        """Results' shapes, dtypes and strides, for tracing."""

    @abstractmethod
    def tolerance(self, problem: Problem, result: int = 0) -> Tolerance:
        """How far a kernel's ``result``, counted as ``exact`` returns them, may be off, with the reason for the
        numbers.
        """

    # ---- problem ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def make_problem(self, **params: Any) -> Problem:
        """The problem with these parameters. Raises UnsupportedCall if there are no kernels for it."""

    @abstractmethod
    def model_problems(self, model: Mapping[str, Any], dtype: str) -> Sequence[Problem]:
        """The problems that a model makes of this op, from its Hugging Face config; none if it has no use for it."""

    @abstractmethod
    def problem_of(self, *args: Any) -> Problem:
        """The problem of a call. Raises UnsupportedCall, BadInput (arguments that make no sense together)."""

    @abstractmethod
    def example_args(
        self, problem: Problem, tokens: int, device: torch.device, generator: torch.Generator
    ) -> tuple[Any, ...]:
        """Random arguments as a model would make them, strided views included."""

    def check_args(
        self, problem: Problem, tokens: int, device: torch.device, generator: torch.Generator
    ) -> tuple[Any, ...]:
        """Random arguments as no model would make them, for verification: whatever a kernel may take for granted by
        mistake (equal strides, an eps too small to matter, a block size) is different here. Every stride is a multiple
        of 16 bytes, so that kernels with the widest vectors launch. ``example_args``, unless overridden.
        """
        return self.example_args(problem, tokens, device, generator)

    @abstractmethod
    def bytes_moved(self, problem: Problem, tokens: int) -> int:
        """The fewest bytes that must cross memory: each input read once, each output written once."""

    # ---- kernels ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def spec(self, kind: str, problem: Problem, config: Config) -> KernelSpec:
        """What to compile for a config."""

    @abstractmethod
    def binding(self, problem: Problem) -> Binding:
        """How a call of this problem becomes a launch."""

    @abstractmethod
    def launch_shape(self, problem: Problem, config: Config) -> LaunchShape:
        """The grid of a config, and the alignment it needs."""

    def sweep_problems(self) -> Sequence[Problem]:
        """Small problems, ragged ones among them, that together reach every path of the kernels."""
        return ()

    def random_problem(self, source: random.Random) -> Problem:
        """A random problem for fuzzing, so small that a thousand calls take seconds. One of ``sweep_problems``, unless
        overridden.
        """
        return source.choice(self.sweep_problems())

    @property
    def schema_without_plan(self) -> str:
        """The schema of the same op, but that it takes no plan."""
        return self.schema.replace(', str plan=""', "")

    @property
    def result_count(self) -> int:
        """How many tensors the op returns."""
        return len(torch._C.parse_schema(self.name + self.schema).returns)

    def split_plan(self, args: Sequence[Any]) -> tuple[tuple[Any, ...], str]:
        """A call's arguments without the plan, and the plan; PyTorch leaves out trailing ones that are defaults."""
        *whole, plan = (*args, *self._defaults[len(args) :])
        return tuple(whole), plan

    def with_defaults(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """All arguments but the plan, of a call without it of which PyTorch left out trailing defaults."""
        return (*args, *self._defaults[len(args) : -1])

    def check_indices(self, args: Sequence[Any]) -> None:
        """Raises BadInput for an integer argument that names a row which its tensor does not have (see ``bounds``).

        It looks at the values, so on a GPU it waits for what was launched before.
        """
        for bound in self.bounds:
            values, rows = args[bound.index], args[bound.of]
            count = 0 if values is None or rows is None else math.prod(rows.shape[: bound.dims])
            if count == 0:  # nothing is looked up, or there is nothing that could be written
                continue
            values = values[: len(args[self.bounds[0].index])]
            wrong = (values >= count) if bound.padded else (values >= count) | (values < 0)
            if wrong.any():
                token = int(wrong.nonzero()[0])
                names = [argument.name for argument in torch._C.parse_schema(self.name + self.schema).arguments]
                raise BadInput(
                    f"{self.name}: {names[bound.index]}[{token}] is {int(values[token])}, but {names[bound.of]} "
                    f"{list(rows.shape)} has {count} rows"
                )

    @cached_property
    def _defaults(self) -> tuple[Any, ...]:
        return tuple(argument.default_value for argument in torch._C.parse_schema(self.name + self.schema).arguments)

    def source_hash(self, kind: str, config: Config | None = None) -> str:
        """Changes with the source of the kernel that ``config`` is of, the C++ one unless it is given.

        Raises UnsupportedCall if there is no kernel for ``kind``.
        """
        return source_hash(self.kernel_source(kind, config).file)

    def source_hashes(self, kind: str) -> tuple[str, ...]:
        """Of each kernel that can be compiled here, the C++ one's first. Raises UnsupportedCall."""
        return tuple(source_hash(kernel.file) for kernel in self.kernel_sources(kind))

    def plan_source(self, kind: str, configs: Iterable[Config | None]) -> str:
        """What a plan of these configs names as its source: the hashes of their kernels, joined by ``+``.

        Raises UnsupportedCall.
        """
        hashes = {self.source_hash(kind, config): None for config in configs if config is not None}
        return "+".join(sorted(hashes)) or self.source_hash(kind)

    def kernel_source(self, kind: str, config: Config | None = None) -> KernelSource:
        """The kernel for a kind of target that ``config`` is of: the C++ one unless it is given, or where there is no
        other, so that its space says what is wrong with the config. Raises UnsupportedCall.
        """
        if kind not in self.kernels:
            raise UnsupportedCall(f"{self.name} has no kernel for {kind}; it has for {', '.join(self.kernels)}")
        if config is not None and language_of(config) == TRITON:
            return self.triton_kernels.get(kind, self.kernels[kind])
        return self.kernels[kind]

    def kernel_sources(self, kind: str) -> tuple[KernelSource, ...]:
        """The kernels for a kind of target that can be compiled here: the C++ one, and with Triton the one in that.

        Raises UnsupportedCall.
        """
        first = self.kernel_source(kind)
        if kind not in self.triton_kernels or triton_unavailable() is not None:
            return (first,)
        return first, self.triton_kernels[kind]

    def default_config(self, kind: str, problem: Problem, tokens: int) -> Config:
        """The config that runs where nobody has tuned."""
        return self.kernel_source(kind).default(problem, tokens)
