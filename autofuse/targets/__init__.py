"""Targets: what can compile kernels and launch them."""

from __future__ import annotations

from functools import cache

import torch

from autofuse.errors import BadInput, TargetUnavailable
from autofuse.targets.base import Artifact, Check, Kernel, KernelSpec, Resources, Target, Toolchain, TritonSpec
from autofuse.targets.cpu import CpuToolchain, build_host_library
from autofuse.targets.cuda import CudaToolchain
from autofuse.targets.hip import HipToolchain

__all__ = [
    "KINDS",
    "Artifact",
    "Check",
    "Kernel",
    "KernelSpec",
    "Resources",
    "Target",
    "Toolchain",
    "TritonSpec",
    "build_host_library",
    "kind_of_arch",
    "parse_device",
    "target_of",
    "toolchain",
]

_TOOLCHAINS: dict[str, type[Toolchain]] = {"cpu": CpuToolchain, "cuda": CudaToolchain, "hip": HipToolchain}

KINDS = tuple(_TOOLCHAINS)


@cache
def toolchain(kind: str) -> Toolchain:
    """The one toolchain for targets of ``kind``. Raises TargetUnavailable for a kind that there are no kernels for."""
    if kind not in _TOOLCHAINS:
        raise TargetUnavailable(f"there are no kernels for {kind!r} devices; there are for {', '.join(KINDS)}")
    return _TOOLCHAINS[kind]()


@cache
def target_of(device: torch.device) -> Target:
    """The target of ``device``. Raises TargetUnavailable."""
    kind = "hip" if device.type == "cuda" and torch.version.hip else device.type
    return toolchain(kind).target(device)


def kind_of_arch(arch: str) -> str:
    """The kind of target that an arch's name belongs to: ``sm_*`` cuda, ``gfx*`` hip, anything else the CPU's."""
    return "cuda" if arch.startswith("sm_") else "hip" if arch.startswith("gfx") else "cpu"


def parse_device(text: str) -> torch.device:
    """``cpu``, ``cuda`` or ``cuda:1``; ``auto`` is the GPU if there is one. Raises BadInput, TargetUnavailable."""
    if text == "auto":
        text = "cuda" if torch.cuda.is_available() and not torch.version.hip else "cpu"
    try:
        device = torch.device(text)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):  # PyTorch calls AMD's GPUs cuda, too
        raise BadInput(f"device {text!r} is none of auto, cpu, cuda, cuda:N")
    if device.type == "cpu":
        if device.index:
            raise BadInput(f"device {text!r}: there is one cpu; give cpu, cuda or cuda:N")
        device = torch.device("cpu")
    target_of(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
