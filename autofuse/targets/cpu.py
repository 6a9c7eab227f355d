"""The CPU target: a C++ compiler with OpenMP, shared libraries loaded by ctypes."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import struct
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from autofuse.cores import usable_cores
from autofuse.errors import BadInput, CompileError, LaunchError, TargetUnavailable
from autofuse.kernels_src import sources, write_sources
from autofuse.targets.base import Artifact, Check, Kernel, KernelSpec, Resources, Target, Toolchain
from autofuse.targets.kernel_cache import KernelCache

__all__ = ["CpuToolchain", "build_host_library"]

_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-fopenmp", "-w")
_COMPILE_TIMEOUT_S = 120.0

# Feature sets of the x86-64 psABI levels, by the flags of /proc/cpuinfo; a CPU has the last level all of whose and
# whose predecessors' flags it has.
_X86_LEVELS = (
    ("x86-64-v2", {"cx16", "lahf_lm", "popcnt", "sse4_1", "sse4_2", "ssse3"}),
    ("x86-64-v3", {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"}),
    ("x86-64-v4", {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}),
)


class _CpuKernel(Kernel):
    def __init__(self, function: Any, params_format: str) -> None:
        self.address = ctypes.cast(function, ctypes.c_void_p).value or 0
        self._function = function
        self._pack = struct.Struct(params_format).pack

    def launch(self, blocks: int, *params: int | float) -> None:
        # A bytes object of each call's own: nothing is shared between threads, and ctypes passes its address as it is.
        self._function(self._pack(*params))


def build_host_library(source: str, flags: Sequence[str], link: Sequence[str], identity: str) -> Path:
    """Compiles a source of ours, which is no kernel, into a shared library in the kernel cache.

    Args:
        flags, link: the compiler's arguments before and after the source.
        identity: what else the binary depends on.

    Raises CompileError, TargetUnavailable.
    """
    return _build(KernelCache(".so"), source, Path(source).stem, flags, link, identity).path


def _build(
    cache: KernelCache, source: str, entry: str, flags: Sequence[str], link: Sequence[str], identity: str
) -> Artifact:
    compiler = _compiler()

    def build(binary: Path) -> Resources:
        obj = binary.with_suffix(".o")
        _run_compiler([*compiler, *flags, "-c", str(write_sources(source, binary.parent)), "-o", str(obj)], source)
        _run_compiler([*compiler, "-shared", str(obj), *link, "-o", str(binary)], source)
        return Resources()

    key = [*sources(source).values(), *compiler, *flags, *link, _compiler_version(compiler), identity]
    return cache.get(entry, key, build)


class CpuToolchain(Toolchain):
    """Compiles for this machine's CPU, or for a psABI level such as ``x86-64-v3``."""

    kind = "cpu"

    def __init__(self) -> None:
        self._cache = KernelCache(".so")
        self._libraries: dict[Path, ctypes.CDLL] = {}

    def target(self, device: torch.device) -> Target:
        return Target("cpu", _host_arch(), f"{_cpu_facts()['model name']} ({usable_cores()} threads)")

    def provenance(self, device: torch.device) -> dict[str, str | int | float | None]:
        try:
            compiler: str | None = _compiler_version(_compiler())
        except TargetUnavailable:
            compiler = None
        return {
            "driver": platform.release(),
            "toolkit": platform.libc_ver()[1] or None,
            "compiler": compiler,
            "units": usable_cores(),
            "torch_threads": torch.get_num_threads(),
        }

    def check_arch(self, arch: str) -> None:
        crosses = platform.machine() in ("x86_64", "AMD64")
        if arch != _host_arch() and not (crosses and arch in {level for level, _ in _X86_LEVELS}):
            levels = ", ".join(level for level, _ in _X86_LEVELS)
            raise BadInput(f"arch {arch!r}: this machine's C++ compiler can do {_host_arch()} (this CPU) and {levels}")
        _compiler()

    def compile(self, spec: KernelSpec, arch: str) -> Artifact:
        self.check_arch(arch)
        march, identity = ("native", _host_identity()) if arch == _host_arch() else (arch, arch)
        flags = (*_FLAGS, f"-march={march}", *(f"-D{name}={value}" for name, value in spec.defines.items()))
        openmp = _openmp_library(_compiler_version(_compiler()))
        return _build(self._cache, spec.source, spec.entry, flags, (openmp,) if openmp else ("-fopenmp",), identity)

    def load(self, spec: KernelSpec, artifact: Artifact, device: torch.device) -> Kernel:
        try:
            library = self._libraries.get(artifact.path) or ctypes.CDLL(str(artifact.path))
            function = getattr(library, spec.entry)
        except (OSError, AttributeError) as error:
            raise LaunchError(f"compiled kernel {artifact.path} cannot be loaded ({error}): delete it") from None
        self._libraries[artifact.path] = library
        function.argtypes = [ctypes.c_char_p]
        function.restype = None
        return _CpuKernel(function, spec.params_format)

    def checks(self) -> list[Check]:
        try:
            compiler = _compiler()
            found = Check("C++ compiler", True, f"{shlex.join(compiler)}: {_compiler_version(compiler)}")
        except TargetUnavailable as error:
            return [Check("C++ compiler", False, "none", str(error))]
        spec = KernelSpec("self_check.cpp", "self_check", {}, "P")
        total = torch.zeros(1)
        try:
            self.load(spec, self.compile(spec, _host_arch()), torch.device("cpu")).launch(1, total.data_ptr())
        except (CompileError, LaunchError, TargetUnavailable) as error:
            return [found, Check("OpenMP", False, "a small kernel does not compile or load", str(error))]
        if total.item() != sum(range(64)):
            return [
                found,
                Check("OpenMP", False, f"a parallel sum of 0..63 gave {total.item()}", "set CXX to another compiler"),
            ]
        return [found, Check("OpenMP", True, f"{usable_cores()} threads")]


@cache
def _cpu_facts() -> dict[str, str]:
    facts = {"model name": platform.processor() or platform.machine(), "flags": ""}
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return facts
    facts.update({name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)})
    return facts


@cache
def _host_arch() -> str:
    machine = platform.machine()
    if machine not in ("x86_64", "AMD64"):
        return machine
    flags = set(_cpu_facts()["flags"].split())
    arch = "x86-64"
    for level, needed in _X86_LEVELS:
        if not needed <= flags:
            break
        arch = level
    return arch


@cache
def _host_identity() -> str:
    """What ``-march=native`` stands for here: a cache folder may be shared by different machines."""
    facts = _cpu_facts()
    return hashlib.sha256(f"{facts['model name']}\0{facts['flags']}".encode()).hexdigest()[:16]


def _compiler() -> list[str]:
    """The C++ compiler's command: ``$CXX``, else g++, else clang++. Raises TargetUnavailable."""
    if chosen := os.environ.get("CXX"):
        try:
            command = shlex.split(chosen)
        except ValueError:  # a quotation mark without its other half
            command = []
        if not command or shutil.which(command[0]) is None:
            raise TargetUnavailable(
                f"CXX={chosen!r} is not a command that can be run: set it to a C++ compiler, or unset it"
            )
        return command
    for name in ("g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise TargetUnavailable("no C++ compiler found: install g++ or clang++, or set CXX to one")


def _compiler_version(compiler: list[str]) -> str:
    return _compiler_version_cached(tuple(compiler))


@cache
def _compiler_version_cached(compiler: tuple[str, ...]) -> str:
    try:
        run = subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise TargetUnavailable(f"{shlex.join(compiler)} cannot be run ({error}): set CXX to a C++ compiler") from None
    return run.stdout.splitlines()[0].strip() if run.returncode == 0 and run.stdout else "unknown version"


@cache
def _openmp_library(compiler_version: str) -> str | None:
    """PyTorch's own copy of GCC's OpenMP runtime, for kernels built by GCC; None where there is none.

    Linked with it, our threads are PyTorch's threads. With a runtime of our own, two pools would spin against each
    other
    on the same cores.
    """
    if "clang" in compiler_version:
        return None
    libraries = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    libraries += sorted((Path(torch.__file__).parents[1] / "torch.libs").glob("libgomp*.so*"))
    return str(libraries[0]) if libraries else None


def _run_compiler(command: list[str], source: str) -> None:
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise CompileError(f"{command[0]} did not compile {source} within {_COMPILE_TIMEOUT_S:.0f} s") from None
    except OSError as error:
        raise TargetUnavailable(f"{command[0]} cannot be run ({error}): set CXX to a C++ compiler") from None
    if run.returncode != 0:
        log = run.stderr + run.stdout
        first = next((line for line in log.splitlines() if "error" in line.lower()), f"exit code {run.returncode}")
        raise CompileError(f"{command[0]} does not compile {source}: {first.strip()}", log)
