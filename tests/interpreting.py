"""Triton kernels on the CPU: Triton's interpreter runs a config's kernel on the arguments of a call."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch

from autofuse.ops import Config, FusedOp, Problem
from autofuse.ops.binding import FieldKind
from autofuse.targets.triton import triton_unavailable
from autofuse.tuner.verify import verify_call

__all__ = ["interpret", "interpreting", "unavailable", "verify"]


def verify(op: FusedOp, problem: Problem, config: Config, args: Sequence[Any]) -> float:
    """Compares a config's results with the op's fp64 reference; raises WrongResult. Returns the error as it does."""
    return verify_call(op, problem, tuple(args), lambda *copies: interpret(op, problem, config, copies))


def interpret(op: FusedOp, problem: Problem, config: Config, args: Sequence[Any]) -> tuple[torch.Tensor, ...]:
    """Runs every block of a launch, one after the other. Results that are not written hold NaN, or 0xFF."""
    binding, shape = op.binding(problem), op.launch_shape(problem, config)
    assert binding.accepts(args)
    assert binding.launchable(args, shape.align), "the arguments do not suit the kernel"
    results = binding.allocate(args)
    for result in results:
        _bytes(result).fill_(0xFF)
    values = [
        _tensor(args, results, field.kind, field.index) if number is None else number
        for field, number in zip(binding.fields, _numbers(op, problem, args, results), strict=True)
    ]
    spec = op.spec("cuda", problem, config)
    kernel = getattr(import_module(f"autofuse.kernels_src.{spec.source.removesuffix('.py')}"), spec.entry)
    interpreting(kernel)
    names = kernel.arg_names[len(values) :]
    kernel[(shape.blocks(binding.tokens(args)),)](*values, **{name: spec.defines[name] for name in names})
    return results


def interpreting(kernel: Any) -> Any:
    """``kernel``, whose interpreter now rounds as GPUs do, and multiplies bf16 numbers, not their bits."""
    interpreter: Any = import_module("triton.runtime.interpreter")
    interpreter._convert_float = _rounded
    builder = interpreter.InterpreterBuilder
    if not hasattr(builder, "create_dot_of_bits"):
        builder.create_dot_of_bits = builder.create_dot
        builder.create_dot = _dot
    return kernel


def _dot(builder: Any, a: Any, b: Any, *others: Any) -> Any:
    import triton.language as tl

    def wide(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        data = _rounded(operand.data, tl.bfloat16, tl.float32, None).view("f4")
        return type(operand)(data, tl.float32)

    return builder.create_dot_of_bits(wide(a), wide(b), *others)


def _rounded(values: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
    """What stands for Triton's own conversion of narrow floats, which cuts bits off where every GPU rounds to nearest
    even. Both arrays hold bits of the dtypes' sizes.
    """
    import numpy as np

    before, after = (getattr(torch, _TORCH_NAMES[str(dtype)]) for dtype in (source, target))
    bits = np.ascontiguousarray(values).view(np.uint8).reshape(-1)
    narrow = torch.from_numpy(bits.copy()).view(before).to(after)
    return narrow.view(torch.uint8).numpy().view(f"u{after.itemsize}").reshape(values.shape)


_TORCH_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64", "fp8e4nv": "float8_e4m3fn"}


def unavailable() -> str:
    """Why there is no interpreting here; "" where there is."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton's interpreter must be chosen before Triton is imported: set TRITON_INTERPRET=1"
    return triton_unavailable() or ""


def _numbers(op: FusedOp, problem: Problem, args: Sequence[Any], results: Sequence[torch.Tensor]) -> list[Any]:
    """The parameters as a launch packs them; None for what is an address."""
    binding = op.binding(problem)
    addresses = (FieldKind.POINTER, FieldKind.RESULT, FieldKind.NOTHING)
    numbers = []
    for field, value in zip(binding.fields, binding.params(args, results), strict=True):
        plain = int(value) if field.kind is FieldKind.FLAG else value  # a 32-bit integer, as a launch has it
        numbers.append(None if field.kind in addresses else plain)
    return numbers


def _tensor(args: Sequence[Any], results: Sequence[torch.Tensor], kind: FieldKind, index: int) -> torch.Tensor:
    if kind is FieldKind.NOTHING:
        return torch.empty(0, dtype=torch.int8)
    tensor = results[index] if kind is FieldKind.RESULT else args[index]
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """All of its memory, with what lies between its elements."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())  # type: ignore[call-overload]
