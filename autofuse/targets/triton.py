"""Compiling Triton kernels to the binaries that the CUDA and the HIP target load and launch like any other.

Triton is used as a compiler only, for an arch that need not be here, in a process of its own. Everything that it would
specialise a kernel for at run time is fixed beforehand: the divisors of addresses and strides are those that the op's
binding asks of every call, and no argument's value counts. So one binary is right for all calls that are launched.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from autofuse.errors import CompileError, TargetUnavailable
from autofuse.kernels_src import sources, write_sources
from autofuse.targets.base import HIDDEN_ARGUMENTS, Artifact, Check, KernelSpec, Resources
from autofuse.targets.kernel_cache import KernelCache
from autofuse.targets.nvrtc import ptxas_resources

__all__ = ["argument_pointers", "compile_triton", "lanes", "launched", "triton_check", "triton_unavailable"]

_OLDEST, _NEWEST = (3, 6), (3, 9)
_RANGE = "3.6 to 3.9"
_LIMIT_S = 300.0
_KEPT = ("PATH", "LD_LIBRARY_PATH", "LANG", "TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH", "TRITON_LIBDEVICE_PATH")
_FIRST_WITH_PDL, _FIRST_WITH_FP8 = 90, 89  # compute capability × 10
_TENSOR_MEMORY = 512  # columns, of a Blackwell SM; a kernel allocates there itself, and its launch says nothing of it
_NOTHING = ctypes.c_void_p(None)
_INSTALL = f"install triton {_RANGE} to have kernels in Triton tuned as well"


@cache
def triton_unavailable() -> str | None:
    """Why kernels in Triton cannot be compiled here, in one line; None where they can. Does not import Triton."""
    version = _version()
    if version is None:
        return f"there is no triton: {_INSTALL}"
    if not _OLDEST <= _numbers(version) <= _NEWEST:
        return f"triton {version} is not one of {_RANGE}, which the kernels are written for: {_INSTALL}"
    return None


def triton_check() -> Check:
    """The line of ``autofuse doctor``."""
    if why := triton_unavailable():
        return Check("triton", False, f"not used: {why}")
    return Check("triton", True, f"{_version()}, kernels in Triton are tuned beside those in C++")


def lanes(arch: str) -> int:
    """Of a warp in Triton's kernels: 64 on AMD's CDNA (gfx9…), 32 elsewhere."""
    return 64 if arch.startswith("gfx9") else 32


def launched(spec: KernelSpec, artifact: Artifact, arch: str) -> KernelSpec:
    """``spec`` with what only the compiled kernel tells of its launch: threads, and dynamic shared memory in bytes."""
    assert spec.triton is not None
    return replace(spec, block=spec.triton.num_warps * lanes(arch), shared_bytes=artifact.resources.shared_bytes or 0)


def argument_pointers(spec: KernelSpec, params: ctypes.Array[ctypes.c_char]) -> ctypes.Array[ctypes.c_void_p]:
    """What a launch through CUDA's or HIP's driver takes as the addresses of a kernel's arguments.

    Args:
        params: the packed parameters, which must outlive the launches; so must the result.
    """
    base = ctypes.addressof(params)
    addresses = [base + offset for offset in spec.argument_offsets()]
    if spec.triton is not None:
        addresses += [ctypes.addressof(_NOTHING)] * HIDDEN_ARGUMENTS
    return (ctypes.c_void_p * len(addresses))(*addresses)


def compile_triton(spec: KernelSpec, arch: str, cache: KernelCache) -> Artifact:
    """Compiles a kernel for an arch (``sm_90a``, ``gfx942``), or finds it in the kernel cache; needs no GPU.

    Raises CompileError (Triton refuses it, or fails), TargetUnavailable (no Triton).
    """
    assert spec.triton is not None
    request = {
        "module": Path(spec.source).stem,
        "entry": spec.entry,
        "signature": [list(pair) for pair in spec.triton.signature],
        "constants": _constants(spec.defines, arch),
        "options": _options(spec, arch),
        "target": _target(arch),
    }
    if why := triton_unavailable():
        raise TargetUnavailable(why)
    key = [*sources(spec.source).values(), json.dumps(request, sort_keys=True), arch, f"triton {_version()}"]
    return cache.get(spec.entry, key, lambda binary: _build(spec, arch, request, binary))


def _constants(defines: Mapping[str, int | str], arch: str) -> dict[str, int | str]:
    """The kernel's ``tl.constexpr`` arguments. A GPU that lacks the instructions of programmatic dependent launch, or
    those that convert to fp8, runs the same config without.
    """
    known = {"PDL": _FIRST_WITH_PDL, "FP8_NATIVE": _FIRST_WITH_FP8}
    lacking = [name for name, first in known.items() if arch.startswith("sm_") and _capability(arch) < first]
    return {**defines, **{name: 0 for name in lacking if name in defines}}


def _options(spec: KernelSpec, arch: str) -> dict[str, int | bool]:
    assert spec.triton is not None
    options: dict[str, int | bool] = {"num_warps": spec.triton.num_warps, "num_stages": spec.triton.num_stages}
    if arch.startswith("gfx"):
        return {**options, "waves_per_eu": spec.triton.waves_per_eu}
    return {**options, "launch_pdl": spec.programmatic_launch and _capability(arch) >= _FIRST_WITH_PDL}


def _target(arch: str) -> tuple[str, int | str, int]:
    """Arguments of Triton's GPUTarget."""
    if arch.startswith("gfx"):
        return "hip", arch, lanes(arch)
    return "cuda", _capability(arch), lanes(arch)


def _capability(arch: str) -> int:
    return int(arch.removeprefix("sm_").rstrip("af"))


def _build(spec: KernelSpec, arch: str, request: Mapping[str, Any], binary: Path) -> Resources:
    folder = binary.parent
    package = folder / "kernels"
    package.mkdir()
    (package / "__init__.py").touch()
    write_sources(spec.source, package)
    what = f"{spec.source} for {arch}"
    _run({**request, "path": [entry for entry in sys.path if entry], "folder": str(folder)}, folder, what)
    try:
        answer = json.loads((folder / "answer.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        log = (folder / "log").read_text(encoding="utf-8", errors="replace")
        last = log.strip().splitlines()[-1:] or ["it said nothing"]
        raise CompileError(f"Triton {_version()} died compiling {what}: {last[0]}", log) from None
    if "error" in answer:
        raise CompileError(f"Triton {_version()} does not compile {what}: {answer['error']}", answer["log"])
    _check_launchable(spec, answer, what)
    (folder / "kernel.bin").replace(binary)
    log = (folder / "log").read_text(encoding="utf-8", errors="replace")
    found = ptxas_resources(log) if arch.startswith("sm_") else _amd_resources(answer["assembly"])
    return replace(found, shared_bytes=answer["shared_bytes"])


def _run(request: Mapping[str, Any], folder: Path, what: str) -> None:
    # Settings of Triton, ptxas and LLVM that a user made for other kernels would change ours.
    environment = {name: value for name, value in os.environ.items() if name in _KEPT}
    environment |= {
        **dict.fromkeys(("HOME", "TMPDIR"), str(folder)),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TRITON_DISABLE_LINE_INFO": "1",  # equal code in equal binaries, wherever it was compiled
        "TRITON_DUMP_PTXAS_LOG": "1",
    }
    worker = Path(__file__).with_name("triton_worker.py")
    with (folder / "log").open("w", encoding="utf-8") as log:
        try:
            # -I: neither its own folder nor the environment say what is imported, but the request's path.
            subprocess.run(
                [sys.executable, "-I", str(worker)],
                input=json.dumps(request),
                stdout=log,
                stderr=log,
                text=True,
                cwd=folder,
                env=environment,
                timeout=_LIMIT_S,
            )
        except subprocess.TimeoutExpired:
            raise CompileError(f"Triton does not compile {what} within {_LIMIT_S:.0f} s") from None


def _check_launchable(spec: KernelSpec, answer: Mapping[str, Any], what: str) -> None:
    """Raises CompileError for a kernel that needs more of its launch than it gets."""
    assert spec.triton is not None
    wrong = ""
    if answer["name"] != spec.entry:
        wrong = f"its entry is called {answer['name']}"
    elif answer["num_warps"] != spec.triton.num_warps:
        wrong = f"it has {answer['num_warps']} warps in place of {spec.triton.num_warps}"
    elif answer["scratch"]:
        wrong = f"it needs memory besides its arguments: {answer['scratch']}"
    elif answer["tensor_memory"] > _TENSOR_MEMORY:
        wrong = f"it needs {answer['tensor_memory']} columns of tensor memory, of which there are {_TENSOR_MEMORY}"
    if wrong:
        raise CompileError(f"Triton {_version()} makes a kernel of {what} that cannot be launched: {wrong}")


def _amd_resources(assembly: str) -> Resources:
    """Reads the code object's metadata: vector registers of a lane, and its scratch memory in bytes."""

    def number(name: str) -> int | None:
        match = re.search(rf"\.{name}:\s+(\d+)", assembly)
        return int(match[1]) if match else None

    return Resources(number("vgpr_count"), number("private_segment_fixed_size"))


@cache
def _version() -> str | None:
    """As the package itself says it: its builds for other GPUs are distributed under other names."""
    found = find_spec("triton")
    if found is None or found.origin is None:
        return None
    try:
        text = Path(found.origin).read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(r"^__version__ = ['\"]([^'\"]+)['\"]", text, re.MULTILINE)
    return match[1] if match else None


def _numbers(version: str) -> tuple[int, int]:
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else (0, 0)
