"""mla_rope_kv_cache_cat: RoPE, the write to the paged latent cache, and the query's concatenation, in one launch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from autofuse.errors import BadInput, UnsupportedCall
from autofuse.ops.base import DTYPES, FusedOp, KernelSource, Tolerance, dtype_name
from autofuse.ops.binding import ANY, Binding, Field, FieldKind, LaunchShape, Result, TensorArg
from autofuse.ops.common import THREADING, THREADING_CONSTRAINTS, most_threads, rows_apart
from autofuse.ops.problem import Config, Problem
from autofuse.ops.space import Constraint, SearchSpace, Tunable
from autofuse.targets import KernelSpec

__all__ = ["MlaRopeKvCacheCat"]

_CACHES = ("none", "auto", "fp8")
_E4M3_MAX = 448.0
_E4M3_EPSILON = 2.0**-3
_VALUE_REGISTERS = 96  # 32-bit registers of a thread for units in flight


def _bytes(problem: Problem) -> int:
    return DTYPES[str(problem["dtype"])].itemsize


def _units(problem: Problem, size: int) -> int:
    """Vectors of ``size`` elements that one token writes."""
    heads = problem.int("heads")
    copied = heads * problem.int("nope_dim") + (problem.int("latent_dim") if problem["cache"] != "none" else 0)
    return (copied + (heads + 1) * problem.int("rope_dim")) // size


def _whole_units(config: Config, problem: Problem, tokens: int) -> bool:
    size = config["VEC_BYTES"] // _bytes(problem)
    rotated = problem.int("rope_dim") // (2 if problem.int("neox") else 1)
    # The table is loaded in words of 4 bytes: a vector has as many angles as elements (NeoX), or half as many.
    angles = size if problem.int("neox") else size // 2
    return (
        size >= 2
        and angles * DTYPES[str(problem["table"])].itemsize >= 4
        and all(width % size == 0 for width in (problem.int("nope_dim"), problem.int("latent_dim"), rotated))
    )


_GPU_SPACE = SearchSpace(
    (
        Tunable("THREADS", (256, 128, 512, 64), "threads per block: fewer blocks, against less even load"),
        Tunable("UNROLL", (1, 2, 4, 8), "vectors per thread: more loads in flight, against registers and fewer blocks"),
        Tunable("VEC_BYTES", (16, 8, 4), "bytes per load: fewer instructions, against more alignment"),
        Tunable("READ_ONCE", (0, 1), "activations leave the caches after reading: room for others"),
        Tunable("PDL", (1, 2, 0), "overlap with the kernels before and after, theirs early (1) or late (2)"),
        Tunable("PREFETCH", (0, 1, 2, 4), "with PDL, blocks per SM that pull their input into L2 while waiting"),
    ),
    (
        Constraint("widths, halves that NeoX pairs, and what is read of the table must be whole vectors", _whole_units),
        Constraint(
            f"the vectors in flight must fit {_VALUE_REGISTERS} registers of a thread",
            lambda c, p, t: 2 * c["UNROLL"] * c["VEC_BYTES"] // 4 <= _VALUE_REGISTERS,
        ),
        Constraint(
            "a block that takes more than there is does nothing for the rest",
            lambda c, p, t: (
                c["THREADS"] * c["UNROLL"] <= max(2 * t * _units(p, max(c["VEC_BYTES"] // _bytes(p), 1)), 64)
            ),
        ),
        Constraint(
            "only a kernel with PDL waits, so only it can prefetch meanwhile",
            lambda c, p, t: c["PDL"] > 0 or c["PREFETCH"] == 0,
        ),
    ),
)

_CPU_SPACE = SearchSpace(
    (
        *THREADING,
        Tunable("VECTOR_BYTES", (64, 32), "SIMD width: fewer instructions, against a lower clock on some CPUs"),
    ),
    THREADING_CONSTRAINTS,
)


def _gpu_default(problem: Problem, tokens: int) -> Config:
    config = Config.of(THREADS=256, UNROLL=1, READ_ONCE=0, PDL=0, PREFETCH=0)
    for size in (16, 8, 4):
        if _whole_units(chosen := Config.of(config, VEC_BYTES=size), problem, tokens):
            return chosen
    raise UnsupportedCall(f"{problem}: its widths are no whole number of 4-byte vectors")


def _cpu_default(problem: Problem, tokens: int) -> Config:
    return Config.of(THREADS=1 if tokens <= 4 else most_threads(tokens), SERIAL_ROWS=0, VECTOR_BYTES=32)


class MlaRopeKvCacheCat(FusedOp):
    """Rotates q_pe and k_pe, writes (kv_c, rotated k_pe) into the paged latent cache, and returns the query whole.

    RoPE (Su et al. 2021, "RoFormer") in fp32, rounded once. The cache's layout and scale are vLLM's: a row is kv_c,
    then k_pe; fp8 stores the rounded value ÷ ``kv_scale``. Kernels do not check that positions and slots are in range.

    Arguments:
        q_nope: [T, H, nope_dim], or None: the query returned is the rotated q_pe alone.
        q_pe: [T, H, rope_dim], bf16, fp16 or fp32, as all activations; strided any way but in the last dimension.
        kv_c: [T, latent_dim].
        k_pe: [T, rope_dim].
        positions: [T], int64, rows of cos_sin_cache.
        cos_sin_cache: [positions, rope_dim], a row holding rope_dim/2 cosines, then as many sines; q_pe's dtype or
            fp32. Plain and DeepSeek-scaled (YaRN) RoPE differ only in this table.
        slot_mapping: [T], int64: block · block_size + row for each token; negative for a padded one, whose cache row
            is not written (all else is computed for it). None: nothing is written.
        kv_cache: [blocks, block_size, latent_dim + rope_dim], written in place; q_pe's dtype, or float8_e4m3fn. None or
            without rows: nothing is written, as before a model has its cache.
        kv_scale: one fp32 value on the same device; for fp8 only.
        is_neox: True pairs element i with i + rope_dim/2 (NeoX), False even with odd neighbours (GPT-J).

    Returns: the query [T, H, nope_dim + rope_dim], and rotated k_pe [T, rope_dim], both contiguous.
    """

    name = "mla_rope_kv_cache_cat"
    schema = (
        "(Tensor? q_nope, Tensor q_pe, Tensor kv_c, Tensor k_pe, Tensor positions, Tensor cos_sin_cache, "
        "Tensor? slot_mapping, Tensor(a!)? kv_cache, Tensor? kv_scale, bool is_neox, "
        'str plan="") -> (Tensor, Tensor)'
    )
    mutates = (7,)
    shared = (4, 5, 6)
    kernels = {  # noqa: RUF012 (a ClassVar of the base class)
        "cuda": KernelSource("mla_rope_kv_cache_cat.cu", _GPU_SPACE, _gpu_default),
        "cpu": KernelSource("mla_rope_kv_cache_cat.cpp", _CPU_SPACE, _cpu_default),
    }

    # ---- meaning ----------------------------------------------------------------------------------------------------

    def reference(self, *args: Any) -> tuple[torch.Tensor, ...]:
        q_nope, q_pe, kv_c, k_pe, positions, table, slots, cache, scale, is_neox = args
        q, k_pe = _rotated(q_nope, q_pe, k_pe, positions, table, is_neox)
        if _writes(slots, cache):
            kept = slots >= 0
            _write(cache, slots[kept], kv_c[kept], k_pe[kept], scale)
        return q, k_pe

    def unfused(self, *args: Any) -> tuple[torch.Tensor, ...]:
        q_nope, q_pe, kv_c, k_pe, positions, table, slots, cache, scale, is_neox = args
        q, k_pe = _rotated(q_nope, q_pe, k_pe, positions, table, is_neox)
        if _writes(slots, cache):
            _write(cache, slots, kv_c, k_pe, scale)
        return q, k_pe

    def exact(self, *args: Any) -> tuple[torch.Tensor, ...]:
        q_nope, q_pe, kv_c, k_pe, positions, table, slots, cache, scale, is_neox = args
        cos, sin = table.double()[positions].chunk(2, dim=-1)
        q = _rotate(q_pe.double(), cos[:, None], sin[:, None], is_neox)
        q = q if q_nope is None else torch.cat([q_nope.double(), q], dim=-1)
        k_pe = _rotate(k_pe.double(), cos, sin, is_neox)
        if cache is None:
            return q, k_pe
        expected = cache.double()
        if _writes(slots, cache):
            kept = slots >= 0
            # What the cache holds was rounded to the activations' dtype first.
            rows = torch.cat([kv_c.double(), k_pe.to(q_pe.dtype).double()], dim=-1)[kept]
            if cache.dtype != q_pe.dtype:
                rows = (rows / scale.double()).clamp(-_E4M3_MAX, _E4M3_MAX)
            size = cache.shape[1]
            expected[slots[kept] // size, slots[kept] % size] = rows
        return q, k_pe, expected

    def fake(self, *args: Any) -> tuple[torch.Tensor, ...]:
        q_nope, q_pe, _, k_pe, *_ = args
        tokens, heads, rope_dim = q_pe.shape
        width = rope_dim + (0 if q_nope is None else q_nope.shape[2])
        return q_pe.new_empty((tokens, heads, width)), k_pe.new_empty((tokens, rope_dim))

    def tolerance(self, problem: Problem, result: int = 0) -> Tolerance:
        # Results are rounded once; a cached value a second time, to fp8, where one unit in the last place of the first
        # rounding may land on the other side of a tie. Differences of products cancel: their error is absolute. Ties
        # are rare, and ``exact`` rounds to the activations' dtype what the cache holds: usually only the last rounding
        # is seen, half a unit at most, and 1 % of that for fp32 arithmetic.
        epsilon = torch.finfo(DTYPES[str(problem["dtype"])]).eps
        relative = 8 * epsilon if problem["dtype"] == "fp32" else epsilon
        if result == 2 and problem["cache"] == "fp8":
            return Tolerance(relative=_E4M3_EPSILON, absolute=2.0**-9, usual=0.505 * _E4M3_EPSILON)
        usual = None if problem["dtype"] == "fp32" else 0.505 * epsilon
        return Tolerance(relative=relative, absolute=8 * torch.finfo(torch.float32).eps + 1e-6, usual=usual)

    # ---- problem ----------------------------------------------------------------------------------------------------

    def make_problem(self, **params: Any) -> Problem:
        """The problem with ``dtype``, ``heads``, ``nope_dim`` (0: no q_nope), ``rope_dim``, ``latent_dim``, ``neox``,
        ``table`` (dtype of cos_sin_cache) and ``cache`` (``none``, ``auto``, ``fp8``).
        """
        names = {
            name: params[name] if isinstance(params[name], str) else dtype_name(params[name])
            for name in ("dtype", "table")
        }
        for name, value in names.items():
            if value not in DTYPES:
                raise UnsupportedCall(f"{self.name}: {name} {value!r} is none of {', '.join(DTYPES)}")
        if names["table"] not in (names["dtype"], "fp32"):
            raise UnsupportedCall(f"{self.name}: cos_sin_cache is {names['table']}, neither {names['dtype']} nor fp32")
        if params["cache"] not in _CACHES:
            raise UnsupportedCall(f"{self.name}: cache {params['cache']!r} is none of {', '.join(_CACHES)}")
        widths = {name: int(params[name]) for name in ("heads", "nope_dim", "rope_dim", "latent_dim")}
        problem = Problem(
            self.name,
            (
                ("dtype", names["dtype"]),
                *widths.items(),
                ("neox", int(bool(params["neox"]))),
                ("table", names["table"]),
                ("cache", params["cache"]),
            ),
        )
        if min(widths["heads"], widths["rope_dim"], widths["latent_dim"]) < 1 or widths["rope_dim"] % 2:
            raise UnsupportedCall(f"{problem}: heads and widths must be positive, rope_dim even")
        _gpu_default(problem, 1)  # raises where not even the narrowest vectors fit
        return problem

    def model_problems(self, model: Mapping[str, Any], dtype: str) -> Sequence[Problem]:
        if not (model.get("kv_lora_rank") and model.get("qk_rope_head_dim") and model.get("num_attention_heads")):
            return []
        return [
            self.make_problem(
                dtype=dtype,
                heads=model["num_attention_heads"],
                nope_dim=model["kv_lora_rank"],
                rope_dim=model["qk_rope_head_dim"],
                latent_dim=model["kv_lora_rank"],
                neox=False,
                table=dtype,
                cache="auto",
            )
        ]

    def problem_of(self, *args: Any) -> Problem:
        q_nope, q_pe, kv_c, k_pe, positions, table, slots, cache, scale, is_neox = args
        if q_pe.dim() != 3 or kv_c.dim() != 2 or k_pe.dim() != 2 or positions.dim() != 1 or table.dim() != 2:
            raise BadInput(
                f"{self.name}: q_pe {list(q_pe.shape)}, kv_c {list(kv_c.shape)}, k_pe {list(k_pe.shape)}, positions "
                f"{list(positions.shape)}, cos_sin_cache {list(table.shape)} are not "
                "[T, H, R], [T, L], [T, R], [T], [P, R]"
            )
        tokens, heads, rope_dim = q_pe.shape
        if q_nope is not None and (q_nope.dim() != 3 or q_nope.shape[:2] != q_pe.shape[:2]):
            raise BadInput(f"{self.name}: q_nope {list(q_nope.shape)} is not [T, H, N] as q_pe {list(q_pe.shape)}")
        rows = {"kv_c": kv_c, "k_pe": k_pe, "positions": positions}
        if slots is not None:
            rows["slot_mapping"] = slots
        for name, tensor in rows.items():
            if tensor.shape[0] != tokens:
                raise BadInput(f"{self.name}: {name} has {tensor.shape[0]} rows, q_pe {tokens}")
        if k_pe.shape[1] != rope_dim or table.shape[1] != rope_dim:
            raise BadInput(
                f"{self.name}: rows of q_pe, k_pe and cos_sin_cache have {rope_dim}, {k_pe.shape[1]} and "
                f"{table.shape[1]} elements, which must be one number"
            )
        if positions.dtype != torch.int64 or (slots is not None and slots.dtype != torch.int64):
            raise BadInput(f"{self.name}: positions and slot_mapping must be int64")
        activations = {tensor.dtype for tensor in (q_pe, kv_c, k_pe, *([] if q_nope is None else [q_nope]))}
        if len(activations) > 1:
            raise UnsupportedCall(f"{self.name}: q_nope, q_pe, kv_c and k_pe are not all of one dtype")
        tensors = [tensor for tensor in args if isinstance(tensor, torch.Tensor)]
        if len({tensor.device for tensor in tensors}) > 1:
            raise BadInput(f"{self.name}: its tensors are on different devices")
        kind = "none"
        if _writes(slots, cache):
            if cache.dim() != 3 or cache.shape[2] != kv_c.shape[1] + rope_dim:
                raise BadInput(
                    f"{self.name}: kv_cache {list(cache.shape)} is not [blocks, block_size, {kv_c.shape[1] + rope_dim}]"
                )
            if cache.dtype not in (q_pe.dtype, torch.float8_e4m3fn):
                raise UnsupportedCall(f"{self.name}: kv_cache is {cache.dtype}, neither {q_pe.dtype} nor float8_e4m3fn")
            kind = "auto" if cache.dtype == q_pe.dtype else "fp8"
            if kind == "fp8" and (scale is None or scale.numel() != 1 or scale.dtype != torch.float32):
                raise BadInput(f"{self.name}: an fp8 kv_cache needs kv_scale, one fp32 value")
        return self.make_problem(
            dtype=q_pe.dtype,
            heads=heads,
            nope_dim=0 if q_nope is None else q_nope.shape[2],
            rope_dim=rope_dim,
            latent_dim=kv_c.shape[1],
            neox=is_neox,
            table=table.dtype,
            cache=kind,
        )

    def example_args(
        self, problem: Problem, tokens: int, device: torch.device, generator: torch.Generator
    ) -> tuple[Any, ...]:
        """q_pe is a slice of the projected query, q_nope comes transposed out of a batched matrix product, kv_c and
        k_pe are slices of one latent; slots are random rows of a cache of blocks of 64.
        """
        dtype = DTYPES[str(problem["dtype"])]
        heads, rope, latent, nope = (problem.int(f"{name}") for name in ("heads", "rope_dim", "latent_dim", "nope_dim"))

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=device, generator=generator).to(dtype)

        query, latents = random(tokens, heads, 128 + rope), random(tokens, latent + rope)
        angles = torch.rand(4096, rope // 2, device=device, generator=generator) * 6.28
        table = torch.cat([angles.cos(), angles.sin()], dim=-1).to(DTYPES[str(problem["table"])])
        cache = scale = slots = None
        if problem["cache"] != "none":
            blocks = -(-tokens // 64) + 1
            slots = torch.randperm(blocks * 64, device=device, generator=generator)[:tokens]
            cache = random(blocks, 64, latent + rope)
            if problem["cache"] == "fp8":
                cache, scale = cache.to(torch.float8_e4m3fn), torch.full((1,), 0.37, device=device)
        return (
            random(heads, tokens, nope).transpose(0, 1) if nope else None,
            query[:, :, 128:],
            latents[:, :latent],
            latents[:, latent:],
            torch.randint(0, 4096, (tokens,), device=device, generator=generator),
            table,
            slots,
            cache,
            scale,
            bool(problem["neox"]),
        )

    def check_args(
        self, problem: Problem, tokens: int, device: torch.device, generator: torch.Generator
    ) -> tuple[Any, ...]:
        """Every third token is padded, the first is not. The cache has blocks of 16 rows, its rows and blocks lie apart
        (by at least a block's worth of rows from the beginning of its memory), and its scale is random. Rows of the
        table, of kv_c and of k_pe lie apart, each in its own way.
        """
        q_nope, q_pe, kv_c, k_pe, positions, table, slots, cache, scale, neox = self.example_args(
            problem, tokens, device, generator
        )
        if cache is not None:
            blocks, rows, width = -(-tokens // 16) + 2, 16, cache.shape[2]
            # None is in the first block: a kernel that takes the block size for a larger one misses them all.
            slots = rows + torch.randperm((blocks - 1) * rows, device=device, generator=generator)[:tokens]
            slots[1::3] = -1
            values = torch.randn((blocks + 1) * (rows + 3), width, device=device, generator=generator)
            wide = rows_apart(values.to(cache.dtype), 1).unflatten(0, (blocks + 1, rows + 3))
            cache = wide[1:, 2 : 2 + rows]  # a row before the first is still this tensor's memory
            if scale is not None:
                scale = 0.05 + torch.rand(1, device=device, generator=generator)
        return (
            q_nope,
            q_pe,
            rows_apart(kv_c, 2),
            rows_apart(k_pe, 1),
            positions,
            rows_apart(table, 1),
            slots,
            cache,
            scale,
            neox,
        )

    def sweep_problems(self) -> Sequence[Problem]:
        shapes = (
            {"heads": 16, "nope_dim": 512, "rope_dim": 64, "latent_dim": 512},
            {"heads": 3, "nope_dim": 0, "rope_dim": 32, "latent_dim": 64},
            {"heads": 1, "nope_dim": 24, "rope_dim": 8, "latent_dim": 40},
        )
        variants = [
            ("bf16", "bf16", "auto", 1),
            ("bf16", "fp32", "auto", 0),
            ("fp16", "fp16", "fp8", 1),
            ("bf16", "bf16", "fp8", 0),
            ("fp32", "fp32", "none", 0),
            ("fp32", "fp32", "auto", 1),
        ]
        return [
            self.make_problem(dtype=dtype, table=table, cache=cache, neox=neox, **shape)
            for shape in shapes
            for dtype, table, cache, neox in variants
        ]

    def bytes_moved(self, problem: Problem, tokens: int) -> int:
        size, heads = _bytes(problem), problem.int("heads")
        rope, latent, nope = problem.int("rope_dim"), problem.int("latent_dim"), problem.int("nope_dim")
        query = heads * (nope + rope) * size
        table = rope * DTYPES[str(problem["table"])].itemsize
        read = query + rope * size + table + 8
        written = query + rope * size
        if problem["cache"] != "none":
            read += latent * size + 8
            written += (latent + rope) * (size if problem["cache"] == "auto" else 1)
        return tokens * (read + written)

    # ---- kernels ----------------------------------------------------------------------------------------------------

    def spec(self, kind: str, problem: Problem, config: Config) -> KernelSpec:
        return KernelSpec(
            source=self.kernel_source(kind).file,
            entry=self.name,
            defines={
                "ELEMENT": str(problem["dtype"]),
                "TABLE": str(problem["table"]),
                "HEADS": problem.int("heads"),
                "NOPE": problem.int("nope_dim"),
                "ROPE": problem.int("rope_dim"),
                "LATENT": problem.int("latent_dim"),
                "NEOX": problem.int("neox"),
                "CACHE": _CACHES.index(str(problem["cache"])),
                **config,
            },
            params_format=self.binding(problem).params_format,
            block=1 if kind == "cpu" else config["THREADS"],
            programmatic_launch=bool(config.get("PDL", 0)),
        )

    def binding(self, problem: Problem) -> Binding:
        dtype, table = DTYPES[str(problem["dtype"])], DTYPES[str(problem["table"])]
        heads, rope, latent, nope = (problem.int(f"{name}") for name in ("heads", "rope_dim", "latent_dim", "nope_dim"))
        pointer, stride, nothing = FieldKind.POINTER, FieldKind.STRIDE, Field(FieldKind.NOTHING)
        writes, fp8 = problem["cache"] != "none", problem["cache"] == "fp8"
        tensors = [
            TensorArg(1, dtype, (None, heads, rope)),
            TensorArg(2, dtype, (None, latent)),
            TensorArg(3, dtype, (None, rope)),
            TensorArg(4, torch.int64, (None,), align=1),
            TensorArg(5, table, (ANY, rope)),
        ]
        tensors += [TensorArg(0, dtype, (None, heads, nope))] if nope else []
        if writes:
            tensors.append(TensorArg(6, torch.int64, (None,), align=1))
            tensors.append(
                TensorArg(7, torch.float8_e4m3fn if fp8 else dtype, (ANY, ANY, latent + rope), align=4 if fp8 else 0)
            )
        tensors += [TensorArg(8, torch.float32, None, align=1)] if fp8 else []
        return Binding(
            tensors=tuple(tensors),
            constants=((9, bool(problem["neox"])),),
            absent=(*(() if nope else (0,)), *(() if writes else (7,))),
            fields=(
                Field(pointer, 0) if nope else nothing,
                Field(pointer, 1),
                Field(pointer, 2),
                Field(pointer, 3),
                Field(pointer, 4),
                Field(pointer, 5),
                Field(pointer, 6) if writes else nothing,
                Field(pointer, 7) if writes else nothing,
                Field(pointer, 8) if fp8 else nothing,
                Field(FieldKind.RESULT, 0),
                Field(FieldKind.RESULT, 1),
                Field(stride, 0, 0) if nope else nothing,
                Field(stride, 0, 1) if nope else nothing,
                Field(stride, 1, 0),
                Field(stride, 1, 1),
                Field(stride, 2, 0),
                Field(stride, 3, 0),
                Field(stride, 5, 0),
                Field(stride, 7, 0) if writes else nothing,
                Field(stride, 7, 1) if writes else nothing,
                Field(FieldKind.SIZE, 7, 1) if writes else Field(FieldKind.TOKENS),
                Field(FieldKind.TOKENS),
            ),
            params_format="P" * 11 + "q" * 9 + "ii",
            results=(Result(dtype, (None, heads, nope + rope)), Result(dtype, (None, rope))),
        )

    def launch_shape(self, problem: Problem, config: Config) -> LaunchShape:
        if "VEC_BYTES" not in config:
            return LaunchShape()
        return LaunchShape(
            units_per_token=_units(problem, config["VEC_BYTES"] // _bytes(problem)),
            units_per_block=config["THREADS"] * config["UNROLL"],
            align=config["VEC_BYTES"],
        )


def _writes(slots: torch.Tensor | None, cache: torch.Tensor | None) -> bool:
    return slots is not None and cache is not None and cache.numel() > 0


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, is_neox: bool) -> torch.Tensor:
    if is_neox:
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)


def _rotated(
    q_nope: torch.Tensor | None,
    q_pe: torch.Tensor,
    k_pe: torch.Tensor,
    positions: torch.Tensor,
    table: torch.Tensor,
    is_neox: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = table[positions].float().chunk(2, dim=-1)
    q = _rotate(q_pe.float(), cos[:, None], sin[:, None], is_neox).to(q_pe.dtype)
    q = q if q_nope is None else torch.cat([q_nope, q], dim=-1)
    return q, _rotate(k_pe.float(), cos, sin, is_neox).to(k_pe.dtype)


def _write(
    cache: torch.Tensor, slots: torch.Tensor, kv_c: torch.Tensor, k_pe: torch.Tensor, scale: torch.Tensor | None
) -> None:
    rows = torch.cat([kv_c, k_pe], dim=-1)
    size = cache.shape[1]
    if cache.dtype != rows.dtype:
        assert scale is not None
        rows = (rows.float() / scale).clamp(-_E4M3_MAX, _E4M3_MAX).to(cache.dtype)
        # PyTorch has no index_put for fp8 everywhere; its bytes will do.
        cache, rows = cache.view(torch.uint8), rows.view(torch.uint8)
    cache[slots // size, slots % size] = rows
