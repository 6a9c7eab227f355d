"""The few calls of the CUDA driver that launching needs, through ctypes.

Loading, launching and asking the version is all there is; the native dispatcher gets its function pointers from here.
``cuda.bindings`` wraps the same calls, but takes 4.4 µs of host time for a launch, against 3.0 µs.
"""

from __future__ import annotations

import ctypes
from functools import cache

from autofuse.errors import LaunchError, TargetUnavailable

__all__ = [
    "MAX_DYNAMIC_SHARED_BYTES",
    "LaunchConfig",
    "check",
    "driver",
    "driver_version",
    "programmatic_launch_attribute",
]

MAX_DYNAMIC_SHARED_BYTES = 8
"""CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES."""
_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION = 6


class _LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute: an id, padding to 8 bytes, and a union of 64 bytes."""

    _fields_ = (("id", ctypes.c_int), ("_pad", ctypes.c_int), ("value", ctypes.c_int), ("_rest", ctypes.c_char * 60))


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("gridDimX", ctypes.c_uint),
        ("gridDimY", ctypes.c_uint),
        ("gridDimZ", ctypes.c_uint),
        ("blockDimX", ctypes.c_uint),
        ("blockDimY", ctypes.c_uint),
        ("blockDimZ", ctypes.c_uint),
        ("sharedMemBytes", ctypes.c_uint),
        ("hStream", ctypes.c_void_p),
        ("attrs", ctypes.POINTER(_LaunchAttribute)),
        ("numAttrs", ctypes.c_uint),
    )


def programmatic_launch_attribute() -> ctypes.Array[_LaunchAttribute]:
    """The attribute list that asks for programmatic dependent launch."""
    return (_LaunchAttribute * 1)(_LaunchAttribute(_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, 0, 1))


@cache
def driver() -> ctypes.CDLL:
    """libcuda. Raises TargetUnavailable."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise TargetUnavailable(f"no NVIDIA driver: {error}") from None
    library.cuLaunchKernelEx.argtypes = [ctypes.c_void_p] * 4
    library.cuModuleLoadData.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_char_p]
    library.cuModuleGetFunction.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p, ctypes.c_char_p]
    library.cuFuncSetAttribute.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
    library.cuGetErrorString.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)]
    library.cuDriverGetVersion.argtypes = [ctypes.POINTER(ctypes.c_int)]
    return library


def check(code: int, what: str) -> None:
    """Raises LaunchError with the driver's own words if ``code`` is not CUDA_SUCCESS."""
    if code:
        text = ctypes.c_char_p()
        driver().cuGetErrorString(code, ctypes.byref(text))
        raise LaunchError(f"{what}: {(text.value or b'unknown error').decode()} (CUDA error {code})")


def driver_version() -> str:
    """The newest CUDA version that the driver supports, e.g. ``13.0``. Raises TargetUnavailable."""
    number = ctypes.c_int()
    check(driver().cuDriverGetVersion(ctypes.byref(number)), "asking the driver's version")
    return f"{number.value // 1000}.{number.value % 1000 // 10}"
