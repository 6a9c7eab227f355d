"""Kernels of rope_kv_cache: search spaces, and how a call becomes a launch."""

from __future__ import annotations

from collections.abc import Mapping

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
    "E4M3",
    "EPS",
    "KERNELS",
    "K_CACHE",
    "K_SCALE",
    "POSITIONS",
    "Q_SCALE",
    "Q_WEIGHT",
    "RETURN_K",
    "SLOTS",
    "SLOTS_FROM_END",
    "TABLE",
    "V_CACHE",
    "V_SCALE",
    "K",
    "Q",
    "V",
    "binding",
    "element_bytes",
    "fp8_cache",
    "heads_of",
    "launch_shape",
    "spec",
    "widest_vector",
]

CACHES = ("none", "auto", "fp8", "fp8_per_head")
E4M3 = torch.float8_e4m3fn
_VECTOR_BYTES = (16, 8, 4)
_WARP = 32

# Arguments, by their place in the schema.
Q, K, V, POSITIONS, TABLE, SLOTS, K_CACHE, V_CACHE, K_SCALE, V_SCALE = range(10)
Q_SCALE, Q_WEIGHT, K_WEIGHT, EPS, NEOX, RETURN_K, DEINTERLEAVE, SLOTS_FROM_END = range(10, 18)


def element_bytes(problem: Problem) -> int:
    return DTYPES[str(problem["dtype"])].itemsize


def fp8_cache(problem: Problem) -> bool:
    return problem["cache"] in ("fp8", "fp8_per_head")


def heads_of(problem: Problem) -> int:
    """Heads of a token that the kernel handles: of q, of k unless nobody wants it, of v if it is cached."""
    cached = problem["cache"] != "none"
    return problem.int("heads") + problem.int("kv_heads") * (cached + (cached or bool(problem["return_k"])))


def _lanes(problem: Problem, size: int) -> int:
    """Threads that share a head, each with two vectors of ``size`` elements; a power of two where they sum."""
    pairs = problem.int("head_dim") // (2 * size)
    return 1 << (pairs - 1).bit_length() if problem["qk_norm"] else pairs


def _units(problem: Problem, config: Mapping[str, int]) -> int:
    """Threads of a token."""
    return -(-heads_of(problem) // config["UNROLL"]) * _lanes(problem, config["VEC_BYTES"] // element_bytes(problem))


def _whole_pairs(config: Mapping[str, int], problem: Problem, tokens: int) -> bool:
    size = config["VEC_BYTES"] // element_bytes(problem)
    # The table is loaded in words of 4 bytes: a vector has as many angles as elements (NeoX), or half as many.
    angles = size if in_halves(problem) else size // 2
    return (
        size >= 2
        and angles * DTYPES[str(problem["table"])].itemsize >= 4
        and all(problem.int(width) % (2 * size) == 0 for width in ("head_dim", "rope_dim"))
    )


def _head_in_warp(config: Mapping[str, int], problem: Problem, tokens: int) -> bool:
    return not problem["qk_norm"] or _lanes(problem, config["VEC_BYTES"] // element_bytes(problem)) <= _WARP


_GPU_SPACE = SearchSpace(
    (
        Tunable("THREADS", (256, 128, 512, 64), "threads per block: fewer blocks, against less even load"),
        Tunable(
            "UNROLL",
            (1, 2, 3, 4, 6),
            "heads per thread: more loads in flight, less to load and work out for each, against fewer threads",
        ),
        Tunable("VEC_BYTES", _VECTOR_BYTES, "bytes per load: fewer instructions, against more alignment"),
        Tunable("READ_ONCE", (0, 1), "activations leave the caches after reading: room for others"),
        Tunable("PDL", (1, 2, 0), "overlap with the kernels before and after, theirs early (1) or late (2)"),
        Tunable("PREFETCH", (0, 1, 2, 4), "with PDL, blocks per SM that pull their input into L2 while waiting"),
        Tunable("GUESS", (0, 1), "these also guess positions: one memory latency less, against more to load and check"),
    ),
    (
        Constraint("halves of a head, of its rotated part, and what is read of the table must be whole", _whole_pairs),
        Constraint(f"a head that is normed must be shared by at most {_WARP} threads", _head_in_warp),
        Constraint("a thread needs a head for each UNROLL", lambda c, p, t: c["UNROLL"] <= heads_of(p)),
        Constraint(
            "a block that takes more than there is does nothing for the rest",
            lambda c, p, t: c["THREADS"] <= max(2 * t * _units(p, c), 64),
        ),
        Constraint(
            "only a kernel with PDL waits, so only it can prefetch meanwhile",
            lambda c, p, t: c["PDL"] > 0 or c["PREFETCH"] == 0,
        ),
        Constraint("only a block that prefetches guesses", lambda c, p, t: c["PREFETCH"] > 0 or c["GUESS"] == 0),
    ),
)

# What AMD has no choice in: CDNA's warps of 64 lanes, and nothing like programmatic dependent launch.
_HIP_FIXED = {
    "WARP_SIZE": (64, "lanes of a warp"),
    "PDL": (0, "only NVIDIA has it"),
    "PREFETCH": (0, "only with PDL"),
    "GUESS": (0, "only with PREFETCH"),
}
_HIP_SPACE = SearchSpace(
    (
        *(tunable for tunable in _GPU_SPACE.tunables if tunable.name not in _HIP_FIXED),
        *(Tunable(name, (value,), trades) for name, (value, trades) in _HIP_FIXED.items()),
    ),
    _GPU_SPACE.constraints,
)

_CPU_SPACE = SearchSpace(
    (
        *THREADING,
        Tunable("VECTOR_BYTES", (64, 32), "SIMD width: fewer instructions, against a lower clock on some CPUs"),
    ),
    THREADING_CONSTRAINTS,
)


def widest_vector(problem: Problem) -> int:
    """Bytes of the widest vectors that suit the problem. Raises UnsupportedCall."""
    for size in _VECTOR_BYTES:
        config = {"VEC_BYTES": size}
        if _whole_pairs(config, problem, 1) and _head_in_warp(config, problem, 1):
            return size
    raise UnsupportedCall(f"{problem}: halves of its heads and of what is rotated are no whole number of vectors")


def _gpu_default(problem: Problem, tokens: int) -> Config:
    vec_bytes = widest_vector(problem)
    config = Config.of(THREADS=256, UNROLL=1, VEC_BYTES=vec_bytes, READ_ONCE=0, PDL=0, PREFETCH=0, GUESS=0)
    return _GPU_SPACE.with_less(config, "THREADS", problem, tokens)


def _cuda_guess(problem: Problem, tokens: int) -> dict[str, int]:
    if tokens <= 32:
        return {"PDL": 1, "THREADS": 128, "VEC_BYTES": 8}
    return {"PDL": 1, "THREADS": 128, "READ_ONCE": 1, "PREFETCH": 2 if tokens > 512 else 0}


def _hip_default(problem: Problem, tokens: int) -> Config:
    return Config.of(_gpu_default(problem, tokens), **{name: value for name, (value, _) in _HIP_FIXED.items()})


def _cpu_default(problem: Problem, tokens: int) -> Config:
    return Config.of(THREADS=1 if tokens <= 4 else most_threads(tokens), SERIAL_ROWS=0, VECTOR_BYTES=32)


KERNELS = {
    "cuda": KernelSource("rope_kv_cache.cu", _GPU_SPACE, _gpu_default, _cuda_guess),
    "hip": KernelSource("rope_kv_cache.cu", _HIP_SPACE, _hip_default),
    "cpu": KernelSource("rope_kv_cache.cpp", _CPU_SPACE, _cpu_default),
}


def spec(kind: str, problem: Problem, config: Config) -> KernelSpec:
    """What to compile for a config."""
    return KernelSpec(
        source=KERNELS[kind].file,
        entry="rope_kv_cache",
        defines={
            "ELEMENT": str(problem["dtype"]),
            "TABLE": str(problem["table"]),
            "HEADS": problem.int("heads"),
            "KV_HEADS": problem.int("kv_heads"),
            "HEAD_DIM": problem.int("head_dim"),
            "ROPE": problem.int("rope_dim"),
            "NEOX": problem.int("neox"),
            "DEINTERLEAVE": int(deinterleaves(problem)),
            "CACHE": CACHES.index(str(problem["cache"])),
            "QK_NORM": problem.int("qk_norm"),
            "Q_FP8": problem.int("q_fp8"),
            "RETURN_K": problem.int("return_k"),
            **config,
        },
        params_format=binding(problem).params_format,
        block=1 if kind == "cpu" else config["THREADS"],
        programmatic_launch=bool(config.get("PDL", 0)),
    )


def binding(problem: Problem) -> Binding:
    """How a call of this problem becomes a launch."""
    dtype, table = DTYPES[str(problem["dtype"])], DTYPES[str(problem["table"])]
    heads, kv_heads, width = (problem.int(name) for name in ("heads", "kv_heads", "head_dim"))
    nothing = Field(FieldKind.NOTHING)
    cached, fp8 = problem["cache"] != "none", fp8_cache(problem)
    tensors = [
        TensorArg(POSITIONS, torch.int64, (None,), align=8),
        TensorArg(Q, dtype, (ROWS, heads, width)),
        TensorArg(K, dtype, (ROWS, kv_heads, width)),
        TensorArg(V, dtype, (ROWS, kv_heads, width)),
        TensorArg(TABLE, table, (ANY, problem.int("rope_dim"))),
    ]
    if cached:
        tensors.append(TensorArg(SLOTS, torch.int64, (ANY,), align=8))
        # A thread writes as many elements to the cache as it reads: of fp8, fewer bytes.
        align = widest_vector(problem) // dtype.itemsize if fp8 else 0
        shape = (ANY, ANY, kv_heads, width)
        tensors += [TensorArg(index, E4M3 if fp8 else dtype, shape, align) for index in (K_CACHE, V_CACHE)]
    if fp8:
        scales = None if problem["cache"] == "fp8" else (kv_heads,)
        tensors += [TensorArg(index, torch.float32, scales, align=4) for index in (K_SCALE, V_SCALE)]
    if problem["q_fp8"]:
        tensors.append(TensorArg(Q_SCALE, torch.float32, None, align=4))
    if problem["qk_norm"]:
        tensors += [TensorArg(index, dtype, (width,)) for index in (Q_WEIGHT, K_WEIGHT)]

    given = {tensor.index for tensor in tensors}
    absent = {Q_SCALE, Q_WEIGHT, K_WEIGHT, *(() if cached else (K_CACHE, V_CACHE))} - given

    def of(kind: FieldKind, index: int, dim: int = 0) -> Field:
        return Field(kind, index, dim) if index in given else nothing

    def cache_fields(cache: int, scale: int) -> list[Field]:
        pointers = [of(FieldKind.POINTER, cache), of(FieldKind.POINTER, scale)]
        strides = [of(FieldKind.STRIDE, cache, dim) for dim in (0, 1, 2)]
        sizes = [Field(FieldKind.SIZE, cache, dim) if cached else Field(FieldKind.TOKENS) for dim in (0, 1)]
        return pointers + strides + sizes

    pointers = (Q, K, V, POSITIONS, TABLE, SLOTS, Q_WEIGHT, K_WEIGHT, Q_SCALE)
    return Binding(
        tensors=tuple(tensors),
        constants=(
            (NEOX, bool(problem["neox"])),
            (RETURN_K, bool(problem["return_k"])),
            (DEINTERLEAVE, deinterleaves(problem)),
        ),
        absent=tuple(sorted(absent)),
        fields=(
            *(of(FieldKind.POINTER, index) for index in pointers),
            Field(FieldKind.RESULT, 0),
            Field(FieldKind.RESULT, 1),
            *(Field(FieldKind.STRIDE, index, dim) for index in (Q, K, V) for dim in (0, 1)),
            Field(FieldKind.STRIDE, TABLE, 0),
            *cache_fields(K_CACHE, K_SCALE),
            *cache_fields(V_CACHE, V_SCALE),
            Field(FieldKind.TOKENS),
            Field(FieldKind.SIZE, SLOTS, 0) if cached else Field(FieldKind.TOKENS),
            Field(FieldKind.SIZE, TABLE, 0),
            Field(FieldKind.FLOAT, EPS),
            Field(FieldKind.FLAG, SLOTS_FROM_END),
        ),
        params_format="P" * 11 + "q" * 7 + "PPqqqii" * 2 + "iiifi",
        results=(
            Result(E4M3 if problem["q_fp8"] else dtype, (None, heads, width)),
            Result(dtype, (None if problem["return_k"] else 0, kv_heads, width)),
        ),
    )


def launch_shape(problem: Problem, config: Config) -> LaunchShape:
    """The grid of a config, and the alignment it needs."""
    if "VEC_BYTES" not in config:  # the CPU kernel splits the work itself and loads from any address
        return LaunchShape()
    return LaunchShape(
        units_per_token=_units(problem, config), units_per_block=config["THREADS"], align=config["VEC_BYTES"]
    )
