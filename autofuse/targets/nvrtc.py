"""Compiling CUDA sources to cubins with NVRTC, driven through cupy; needs no GPU and no driver."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

from autofuse.errors import BadInput, CompileError, TargetUnavailable
from autofuse.kernels_src import sources
from autofuse.targets.base import KernelSpec, Resources

__all__ = ["check_arch", "compile_cubin", "flags", "nvrtc", "ptxas_resources", "supported_arches", "version"]

_FLAGS = ("--std=c++17", "--ptxas-options=-v")
_ARCH = re.compile(r"sm_(\d+)([af]?)")


def nvrtc() -> ModuleType:
    """cupy's NVRTC module. Raises TargetUnavailable with what to install.

    Imported on first use: cupy takes 0.3 s, and a machine without an NVIDIA GPU need not have it.
    """
    try:
        from cupy.cuda import nvrtc as module

        module.getVersion()
    except ImportError as error:
        raise TargetUnavailable(
            f"NVRTC is needed to compile CUDA kernels, and cupy cannot be imported ({error}): "
            "install the project with its 'cuda' extra"
        ) from None
    except Exception as error:  # cupy raises RuntimeError, OSError and errors of its own where libnvrtc is missing
        raise TargetUnavailable(f"cupy finds no NVRTC library ({error}): install nvidia-cuda-nvrtc") from None
    return module


def version() -> str:
    """NVRTC's version, e.g. ``13.0``. Raises TargetUnavailable."""
    major, minor = nvrtc().getVersion()
    return f"{major}.{minor}"


def supported_arches() -> list[str]:
    """The arches that this NVRTC compiles for, e.g. ``sm_90``. Raises TargetUnavailable."""
    return [f"sm_{number}" for number in nvrtc().getSupportedArchs()]


def check_arch(arch: str) -> None:
    """Raises BadInput for an arch that NVRTC cannot compile for, TargetUnavailable."""
    match = _ARCH.fullmatch(arch)
    if match is None or f"sm_{match[1]}" not in supported_arches():
        raise BadInput(
            f"arch {arch!r}: NVRTC {version()} compiles for {', '.join(supported_arches())} (sm_90a and later with 'a')"
        )


def flags(spec: KernelSpec, arch: str) -> list[str]:
    """NVRTC's options for ``spec``. Raises BadInput for an arch that it cannot compile for."""
    check_arch(arch)
    return [*_FLAGS, f"--gpu-architecture={arch}", *(f"-D{name}={value}" for name, value in spec.defines.items())]


def compile_cubin(spec: KernelSpec, arch: str, binary: Path) -> Resources:
    """Compiles ``spec`` and writes the cubin to ``binary``. Raises BadInput, CompileError, TargetUnavailable."""
    module = nvrtc()
    (_, text), *headers = sources(spec.source).items()
    program = module.createProgram(
        text, spec.source, [header.encode() for _, header in headers], [name.encode() for name, _ in headers]
    )
    try:
        try:
            module.compileProgram(program, flags(spec, arch))
        except module.NVRTCError as error:
            log = module.getProgramLog(program)
            first = next((line for line in log.splitlines() if "error" in line.lower()), str(error))
            raise CompileError(f"NVRTC does not compile {spec.source} for {arch}: {first.strip()}", log) from None
        binary.write_bytes(module.getCUBIN(program))
        return ptxas_resources(module.getProgramLog(program))
    finally:
        module.destroyProgram(program)


def ptxas_resources(log: str) -> Resources:
    """Reads ptxas's report: registers, spilled bytes (stores and loads), static shared memory."""

    def number(pattern: str) -> int | None:
        match = re.search(pattern, log)
        return int(match[1]) if match else None

    stores, loads = number(r"(\d+) bytes spill stores"), number(r"(\d+) bytes spill loads")
    return Resources(
        registers=number(r"Used (\d+) registers"),
        spill_bytes=None if stores is None else stores + (loads or 0),
        shared_bytes=number(r"(\d+) bytes smem") or 0,
    )
