"""What a Triton kernel is compiled with, from what its op declares already."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from autofuse.errors import UnsupportedCall
from autofuse.ops.base import KernelSource
from autofuse.ops.binding import Binding, FieldKind
from autofuse.ops.problem import Config, Problem
from autofuse.ops.space import SearchSpace, Tunable
from autofuse.targets import KernelSpec, TritonSpec

__all__ = ["NUM_WARPS", "PDL", "READ_ONCE", "VEC_BYTES", "WAVES_PER_EU", "on_amd", "power_of_two", "triton_spec"]

NUM_WARPS = Tunable("NUM_WARPS", (4, 1, 2, 8, 16), "warps of a block: a row is done sooner, against more to combine")
VEC_BYTES = Tunable("VEC_BYTES", (16, 4), "what rows are multiples of, and loads widened to: against more alignment")
READ_ONCE = Tunable("READ_ONCE", (0, 1), "activations leave the caches after reading: room for others")
PDL = Tunable("PDL", (1, 2, 0), "overlap with the kernels before and after, theirs early (1) or late (2)")
WAVES_PER_EU = Tunable(
    "WAVES_PER_EU", (0, 2, 4), "waves of a SIMD that the compiler aims at: hides latency, against registers"
)

_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float8_e4m3fn: "u8",  # its bytes: a GPU that does not know the dtype stores them as well
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}
_NUMBERS = {FieldKind.TOKENS: "i32", FieldKind.SIZE: "i32", FieldKind.FLAG: "i32", FieldKind.FLOAT: "fp32"}


def triton_spec(
    source: str, entry: str, binding: Binding, config: Config, constants: Mapping[str, int | str], align: int
) -> KernelSpec:
    """The spec of a Triton kernel, whose run-time arguments are the binding's fields.

    Args:
        constants: of the problem. These and the config are the kernel's ``tl.constexpr`` arguments, by name.
        align: bytes that every address and outer stride of a launched call is a multiple of, as in ``LaunchShape``.
    """
    return KernelSpec(
        source=source,
        entry=entry,
        defines={**constants, **config},
        params_format=binding.params_format,
        programmatic_launch=bool(config.get("PDL", 0)),
        triton=TritonSpec(
            signature=_signature(binding, align),
            num_warps=config["NUM_WARPS"],
            num_stages=config.get("NUM_STAGES", 1),
            waves_per_eu=config.get("WAVES_PER_EU", 0),
        ),
    )


def on_amd(kernel: KernelSource) -> KernelSource:
    """The same for AMD's GPUs: nothing like programmatic dependent launch, and a hint for the compiler more."""
    tunables = (tunable for tunable in kernel.space.tunables if tunable is not PDL)
    without = Tunable(PDL.name, (0,), "only NVIDIA has it")
    space = SearchSpace((*tunables, without, WAVES_PER_EU), kernel.space.constraints)

    def default(problem: Problem, tokens: int) -> Config:
        return Config.of(kernel.default(problem, tokens), PDL=0, WAVES_PER_EU=0)

    return KernelSource(kernel.file, space, default)


def power_of_two(size: int) -> int:
    """The smallest one that is at least ``size``: the length of a block in Triton that holds as many elements."""
    return 1 << max(size - 1, 0).bit_length()


def _signature(binding: Binding, align: int) -> tuple[tuple[str, int], ...]:
    """Triton's types, and what of their values every launched call has in common (``Binding.launchable``)."""
    tensors = {tensor.index: tensor for tensor in binding.tensors}
    types: list[tuple[str, int]] = []
    for field in binding.fields:
        if field.kind is FieldKind.POINTER:
            tensor = tensors[field.index]
            types.append((f"*{_type(tensor.dtype)}", tensor.align or align))
        elif field.kind is FieldKind.RESULT:
            types.append((f"*{_type(binding.results[field.index].dtype)}", align))  # of what allocators give, enough
        elif field.kind is FieldKind.STRIDE:
            tensor = tensors[field.index]
            # The last dimension's stride, if a kernel takes it, may be anything where there is one element.
            outer = tensor.sizes is not None and field.dim < len(tensor.sizes) - 1
            divisor = (tensor.align or align) // tensor.dtype.itemsize if outer else 1
            types.append(("i64", max(divisor, 1)))
        elif field.kind is FieldKind.NOTHING:
            types.append(("*i8", 1))
        else:
            types.append((_NUMBERS[field.kind], 1))
    return tuple(types)


def _type(dtype: torch.dtype) -> str:
    if dtype not in _TYPES:
        raise UnsupportedCall(f"Triton's kernels know no {dtype}")
    return _TYPES[dtype]
