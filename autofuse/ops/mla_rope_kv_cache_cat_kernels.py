"""Kernels of mla_rope_kv_cache_cat: kinds of caches, search spaces, and how a call becomes a launch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from autofuse.errors import UnsupportedCall
from autofuse.ops.base import DTYPES, KernelSource
from autofuse.ops.binding import ANY, ROWS, Binding, Field, FieldKind, LaunchShape, Result, TensorArg
from autofuse.ops.common import THREADING, THREADING_CONSTRAINTS, most_threads
from autofuse.ops.problem import Config, Problem
from autofuse.ops.rope import deinterleaves, in_halves
from autofuse.ops.space import Constraint, SearchSpace, Tunable
from autofuse.targets import KernelSpec

__all__ = [
    "CACHES",
    "DS_MLA_BYTES",
    "DS_MLA_GROUP",
    "DS_MLA_LATENT",
    "DS_MLA_ROPE",
    "DS_MLA_SCALES",
    "GPU_SPACE",
    "KERNELS",
    "CacheKind",
    "binding",
    "element_bytes",
    "fp8_query",
    "gpu_default",
    "kind_of_cache",
    "launch_shape",
    "spec",
]


@dataclass(frozen=True)
class CacheKind:
    """What a problem's ``cache`` stands for.

    Attributes:
        code: the kernels' constant CACHE.
        apart: k_pe has a cache of its own.
    """

    code: int
    apart: bool = False


CACHES = {
    "none": CacheKind(0),
    "auto": CacheKind(1),
    "fp8": CacheKind(2),
    "fp8_ds_mla": CacheKind(3),
    "auto_apart": CacheKind(1, apart=True),
    "fp8_apart": CacheKind(2, apart=True),
}
DS_MLA_LATENT, DS_MLA_ROPE, DS_MLA_GROUP = 512, 64, 128
DS_MLA_SCALES = slice(DS_MLA_LATENT, DS_MLA_LATENT + 16)  # bytes of a row
DS_MLA_BYTES = DS_MLA_SCALES.stop + 2 * DS_MLA_ROPE
_LOAD_REGISTERS = 64  # 32-bit registers of a thread for units in flight
_WARP = 32
_SORTED_TOKENS = 64  # the ordinary CHUNK


def element_bytes(problem: Problem) -> int:
    return DTYPES[str(problem["dtype"])].itemsize


def kind_of_cache(problem: Problem) -> CacheKind:
    return CACHES[str(problem["cache"])]


def fp8_query(problem: Problem) -> bool:
    return dict(problem.params).get("query", "auto") == "fp8"


def _units(problem: Problem, size: int) -> int:
    """A token's units of ``size`` elements: see the kernel."""
    heads, latents = problem.int("heads"), problem.int("latent_dim") if kind_of_cache(problem).code else 0
    rotated = (heads + 1) * problem.int("rope_dim") // (2 if in_halves(problem) else 1)
    return (heads * problem.int("nope_dim") + latents + rotated) // size


def _size(config: Mapping[str, int], problem: Problem) -> int:
    """Elements of a vector."""
    return config["VEC_BYTES"] // element_bytes(problem)


def _whole_units(config: Config, problem: Problem, tokens: int) -> bool:
    size = _size(config, problem)
    rotated = problem.int("rope_dim") // (2 if in_halves(problem) else 1)
    # The table is loaded in words of 4 bytes: a vector has as many angles as elements (NeoX), or half as many.
    angles = size if in_halves(problem) else size // 2
    return (
        size >= 2
        and angles * DTYPES[str(problem["table"])].itemsize >= 4
        and all(width % size == 0 for width in (problem.int("nope_dim"), problem.int("latent_dim"), rotated))
    )


def _whole_groups(config: Config, problem: Problem, tokens: int) -> bool:
    if problem["cache"] != "fp8_ds_mla":
        return True
    return DS_MLA_GROUP // _size(config, problem) <= _WARP and config["CHUNK"] % _SORTED_TOKENS == 0


def _fits_registers(config: Config, problem: Problem, tokens: int) -> bool:
    vector = config["VEC_BYTES"] // 4
    angles = vector * DTYPES[str(problem["table"])].itemsize // element_bytes(problem)
    unit = 2 * vector + 2 * angles if in_halves(problem) else vector + angles
    return config["UNROLL"] * unit <= _LOAD_REGISTERS


GPU_SPACE = SearchSpace(
    (
        Tunable("THREADS", (256, 128, 512, 64), "threads per block: fewer blocks, against less even load"),
        Tunable("UNROLL", (1, 2, 4, 8), "units per thread: more loads in flight, against registers and fewer blocks"),
        Tunable("VEC_BYTES", (16, 8, 4, 32), "bytes per vector: fewer instructions, against more alignment"),
        Tunable(
            "CHUNK",
            (_SORTED_TOKENS, 1, 1024),
            "tokens whose units are sorted by kind: long chains of loads begin first, against rows written whole",
        ),
        Tunable("READ_ONCE", (0, 1), "activations leave the caches after reading: room for others"),
        Tunable("PDL", (1, 2, 0), "overlap with the kernels before and after, theirs early (1) or late (2)"),
        Tunable("PREFETCH", (0, 1, 2, 4), "with PDL, blocks per SM that pull their input into L2 while waiting"),
        Tunable(
            "GUESS",
            (0, 1),
            "blocks that prefetch look at the positions too: the table is loaded one round trip earlier, against a "
            "load more",
        ),
    ),
    (
        Constraint(
            "widths, halves of what is rotated, and what is read of the table must be whole vectors", _whole_units
        ),
        Constraint("the groups of fp8_ds_mla lie within a warp, and begin with a chunk", _whole_groups),
        Constraint(
            "32 bytes are two loads either way: they save stores where the query is fp8",
            lambda c, p, t: c["VEC_BYTES"] <= 16 or fp8_query(p),
        ),
        Constraint(f"the units in flight must fit {_LOAD_REGISTERS} registers of a thread", _fits_registers),
        Constraint(
            "a block that takes more than there is does nothing for the rest",
            lambda c, p, t: c["THREADS"] * c["UNROLL"] <= max(2 * t * _units(p, max(_size(c, p), 1)), 64),
        ),
        Constraint(
            "a chunk of more tokens than there are is like a smaller one, and a single token is sorted",
            lambda c, p, t: c["CHUNK"] == _SORTED_TOKENS or t > min(c["CHUNK"], _SORTED_TOKENS),
        ),
        Constraint(
            "the units of a chunk are counted in 30 bits",
            lambda c, p, t: c["CHUNK"] * _units(p, max(_size(c, p), 1)) < 1 << 30,
        ),
        Constraint(
            "only a kernel with PDL waits, so only it can prefetch meanwhile",
            lambda c, p, t: c["PDL"] > 0 or c["PREFETCH"] == 0,
        ),
        Constraint(
            "only blocks that prefetch look at positions beforehand",
            lambda c, p, t: c["PREFETCH"] > 0 or c["GUESS"] == 0,
        ),
    ),
)

# What AMD has no choice in: warps of 64 lanes, and nothing like programmatic dependent launch.
_HIP_FIXED = {
    "WARP_SIZE": (64, "lanes of a warp"),
    "PDL": (0, "only NVIDIA has it"),
    "PREFETCH": (0, "only with PDL"),
    "GUESS": (0, "only with PDL"),
}
_HIP_SPACE = SearchSpace(
    (
        *(tunable for tunable in GPU_SPACE.tunables if tunable.name not in _HIP_FIXED),
        *(Tunable(name, (value,), trades) for name, (value, trades) in _HIP_FIXED.items()),
    ),
    GPU_SPACE.constraints,
)

_CPU_SPACE = SearchSpace(
    (
        *THREADING,
        Tunable("VECTOR_BYTES", (64, 32), "SIMD width: fewer instructions, against a lower clock on some CPUs"),
    ),
    THREADING_CONSTRAINTS,
)


def gpu_default(problem: Problem, tokens: int) -> Config:
    config = Config.of(THREADS=256, UNROLL=1, CHUNK=_SORTED_TOKENS, READ_ONCE=0, PDL=0, PREFETCH=0, GUESS=0)
    for size in (16, 8, 4):
        chosen = Config.of(config, VEC_BYTES=size)
        if _whole_units(chosen, problem, tokens) and _whole_groups(chosen, problem, tokens):
            return GPU_SPACE.with_less(chosen, "THREADS", problem, tokens)
    raise UnsupportedCall(f"{problem}: its widths are no whole number of 4-byte vectors")


def cuda_guess(problem: Problem, tokens: int) -> dict[str, int]:
    heads, cache = tokens * problem.int("heads"), kind_of_cache(problem)
    if heads <= 512:
        few = {"PDL": 1, "VEC_BYTES": 8}
        return {**few, "CHUNK": 1, "THREADS": 512} if cache.code and tokens > 1 else few
    if heads > 1 << 15:  # more bytes than the L2 holds
        return {"PDL": 2, "PREFETCH": 4}
    many = {"PDL": 1, "PREFETCH": 4, "READ_ONCE": 1}
    return {**many, "CHUNK": 1024} if cache.apart and tokens > 128 else many


def _hip_default(problem: Problem, tokens: int) -> Config:
    return Config.of(gpu_default(problem, tokens), **{name: value for name, (value, _) in _HIP_FIXED.items()})


def _cpu_default(problem: Problem, tokens: int) -> Config:
    return Config.of(THREADS=1 if tokens <= 4 else most_threads(tokens), SERIAL_ROWS=0, VECTOR_BYTES=32)


KERNELS = {
    "cuda": KernelSource("mla_rope_kv_cache_cat.cu", GPU_SPACE, gpu_default, cuda_guess),
    "hip": KernelSource("mla_rope_kv_cache_cat.cu", _HIP_SPACE, _hip_default),
    "cpu": KernelSource("mla_rope_kv_cache_cat.cpp", _CPU_SPACE, _cpu_default),
}


def spec(kind: str, problem: Problem, config: Config) -> KernelSpec:
    """What to compile for a config."""
    return KernelSpec(
        source=KERNELS[kind].file,
        entry="mla_rope_kv_cache_cat",
        defines={
            "ELEMENT": str(problem["dtype"]),
            "TABLE": str(problem["table"]),
            "HEADS": problem.int("heads"),
            "NOPE": problem.int("nope_dim"),
            "ROPE": problem.int("rope_dim"),
            "LATENT": problem.int("latent_dim"),
            "NEOX": problem.int("neox"),
            "DEINTERLEAVE": int(deinterleaves(problem)),
            "CACHE": kind_of_cache(problem).code,
            "APART": int(kind_of_cache(problem).apart),
            "Q_FP8": int(fp8_query(problem)),
            **config,
        },
        params_format=binding(problem).params_format,
        block=1 if kind == "cpu" else config["THREADS"],
        programmatic_launch=bool(config.get("PDL", 0)),
    )


def binding(problem: Problem) -> Binding:
    """How a call of this problem becomes a launch."""
    dtype, table = DTYPES[str(problem["dtype"])], DTYPES[str(problem["table"])]
    heads, rope, latent, nope = (problem.int(f"{name}") for name in ("heads", "rope_dim", "latent_dim", "nope_dim"))
    cache, query_is_fp8 = kind_of_cache(problem), fp8_query(problem)
    pointer, stride = FieldKind.POINTER, FieldKind.STRIDE
    # An integer that the kernel does not read is some other one.
    no_pointer, no_size = Field(FieldKind.NOTHING), Field(FieldKind.TOKENS)

    def paged(index: int, present: bool) -> tuple[Field, ...]:
        if not present:
            return no_pointer, no_pointer, no_pointer, no_size, no_size
        sizes = Field(FieldKind.SIZE, index, 0), Field(FieldKind.SIZE, index, 1)
        return Field(pointer, index), Field(stride, index, 0), Field(stride, index, 1), *sizes

    tensors = [
        TensorArg(4, torch.int64, (None,), align=1),
        TensorArg(1, dtype, (ROWS, heads, rope)),
        TensorArg(2, dtype, (ROWS, latent)),
        TensorArg(3, dtype, (ROWS, rope)),
        TensorArg(5, table, (ANY, rope)),
    ]
    tensors += [TensorArg(0, dtype, (ROWS, heads, nope))] if nope else []
    if cache.code:
        stored = {1: dtype, 2: torch.float8_e4m3fn, 3: torch.uint8}[cache.code]
        width = DS_MLA_BYTES if cache.code == 3 else latent + (0 if cache.apart else rope)
        # Rows of fp8 begin where dense ones would: at multiples of the largest power of two in their widths.
        align = {1: 0, 2: (latent | rope | 16) & -(latent | rope | 16), 3: 16}[cache.code]
        tensors.append(TensorArg(6, torch.int64, (ANY,), align=1))
        tensors.append(TensorArg(7, stored, (ANY, ANY, width), align=align))
        tensors += [TensorArg(8, stored, (ANY, ANY, rope), align=align)] if cache.apart else []
    tensors += [TensorArg(9, torch.float32, None, align=1)] if cache.code == 2 else []
    tensors += [TensorArg(10, torch.float32, None, align=1)] if query_is_fp8 else []
    absent = {0: not nope, 7: not cache.code, 8: bool(cache.code) and not cache.apart, 10: not query_is_fp8}
    return Binding(
        tensors=tuple(tensors),
        constants=((11, bool(problem["neox"])), (12, deinterleaves(problem))),
        absent=tuple(index for index, is_absent in absent.items() if is_absent),
        fields=(
            Field(pointer, 0) if nope else no_pointer,
            Field(pointer, 1),
            Field(pointer, 2),
            Field(pointer, 3),
            Field(pointer, 4),
            Field(pointer, 5),
            Field(pointer, 6) if cache.code else no_pointer,
            Field(pointer, 9) if cache.code == 2 else no_pointer,
            Field(pointer, 10) if query_is_fp8 else no_pointer,
            Field(FieldKind.RESULT, 0),
            Field(FieldKind.RESULT, 1),
            Field(stride, 0, 0) if nope else no_pointer,
            Field(stride, 0, 1) if nope else no_pointer,
            Field(stride, 1, 0),
            Field(stride, 1, 1),
            Field(stride, 2, 0),
            Field(stride, 3, 0),
            Field(stride, 5, 0),
            *paged(7, bool(cache.code)),
            *paged(8, cache.apart),
            Field(FieldKind.TOKENS),
            Field(FieldKind.SIZE, 6, 0) if cache.code else no_size,
            Field(FieldKind.SIZE, 5, 0),
            Field(FieldKind.FLAG, 13),
        ),
        params_format="P" * 11 + "q" * 7 + 2 * "Pqqii" + "iiii",
        results=(
            Result(torch.float8_e4m3fn if query_is_fp8 else dtype, (None, heads, nope + rope)),
            Result(dtype, (None, rope)),
        ),
    )


def launch_shape(problem: Problem, config: Config) -> LaunchShape:
    """The grid of a config, and the alignment it needs."""
    if "VEC_BYTES" not in config:
        return LaunchShape()
    return LaunchShape(
        units_per_token=_units(problem, _size(config, problem)),
        units_per_block=config["THREADS"] * config["UNROLL"],
        align=min(config["VEC_BYTES"], 16),
    )
