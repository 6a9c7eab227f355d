"""What a target is: something that kernels are compiled for, loaded on and timed on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from struct import calcsize

import torch

from autofuse.errors import BadInput

__all__ = [
    "HIDDEN_ARGUMENTS",
    "Artifact",
    "Check",
    "Kernel",
    "KernelSpec",
    "Resources",
    "Target",
    "Toolchain",
    "TritonSpec",
    "field_offsets",
]

HIDDEN_ARGUMENTS = 4
"""Triton adds pointers of its own to a kernel's arguments, in 3.6 two: to scratch memory, which none of ours asks for.
A launch offers so many null pointers; the driver reads as many as the kernel has."""


@dataclass(frozen=True)
class Target:
    """What a kernel is compiled for and timed on.

    Attributes:
        kind: ``cpu``, ``cuda`` or ``hip``.
        arch: the exact architecture: ``x86-64-v4``, ``sm_90a``, ``gfx942``.
        device_name: as the driver or the operating system gives it, e.g. ``NVIDIA H200``.

    Example:
        >>> str(Target("cuda", "sm_90a", "NVIDIA H200"))
        'cuda:sm_90a:NVIDIA H200'
    """

    kind: str
    arch: str
    device_name: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.arch}:{self.device_name}"

    @property
    def vendor(self) -> str:
        return {"cuda": "NVIDIA", "hip": "AMD"}.get(self.kind, "CPU")

    def same_arch(self, other: Target) -> bool:
        """Whether it is another GPU that runs the same machine code, within the same limits on a block's registers and
        shared memory: an H100 and an H200. They differ in memory, clocks and the number of multiprocessors, so a
        config of one works on the other, and may be slower there. CPUs of one arch differ in more, and are not alike.
        """
        return self != other and self.kind == other.kind != "cpu" and self.arch == other.arch

    @classmethod
    def parse(cls, text: str) -> Target:
        """Reads the canonical form back. Raises BadInput."""
        kind, _, rest = text.partition(":")
        arch, _, name = rest.partition(":")
        if not (kind and arch and name):
            raise BadInput(f"target {text!r} is not of the form kind:arch:device name")
        return cls(kind, arch, name)


@dataclass(frozen=True)
class TritonSpec:
    """What Triton compiles a kernel with, besides its constants.

    Attributes:
        signature: of each run-time argument, in order: Triton's name of its type (``*bf16``, ``i64``), and a power of
            two that every value is a multiple of: bytes of an address, elements of a stride.
        num_warps: of a block.
        num_stages: of software pipelining, in kernels with loops.
        waves_per_eu: on AMD, how many waves of a SIMD the compiler aims at; 0: as it likes.
    """

    signature: tuple[tuple[str, int], ...]
    num_warps: int
    num_stages: int = 1
    waves_per_eu: int = 0


@dataclass(frozen=True)
class KernelSpec:
    """What to compile: one kernel source with its tunables and the problem's constants fixed.

    Attributes:
        source: file name in ``kernels_src``.
        entry: the ``extern "C"`` function's name, or the Triton function's.
        defines: name → value, passed as ``-DNAME=value``, or as ``tl.constexpr`` arguments.
        params_format: the ``struct`` format of the kernel's one parameter, the C struct ``Params``. A Triton kernel
            takes the same fields as arguments of their own.
        block: threads per block (GPU); 1 on a CPU. Of a Triton kernel, the compiler decides.
        shared_bytes: dynamic shared memory per block, in bytes. Of a Triton kernel, the compiler decides.
        programmatic_launch: launch with programmatic dependent launch (NVIDIA, sm_90 and later).
        triton: None for C++.
    """

    source: str
    entry: str
    defines: Mapping[str, int | str]
    params_format: str
    block: int = 1
    shared_bytes: int = 0
    programmatic_launch: bool = False
    triton: TritonSpec | None = None

    def argument_offsets(self) -> tuple[int, ...]:
        """Where each of the kernel's arguments begins in the packed parameters: a C++ kernel has one, the struct."""
        return (0,) if self.triton is None else tuple(field_offsets(self.params_format))


def field_offsets(params_format: str) -> list[int]:
    """Where each field of a parameter struct begins, in bytes.

    Example:
        >>> field_offsets("Piqf")
        [0, 8, 16, 24]
    """
    return [calcsize(f"{params_format[:i]}0{code}") for i, code in enumerate(params_format)]


@dataclass(frozen=True)
class Resources:
    """What the compiler said of a kernel; None where it did not say. Sizes in bytes."""

    registers: int | None = None
    spill_bytes: int | None = None
    shared_bytes: int | None = None

    def as_dict(self) -> dict[str, int | None]:
        return asdict(self)


@dataclass(frozen=True)
class Artifact:
    """A compiled kernel on disk.

    Attributes:
        path: the cubin or shared library, in the kernel cache.
        seconds: how long the compiler took; 0 where it was in the cache.
    """

    path: Path
    resources: Resources = field(default_factory=Resources)
    seconds: float = 0.0


class Kernel(ABC):
    """A loaded kernel, ready to launch on one device.

    Attributes:
        address: of the C function (CPU), or the driver's function handle (CUDA).
        block, shared_bytes, programmatic_launch: how it is launched, as in KernelSpec.
        separate_arguments: whether the fields of its parameters are arguments of their own (Triton), not one struct.
    """

    address: int
    block: int = 1
    shared_bytes: int = 0
    programmatic_launch: bool = False
    separate_arguments: bool = False

    @abstractmethod
    def launch(self, blocks: int, *params: int | float) -> None:
        """Launches ``blocks`` blocks on PyTorch's current stream, without synchronising.

        ``params`` are the fields of the kernel's ``Params`` struct, in order. A CPU kernel runs to its end and splits
        the work itself: ``blocks`` means nothing there. Raises LaunchError.
        """


@dataclass(frozen=True)
class Check:
    """One line of ``autofuse doctor``: ``ok`` or what to do about it."""

    name: str
    ok: bool
    found: str
    remedy: str = ""


class Toolchain(ABC):
    """One kind of target: how to name its devices, compile for them, and load what was compiled."""

    kind: str

    @abstractmethod
    def target(self, device: torch.device) -> Target:
        """The target of ``device``. Raises TargetUnavailable."""

    @abstractmethod
    def provenance(self, device: torch.device) -> dict[str, str | int | float | None]:
        """What else could change a timing on ``device``: driver, toolkit, compiler, SM or core count, power cap…"""

    @abstractmethod
    def check_arch(self, arch: str) -> None:
        """Raises BadInput (an arch that there is no compiling for), TargetUnavailable (no compiler)."""

    def most_shared_bytes(self, arch: str) -> int | None:
        """Shared memory that a block of a GPU can have, static and dynamic; None where there is none, or unknown."""
        return None

    @abstractmethod
    def compile(self, spec: KernelSpec, arch: str) -> Artifact:
        """Compiles ``spec`` for ``arch``, or finds it in the kernel cache; needs no device.

        Raises BadInput (an arch it cannot compile for), CompileError, TargetUnavailable (no compiler).
        """

    @abstractmethod
    def load(self, spec: KernelSpec, artifact: Artifact, device: torch.device) -> Kernel:
        """Loads a compiled kernel on ``device``. Raises LaunchError, TargetUnavailable."""

    @abstractmethod
    def checks(self) -> list[Check]:
        """What this kind of target needs on this machine, and whether it is there."""
