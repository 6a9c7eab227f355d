"""mla_rope_kv_cache_cat: RoPE, the write to the latent cache, and the query's concatenation, in one launch."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from autofuse.errors import BadInput, UnsupportedCall
from autofuse.ops import mla_rope_kv_cache_cat_kernels as kernels
from autofuse.ops import mla_rope_kv_cache_cat_triton as triton
from autofuse.ops.base import DTYPES, FusedOp, Tolerance, dtype_name
from autofuse.ops.binding import Binding, IndexBound, LaunchShape
from autofuse.ops.common import rows_apart
from autofuse.ops.mla_rope_kv_cache_cat_kernels import (
    CACHES,
    DS_MLA_BYTES,
    DS_MLA_GROUP,
    DS_MLA_LATENT,
    DS_MLA_ROPE,
    DS_MLA_SCALES,
    element_bytes,
    fp8_query,
    gpu_default,
    kind_of_cache,
)
from autofuse.ops.problem import Config, Problem
from autofuse.ops.rope import (
    E4M3_EPSILON,
    E4M3_MAX,
    E4M3_SMALLEST,
    counted_from_start,
    deinterleaves,
    rotate,
    scaled_to_fp8,
)
from autofuse.targets import KernelSpec

__all__ = ["MlaRopeKvCacheCat"]

_QUERIES = ("auto", "fp8")
_SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


class MlaRopeKvCacheCat(FusedOp):
    """Rotates q_pe and k_pe, writes (kv_c, rotated k_pe) into the latent cache, and returns the query whole.

    RoPE (Su et al. 2021, "RoFormer") in fp32, rounded once. Layouts of the cache and scales are vLLM's
    (``concat_and_cache_mla``): fp8 stores the rounded value ÷ scale, saturated. T is the number of positions: buffers
    of activations may be longer, as they are where CUDA graphs pad a batch; their rows from T on are not read. Kernels
    do not check that positions are in the table.

    Arguments:
        q_nope: [≥ T, H, nope_dim], or None: the query returned is the rotated q_pe alone.
        q_pe: [≥ T, H, rope_dim], bf16, fp16 or fp32, as all activations; strided any way but in the last dimension.
        kv_c: [≥ T, latent_dim].
        k_pe: [≥ T, rope_dim].
        positions: [T], int64, rows of cos_sin_cache.
        cos_sin_cache: [positions, rope_dim], a row holding rope_dim/2 cosines, then as many sines; q_pe's dtype or
            fp32. Plain and DeepSeek-scaled (YaRN) RoPE differ only in this table.
        slot_mapping: int64: block · block_size + row for each token. A token is padded, and writes no cache row (all
            else is computed for it), whose slot is negative (but see slots_from_end) or beyond the cache, or who has
            none because slot_mapping is shorter than T. None: nothing is written. A slot beyond the cache raises
            ValueError where values are looked at (see ``bounds``).
        kv_cache: written in place. None or without rows: nothing is written, as before a model has its cache. One of
            [blocks, block_size, latent_dim + rope_dim], a row holding kv_c, then k_pe; q_pe's dtype, or float8_e4m3fn;
            [blocks, block_size, latent_dim], as above, where there is a k_pe_cache;
            [blocks, block_size, 656], uint8, "fp8_ds_mla" (latent_dim 512, rope_dim 64, bf16 or fp16): 512 fp8 values
            of kv_c, four fp32 scales, max(amax ÷ 448, the smallest normal number) of 128 values each, and 64 elements
            of k_pe in q_pe's dtype.
        k_pe_cache: [blocks, block_size, rope_dim], written in place, kv_cache's dtype: two contiguous caches
            [batch, positions, width] are these with slot = batch index · positions + position.
        kv_scale: one fp32 value on the same device; for a float8_e4m3fn cache only.
        q_scale: one fp32 value on the same device: the query is returned as float8_e4m3fn, the rounded value ÷ q_scale.
        is_neox: True pairs element i with i + rope_dim/2 (NeoX), False even with odd neighbours (GPT-J).
        deinterleave: with is_neox False, neighbours are paired but come out as halves: all even elements, then all odd
            ones, as NeoX has them. Both the results and what is cached. Hugging Face transformers' DeepSeek-V3 and
            Kimi-K2 do so (``apply_rotary_pos_emb_interleave`` in models/deepseek_v3/modeling_deepseek_v3.py): a query
            and a key in the same order have the same product.
        slots_from_end: negative slots count from the cache's end, as PyTorch's indices do: -1 is its last row. False:
            they are of padded tokens.

    Returns: the query [T, H, nope_dim + rope_dim], and rotated k_pe [T, rope_dim], both contiguous.
    """

    name = "mla_rope_kv_cache_cat"
    bounds = (
        IndexBound(4, 5),  # positions: rows of cos_sin_cache
        IndexBound(6, 7, dims=2, padded=True),  # slot_mapping: of kv_cache
        IndexBound(6, 8, dims=2, padded=True),  # and of the cache of k_pe
    )
    schema = (
        "(Tensor? q_nope, Tensor q_pe, Tensor kv_c, Tensor k_pe, Tensor positions, Tensor cos_sin_cache, "
        "Tensor? slot_mapping, Tensor(a!)? kv_cache, Tensor(b!)? k_pe_cache, Tensor? kv_scale, Tensor? q_scale, "
        'bool is_neox, bool deinterleave=False, bool slots_from_end=False, str plan="") -> (Tensor, Tensor)'
    )
    mutates = (7, 8)
    shared = (4, 5, 6)
    kernels, triton_kernels = kernels.KERNELS, triton.TRITON_KERNELS

    # ---- meaning ----------------------------------------------------------------------------------------------------

    def reference(self, *args: Any) -> tuple[torch.Tensor, ...]:
        *inputs, slots, cache, k_pe_cache, kv_scale, q_scale, is_neox, deinterleave, from_end = args
        q, kv_c, k_pe = _rotated(is_neox, deinterleave, *inputs)
        if _writes(slots, cache):
            tokens, kept = _kept(slots, cache, len(k_pe), from_end)
            _write(cache, k_pe_cache, kept, kv_c[tokens], k_pe[tokens], kv_scale)
        return q if q_scale is None else scaled_to_fp8(q, q_scale), k_pe

    def unfused(self, *args: Any) -> tuple[torch.Tensor, ...]:
        *inputs, slots, cache, k_pe_cache, kv_scale, q_scale, is_neox, deinterleave, from_end = args
        q, kv_c, k_pe = _rotated(is_neox, deinterleave, *inputs)
        if _writes(slots, cache):
            slots = counted_from_start(slots, cache) if from_end else slots
            _write(cache, k_pe_cache, slots, kv_c, k_pe, kv_scale)
        return q if q_scale is None else scaled_to_fp8(q, q_scale), k_pe

    def exact(self, *args: Any) -> tuple[torch.Tensor, ...]:
        q_nope, q_pe, kv_c, k_pe, positions, table, slots, cache, k_pe_cache, kv_scale, q_scale, *style, from_end = args
        tokens, dtype = len(positions), q_pe.dtype
        cos, sin = table.double()[positions].chunk(2, dim=-1)
        q = rotate(q_pe[:tokens].double(), cos[:, None], sin[:, None], *style)
        q = q if q_nope is None else torch.cat([q_nope[:tokens].double(), q], dim=-1)
        q = q if q_scale is None else _quotient(q.to(dtype), q_scale)
        k_pe = rotate(k_pe[:tokens].double(), cos, sin, *style)
        if cache is None:
            return q, k_pe
        caches = [cache, *([] if k_pe_cache is None else [k_pe_cache])]
        expected = [each.clone() if each.dtype == torch.uint8 else each.double() for each in caches]
        if _writes(slots, cache):
            kept, slots = _kept(slots, cache, tokens, from_end)
            # What the cache holds was rounded to the activations' dtype first.
            parts = [kv_c[:tokens][kept].double(), k_pe[kept].to(dtype).double()]
            if cache.dtype == torch.uint8:
                parts = [_packed(parts[0], parts[1].to(dtype))]
            elif cache.dtype != dtype:
                parts = [_quotient(part, kv_scale) for part in parts]
            for each, rows in zip(expected, parts if k_pe_cache is not None else [torch.cat(parts, -1)], strict=True):
                each[slots // each.shape[1], slots % each.shape[1]] = rows
        return q, k_pe, *expected

    def fake(self, *args: Any) -> tuple[torch.Tensor, ...]:
        with suppress(UnsupportedCall):  # which the reference computes
            self.problem_of(*args)
        q_nope, q_pe, _, k_pe, positions, *_, q_scale, _, _, _ = args
        tokens, heads, rope_dim = positions.shape[0], q_pe.shape[1], q_pe.shape[2]
        width = rope_dim + (0 if q_nope is None else q_nope.shape[2])
        dtype = q_pe.dtype if q_scale is None else torch.float8_e4m3fn
        return q_pe.new_empty((tokens, heads, width), dtype=dtype), k_pe.new_empty((tokens, rope_dim))

    def tolerance(self, problem: Problem, result: int = 0) -> Tolerance:
        # Results are rounded once; a cached value and an fp8 query a second time, to fp8, where one unit in the last
        # place of the first rounding may land on the other side of a tie. Differences of products cancel: their error
        # is absolute. Ties are rare, and ``exact`` rounds to the activations' dtype what is divided by a scale: usually
        # only the last rounding is seen, half a unit at most, and 1 % of that for fp32 arithmetic.
        epsilon = torch.finfo(DTYPES[str(problem["dtype"])]).eps
        relative = 8 * epsilon if problem["dtype"] == "fp32" else epsilon
        usual = None if problem["dtype"] == "fp32" else 0.505 * epsilon
        rounded_once = Tolerance(relative=relative, absolute=8 * torch.finfo(torch.float32).eps + 1e-6, usual=usual)
        if result >= 2 and problem["cache"] == "fp8_ds_mla":
            return _PackedTolerance(relative, rounded_once.absolute, usual, dtype=str(problem["dtype"]))
        if (result == 0 and fp8_query(problem)) or (result >= 2 and kind_of_cache(problem).code == 2):
            return Tolerance(relative=E4M3_EPSILON, absolute=E4M3_SMALLEST, usual=0.505 * E4M3_EPSILON)
        return rounded_once

    # ---- problem ----------------------------------------------------------------------------------------------------

    def make_problem(self, **params: Any) -> Problem:
        """The problem with ``dtype``, ``heads``, ``nope_dim`` (0: no q_nope), ``rope_dim``, ``latent_dim``, ``neox``,
        ``table`` (dtype of cos_sin_cache), ``cache`` (``none``, ``auto``, ``fp8``, ``fp8_ds_mla``, and, with a cache of
        its own for k_pe, ``auto_apart``, ``fp8_apart``), ``query`` (``auto``, ``fp8``; left out: ``auto``) and
        ``deinterleave`` (left out: no).
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
        query = params.get("query", "auto")
        for name, value, known in (("cache", params["cache"], tuple(CACHES)), ("query", query, _QUERIES)):
            if value not in known:
                raise UnsupportedCall(f"{self.name}: {name} {value!r} is none of {', '.join(known)}")
        widths = {name: int(params[name]) for name in ("heads", "nope_dim", "rope_dim", "latent_dim")}
        problem = Problem(
            self.name,
            (
                ("dtype", names["dtype"]),
                *widths.items(),
                ("neox", int(bool(params["neox"]))),
                ("table", names["table"]),
                ("cache", params["cache"]),
                *((("query", query),) if query != "auto" else ()),
                *((("deinterleave", 1),) if params.get("deinterleave") else ()),
            ),
        )
        if problem["neox"] and deinterleaves(problem):
            raise UnsupportedCall(f"{problem}: halves, as NeoX pairs them, are not de-interleaved")
        if min(widths["heads"], widths["rope_dim"], widths["latent_dim"]) < 1 or widths["rope_dim"] % 2:
            raise UnsupportedCall(f"{problem}: heads and widths must be positive, rope_dim even")
        if problem["cache"] == "fp8_ds_mla" and (
            (widths["latent_dim"], widths["rope_dim"]) != (DS_MLA_LATENT, DS_MLA_ROPE) or element_bytes(problem) != 2
        ):
            raise UnsupportedCall(f"{problem}: fp8_ds_mla is for bf16 or fp16, latent_dim 512 and rope_dim 64")
        gpu_default(problem, 1)  # raises where not even the narrowest vectors fit
        return problem

    def model_problems(self, model: Mapping[str, Any], dtype: str) -> Sequence[Problem]:
        """First what engines with absorbed attention make of it, such as vLLM; then Hugging Face transformers, with a
        StaticCache (one tensor for the latent, one for the key) and with a cache that grows, which is not written in
        place.
        """
        names = {"heads": "num_attention_heads", "rope_dim": "qk_rope_head_dim", "latent_dim": "kv_lora_rank"}
        sizes = {name: model.get(key) for name, key in names.items()}
        if not all(sizes.values()):
            return []
        halves = model.get("rope_interleave") is False
        shared = {**sizes, "dtype": dtype, "neox": halves, "table": dtype}
        found = [{**shared, "nope_dim": model["kv_lora_rank"], "cache": "auto"}]
        if nope_dim := model.get("qk_nope_head_dim"):
            # DeepSeek-V2 multiplies complex numbers of two fp32; all others rotate in their own dtype.
            style = {"table": "fp32"} if model.get("model_type") == "deepseek_v2" else {"deinterleave": not halves}
            whole = {**shared, **style, "nope_dim": nope_dim}
            # Where nothing is cached, the key stands for the latent.
            found += [{**whole, "cache": "auto_apart"}, {**whole, "cache": "none", "latent_dim": sizes["rope_dim"]}]
        return [self.make_problem(**params) for params in found]

    def problem_of(self, *args: Any) -> Problem:
        q_nope, q_pe, kv_c, k_pe, positions, table, slots, cache, k_pe_cache, kv_scale, q_scale, *flags = args
        is_neox, deinterleave, _ = flags
        if q_pe.dim() != 3 or kv_c.dim() != 2 or k_pe.dim() != 2 or positions.dim() != 1 or table.dim() != 2:
            raise BadInput(
                f"{self.name}: q_pe {list(q_pe.shape)}, kv_c {list(kv_c.shape)}, k_pe {list(k_pe.shape)}, positions "
                f"{list(positions.shape)}, cos_sin_cache {list(table.shape)} are not "
                "[T, H, R], [T, L], [T, R], [T], [P, R]"
            )
        tokens, heads, rope_dim, latent_dim = positions.shape[0], q_pe.shape[1], q_pe.shape[2], kv_c.shape[1]
        activations = {"q_pe": q_pe, "kv_c": kv_c, "k_pe": k_pe}
        if q_nope is not None:
            if q_nope.dim() != 3 or q_nope.shape[1] != heads:
                raise BadInput(f"{self.name}: q_nope {list(q_nope.shape)} is not [T, H, N] as q_pe {list(q_pe.shape)}")
            activations["q_nope"] = q_nope
        for name, tensor in activations.items():
            if tensor.shape[0] < tokens:
                raise BadInput(f"{self.name}: {name} has {tensor.shape[0]} rows, positions {tokens}")
        if k_pe.shape[1] != rope_dim or table.shape[1] != rope_dim:
            raise BadInput(
                f"{self.name}: rows of q_pe, k_pe and cos_sin_cache have {rope_dim}, {k_pe.shape[1]} and "
                f"{table.shape[1]} elements, which must be one number"
            )
        if positions.dtype != torch.int64:
            raise BadInput(f"{self.name}: positions must be int64, not {positions.dtype}")
        if slots is not None and (slots.dtype != torch.int64 or slots.dim() != 1):
            raise BadInput(f"{self.name}: slot_mapping must be int64, [T], not {slots.dtype}, {list(slots.shape)}")
        if is_neox and deinterleave:
            raise BadInput(f"{self.name}: with is_neox there are no neighbours to deinterleave")
        if len({tensor.device for tensor in args if isinstance(tensor, torch.Tensor)}) > 1:
            raise BadInput(f"{self.name}: its tensors are on different devices")
        for name, scale in (("kv_scale", kv_scale), ("q_scale", q_scale)):
            if scale is not None and (scale.numel() != 1 or scale.dtype != torch.float32):
                raise BadInput(f"{self.name}: {name} must be one fp32 value, not {scale.dtype}, {list(scale.shape)}")
        rows = {**activations, "cos_sin_cache": table, "positions": positions, "slot_mapping": slots}
        kind = "none"
        if _writes(slots, cache):
            kind = self._cache_kind(q_pe.dtype, latent_dim, rope_dim, cache, k_pe_cache, kv_scale)
            rows |= {"kv_cache": cache, "k_pe_cache": k_pe_cache}
        for name, tensor in rows.items():
            if tensor is not None and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
                raise BadInput(f"{self.name}: {name}'s last dimension is not contiguous")
        if len({tensor.dtype for tensor in activations.values()}) > 1:
            raise BadInput(f"{self.name}: q_nope, q_pe, kv_c and k_pe are not all of one dtype")
        return self.make_problem(
            dtype=q_pe.dtype,
            heads=heads,
            nope_dim=0 if q_nope is None else q_nope.shape[2],
            rope_dim=rope_dim,
            latent_dim=latent_dim,
            neox=is_neox,
            table=table.dtype,
            cache=kind,
            query="auto" if q_scale is None else "fp8",
            deinterleave=deinterleave,
        )

    def _cache_kind(
        self,
        dtype: torch.dtype,
        latent_dim: int,
        rope_dim: int,
        cache: torch.Tensor,
        k_pe_cache: torch.Tensor | None,
        kv_scale: torch.Tensor | None,
    ) -> str:
        """The problem's ``cache`` of a call that writes one."""
        packed = cache.dtype == torch.uint8
        if packed and (k_pe_cache is not None or (latent_dim, rope_dim) != (DS_MLA_LATENT, DS_MLA_ROPE)):
            raise BadInput(
                f"{self.name}: a kv_cache of uint8 is fp8_ds_mla, whose rows hold a latent of 512 and a k_pe of 64 "
                "elements, and needs no k_pe_cache"
            )
        width = DS_MLA_BYTES if packed else latent_dim + (rope_dim if k_pe_cache is None else 0)
        if cache.dim() != 3 or cache.shape[2] != width:
            raise BadInput(f"{self.name}: kv_cache {list(cache.shape)} is not [blocks, block_size, {width}]")
        if packed:
            return "fp8_ds_mla"
        if k_pe_cache is not None and (
            tuple(k_pe_cache.shape) != (*cache.shape[:2], rope_dim) or k_pe_cache.dtype != cache.dtype
        ):
            raise BadInput(
                f"{self.name}: k_pe_cache {list(k_pe_cache.shape)} of {k_pe_cache.dtype} is not "
                f"{[*cache.shape[:2], rope_dim]} of {cache.dtype}, as kv_cache"
            )
        if cache.dtype not in (dtype, torch.float8_e4m3fn):
            raise UnsupportedCall(f"{self.name}: kv_cache is {cache.dtype}, neither {dtype} nor float8_e4m3fn")
        kind = "auto" if cache.dtype == dtype else "fp8"
        if kind == "fp8" and kv_scale is None:
            raise BadInput(f"{self.name}: an fp8 kv_cache needs kv_scale, one fp32 value")
        return kind if k_pe_cache is None else f"{kind}_apart"

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
        slots: torch.Tensor | None = None
        caches: list[torch.Tensor | None] = [None, None]
        if kind_of_cache(problem).code:
            blocks = -(-tokens // 64) + 1
            slots = torch.randperm(blocks * 64, device=device, generator=generator)[:tokens]
            caches = _caches(problem, random(blocks, 64, latent + rope))
        scaled, fp8 = kind_of_cache(problem).code == 2, fp8_query(problem)
        return (
            random(heads, tokens, nope).transpose(0, 1) if nope else None,
            query[:, :, 128:],
            latents[:, :latent],
            latents[:, latent:],
            torch.randint(0, 4096, (tokens,), device=device, generator=generator),
            table,
            slots,
            *caches,
            torch.full((1,), 0.37, device=device) if scaled else None,
            torch.full((1,), 0.29, device=device) if fp8 else None,
            bool(problem["neox"]),
            deinterleaves(problem),
            False,
        )

    def check_args(
        self, problem: Problem, tokens: int, device: torch.device, generator: torch.Generator
    ) -> tuple[Any, ...]:
        """Every third token is padded, or each second of these has a slot that counts from the end, but not the first;
        of the others, some have slots beyond the cache, and the last ones none at all. Buffers are up to two rows
        longer than T. The cache has blocks of 5 to 18 rows, its rows and blocks lie apart (by at least a block's worth
        of rows from the beginning and the end of its memory), and scales are random. Rows of the table and of all
        activations lie apart, each in its own way. Values of a row are of its own size, and some rows are zero.
        """
        dtype, table_dtype = (DTYPES[str(problem[name])] for name in ("dtype", "table"))
        heads, rope, latent, nope = (problem.int(f"{name}") for name in ("heads", "rope_dim", "latent_dim", "nope_dim"))
        seeds = torch.randint(0, 1 << 30, (16,), device=device, generator=generator).tolist()

        def activation(number: int, apart: int, *shape: int) -> torch.Tensor:
            rows = tokens + seeds[number] % 3
            sizes = 10 ** (2 * torch.rand(rows, *(1 for _ in shape), device=device, generator=generator) - 1)
            sizes[1::4] = 0
            values = sizes * torch.randn(rows, *shape, device=device, generator=generator)
            return rows_apart(values.to(dtype).flatten(0, -2), apart).unflatten(0, (rows, *shape[:-1]))

        angles = torch.rand(37, rope // 2, device=device, generator=generator) * 6.28
        table = rows_apart(torch.cat([angles.cos(), angles.sin()], dim=-1).to(table_dtype), 1)
        slots: torch.Tensor | None = None
        caches: list[torch.Tensor | None] = [None, None]
        from_end = False
        if kind_of_cache(problem).code:
            size = 5 + seeds[4] % 14
            blocks = -(-tokens // size) + 2
            # None is in the first block: a kernel that takes the block size for a larger one misses them all.
            slots = size + torch.randperm((blocks - 1) * size, device=device, generator=generator)[: max(tokens, 1)]
            from_end = bool(seeds[8] % 2)
            slots[1::6] = -1 - blocks * size * from_end - seeds[5] % size
            slots[4::6] = slots[4::6] - blocks * size if from_end else -1 - seeds[5] % size
            slots[3::6] = blocks * size + seeds[6] % size
            slots = slots[: max(tokens - seeds[7] % (tokens // 2 + 1), 1)]
            values = torch.randn((blocks + 2) * (size + 3), latent + rope, device=device, generator=generator)
            for number, content in enumerate(_caches(problem, values.to(dtype))):
                if content is not None:
                    wide = rows_apart(content, 1 + number).unflatten(0, (blocks + 2, size + 3))
                    caches[number] = wide[1:-1, 2 : 2 + size]  # around it there still is this tensor's memory
        scales = 0.05 + torch.rand(2, 1, device=device, generator=generator)
        return (
            activation(0, 1, heads, nope) if nope else None,
            activation(1, 2, heads, rope),
            activation(2, 2, latent),
            activation(3, 1, rope),
            torch.randint(0, 37, (tokens,), device=device, generator=generator),
            table,
            slots,
            *caches,
            scales[0] if kind_of_cache(problem).code == 2 else None,
            scales[1] if fp8_query(problem) else None,
            bool(problem["neox"]),
            deinterleaves(problem),
            from_end,
        )

    def sweep_problems(self) -> Sequence[Problem]:
        deepseek = {"heads": 5, "nope_dim": 512, "rope_dim": 64, "latent_dim": 512}
        few = {"heads": 2, "nope_dim": 0, "rope_dim": 64, "latent_dim": 512}
        bare = {"heads": 3, "nope_dim": 0, "rope_dim": 32, "latent_dim": 64}
        odd = {"heads": 3, "nope_dim": 96, "rope_dim": 32, "latent_dim": 64}
        small = {"heads": 1, "nope_dim": 24, "rope_dim": 8, "latent_dim": 40}
        narrow = {"heads": 2, "nope_dim": 6, "rope_dim": 4, "latent_dim": 10}
        styles = {"NeoX": {"neox": True}, "GPT-J": {"neox": False}, "apart": {"neox": False, "deinterleave": True}}
        variants: list[tuple[dict[str, int], str, str, str, str, str]] = [
            (deepseek, "bf16", "bf16", "auto", "GPT-J", "auto"),
            (deepseek, "bf16", "fp32", "fp8_ds_mla", "NeoX", "fp8"),
            (few, "fp16", "fp16", "fp8_ds_mla", "GPT-J", "auto"),
            (odd, "fp16", "fp16", "fp8", "NeoX", "auto"),
            (odd, "bf16", "fp32", "fp8_apart", "GPT-J", "fp8"),
            (small, "bf16", "bf16", "auto_apart", "NeoX", "auto"),
            (narrow, "bf16", "fp32", "fp8", "GPT-J", "fp8"),
            (bare, "fp32", "fp32", "none", "GPT-J", "auto"),
            (small, "fp32", "fp32", "auto", "NeoX", "fp8"),
            (odd, "bf16", "bf16", "auto_apart", "apart", "auto"),
            (few, "fp16", "fp32", "fp8_ds_mla", "apart", "fp8"),
            (small, "bf16", "fp32", "fp8", "apart", "auto"),
            (bare, "fp32", "fp32", "none", "apart", "fp8"),
        ]
        return [
            self.make_problem(dtype=dtype, table=table, cache=cache, query=query, **styles[style], **shape)
            for shape, dtype, table, cache, style, query in variants
        ]

    def random_problem(self, source: random.Random) -> Problem:
        """1 to 128 heads, as often few as many; widths that fit wide vectors, or only narrow ones."""
        cache = source.choice(list(CACHES))
        dtype = source.choice(["bf16", "fp16"] if cache == "fp8_ds_mla" else list(DTYPES))
        heads, step = int(2 ** source.uniform(0, 7.01)), source.choice([2, 4, 8, 16])
        most = 1024 // heads + 1  # words of a head
        rope, latent = source.randint(1, min(most, 32)) * 2 * step, source.randint(1, 32) * step
        if cache == "fp8_ds_mla":
            rope, latent, step = DS_MLA_ROPE, DS_MLA_LATENT, max(step, 4)
        style = source.choice(["NeoX", "GPT-J", "apart"])
        return self.make_problem(
            dtype=dtype,
            heads=heads,
            nope_dim=source.choice([0, source.randint(1, most) * step]),
            rope_dim=rope,
            latent_dim=latent,
            neox=style == "NeoX",
            deinterleave=style == "apart",
            # A pair of two bf16 elements has one cosine, less than a word.
            table=dtype if step > 2 and source.random() < 0.5 else "fp32",
            cache=cache,
            query=source.choice(_QUERIES),
        )

    def bytes_moved(self, problem: Problem, tokens: int) -> int:
        size, heads, kind = element_bytes(problem), problem.int("heads"), kind_of_cache(problem)
        rope, latent, nope = problem.int("rope_dim"), problem.int("latent_dim"), problem.int("nope_dim")
        query = heads * (nope + rope)
        read = (query + rope) * size + rope * DTYPES[str(problem["table"])].itemsize + 8
        written = query * (1 if fp8_query(problem) else size) + rope * size
        if kind.code:
            read += latent * size + 8
            written += {1: (latent + rope) * size, 2: latent + rope, 3: DS_MLA_BYTES}[kind.code]
        return tokens * (read + written)

    # ---- kernels ----------------------------------------------------------------------------------------------------

    def spec(self, kind: str, problem: Problem, config: Config) -> KernelSpec:
        return triton.spec(kind, problem, config)

    def binding(self, problem: Problem) -> Binding:
        return kernels.binding(problem)

    def launch_shape(self, problem: Problem, config: Config) -> LaunchShape:
        return triton.launch_shape(problem, config)


@dataclass(frozen=True)
class _PackedTolerance(Tolerance):
    """How far bytes of fp8_ds_mla rows may be off. Rows are the same, or compared part by part: fp8 codes by what an
    fp8 value may be off, scales as fp32, and k_pe, of ``dtype``, as this tolerance says.
    """

    dtype: str = "bf16"

    def error(self, out: torch.Tensor, reference: torch.Tensor) -> float:
        differ = (out != reference).any(-1)
        parts = zip(_unpacked(out[differ], self.dtype), _unpacked(reference[differ], self.dtype), strict=True)
        # Both codes are rounded: they are the same, but for ties.
        codes = Tolerance(E4M3_EPSILON, E4M3_SMALLEST, usual=0.01 * E4M3_EPSILON)
        scales = Tolerance(2 * torch.finfo(torch.float32).eps, 0.0)
        k_pe = Tolerance(self.relative, self.absolute, self.usual)
        return max(each.error(*part) for each, part in zip((codes, scales, k_pe), parts, strict=True))


def _caches(problem: Problem, rows: torch.Tensor) -> list[torch.Tensor | None]:
    """kv_cache and k_pe_cache of a problem, with the values of ``rows`` [..., latent_dim + rope_dim]."""
    kind, latent = kind_of_cache(problem), problem.int("latent_dim")
    if kind.code == 3:
        return [rows.view(torch.uint8)[..., :DS_MLA_BYTES].contiguous(), None]  # whatever bytes
    rows = rows.to(torch.float8_e4m3fn) if kind.code == 2 else rows
    return [rows[..., :latent].clone(), rows[..., latent:].clone()] if kind.apart else [rows, None]


def _writes(slots: torch.Tensor | None, cache: torch.Tensor | None) -> bool:
    return slots is not None and cache is not None and slots.numel() > 0 and cache.numel() > 0


def _kept(slots: torch.Tensor, cache: torch.Tensor, tokens: int, from_end: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens that are written, and their slots, counted from the beginning."""
    slots = counted_from_start(slots[:tokens], cache) if from_end else slots[:tokens]
    kept = ((slots >= 0) & (slots < cache.shape[0] * cache.shape[1])).nonzero()[:, 0]
    return kept, slots[kept]


def _quotient(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x ÷ scale in fp64, saturated as fp8, but not rounded."""
    return (x.double() / scale.double()).clamp(-E4M3_MAX, E4M3_MAX)


def _rotated(
    is_neox: bool,
    deinterleave: bool,
    q_nope: torch.Tensor | None,
    q_pe: torch.Tensor,
    kv_c: torch.Tensor,
    k_pe: torch.Tensor,
    positions: torch.Tensor,
    table: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The query, kv_c and the rotated k_pe, of T tokens."""
    tokens = positions.shape[0]
    q_pe, kv_c, k_pe = q_pe[:tokens], kv_c[:tokens], k_pe[:tokens]
    cos, sin = table[positions].float().chunk(2, dim=-1)
    q = rotate(q_pe.float(), cos[:, None], sin[:, None], is_neox, deinterleave).to(q_pe.dtype)
    q = q if q_nope is None else torch.cat([q_nope[:tokens], q], dim=-1)
    return q, kv_c, rotate(k_pe.float(), cos, sin, is_neox, deinterleave).to(k_pe.dtype)


def _packed(kv_c: torch.Tensor, k_pe: torch.Tensor) -> torch.Tensor:
    """Rows of fp8_ds_mla, in the arithmetic of kv_c's dtype."""
    groups = kv_c.unflatten(-1, (-1, DS_MLA_GROUP))
    scales = (groups.abs().amax(-1) / E4M3_MAX).clamp(min=_SMALLEST_NORMAL).float()
    codes = (groups / scales[..., None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).flatten(-2)
    return torch.cat([part.contiguous().view(torch.uint8) for part in (codes, scales, k_pe)], dim=-1)


def _unpacked(rows: torch.Tensor, dtype: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes as values, scales and k_pe of rows of fp8_ds_mla."""
    codes, scales, k_pe = rows.tensor_split((DS_MLA_SCALES.start, DS_MLA_SCALES.stop), dim=-1)
    return (
        codes.contiguous().view(torch.float8_e4m3fn).float(),
        scales.contiguous().view(torch.float32),
        k_pe.contiguous().view(DTYPES[dtype]),
    )


def _write(
    cache: torch.Tensor,
    k_pe_cache: torch.Tensor | None,
    slots: torch.Tensor,
    kv_c: torch.Tensor,
    k_pe: torch.Tensor,
    scale: torch.Tensor | None,
) -> None:
    if cache.dtype == torch.uint8:
        parts = [_packed(kv_c.float(), k_pe)]
    elif cache.dtype != kv_c.dtype:
        assert scale is not None
        parts = [scaled_to_fp8(part, scale) for part in (kv_c, k_pe)]
    else:
        parts = [kv_c, k_pe]
    if cache.dtype == torch.float8_e4m3fn:  # PyTorch has no cat and no index_put for fp8 everywhere; its bytes will do
        parts = [part.view(torch.uint8) for part in parts]
        cache, k_pe_cache = cache.view(torch.uint8), None if k_pe_cache is None else k_pe_cache.view(torch.uint8)
    size = cache.shape[1]
    if k_pe_cache is not None:
        k_pe_cache[slots // size, slots % size] = parts.pop()
    cache[slots // size, slots % size] = torch.cat(parts, dim=-1)
