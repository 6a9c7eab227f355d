"""The HIP target, for AMD GPUs: hiprtc or clang to a code object, launched through the HIP runtime.

Its kernels were compiled for gfx90a, gfx942, gfx950 and others by clang, and emulated on a CPU at 64 lanes. No AMD GPU
has run them yet, and neither has any run what is below for machines with ROCm: hiprtc, loading and launching.
"""

from __future__ import annotations

import ctypes
import os
import re
import shlex
import shutil
import struct
import subprocess
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from autofuse.errors import AutofuseError, BadInput, CompileError, LaunchError, TargetUnavailable
from autofuse.kernels_src import sources, write_sources
from autofuse.targets.base import Artifact, Check, Kernel, KernelSpec, Resources, Target, Toolchain
from autofuse.targets.kernel_cache import KernelCache
from autofuse.targets.triton import argument_pointers, compile_triton, launched

__all__ = ["HipToolchain"]

_COMPILE_TIMEOUT_S = 120.0
_CLANGS = ("amdclang++", "/opt/rocm/llvm/bin/clang++", *(f"clang-{version}" for version in range(24, 16, -1)), "clang")
_CLANG_FLAGS = (
    *("-x", "hip", "--cuda-device-only", "--no-gpu-bundle-output", "-nogpuinc", "-nogpulib", "-std=c++17", "-O3"),
    *("-Wno-everything", "-Rpass-analysis=kernel-resource-usage"),
)
_ARCH = re.compile(r"gfx[0-9a-f]{3,5}")
_NO_LINKER = re.compile(r"posix_spawn failed|\"lld\" doesn't exist")
_SHOWN = ("gfx90a", "gfx94", "gfx95", "gfx10", "gfx11", "gfx12")  # arches that a message lists: not the oldest
_SHARED_BYTES = 64 << 10  # LDS of a block (LLVM's AMDGPU user guide, "addressable local memory"), but for these:
_MORE_SHARED_BYTES = {"gfx950": 160 << 10}
_CHOOSE = (
    "install the project with its 'amd' extra, or clang 17 or later with lld (Debian: clang-19 lld-19), "
    "or set AUTOFUSE_HIP_CLANG to one"
)


@dataclass(frozen=True)
class _Clang:
    """A clang that compiles for AMD GPUs.

    Attributes:
        command: what runs it.
        lld: what runs its linker, if that is no program of its own which clang finds.
    """

    command: tuple[str, ...]
    lld: tuple[str, ...] = ()


class _HipKernel(Kernel):
    def __init__(self, spec: KernelSpec, function: int, module: int, device: int) -> None:
        self.address, self.block, self.shared_bytes = function, spec.block, spec.shared_bytes
        self.separate_arguments = spec.triton is not None
        self._spec, self._module, self._device = spec, module, device
        self._pack = struct.Struct(spec.params_format).pack

    def launch(self, blocks: int, *params: int | float) -> None:
        # The runtime copies the parameters before it returns.
        content = ctypes.create_string_buffer(self._pack(*params))
        pointers = argument_pointers(self._spec, content)
        with torch.cuda.device(self._device):
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            grid, block = (blocks, 1, 1), (self.block, 1, 1)
            code = _runtime().hipModuleLaunchKernel(
                ctypes.c_void_p(self.address), *grid, *block, self.shared_bytes, stream, pointers, None
            )
        _check(code, f"launching {self._spec.entry} with {blocks} blocks of {self.block} threads")


class HipToolchain(Toolchain):
    """Compiles for any arch that hiprtc or a clang knows; loads and launches on this machine's AMD GPUs."""

    kind = "hip"

    def __init__(self) -> None:
        self._cache = KernelCache(".hsaco")

    def target(self, device: torch.device) -> Target:
        if not torch.version.hip or not torch.cuda.is_available():
            raise TargetUnavailable(f"device {device}: PyTorch {torch.__version__} finds no AMD GPU with ROCm")
        if (device.index or 0) >= torch.cuda.device_count():
            raise TargetUnavailable(f"device {device}: this machine has {torch.cuda.device_count()} GPU(s)")
        properties: Any = torch.cuda.get_device_properties(device)
        return Target("hip", properties.gcnArchName.partition(":")[0], properties.name)

    def provenance(self, device: torch.device) -> dict[str, str | int | float | None]:
        properties = torch.cuda.get_device_properties(device)
        return {
            "driver": None,
            "toolkit": torch.version.hip,
            "compiler": "hiprtc" if _hiprtc() else _version(_clang(self.target(device).arch)),
            "units": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
        }

    def check_arch(self, arch: str) -> None:
        if not _ARCH.fullmatch(arch):
            raise BadInput(f"arch {arch!r} is not an AMD GPU's, such as gfx90a or gfx942")
        if not _hiprtc():
            _clang(arch)

    def most_shared_bytes(self, arch: str) -> int:
        return _MORE_SHARED_BYTES.get(arch, _SHARED_BYTES)

    def compile(self, spec: KernelSpec, arch: str) -> Artifact:
        if spec.triton is not None:
            return compile_triton(spec, arch, self._cache)
        self.check_arch(arch)
        defines = [f"-D{name}={value}" for name, value in spec.defines.items()]
        # CDNA (gfx9) has 64 lanes; RDNA runs 32 unless told.
        if spec.defines.get("WARP_SIZE") == 64 and not arch.startswith("gfx9"):
            defines.append("-mwavefrontsize64")
        texts = list(sources(spec.source).values())
        if hiprtc := _hiprtc():
            options = [f"--gpu-architecture={arch}", "-std=c++17", "-O3", *defines]
            key = [*texts, *options, f"hiprtc {torch.version.hip}"]
            return self._cache.get(spec.entry, key, lambda binary: _compile_hiprtc(hiprtc, spec, arch, options, binary))
        clang = _clang(arch)
        flags = [*_CLANG_FLAGS, f"--offload-arch={arch}", *defines]
        key = [*texts, *clang.command, *flags, _version(clang)]
        return self._cache.get(spec.entry, key, lambda binary: _compile_clang(clang, spec, arch, flags, binary))

    def load(self, spec: KernelSpec, artifact: Artifact, device: torch.device) -> Kernel:
        arch = self.target(device).arch
        if spec.triton is not None:
            spec = launched(spec, artifact, arch)
        index = torch.cuda.current_device() if device.index is None else device.index
        try:
            image = artifact.path.read_bytes()
        except OSError as error:
            raise LaunchError(f"compiled kernel {artifact.path} cannot be read ({error.strerror})") from None
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        torch.empty(1, device=torch.device("cuda", index))  # creates the device's primary context
        with torch.cuda.device(index):
            _check(_runtime().hipModuleLoadData(ctypes.byref(module), image), f"loading {artifact.path}")
            _check(
                _runtime().hipModuleGetFunction(ctypes.byref(function), module, spec.entry.encode()),
                f"finding {spec.entry} in {artifact.path}",
            )
        assert function.value is not None
        assert module.value is not None
        return _HipKernel(spec, function.value, module.value, index)

    def checks(self) -> list[Check]:
        checks = []
        if _hiprtc():
            checks.append(Check("AMD compiler", True, f"hiprtc of ROCm {torch.version.hip}"))
        else:
            try:
                checks.append(Check("AMD compiler", True, "; ".join(map(_version, _clangs()))))
            except TargetUnavailable as error:
                if torch.version.hip:
                    checks.append(Check("AMD compiler", False, "none", str(error)))
        try:
            checks.append(Check("GPU", True, str(self.target(torch.device("cuda")))))
        except AutofuseError:
            checks.append(Check("GPU", False, "no AMD GPU with a ROCm build of PyTorch"))
        return checks


# ---- Compiling -------------------------------------------------------------------------------------------------------


@cache
def _hiprtc() -> ModuleType | None:
    """cupy's ROCm build, whose NVRTC module is hiprtc; None where PyTorch or cupy is no ROCm build."""
    if not torch.version.hip:
        return None
    try:
        from cupy.cuda import nvrtc, runtime
    except ImportError:
        return None
    return nvrtc if runtime.is_hip else None


def _compile_hiprtc(hiprtc: Any, spec: KernelSpec, arch: str, options: list[str], binary: Path) -> Resources:
    (_, text), *headers = sources(spec.source).items()
    program = hiprtc.createProgram(
        text, spec.source, [header.encode() for _, header in headers], [name.encode() for name, _ in headers]
    )
    try:
        try:
            hiprtc.compileProgram(program, options)
        except hiprtc.NVRTCError as error:
            raise _compile_error("hiprtc", spec, arch, hiprtc.getProgramLog(program) or str(error)) from None
        binary.write_bytes(hiprtc.getPTX(program))  # on ROCm, the code object
    finally:
        hiprtc.destroyProgram(program)
    return Resources()


def _compile_clang(clang: _Clang, spec: KernelSpec, arch: str, flags: list[str], binary: Path) -> Resources:
    source = str(write_sources(spec.source, binary.parent))
    run = _run([*clang.command, *flags, *_linker_flags(clang), source, "-o", str(binary)])
    if run.returncode and _NO_LINKER.search(run.stderr):
        raise TargetUnavailable(f"{shlex.join(clang.command)} finds no lld to link with: {_CHOOSE}")
    if run.returncode:
        log = run.stderr.replace(f"{binary.parent}/", "")  # a folder that is gone by then
        raise _compile_error(Path(clang.command[0]).name, spec, arch, log)
    return _resources(run.stderr)


def _linker_flags(clang: _Clang) -> list[str]:
    """Clang runs ``lld -flavor gnu …``, and looks first for a file whose path is what follows -B and that name."""
    if not clang.lld:
        return []

    def write(script: Path) -> Resources:
        script.write_text(f'#!/bin/sh\nshift 2\nexec {shlex.join(clang.lld)} "$@"\n', encoding="utf-8")
        script.chmod(0o755)
        return Resources()

    script = KernelCache("-lld").get("clang", clang.lld, write).path
    return [f"-B{str(script).removesuffix('lld')}"]


def _compile_error(compiler: str, spec: KernelSpec, arch: str, log: str) -> CompileError:
    first = next((line for line in log.splitlines() if "error" in line.lower()), log[:200])
    return CompileError(f"{compiler} does not compile {spec.source} for {arch}: {first.strip()}", log)


def _resources(log: str) -> Resources:
    """Reads clang's remarks: vector registers of a lane, its scratch memory, LDS of a block."""

    def number(name: str) -> int | None:
        match = re.search(rf"remark: +{re.escape(name)}: (\d+)", log)
        return int(match[1]) if match else None

    # Scratch is what the compiler spills to, and local arrays that it could not keep in registers.
    return Resources(number("VGPRs"), number("ScratchSize [bytes/lane]"), number("LDS Size [bytes/block]"))


@cache
def _clang(arch: str) -> _Clang:
    """The first clang here that compiles for ``arch``. Raises BadInput, TargetUnavailable."""
    for clang in _clangs():
        if arch in _known_arches(clang.command):
            return clang
    names = ", ".join(shlex.join(clang.command) for clang in _clangs())
    known = {name for clang in _clangs() for name in _known_arches(clang.command) if name.startswith(_SHOWN)}
    raise BadInput(f"arch {arch!r}: {names} compiles for {', '.join(sorted(known))}; for newer ones {_CHOOSE}")


@cache
def _clangs() -> tuple[_Clang, ...]:
    """The clangs here that compile for AMD GPUs, the preferred one first: ``$AUTOFUSE_HIP_CLANG``, ROCm's, others on
    the PATH from the newest on, the one that the package ziglang holds. Raises TargetUnavailable if there is none.
    """
    found = [_Clang((name,)) for name in _CLANGS if shutil.which(name)]
    if chosen := os.environ.get("AUTOFUSE_HIP_CLANG"):
        try:
            clang = _of_command(tuple(shlex.split(chosen)))
        except ValueError:  # a quotation mark without its other half
            clang = _Clang(())
        if not clang.command or not shutil.which(clang.command[0]) or not _known_arches(clang.command):
            raise TargetUnavailable(
                f"AUTOFUSE_HIP_CLANG={chosen!r} is not a clang that compiles for AMD GPUs: {_CHOOSE}"
            )
        found.insert(0, clang)
    if (package := find_spec("ziglang")) and package.origin:
        found.append(_of_command((str(Path(package.origin).with_name("zig")), "clang")))
    found = [clang for clang in found if _known_arches(clang.command)]
    if not found:
        raise TargetUnavailable(f"no clang that compiles for AMD GPUs found: {_CHOOSE}")
    return tuple(found)


def _of_command(command: tuple[str, ...]) -> _Clang:
    """Zig (``zig clang``, ``python -m ziglang clang``) is a clang and an lld in one."""
    is_zig = len(command) > 1 and Path(command[-2]).name in ("zig", "ziglang") and command[-1] == "clang"
    return _Clang(command, (*command[:-1], "ld.lld") if is_zig else ())


@cache
def _known_arches(command: tuple[str, ...]) -> tuple[str, ...]:
    run = _run([*command, "--target=amdgcn-amd-amdhsa", "-nogpulib", "--print-supported-cpus"])
    return tuple(re.findall(r"^\s+(gfx[0-9a-f]+)$", run.stdout + run.stderr, re.MULTILINE))


@cache
def _version(clang: _Clang) -> str:
    lines = _run([*clang.command, "--version"]).stdout.splitlines()
    return f"{shlex.join(clang.command)}: {lines[0].strip() if lines else 'unknown version'}"


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise CompileError(f"{command[0]} did not end within {_COMPILE_TIMEOUT_S:.0f} s") from None
    except OSError as error:
        raise TargetUnavailable(f"{command[0]} cannot be run ({error}): {_CHOOSE}") from None


# ---- The HIP runtime, through ctypes ---------------------------------------------------------------------------------


@cache
def _runtime() -> ctypes.CDLL:
    """The libamdhip64 that PyTorch uses. Raises TargetUnavailable."""
    bundled = Path(torch.__file__).parent / "lib" / "libamdhip64.so"
    try:
        library = ctypes.CDLL(str(bundled) if bundled.exists() else "libamdhip64.so")
    except OSError as error:
        raise TargetUnavailable(f"no HIP runtime: {error}") from None
    number, address = ctypes.c_uint, ctypes.c_void_p
    library.hipModuleLaunchKernel.argtypes = [address, *(number,) * 7, address, address, address]
    library.hipModuleLoadData.argtypes = [ctypes.POINTER(address), ctypes.c_char_p]
    library.hipModuleGetFunction.argtypes = [ctypes.POINTER(address), address, ctypes.c_char_p]
    library.hipGetErrorString.restype = ctypes.c_char_p
    return library


def _check(code: int, what: str) -> None:
    if code:
        text = (_runtime().hipGetErrorString(code) or b"unknown error").decode()
        raise LaunchError(f"{what}: {text} (HIP error {code})")
