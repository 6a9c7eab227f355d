"""The CUDA target: NVRTC to a cubin for the exact arch, launched through the driver on PyTorch's current stream."""

from __future__ import annotations

import ctypes
import struct
import subprocess
import threading
from typing import Any

import torch

from autofuse.errors import AutofuseError, LaunchError, TargetUnavailable
from autofuse.kernels_src import sources
from autofuse.targets import nvrtc
from autofuse.targets.base import Artifact, Check, Kernel, KernelSpec, Target, Toolchain
from autofuse.targets.cuda_driver import (
    MAX_DYNAMIC_SHARED_BYTES,
    LaunchConfig,
    check,
    driver,
    driver_version,
    programmatic_launch_attribute,
)
from autofuse.targets.kernel_cache import KernelCache
from autofuse.targets.triton import argument_pointers, compile_triton, launched

__all__ = ["CudaToolchain"]

# Arches whose newest instructions exist only in an arch-specific ("a") build.
_ARCH_SPECIFIC_FROM = 90
_SHARED_BYTES = 48 << 10  # of dynamic shared memory: more must be asked for
# That a block can ask for, in KB (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability").
_MOST_SHARED_KB = {
    **dict.fromkeys(("sm_80", "sm_87"), 163),
    **dict.fromkeys(("sm_86", "sm_89", "sm_120", "sm_121"), 99),
    **dict.fromkeys(("sm_90", "sm_100", "sm_103", "sm_110"), 227),
}


class _LaunchState:
    """Everything that one launch hands to the driver, at fixed addresses. One per thread: a launch fills it in."""

    def __init__(self, spec: KernelSpec, params: struct.Struct, programmatic: bool) -> None:
        self.params = ctypes.create_string_buffer(params.size)
        self._pointers = argument_pointers(spec, self.params)
        self._attributes = programmatic_launch_attribute()
        self.config = LaunchConfig(1, 1, 1, spec.block, 1, 1, spec.shared_bytes)
        if programmatic:
            self.config.attrs = self._attributes
            self.config.numAttrs = 1
        self.config_address = ctypes.addressof(self.config)
        self.pointers_address = ctypes.addressof(self._pointers)


class _CudaKernel(Kernel):
    def __init__(self, spec: KernelSpec, function: int, module: int, device: int) -> None:
        self.address = function
        self.block, self.shared_bytes = spec.block, spec.shared_bytes
        self.separate_arguments = spec.triton is not None
        # Earlier GPUs run the same kernel without it.
        self.programmatic_launch = spec.programmatic_launch and torch.cuda.get_device_capability(device) >= (9, 0)
        self._spec = spec
        self._struct = struct.Struct(spec.params_format)
        self._pack_into = self._struct.pack_into
        self._function = function
        self._module = module
        self._device = device
        self._local = threading.local()
        self._launch = driver().cuLaunchKernelEx
        # Bound here: each lookup in a module costs a launch some tens of nanoseconds.
        self._current_stream: Any = torch._C._cuda_getCurrentRawStream
        self._current_device: Any = torch._C._cuda_getDevice

    def launch(self, blocks: int, *params: int | float) -> None:
        try:
            state = self._local.state
        except AttributeError:
            state = self._local.state = _LaunchState(self._spec, self._struct, self.programmatic_launch)
        self._pack_into(state.params, 0, *params)
        config = state.config
        config.gridDimX = blocks
        config.hStream = self._current_stream(self._device)
        if self._current_device() == self._device:
            code = self._launch(state.config_address, self._function, state.pointers_address, None)
        else:
            with torch.cuda.device(self._device):
                code = self._launch(state.config_address, self._function, state.pointers_address, None)
        if code:
            check(code, f"launching {self._spec.entry} with {blocks} blocks of {self._spec.block} threads")


class CudaToolchain(Toolchain):
    """Compiles for any arch that NVRTC knows; loads and launches on this machine's NVIDIA GPUs."""

    kind = "cuda"

    def __init__(self) -> None:
        self._cache = KernelCache(".cubin")

    def target(self, device: torch.device) -> Target:
        if torch.version.hip or not torch.cuda.is_available():
            raise TargetUnavailable(f"device {device}: PyTorch {torch.__version__} finds no NVIDIA GPU")
        if (device.index or 0) >= torch.cuda.device_count():
            raise TargetUnavailable(f"device {device}: this machine has {torch.cuda.device_count()} GPU(s)")
        major, minor = torch.cuda.get_device_capability(device)
        number = 10 * major + minor
        suffix = "a" if number >= _ARCH_SPECIFIC_FROM else ""
        return Target("cuda", f"sm_{number}{suffix}", torch.cuda.get_device_name(device))

    def provenance(self, device: torch.device) -> dict[str, str | int | float | None]:
        properties = torch.cuda.get_device_properties(device)
        return {
            "driver": _nvidia_smi(device, "driver_version"),
            "toolkit": torch.version.cuda,
            "compiler": f"NVRTC {nvrtc.version()}",
            "units": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "power_limit_w": _number(_nvidia_smi(device, "power.limit")),
            "partition": _nvidia_smi(device, "mig.mode.current"),
            "sm_clock_mhz": _number(_nvidia_smi(device, "clocks.sm")),
            "memory_clock_mhz": _number(_nvidia_smi(device, "clocks.mem")),
        }

    def check_arch(self, arch: str) -> None:
        nvrtc.check_arch(arch)

    def most_shared_bytes(self, arch: str) -> int | None:
        kilobytes = _MOST_SHARED_KB.get(arch.rstrip("af"))
        return kilobytes and kilobytes << 10

    def compile(self, spec: KernelSpec, arch: str) -> Artifact:
        if spec.triton is not None:
            return compile_triton(spec, arch, self._cache)
        flags = nvrtc.flags(spec, arch)
        key = [*sources(spec.source).values(), *flags, nvrtc.version()]
        return self._cache.get(spec.entry, key, lambda binary: nvrtc.compile_cubin(spec, arch, binary))

    def load(self, spec: KernelSpec, artifact: Artifact, device: torch.device) -> Kernel:
        index = torch.cuda.current_device() if device.index is None else device.index
        if spec.triton is not None:
            spec = launched(spec, artifact, self.target(device).arch)
        try:
            image = artifact.path.read_bytes()
        except OSError as error:
            raise LaunchError(f"compiled kernel {artifact.path} cannot be read ({error.strerror})") from None
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        torch.empty(1, device=torch.device("cuda", index))  # creates the device's primary context
        with torch.cuda.device(index):  # and makes it current
            check(driver().cuModuleLoadData(ctypes.byref(module), image), f"loading {artifact.path}")
            check(
                driver().cuModuleGetFunction(ctypes.byref(function), module, spec.entry.encode()),
                f"finding {spec.entry} in {artifact.path}",
            )
            if spec.shared_bytes > _SHARED_BYTES:
                check(
                    driver().cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED_BYTES, spec.shared_bytes),
                    f"asking for {spec.shared_bytes} bytes of shared memory for {spec.entry}",
                )
        assert function.value is not None
        assert module.value is not None
        return _CudaKernel(spec, function.value, module.value, index)

    def checks(self) -> list[Check]:
        checks = []
        try:
            checks.append(Check("NVRTC", True, f"{nvrtc.version()}, {', '.join(nvrtc.supported_arches())}"))
        except TargetUnavailable as error:
            checks.append(Check("NVRTC", False, "none: CUDA kernels cannot be compiled", str(error)))
        try:
            checks.append(Check("NVIDIA driver", True, f"CUDA {driver_version()}"))
            name = str(self.target(torch.device("cuda")))
            checks.append(Check("GPU", True, f"{name}, {torch.cuda.device_count()} visible"))
        except AutofuseError as error:
            checks.append(Check("GPU", False, "none: kernels run on the CPU", str(error)))
        return checks


def _nvidia_smi(device: torch.device, field: str) -> str | None:
    """One field of ``nvidia-smi --query-gpu``; None where the tool or the field is missing."""
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits", f"--id={uuid}"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    value = run.stdout.strip()
    return value if run.returncode == 0 and value and not value.startswith("[") else None


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None
