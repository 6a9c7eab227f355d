"""Compiles a GPU kernel as C++ and runs it on the CPU, strictly.

An op's kernel for ``cuda`` or ``hip`` is compiled from its unmodified source with AddressSanitizer, and launched as the
op says (``spec``, ``binding``, ``launch_shape``), so an op needs no code here. What is an error:

- reading or writing outside a tensor, between the rows of a strided one, or outside shared memory;
- an address that is not a multiple of the vector's size (inputs are aligned to ``launch_shape.align`` and no further);
- a barrier that not all of its threads reach, a shuffle or vote that not all lanes of its mask reach;
- a result byte that nobody writes, or two blocks write, or that depends on the order of blocks or threads;
- a changed input; a read of uninitialised shared memory shows as NaN;
- with programmatic dependent launch, touching a tensor that is not constant before waiting for the previous kernel.

Not seen: races between threads of a block that no order of threads brings out, writes of a byte that hold the value
which an in-place argument has anyway, what only hardware does (PTX, timing, caches). Blocks must not depend on each
other. Tensors that share memory are given copies of their own.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

import autofuse.kernels_src
from autofuse.ops import Config, FusedOp, Problem
from autofuse.ops.binding import FieldKind
from autofuse.targets import KernelSpec, Resources
from autofuse.targets.kernel_cache import KernelCache

__all__ = ["BLOCK_ORDERS", "EmulationError", "build", "emulate", "unavailable", "verify"]

BLOCK_ORDERS = ("forward", "reverse", "shuffled")
"""In which order blocks run, and within each block its threads."""

_FOLDER = Path(__file__).parent
_RUNTIME = ("scheduler.cpp", "memory.cpp")
_SANITIZE = ("-fsanitize=address,alignment,bounds", "-fno-sanitize-recover=all")
_FLAGS = ("-std=c++17", "-g1", "-w")
# Loops that look like memcpy stay loops: AddressSanitizer's memcpy would refuse what the runtime alone may touch.
_RUNTIME_FLAGS = ("-O3", "-fno-tree-loop-distribute-patterns")
# C++'s own headers take longer to compile than a kernel, and no GPU compiler has them.
_KERNEL_FLAGS = ("-O1", "-nostdinc++", *_SANITIZE, "-fsanitize-sections=emulated_shared")
_TIMEOUT_S = 60.0
_POISONS = (0xFF, 0x7F)  # NaN, and a large number, in bf16, fp16 and fp32
_INPUT, _IN_PLACE, _RESULT = range(3)


class EmulationError(Exception):
    """A kernel did something that a kernel must not do. The message is one line that says what and where."""


@dataclass(frozen=True)
class _Region:
    """A tensor that the kernel is given: ``segments`` are the (offset, length) in bytes of what belongs to it. What is
    ``constant`` may be read before waiting for the previous kernel.
    """

    role: int
    index: int
    skew: int
    constant: bool
    content: bytes
    segments: tuple[tuple[int, int], ...]


def emulate(
    op: FusedOp,
    problem: Problem,
    config: Config,
    args: Sequence[Any],
    *,
    kind: str = "cuda",
    warp_size: int | None = None,
    named_barriers: bool | None = None,
    block_orders: Sequence[str] = BLOCK_ORDERS,
    edits: Sequence[tuple[str, str, str]] = (),
) -> tuple[torch.Tensor, ...]:
    """Runs a config of an op's GPU kernel on CPU tensors.

    Args:
        args: the op's arguments without the plan; those that the op writes are written.
        kind: whose kernel: ``cuda`` or ``hip``.
        warp_size: 32 or 64 lanes; the kernel's own unless given.
        named_barriers: whether barriers among part of a block exist; at 32 lanes they do, unless given.
        block_orders: of BLOCK_ORDERS; the kernel runs once in each, and must write the same.
        edits: (file, old, new) to replace in the kernel's sources.

    Returns: the op's results.
    Raises: EmulationError; ValueError for arguments that the kernel would not be launched with, or an edit of what is
    not there.
    """
    binding, shape = op.binding(problem), op.launch_shape(problem, config)
    if not (binding.accepts(args) and binding.launchable(args, shape.align)):
        raise ValueError(f"{op.name} is not launched with these arguments for {problem} with {config}")
    results = binding.allocate(args)
    blocks = shape.blocks(binding.tokens(args))
    if blocks == 0:
        return results
    spec = op.spec(kind, problem, config)
    lanes = warp_size or _own_lanes(spec)
    program = build(spec, warp_size=warp_size, named_barriers=named_barriers, edits=edits)

    tensors = [(tensor, args[tensor.index]) for tensor in binding.tensors]
    regions = [
        _region(
            _IN_PLACE if tensor.index in op.mutates else _INPUT,
            tensor.index,
            arg,
            max(tensor.align or shape.align, arg.element_size()),
            tensor.constant,
        )
        for tensor, arg in tensors
    ]
    regions += [_region(_RESULT, index, result, 0, False) for index, result in enumerate(results)]
    places = {(FieldKind.POINTER, tensor.index): place for place, (tensor, _) in enumerate(tensors)}
    places |= {(FieldKind.RESULT, index): len(tensors) + index for index in range(len(results))}

    values = binding.params(args, results)
    pointers = []
    for number, (field, code) in enumerate(zip(binding.fields, binding.params_format, strict=True)):
        place = places.get((field.kind, field.index))
        if place is None:
            continue
        offset = struct.calcsize(binding.params_format[: number + 1]) - struct.calcsize(code)
        pointers.append((offset, place))
        values[number] = 0

    passes = [(BLOCK_ORDERS.index(order), _POISONS[i % 2]) for i, order in enumerate(block_orders)]
    if len(passes) == 1:
        passes.append((passes[0][0], _POISONS[1]))
    params = struct.pack(binding.params_format, *values)
    block = spec.block if lanes == _own_lanes(spec) else 0
    head = (blocks, block, spec.shared_bytes, spec.programmatic_launch and lanes == 32)
    message = [
        _numbers(*head, len(params), len(pointers), len(regions), len(passes)),
        params,
        *(_numbers(*pointer) for pointer in pointers),
    ]
    for region in regions:
        place = (region.role, region.index, region.skew, region.constant)
        message.append(_numbers(*place, len(region.content), len(region.segments)))
        message += [_numbers(*segment) for segment in region.segments]
        if region.role != _RESULT:
            message.append(region.content)
    message += [_numbers(*each) for each in passes]

    output = _run(program, b"".join(message))
    for tensor, region in zip([*(arg for _, arg in tensors), *results], regions, strict=True):
        if region.role != _INPUT:
            _flat(tensor).copy_(_from_bytes(output[: len(region.content)], tensor.dtype))
            output = output[len(region.content) :]
    return results


def verify(op: FusedOp, problem: Problem, config: Config, args: Sequence[Any], **how: Any) -> None:
    """Runs a config as ``emulate`` does, and raises EmulationError as well if it does not compute the op."""
    exact = op.exact(*args)
    results = emulate(op, problem, config, args, **how)
    written = [args[index] for index in op.mutates if args[index] is not None]
    for index, (result, right) in enumerate(zip([*results, *written], exact, strict=True)):
        if not (error := op.tolerance(problem, index).error(result, right)) <= 1.0:
            raise EmulationError(f"result {index} is {error:.3g} times the tolerance from the reference")


def build(
    spec: KernelSpec,
    *,
    warp_size: int | None = None,
    named_barriers: bool | None = None,
    edits: Sequence[tuple[str, str, str]] = (),
) -> Path:
    """The program that emulates a kernel, compiled unless the kernel cache has it. Raises EmulationError, ValueError.

    Arguments as for ``emulate``.
    """
    lanes = warp_size or _own_lanes(spec)
    named = lanes == 32 if named_barriers is None else named_barriers
    defines = {**spec.defines, "WARP_SIZE": lanes, "NAMED_BARRIERS": int(named)}
    flags = [
        *_FLAGS,
        *_KERNEL_FLAGS,
        f'-DSOURCE="{spec.source}"',
        f"-DKERNEL={spec.entry}",
        *(f"-D{name}={value}" for name, value in defines.items()),
    ]
    runtime = [_runtime(source) for source in _RUNTIME]
    texts = dict(autofuse.kernels_src.sources(spec.source))
    for file, old, new in edits:
        if old not in texts.get(file, ""):
            raise ValueError(f"{file} has no {old!r}")
        texts[file] = texts[file].replace(old, new)

    def compile_kernel(program: Path) -> Resources:
        for file, text in texts.items():
            (program.parent / file).write_text(text, encoding="utf-8")
        source = str(_FOLDER / "kernel.cpp")
        objects = [str(path) for path in runtime]
        _compile([*_compiler(), *flags, f"-I{program.parent}", f"-I{_FOLDER}", source, *objects, "-o", str(program)])
        return Resources()

    ours = [(_FOLDER / name).read_text(encoding="utf-8") for name in ("kernel.cpp", "cuda_on_cpu.h")]
    key = [*texts.values(), *ours, *map(str, runtime), *flags]
    return KernelCache(".emulated").get(spec.entry, key, compile_kernel).path


@cache
def unavailable() -> str:
    """Why nothing can be emulated here; empty where it can be."""
    if platform.system() != "Linux":
        return "emulation needs Linux"
    if not _compiler():
        return "emulation needs g++"
    command = [*_compiler(), "-std=c++17", *_SANITIZE, "-fsanitize-sections=x", "-x", "c++", "-", "-o", "/dev/null"]
    text = "int main(int n, char**) { return int(float(_Float16(n))); }"
    if subprocess.run(command, input=text, capture_output=True, text=True).returncode:
        return "emulation needs g++ 12 or later with AddressSanitizer and _Float16"
    return ""


def _own_lanes(spec: KernelSpec) -> int:
    return int(spec.defines.get("WARP_SIZE", 32))


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """The memory from a tensor's first element to its last, whatever lies between."""
    if tensor.numel() == 0:
        return tensor.reshape(-1)
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((last + 1,), (1,))


def _from_bytes(content: bytes, dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).view(dtype) if content else torch.empty(0).to(dtype)


def _region(role: int, index: int, tensor: torch.Tensor, align: int, constant: bool) -> _Region:
    content = _flat(tensor).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return _Region(role, index, align, constant, content, _segments(tensor))


def _segments(tensor: torch.Tensor) -> tuple[tuple[int, int], ...]:
    """(offset, length) in bytes of a tensor's own memory, without the gaps between its rows."""
    if tensor.numel() == 0:
        return ()
    offsets = np.zeros(1, dtype=np.int64)
    length = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = (offsets[:, None] + np.arange(size) * stride).reshape(-1)
    if tensor.stride()[-1:] == (1,):
        length = tensor.shape[-1]
        offsets = offsets[::length]
    segments: list[tuple[int, int]] = []
    for offset in np.unique(offsets).tolist():
        if segments and offset <= sum(segments[-1]):
            start, _ = segments.pop()
            segments.append((start, offset + length - start))
        else:
            segments.append((offset, length))
    return tuple((offset * tensor.element_size(), count * tensor.element_size()) for offset, count in segments)


def _numbers(*values: int) -> bytes:
    return struct.pack(f"={len(values)}q", *values)


@cache
def _compiler() -> tuple[str, ...]:
    """g++: clang's AddressSanitizer leaves variables with a section of their own, our shared memory, unguarded."""
    linker = ["-fuse-ld=gold"] if shutil.which("ld.gold") else []  # twice as fast
    chosen = shlex.split(os.environ.get("CXX", ""))
    if chosen and "clang" not in chosen[0] and shutil.which(chosen[0]):
        return (*chosen, *linker)
    return ("g++", *linker) if shutil.which("g++") else ()


def _compile(command: Sequence[str]) -> None:
    run = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
    if run.returncode:
        first = next((line for line in run.stderr.splitlines() if "error" in line), run.stderr[:200])
        raise EmulationError(f"{command[0]} does not compile it: {first.strip()}")


def _runtime(source: str) -> Path:
    """The object file of a part of the runtime: compiled once, without the sanitizer, for all kernels."""

    def compile_part(binary: Path) -> Resources:
        _compile([*_compiler(), *_FLAGS, *_RUNTIME_FLAGS, "-c", str(_FOLDER / source), "-o", str(binary)])
        return Resources()

    texts = [(_FOLDER / name).read_text(encoding="utf-8") for name in (source, "scheduler.h")]
    return KernelCache(".o").get(f"emulation-{Path(source).stem}", [*texts, *_RUNTIME_FLAGS], compile_part).path


def _run(program: Path, message: bytes) -> bytes:
    # Threads have stacks of their own, which AddressSanitizer's copies of stack frames do not know.
    options = {"ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0", "UBSAN_OPTIONS": "print_stacktrace=0"}
    try:
        run = subprocess.run(
            [program], input=message, capture_output=True, timeout=_TIMEOUT_S, env={**os.environ, **options}
        )
    except subprocess.TimeoutExpired:
        raise EmulationError(f"the kernel did not end within {_TIMEOUT_S:.0f} s") from None
    if run.returncode:
        raise EmulationError(_what_went_wrong(run.stderr.decode(errors="replace"), run.returncode))
    return run.stdout


def _what_went_wrong(log: str, code: int) -> str:
    """One line out of the runtime's, AddressSanitizer's and the undefined-behaviour sanitizer's."""
    where = re.search(r"emulation: (block \d+, thread \d+)$", log, re.MULTILINE)
    prefix = f"{where[1]}: " if where else ""
    if found := re.search(r"AddressSanitizer: (\S+) on", log):
        access = re.search(r"^((?:READ|WRITE) of size \d+)", log, re.MULTILINE)
        place = re.search(r"(\w[\w.]*\.cuh?:\d+)", log)
        note = " (before waiting for the previous kernel, or between rows)" if "poison" in found[1] else ""
        return f"{prefix}{found[1]}, {access[1] if access else 'access'} at {place[1] if place else '?'}{note}"
    if found := re.search(r"(\w[\w.]*:\d+):\d+: runtime error: (.*)", log):
        return f"{found[1]}: {found[2]}"
    if found := re.search(r"emulation: (.*)", log):
        return found[1]
    return f"the program ended with code {code}: {log[-200:].strip()}"
