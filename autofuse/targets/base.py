"""What a target is: something that kernels are compiled for, loaded on and timed on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from autofuse.errors import BadInput

__all__ = ["Artifact", "Check", "Kernel", "KernelSpec", "Resources", "Target", "Toolchain"]


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
class KernelSpec:
    """What to compile: one kernel source with its tunables and the problem's constants fixed.

    Attributes:
        source: file name in ``kernels_src``.
        entry: the ``extern "C"`` function's name.
        defines: name → value, passed as ``-DNAME=value``.
        params_format: the ``struct`` format of the kernel's one parameter, the C struct ``Params``.
        block: threads per block (GPU); 1 on a CPU.
        shared_bytes: dynamic shared memory per block, in bytes.
        programmatic_launch: launch with programmatic dependent launch (NVIDIA, sm_90 and later).
    """

    source: str
    entry: str
    defines: Mapping[str, int | str]
    params_format: str
    block: int = 1
    shared_bytes: int = 0
    programmatic_launch: bool = False


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
    """

    address: int
    block: int = 1
    shared_bytes: int = 0
    programmatic_launch: bool = False

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
