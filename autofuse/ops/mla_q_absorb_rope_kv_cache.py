"""mla_q_absorb_rope_kv_cache: the query's way to the latent space, with all of mla_rope_kv_cache_cat, in one launch."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch

from autofuse.errors import BadInput, UnsupportedCall
from autofuse.ops.base import DTYPES, FusedOp, KernelSource, Tolerance
from autofuse.ops.binding import ROWS, Binding, Field, FieldKind, IndexBound, LaunchShape, TensorArg
from autofuse.ops.common import THREADING, rows_apart
from autofuse.ops.mla_rope_kv_cache_cat import MlaRopeKvCacheCat
from autofuse.ops.mla_rope_kv_cache_cat_kernels import GPU_SPACE, fp8_query, gpu_default, launch_shape
from autofuse.ops.mla_rope_kv_cache_cat_kernels import spec as rope_spec
from autofuse.ops.problem import Config, Problem
from autofuse.ops.rope import E4M3_EPSILON
from autofuse.ops.space import Constraint, SearchSpace, Tunable
from autofuse.targets import KernelSpec

__all__ = ["MlaQAbsorbRopeKvCache"]

_DTYPES = ("bf16", "fp16")  # that tensor cores multiply
_WARP_ROWS, _WARP_COLUMNS, _WARP_DEPTH = 16, 64, 32  # what a warp multiplies at once: see kernels_src/mma.cuh
_MOST_COLUMNS = 128  # of a warpgroup's product
_MOST_TOKENS = 128  # of a block of the kernel that is not staged
_WARPGROUP, _TILE = 128, 64  # threads, and the tokens that they multiply at once
_WIDEST = 128  # of qk_nope_head_dim: W_UK stays in registers
_DS_MLA_THREADS = 64  # groups of fp8_ds_mla lie within a warp, of 32 lanes or 64

_Q_NOPE, _W = 0, 1  # the op's arguments; from 2 on those of mla_rope_kv_cache_cat, from 1 on
_W_CONSTANT = 15
_ROPE = MlaRopeKvCacheCat()


def _w_is_constant(problem: Problem) -> bool:
    return bool(dict(problem.params).get("w_constant", 0))


def _rope_problem(problem: Problem) -> Problem:
    """That of mla_rope_kv_cache_cat behind the product."""
    own = ("qk_nope_dim", "w_constant")
    return Problem(_ROPE.name, tuple((name, value) for name, value in problem.params if name not in own))


def _round(config: Config) -> int:
    """Staged, tokens that a block multiplies at a time."""
    return config["THREADS"] // _WARPGROUP * _TILE


def _whole_rounds(config: Config, problem: Problem, tokens: int) -> bool:
    count = config["TOKENS"]
    return count % max(_round(config), _TILE) == 0 if config["STAGED"] else count <= _MOST_TOKENS


def _columns(config: Config) -> int:
    """Of a block that multiplies."""
    warps = config["THREADS"] // config.get("WARP_SIZE", 32)
    return config["W_COLUMNS"] if config["STAGED"] else warps * _WARP_COLUMNS


def _whole_blocks(config: Config, problem: Problem, tokens: int) -> bool:
    depth, columns = problem.int("qk_nope_dim"), _columns(config)
    if columns < 1 or problem.int("nope_dim") % columns:
        return False
    # Staged, all threads copy as much of W_UK.
    tiles = depth % _TILE == 0 and config["THREADS"] % _WARPGROUP == 0
    return not config["STAGED"] or (tiles and depth * columns // 8 % config["THREADS"] == 0)


def _shared_bytes(config: Config, problem: Problem) -> int:
    """STAGED 1: W_UK, and q_nope of a round and, where there is one, the next."""
    rows = _round(config) * (1 if config["TOKENS"] == _round(config) else 2)
    return config["STAGED"] * 2 * problem.int("qk_nope_dim") * (_columns(config) + rows)


def _on_rope(constraint: Constraint) -> Constraint:
    """A constraint of mla_rope_kv_cache_cat's space, for the same config here."""
    return Constraint(constraint.reason, lambda c, p, t: constraint.holds(c, _rope_problem(p), t))


_TRADES = {
    "THREADS": "threads per block: fewer blocks, which share q_nope, against less even load",
    "PREFETCH": "with PDL: blocks per SM that pull their input into L2 while waiting; others pull W_UK, if not EARLY",
}
_FIXED = {
    "CHUNK": (64,),
    "READ_ONCE": (0,),
    "THREADS": (64, 32, 128, 256, 512),
    "UNROLL": (1, 2, 4),
    "VEC_BYTES": (16, 8, 4),
}
_GPU_SPACE = SearchSpace(
    (
        *(
            Tunable(each.name, _FIXED.get(each.name, each.values), _TRADES.get(each.name, each.trades))
            for each in GPU_SPACE.tunables
        ),
        Tunable("STAGED", (0, 1), "operands pass through shared memory: for many tokens"),
        Tunable("W_COLUMNS", (128, 64, 32, 256), "staged, of a block that multiplies: less of q_nope, fewer blocks"),
        Tunable("TOKENS", (16, 64, 32, 128, 256, 512), "of a block that multiplies: less of W_UK, fewer blocks"),
        Tunable("EARLY", (1, 0), "with PDL and a W_UK that is constant: it is loaded while waiting"),
    ),
    (
        *map(_on_rope, GPU_SPACE.constraints),
        Constraint(
            "a block has columns of one head, 64 for each warp, or, staged, whole tiles, of which each thread has "
            "as much to copy",
            _whole_blocks,
        ),
        Constraint(
            "columns follow from THREADS where operands are not staged",
            lambda c, p, t: bool(c["STAGED"]) or c["W_COLUMNS"] == _MOST_COLUMNS,
        ),
        Constraint(
            f"staged, whole rounds of {_TILE} tokens for each warpgroup; else at most {_MOST_TOKENS} tokens",
            _whole_rounds,
        ),
        Constraint(
            "the groups of fp8_ds_mla lie within a warp, and begin with a block",
            lambda c, p, t: p["cache"] != "fp8_ds_mla" or c["THREADS"] % _DS_MLA_THREADS == 0,
        ),
        Constraint(
            "a block that takes twice the tokens there are, or more, has nothing to do with the rest",
            lambda c, p, t: c["TOKENS"] <= max(2 * t - 1, _TILE if c["STAGED"] else _WARP_ROWS),
        ),
        Constraint(
            "only a kernel with PDL waits, and only a W_UK that is constant is there before that",
            lambda c, p, t: c["EARLY"] == 0 or (c["PDL"] > 0 and _w_is_constant(p)),
        ),
    ),
)

# What AMD has no choice in: CDNA's warps of 64 lanes, and nothing like programmatic dependent launch.
_HIP_FIXED = {
    "WARP_SIZE": (64, "lanes of a warp"),
    "STAGED": (0, "asynchronous copies are NVIDIA's"),
    "PDL": (0, "only NVIDIA has it"),
    "PREFETCH": (0, "only with PDL"),
    "GUESS": (0, "only with PDL"),
    "EARLY": (0, "only with PDL"),
}
_HIP_SPACE = SearchSpace(
    (
        Tunable("THREADS", (128, 64, 256, 512), _TRADES["THREADS"]),
        *(each for each in _GPU_SPACE.tunables if each.name not in _HIP_FIXED and each.name != "THREADS"),
        *(Tunable(name, (value,), trades) for name, (value, trades) in _HIP_FIXED.items()),
    ),
    _GPU_SPACE.constraints,
)

_CPU_SPACE = SearchSpace(
    (
        THREADING[0],
        Tunable("ROWS", (6, 4, 2), "tokens in registers: less of W_UK is read, against registers"),
        Tunable("VECTOR_BYTES", (64, 32), "SIMD width: fewer instructions, against a lower clock on some CPUs"),
    ),
    (Constraint("every thread needs a head", lambda c, p, t: c["THREADS"] <= p.int("heads")),),
)


def _cuda_default(problem: Problem, tokens: int) -> Config:
    rope, warps = gpu_default(_rope_problem(problem), tokens), 2 if problem.int("nope_dim") % 128 == 0 else 1
    return Config.of(rope, STAGED=0, THREADS=32 * warps, W_COLUMNS=_MOST_COLUMNS, TOKENS=_WARP_ROWS, EARLY=0)


def _cuda_guess(problem: Problem, tokens: int) -> dict[str, int]:
    early = {"PDL": 1, "EARLY": int(_w_is_constant(problem))}
    staged = {**early, "STAGED": 1, "THREADS": 128, "TOKENS": 64, "W_COLUMNS": 64}
    if tokens <= 128:
        few = {"W_COLUMNS": 32} if 2 <= tokens <= 32 else {}
        return {**staged, **few, "VEC_BYTES": 8 if tokens <= 8 else 16}
    if tokens <= 512:
        return {**staged, "PDL": 2, "W_COLUMNS": 128}
    many = {**staged, "W_COLUMNS": 256, "UNROLL": 4}
    if tokens <= 2048:
        return {**many, "PREFETCH": 2, "THREADS": 256, "TOKENS": 128}
    return {**many, "PREFETCH": 4, "THREADS": 512, "TOKENS": 512}


def _hip_default(problem: Problem, tokens: int) -> Config:
    fixed = {name: value for name, (value, _) in _HIP_FIXED.items()}
    return Config.of(_cuda_default(problem, tokens), **fixed, THREADS=64)


def _cpu_default(problem: Problem, tokens: int) -> Config:
    threads = max(count for count in THREADING[0].values if count <= problem.int("heads"))
    return Config.of(THREADS=threads, ROWS=6, VECTOR_BYTES=32)


class MlaQAbsorbRopeKvCache(FusedOp):
    """Takes each head's q_nope to the latent space, and rotates, caches and concatenates as mla_rope_kv_cache_cat does.

    MLA's absorbed form (DeepSeek-V2 technical report, section 2.1.2): the key's up-projection W_UK is applied to the
    query instead, ``ql_nope[t, n] = q_nope[t, n] · w_uk[n]`` in fp32, rounded to the model's dtype, as the unfused
    product would leave it. The query returned is (ql_nope, rotated q_pe).

    Arguments:
        q_nope: [≥ T, H, qk_nope_head_dim], bf16 or fp16; strided any way but in the last dimension.
        w_uk: [H, qk_nope_head_dim, kv_lora_rank], q_nope's dtype; strided any way but in the last dimension.
        q_pe, kv_c, k_pe, positions, cos_sin_cache, slot_mapping, kv_cache, k_pe_cache, kv_scale, q_scale, is_neox,
            deinterleave, slots_from_end: mla_rope_kv_cache_cat's, q_pe in q_nope's dtype.
        w_constant: a promise that w_uk was written long ago, as a model's weights are: see mla_v_up_quant.

    Kernels are for a qk_nope_head_dim of 32, 64, 96 or 128, a kv_lora_rank that is a multiple of 64 (with fp8_ds_mla of
    128) and a rope_dim that is a multiple of 16; the reference computes all else.

    Returns: the query [T, H, kv_lora_rank + rope_dim], and rotated k_pe [T, rope_dim], both contiguous.
    """

    name = "mla_q_absorb_rope_kv_cache"
    bounds = tuple(IndexBound(each.index + 1, each.of + 1, each.dims, each.padded) for each in _ROPE.bounds)
    schema = (
        "(Tensor q_nope, Tensor w_uk, Tensor q_pe, Tensor kv_c, Tensor k_pe, Tensor positions, Tensor cos_sin_cache, "
        "Tensor? slot_mapping, Tensor(a!)? kv_cache, Tensor(b!)? k_pe_cache, Tensor? kv_scale, Tensor? q_scale, "
        "bool is_neox, bool deinterleave=False, bool slots_from_end=False, bool w_constant=False, "
        'str plan="") -> (Tensor, Tensor)'
    )
    mutates = tuple(index + 1 for index in _ROPE.mutates)
    shared = tuple(index + 1 for index in _ROPE.shared)
    kernels = {  # noqa: RUF012 (a ClassVar of the base class)
        "cuda": KernelSource("mla_q_absorb_rope_kv_cache.cu", _GPU_SPACE, _cuda_default, _cuda_guess),
        "hip": KernelSource("mla_q_absorb_rope_kv_cache.cu", _HIP_SPACE, _hip_default),
        "cpu": KernelSource("mla_q_absorb_rope_kv_cache.cpp", _CPU_SPACE, _cpu_default),
    }

    # ---- meaning ----------------------------------------------------------------------------------------------------

    def reference(self, *args: Any) -> tuple[torch.Tensor, ...]:
        q_nope, w, *rope, _ = args
        return _ROPE.reference(_product(q_nope, w), *rope)

    def unfused(self, *args: Any) -> tuple[torch.Tensor, ...]:
        q_nope, w, *rope, _ = args
        return _ROPE.unfused(_product(q_nope, w), *rope)

    def exact(self, *args: Any) -> tuple[torch.Tensor, ...]:
        q_nope, w, *rope, _ = args
        return _ROPE.exact(_product(q_nope.double(), w.double()), *rope)

    def fake(self, *args: Any) -> tuple[torch.Tensor, ...]:
        with suppress(UnsupportedCall):  # which the reference computes
            self.problem_of(*args)
        q_nope, w, *rope, _ = args
        return _ROPE.fake(q_nope.new_empty((q_nope.shape[0], q_nope.shape[1], w.shape[2])), *rope)

    def tolerance(self, problem: Problem, result: int = 0) -> Tolerance:
        # The query's products are of size 1 to 10, however small their sum: fp32 in any order is off by some 1e-6 of
        # that, whose sign decides where the sum is rounded to at a tie. In fp8 such a tie may decide the next one.
        tolerance = _ROPE.tolerance(_rope_problem(problem), result)
        if result != 0:
            return tolerance
        if fp8_query(problem):
            dtype = DTYPES[str(problem["dtype"])]
            return replace(tolerance, usual=0.505 * E4M3_EPSILON + torch.finfo(dtype).eps)
        return replace(tolerance, absolute=1e-4, usual_absolute=3e-5)

    # ---- problem ----------------------------------------------------------------------------------------------------

    def make_problem(self, **params: Any) -> Problem:
        """The problem with mla_rope_kv_cache_cat's parameters (``nope_dim`` is w_uk's last dimension, kv_lora_rank),
        ``qk_nope_dim``, w_uk's other one, and ``w_constant`` (False; left out where it is).
        """
        depth, constant = int(params.pop("qk_nope_dim")), bool(params.pop("w_constant", False))
        try:
            rope = _ROPE.make_problem(**params)
        except UnsupportedCall as error:
            raise UnsupportedCall(f"{self.name}: {error}") from error
        dtype, width = rope["dtype"], rope.int("nope_dim")
        if dtype not in _DTYPES:
            raise UnsupportedCall(f"{self.name}: dtype {dtype!r} is none of {', '.join(_DTYPES)}")
        if depth < 1 or depth % _WARP_DEPTH or depth > _WIDEST or width < 1 or width % _WARP_COLUMNS:
            raise UnsupportedCall(
                f"{self.name}: qk_nope_head_dim {depth} is none of {_WARP_DEPTH} to {_WIDEST} in steps of "
                f"{_WARP_DEPTH}, or kv_lora_rank {width} no multiple of {_WARP_COLUMNS}"
            )
        if rope.int("rope_dim") % 16:
            raise UnsupportedCall(f"{self.name}: rope_dim {rope.int('rope_dim')} is no multiple of 16")
        if rope["cache"] == "fp8_ds_mla" and width % (2 * _WARP_COLUMNS):
            raise UnsupportedCall(f"{self.name}: beside fp8_ds_mla, kv_lora_rank {width} is no multiple of 128")
        own = (("qk_nope_dim", depth), *((("w_constant", 1),) if constant else ()))
        return Problem(self.name, (*rope.params, *own))

    def model_problems(self, model: Mapping[str, Any], dtype: str) -> Sequence[Problem]:
        """What engines with absorbed attention make of it, such as vLLM."""
        depth = model.get("qk_nope_head_dim")
        if not depth or dtype not in _DTYPES:
            return []
        absorbed = _ROPE.model_problems(model, dtype)[:1]
        try:
            return [self.make_problem(**dict(rope.params), qk_nope_dim=depth, w_constant=True) for rope in absorbed]
        except UnsupportedCall:
            return []

    def problem_of(self, *args: Any) -> Problem:
        q_nope, w, *rope, constant = args
        if q_nope.dim() != 3 or w.dim() != 3 or tuple(q_nope.shape[1:]) != tuple(w.shape[:2]):
            raise BadInput(
                f"{self.name}: q_nope {list(q_nope.shape)} and w_uk {list(w.shape)} are not [T, heads, "
                "qk_nope_head_dim] and [heads, qk_nope_head_dim, kv_lora_rank]"
            )
        for name, tensor in (("q_nope", q_nope), ("w_uk", w)):
            if tensor.shape[2] > 1 and tensor.stride(2) != 1:
                raise BadInput(f"{self.name}: {name}'s last dimension is not contiguous")
        if w.device != q_nope.device:
            raise BadInput(f"{self.name}: its tensors are on different devices")
        if w.dtype != q_nope.dtype:
            raise BadInput(f"{self.name}: q_nope is {q_nope.dtype}, w_uk {w.dtype}")
        try:
            inner = _ROPE.problem_of(_like_product(q_nope, w), *rope)
        except BadInput as error:
            raise BadInput(str(error).replace(f"{_ROPE.name}:", f"{self.name}:")) from error
        except UnsupportedCall as error:
            raise UnsupportedCall(f"{self.name}: {error}") from error
        return self.make_problem(**dict(inner.params), qk_nope_dim=q_nope.shape[2], w_constant=constant)

    def example_args(
        self, problem: Problem, tokens: int, device: torch.device, generator: torch.Generator
    ) -> tuple[Any, ...]:
        """q_nope and q_pe are slices of the projected query, products are of size 1."""
        heads, depth, width, rope_dim = (problem.int(name) for name in ("heads", "qk_nope_dim", "nope_dim", "rope_dim"))
        dtype = DTYPES[str(problem["dtype"])]
        without = _ROPE.make_problem(**{**dict(_rope_problem(problem).params), "nope_dim": 0})
        _, _, *rope = _ROPE.example_args(without, tokens, device, generator)
        query = torch.randn(tokens, heads, depth + rope_dim, device=device, generator=generator).to(dtype)
        w = (torch.randn(heads, depth, width, device=device, generator=generator) * depth**-0.5).to(dtype)
        return query[..., :depth], w, query[..., depth:], *rope, _w_is_constant(problem)

    def check_args(
        self, problem: Problem, tokens: int, device: torch.device, generator: torch.Generator
    ) -> tuple[Any, ...]:
        """As mla_rope_kv_cache_cat's; rows and heads of w_uk lie apart, and its columns have sizes of their own."""
        heads, depth, width = (problem.int(name) for name in ("heads", "qk_nope_dim", "nope_dim"))
        dtype = DTYPES[str(problem["dtype"])]
        _, *rope = _ROPE.check_args(_rope_problem(problem), tokens, device, generator)
        rows = tokens + 1
        sizes = 10 ** (2 * torch.rand(rows, 1, 1, device=device, generator=generator) - 1)
        sizes[2::5] = 0
        x = (sizes * torch.randn(rows, heads, depth, device=device, generator=generator)).transpose(0, 1)
        columns = 0.5 + torch.rand(heads, 1, width, device=device, generator=generator)
        w = torch.randn(heads, depth, width, device=device, generator=generator) * columns * depth**-0.5
        return (
            rows_apart(x.reshape(heads * rows, depth).to(dtype), 1).unflatten(0, (heads, rows)).transpose(0, 1),
            rows_apart(w.reshape(heads * depth, width).to(dtype), 2).unflatten(0, (heads, depth)),
            *rope,
            _w_is_constant(problem),
        )

    def sweep_problems(self) -> Sequence[Problem]:
        few = {"heads": 2, "qk_nope_dim": 128, "nope_dim": 256, "rope_dim": 64, "latent_dim": 512}
        odd = {"heads": 1, "qk_nope_dim": 96, "nope_dim": 192, "rope_dim": 32, "latent_dim": 192}
        small = {"heads": 2, "qk_nope_dim": 32, "nope_dim": 64, "rope_dim": 16, "latent_dim": 64}
        wide = {"heads": 1, "qk_nope_dim": 32, "nope_dim": 512, "rope_dim": 16, "latent_dim": 64}
        styles = {"NeoX": {"neox": True}, "GPT-J": {"neox": False}, "apart": {"neox": False, "deinterleave": True}}
        variants: list[tuple[dict[str, int], str, str, str, str, str, bool]] = [
            (few, "bf16", "bf16", "auto", "GPT-J", "auto", True),
            (few, "bf16", "fp32", "fp8_ds_mla", "NeoX", "fp8", False),
            (odd, "fp16", "fp16", "fp8", "NeoX", "auto", True),
            (odd, "bf16", "fp32", "fp8_apart", "GPT-J", "fp8", True),
            (small, "bf16", "bf16", "auto_apart", "apart", "auto", False),
            (wide, "fp16", "fp32", "none", "GPT-J", "fp8", False),
        ]
        return [
            self.make_problem(
                dtype=dtype, table=table, cache=cache, query=query, w_constant=constant, **styles[style], **shape
            )
            for shape, dtype, table, cache, style, query, constant in variants
        ]

    def random_problem(self, source: random.Random) -> Problem:
        """Up to 6 heads; any kind of cache."""
        cache = source.choice(["none", "auto", "fp8", "fp8_ds_mla", "auto_apart", "fp8_apart"])
        packed = cache == "fp8_ds_mla"
        width = _WARP_COLUMNS * (2 if packed else source.randint(1, 5))
        style = source.choice(["NeoX", "GPT-J", "apart"])
        dtype = source.choice(_DTYPES)
        return self.make_problem(
            dtype=dtype,
            heads=source.randint(1, 6),
            qk_nope_dim=_WARP_DEPTH * source.randint(1, 4),
            nope_dim=width,
            rope_dim=64 if packed else 16 * source.randint(1, 5),
            latent_dim=512 if packed else 16 * source.randint(1, 20),
            neox=style == "NeoX",
            deinterleave=style == "apart",
            table=source.choice([dtype, "fp32"]),
            cache=cache,
            query=source.choice(["auto", "fp8"]),
            w_constant=source.random() < 0.5,
        )

    def bytes_moved(self, problem: Problem, tokens: int) -> int:
        heads, depth, width = (problem.int(name) for name in ("heads", "qk_nope_dim", "nope_dim"))
        size = DTYPES[str(problem["dtype"])].itemsize
        # Of the query before its rotated part, q_nope is read, not what it becomes.
        read = heads * size * (tokens * (depth - width) + depth * width)
        return _ROPE.bytes_moved(_rope_problem(problem), tokens) + read

    # ---- kernels ----------------------------------------------------------------------------------------------------

    def spec(self, kind: str, problem: Problem, config: Config) -> KernelSpec:
        spec = rope_spec(kind, _rope_problem(problem), config)
        own = {"QK_NOPE": problem.int("qk_nope_dim"), "W_CONSTANT": int(_w_is_constant(problem))}
        return replace(
            spec,
            source=self.kernel_source(kind).file,
            entry=self.name,
            defines={**spec.defines, **own},
            params_format=self.binding(problem).params_format,
            shared_bytes=0 if kind == "cpu" else _shared_bytes(config, problem),
        )

    def binding(self, problem: Problem) -> Binding:
        """mla_rope_kv_cache_cat's, with q_nope as it is before the product, and W_UK behind it."""
        dtype = DTYPES[str(problem["dtype"])]
        heads, depth, width = (problem.int(name) for name in ("heads", "qk_nope_dim", "nope_dim"))
        rope, constant = _ROPE.binding(_rope_problem(problem)), _w_is_constant(problem)
        of_argument = (FieldKind.POINTER, FieldKind.STRIDE, FieldKind.SIZE, FieldKind.FLAG)
        return Binding(
            tensors=(
                *(replace(each, index=each.index + 1) for each in rope.tensors if each.index != 0),
                TensorArg(_Q_NOPE, dtype, (ROWS, heads, depth)),
                TensorArg(_W, dtype, (heads, depth, width), constant=constant),
            ),
            absent=tuple(index + 1 for index in rope.absent),
            constants=(*((index + 1, value) for index, value in rope.constants), (_W_CONSTANT, constant)),
            fields=(
                *(
                    replace(field, index=field.index + 1) if field.kind in of_argument and field.index else field
                    for field in rope.fields
                ),
                Field(FieldKind.POINTER, _W),
                Field(FieldKind.STRIDE, _W, 0),
                Field(FieldKind.STRIDE, _W, 1),
            ),
            params_format=rope.params_format + "Pqq",
            results=rope.results,
        )

    def launch_shape(self, problem: Problem, config: Config) -> LaunchShape:
        if "TOKENS" not in config:  # the CPU kernel splits the work itself and loads from any address
            return LaunchShape()
        without = _ROPE.make_problem(**{**dict(_rope_problem(problem).params), "nope_dim": 0})
        units = launch_shape(without, config)
        return LaunchShape(
            units_per_block=config["TOKENS"],
            repeat=problem.int("heads") * problem.int("nope_dim") // _columns(config),
            more_per_token=units.units_per_token,
            more_per_block=units.units_per_block,
            align=16,
        )


def _product(q_nope: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """[T, H, kv_lora_rank]"""
    return torch.bmm(q_nope.transpose(0, 1), w).transpose(0, 1)


def _like_product(q_nope: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """What has the product's shape and dtype, all of whose rows are one."""
    return q_nope.new_empty(w.shape[2]).expand(*q_nope.shape[:2], -1)
