"""The native dispatcher: calls that are bound already go from PyTorch to the kernel without Python.

On a CPU that is 4 µs a call against 25 through ``_PythonDispatcher``. ``kernels_src/dispatch.cpp`` is built by the C++
compiler on first use and kept in the kernel cache; without a compiler everything works through Python.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from autofuse.errors import AutofuseError, TargetUnavailable
from autofuse.ops import Binding, FusedOp, LaunchShape
from autofuse.targets import Kernel, build_host_library
from autofuse.targets.base import field_offsets
from autofuse.targets.cuda_driver import driver

__all__ = ["NativeDispatcher", "Variant", "load_native"]

logger = logging.getLogger("autofuse.runtime")

_MAX_DIMS = 6
_MAX_PARAMS_BYTES = 512
_MAX_FIELDS = 64
_SOURCE = "dispatch.cpp"


@dataclass(frozen=True)
class Variant:
    """One bucket of a plan: its kernel, for calls of at most ``tokens`` (the last bucket takes the rest).

    Without a kernel the op's reference runs.
    """

    tokens: int
    kernel: Kernel | None
    shape: LaunchShape


# The structs below are those of dispatch.cpp.


class _TensorGuard(ctypes.Structure):
    _fields_ = (
        ("arg", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("element_bytes", ctypes.c_int32),
        ("dims", ctypes.c_int32),
        ("align", ctypes.c_int32),
        ("padding", ctypes.c_int32),
        ("sizes", ctypes.c_int64 * _MAX_DIMS),
    )


class _Constant(ctypes.Structure):
    _fields_ = (("arg", ctypes.c_int32), ("is_bool", ctypes.c_int32), ("value", ctypes.c_int64))


class _Field(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_int32),
        ("index", ctypes.c_int32),
        ("dim", ctypes.c_int32),
        ("offset", ctypes.c_int32),
    )


class _Result(ctypes.Structure):
    _fields_ = (
        ("dtype", ctypes.c_int32),
        ("dims", ctypes.c_int32),
        ("sizes", ctypes.c_int64 * _MAX_DIMS),
        ("round_tokens", ctypes.c_int64),
        ("column_major", ctypes.c_int64),
    )


class _Variant(ctypes.Structure):
    _fields_ = (
        ("up_to_tokens", ctypes.c_int64),
        ("function", ctypes.c_uint64),
        ("units_per_token", ctypes.c_int64),
        ("units_per_block", ctypes.c_int64),
        ("repeat", ctypes.c_int64),
        ("more_per_token", ctypes.c_int64),
        ("more_per_block", ctypes.c_int64),
        ("align", ctypes.c_uint64),
        ("block", ctypes.c_uint32),
        ("shared_bytes", ctypes.c_uint32),
        ("programmatic", ctypes.c_int32),
        ("separate_arguments", ctypes.c_int32),
    )


class _Bound(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int32) for name in ("arg", "rows_of", "dims", "padded"))


class _Cuda(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_void_p)
        for name in ("launch", "get_context", "push_context", "pop_context", "error_string", "current_stream")
    )


class NativeDispatcher:
    """The loaded library. Use ``load_native``."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._library.autofuse_set_error.argtypes = [ctypes.c_char_p, ctypes.c_int]
        self._library.autofuse_current_plan.restype = ctypes.c_char_p
        self._slots: dict[str, int] = {}
        if torch.version.cuda and torch.cuda.is_available():
            self._set_cuda()

    def _set_cuda(self) -> None:
        cuda, torch_cuda = driver(), ctypes.CDLL(str(_torch_library_folder() / "libtorch_cuda.so"))
        functions = (
            cuda.cuLaunchKernelEx,
            cuda.cuCtxGetCurrent,
            cuda.cuCtxPushCurrent_v2,
            cuda.cuCtxPopCurrent_v2,
            cuda.cuGetErrorString,
            torch_cuda.aoti_torch_get_current_cuda_stream,
        )
        addresses = (ctypes.cast(function, ctypes.c_void_p).value for function in functions)
        self._library.autofuse_set_cuda(ctypes.byref(_Cuda(*addresses)))

    def register(self, op: FusedOp, keys: Sequence[str]) -> bool:
        """Makes this the implementation of ``op`` for PyTorch's dispatch ``keys``, over the one in Python; False if it
        cannot: the op has arguments of a type that is not known here, or PyTorch refuses.

        Calls that are not bound go to ``autofuse::_unbound_<op>``.
        """
        codes = {"Tensor": "T", "Optional[Tensor]": "O", "float": "f", "int": "i", "bool": "b", "str": "s"}
        arguments = torch._C.parse_schema(op.name + op.schema).arguments
        types = "".join(codes.get(str(argument.type), "") for argument in arguments)
        if len(types) != len(arguments):
            return False
        slot = self._slots.setdefault(op.name, len(self._slots))
        return not any(
            self._library.autofuse_register(
                slot, op.name.encode(), f"autofuse::_unbound_{op.name}".encode(), types.encode(), key.encode()
            )
            for key in keys
        )

    def bind(self, op: FusedOp, plan: str, device: torch.device, binding: Binding, variants: Sequence[Variant]) -> None:
        """From now on, calls of ``op`` with this plan that ``binding`` accepts are launched natively."""
        size = struct.calcsize(binding.params_format)
        if op.name not in self._slots or size > _MAX_PARAMS_BYTES or len(binding.fields) > _MAX_FIELDS:
            return
        tensors = [
            _TensorGuard(
                arg.index,
                _number(arg.dtype),
                arg.dtype.itemsize,
                -1 if arg.sizes is None else len(arg.sizes),
                arg.align,
                0,
                _sizes(arg.sizes or ()),
            )
            for arg in binding.tensors
        ]
        constants = [_Constant(index, isinstance(value, bool), int(value)) for index, value in binding.constants]
        constants += [_Constant(index, 0, 0) for index in binding.absent]  # None is a null pointer
        fields = [
            _Field(field.kind, field.index, field.dim, offset)
            for field, offset in zip(binding.fields, field_offsets(binding.params_format), strict=True)
        ]
        results = [
            _Result(
                _number(result.dtype),
                len(result.sizes),
                _sizes(result.sizes),
                result.round_tokens,
                result.column_major,
            )
            for result in binding.results
        ]
        native = [_native(variant) for variant in variants]
        given = {arg.index for arg in binding.tensors}
        bounds = [_Bound(b.index, b.of, b.dims, b.padded) for b in op.bounds if {b.index, b.of} <= given]
        tables = [
            *_table(_TensorGuard, tensors),
            *_table(_Constant, constants),
            *_table(_Field, fields),
            *_table(_Result, results),
            *_table(_Variant, native),
            *_table(_Bound, bounds),
        ]
        on_gpu = device.type == "cuda"
        arguments = (self._slots[op.name], plan.encode(), int(on_gpu), int(on_gpu), device.index or 0, *tables)
        if on_gpu:
            with torch.cuda.device(device):
                self._library.autofuse_bind(*arguments)
        else:
            self._library.autofuse_bind(*arguments)

    def current_plan(self) -> str:
        """The plan of the native call that this Python call serves."""
        return bytes(self._library.autofuse_current_plan()).decode()

    def set_error(self, message: str, is_value_error: bool = False) -> None:
        """Makes the native call that this Python call serves raise RuntimeError or ValueError with ``message``."""
        self._library.autofuse_set_error(message.encode(), is_value_error)


def load_native() -> NativeDispatcher | None:
    """Builds (or finds) and loads the native dispatcher; None where there is no C++ compiler, or it does not work.

    ``AUTOFUSE_NATIVE=0`` switches it off.
    """
    if os.environ.get("AUTOFUSE_NATIVE") == "0" or platform.system() != "Linux" or torch.version.hip:
        return None  # it launches through NVIDIA's driver; for AMD's, Python does
    libraries = _torch_library_folder()
    include = libraries.parent / "include"
    flags = ["-std=c++17", "-O2", "-fPIC", "-shared", "-DUSE_CUDA=1", f"-I{include}"]
    # -z defs: a PyTorch that lacks one of the functions shows now, not at the first call.
    link = [f"-L{libraries}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{libraries}", "-Wl,-z,defs"]
    try:
        path = build_host_library(_SOURCE, flags, link, torch.__version__)
        return NativeDispatcher(ctypes.CDLL(str(path)))
    except TargetUnavailable as error:  # no compiler
        logger.info("calls go through Python, at some tens of microseconds each: %s", error)
    except (AutofuseError, OSError, AttributeError) as error:
        logger.warning("calls go through Python, at some tens of microseconds each: %s", error)
    return None


def _native(variant: Variant) -> _Variant:
    shape, kernel = variant.shape, variant.kernel
    more = (shape.more_per_token, shape.more_per_block)
    grid = (shape.units_per_token, shape.units_per_block, shape.repeat, *more, shape.align)
    if kernel is None:
        return _Variant(variant.tokens, 0, *grid, 1, 0, 0, 0)
    launch = (kernel.block, kernel.shared_bytes, kernel.programmatic_launch, kernel.separate_arguments)
    return _Variant(variant.tokens, kernel.address, *grid, *launch)


def _table(kind: type[Any], rows: Sequence[Any]) -> list[Any]:
    """A C array, after its length."""
    return [len(rows), (kind * len(rows))(*rows)]


def _torch_library_folder() -> Path:
    return Path(torch.__file__).parent / "lib"


def _number(dtype: torch.dtype) -> int:
    """The dtype's number in PyTorch's C ABI."""
    return _NUMBERS[dtype]


_NUMBERS = {  # c10::ScalarType
    torch.uint8: 0,
    torch.int8: 1,
    torch.int32: 3,
    torch.int64: 4,
    torch.float16: 5,
    torch.float32: 6,
    torch.float64: 7,
    torch.bfloat16: 15,
    torch.float8_e4m3fn: 24,
}


def _sizes(sizes: Sequence[int | None]) -> ctypes.Array[ctypes.c_int64]:
    padded = [-1 if size is None else size for size in sizes] + [0] * (_MAX_DIMS - len(sizes))
    return (ctypes.c_int64 * _MAX_DIMS)(*padded)
