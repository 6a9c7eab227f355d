"""rope_kv_cache: RoPE of q and k, RMSNorm before it if wanted, and the write to the paged KV cache, in one launch."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from autofuse.errors import BadInput, UnsupportedCall
from autofuse.ops import rope_kv_cache_kernels as kernels
from autofuse.ops import rope_kv_cache_triton as triton
from autofuse.ops.base import DTYPES, FusedOp, Tolerance, dtype_name
from autofuse.ops.binding import Binding, IndexBound, LaunchShape
from autofuse.ops.common import rows_apart
from autofuse.ops.languages import TRITON, language_of
from autofuse.ops.problem import Config, Problem
from autofuse.ops.rope import (
    E4M3_EPSILON,
    E4M3_MAX,
    E4M3_SMALLEST,
    counted_from_start,
    deinterleaves,
    rotate,
    scaled_to_fp8,
    write_rows,
)
from autofuse.ops.rope_kv_cache_kernels import (
    CACHES,
    E4M3,
    EPS,
    K_CACHE,
    K_SCALE,
    POSITIONS,
    Q_SCALE,
    Q_WEIGHT,
    RETURN_K,
    SLOTS,
    SLOTS_FROM_END,
    TABLE,
    V_CACHE,
    V_SCALE,
    K,
    Q,
    V,
    element_bytes,
    fp8_cache,
    heads_of,
    widest_vector,
)
from autofuse.targets import KernelSpec

__all__ = ["RopeKvCache"]

_LARGEST_NORMED = 8.0  # of elements of an RMS-normed head times its weight, but for one in many millions
_SMALLEST_SCALE = 0.25  # of those that are verified with

# Models with a rotary embedding like GPT-J's, and models that norm each q and k head first, by Hugging Face model_type.
_GPTJ_STYLE = ("codegen", "cohere", "cohere2", "glm", "glm4", "gptj")
_QK_NORMED = ("qwen3", "qwen3_moe")


class RopeKvCache(FusedOp):
    """Rotates q and k, writes rotated k and v into the paged KV cache, and returns q, and k if it is wanted.

    RoPE (Su et al. 2021, "RoFormer") in fp32, rounded once, of the first R elements of each head; the others are copied
    (partial rotary). With weights, each q and k head is RMS-normed over D first (Qwen3): in fp32, rounded, times the
    weight, rounded, as Hugging Face and vLLM do (cast before the weight). The cache's layouts and scales are vLLM's:
    fp8 stores the rounded value ÷ scale, saturated. Kernels do not check that positions are in range.

    Arguments:
        q: [T or more, H, D], bf16, fp16 or fp32, as k and v; strided any way but in the last dimension, as they are.
        k, v: [T or more, KV, D].
        positions: [T], int64, rows of cos_sin_cache.
        cos_sin_cache: [P, R], R ≤ D; a row holds R/2 cosines, then as many sines; q's dtype or fp32.
        slot_mapping: int64: block · block_size + row for each token. Where it is negative (but see slots_from_end) or
            beyond the cache, and for tokens behind its end, no row is written (all else is computed for them): padding,
            as under a CUDA graph. None or empty: nothing is written. A slot beyond the cache raises ValueError where
            values are looked at (see ``bounds``).
        k_cache, v_cache: [blocks, block_size, KV, D], written in place; q's dtype, or float8_e4m3fn; strided any way
            but in the last dimension. So one op serves every layout: NHD is contiguous; HND is a permuted view of
            [blocks, KV, block_size, D]; and a static cache of transformers, [B, KV, P, D], is ``transpose(1, 2)`` of
            it, with b · P + position for a slot. None or without rows: nothing is written, as before a model has one.
        k_scale, v_scale: for fp8 caches: fp32 on the same device, one value, or [KV] for one for each head.
        q_scale: one fp32 value, or None. With it q is returned as float8_e4m3fn of the rounded value ÷ q_scale.
        q_weight, k_weight: [D], q's dtype, both or neither; eps: added to the mean of squares.
        is_neox: True pairs element i with i + R/2 (NeoX), False even with odd neighbours (GPT-J).
        return_k: False returns [0, KV, D] in place of k, for attention that reads k from the cache.
        deinterleave: with is_neox False, neighbours are paired but come out as halves: of the R elements all even ones,
            then all odd ones, as NeoX has them. Both the results and what is cached. Hugging Face transformers'
            ``apply_rotary_pos_emb_interleave`` does so (models/deepseek_v3/modeling_deepseek_v3.py).
        slots_from_end: negative slots count from the caches' end, as PyTorch's indices do: -1 is the last row. False:
            they are of padded tokens.

    Returns: q [T, H, D] and k [T, KV, D], both contiguous.
    """

    name = "rope_kv_cache"
    bounds = (
        IndexBound(POSITIONS, TABLE),
        IndexBound(SLOTS, K_CACHE, dims=2, padded=True),
        IndexBound(SLOTS, V_CACHE, dims=2, padded=True),
    )
    schema = (
        "(Tensor q, Tensor k, Tensor v, Tensor positions, Tensor cos_sin_cache, Tensor? slot_mapping, "
        "Tensor(a!)? k_cache, Tensor(b!)? v_cache, Tensor? k_scale, Tensor? v_scale, Tensor? q_scale, "
        "Tensor? q_weight, Tensor? k_weight, float eps, bool is_neox, bool return_k, "
        'bool deinterleave=False, bool slots_from_end=False, str plan="") -> (Tensor, Tensor)'
    )
    mutates = (K_CACHE, V_CACHE)
    shared = (POSITIONS, TABLE, SLOTS)
    kernels = kernels.KERNELS
    triton_kernels = triton.TRITON_KERNELS

    # ---- meaning ----------------------------------------------------------------------------------------------------

    def reference(self, *args: Any) -> tuple[torch.Tensor, ...]:
        return self._computed(args, _in_cache(args) if _writes(args) else None)

    def unfused(self, *args: Any) -> tuple[torch.Tensor, ...]:
        return self._computed(args, None)

    def _computed(self, args: Sequence[Any], kept: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """The op, of whose cache rows only those of the tokens ``kept`` are written, or all."""
        q, k, v, positions, table, slots, k_cache, v_cache, k_scale, v_scale, q_scale, *_ = args
        q_weight, k_weight, eps, is_neox, return_k, deinterleave = args[Q_WEIGHT:SLOTS_FROM_END]
        tokens = positions.shape[0]
        q, k = q[:tokens], k[:tokens]
        if q_weight is not None:
            q, k = _rms_norm(q, q_weight, eps), _rms_norm(k, k_weight, eps)
        cos, sin = table[positions].float()[:, None].chunk(2, dim=-1)
        q, k = (rotate(x.float(), cos, sin, is_neox, deinterleave).to(x.dtype) for x in (q, k))
        if _writes(args):
            for cache, rows, scale in ((k_cache, k, k_scale), (v_cache, v[:tokens], v_scale)):
                chosen = slice(None) if kept is None else kept
                rows = rows[: slots.shape[0]][chosen]
                if cache.dtype != rows.dtype:
                    rows = scaled_to_fp8(rows, _for_heads(scale))
                write_rows(cache, _slots(args)[chosen], rows)
        return (
            (q if q_scale is None else scaled_to_fp8(q, q_scale)).contiguous(),
            k.contiguous() if return_k else k.new_empty((0, *k.shape[1:])),
        )

    def exact(self, *args: Any) -> tuple[torch.Tensor, ...]:
        q, k, v, positions, table, slots, k_cache, v_cache, k_scale, v_scale, q_scale, *_ = args
        q_weight, k_weight, eps, is_neox, return_k, deinterleave = args[Q_WEIGHT:SLOTS_FROM_END]
        tokens, dtype = positions.shape[0], q.dtype
        cos, sin = table.double()[positions][:, None].chunk(2, dim=-1)

        def rotated(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
            x = x[:tokens].double()
            if weight is not None:
                x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
                x = (x.to(dtype).double() * weight.double()).to(dtype).double()
            return rotate(x, cos, sin, is_neox, deinterleave)

        def scaled(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            # What becomes fp8 was rounded to the activations' dtype first.
            return (x.to(dtype).double() / scale.double()).clamp(-E4M3_MAX, E4M3_MAX)

        q, k = rotated(q, q_weight), rotated(k, k_weight)
        results = [q if q_scale is None else scaled(q, q_scale), k if return_k else k[:0]]
        for cache, rows, scale in ((k_cache, k, k_scale), (v_cache, v[:tokens].double(), v_scale)):
            if cache is None:
                continue
            expected = cache.double()
            if _writes(args):
                kept = _in_cache(args)
                rows = rows[: slots.shape[0]][kept]
                rows = rows if cache.dtype == dtype else scaled(rows, _for_heads(scale))
                write_rows(expected, _slots(args)[kept], rows)
            results.append(expected)
        return tuple(results)

    def fake(self, *args: Any) -> tuple[torch.Tensor, ...]:
        q, k, tokens = args[Q], args[K], args[POSITIONS].shape[0]
        q_dtype = q.dtype if args[Q_SCALE] is None else E4M3
        return (
            q.new_empty((tokens, *q.shape[1:]), dtype=q_dtype),
            k.new_empty((tokens if args[RETURN_K] else 0, *k.shape[1:])),
        )

    def tolerance(self, problem: Problem, result: int = 0) -> Tolerance:
        # Results are rounded once; what becomes fp8 a second time, where one unit in the last place of the first
        # rounding may land on the other side of a tie. Differences of products cancel: their error is absolute. Ties
        # are rare, and ``exact`` rounds where kernels do: usually only the last rounding is seen, half a unit at most,
        # and 1 % of that for fp32 arithmetic.
        # The norm rounds twice before the rotation. Where one of these lands on the other side of a tie, and the
        # element and its partner nearly cancel, the result is off by units of these, not of its own.
        epsilon = torch.finfo(DTYPES[str(problem["dtype"])]).eps
        fp32 = problem["dtype"] == "fp32"
        arithmetic = 8 * torch.finfo(torch.float32).eps + 1e-6
        ties = 0.0
        if problem["qk_norm"]:
            arithmetic *= _LARGEST_NORMED
            ties = (16 if fp32 else 2) * epsilon * _LARGEST_NORMED
        if (result == 0 and problem["q_fp8"]) or (result >= 2 and fp8_cache(problem)):
            return Tolerance(
                relative=E4M3_EPSILON,
                absolute=E4M3_SMALLEST + ties / _SMALLEST_SCALE,
                usual=0.505 * E4M3_EPSILON,
                usual_absolute=E4M3_SMALLEST,
            )
        return Tolerance(
            relative=8 * epsilon if fp32 else epsilon,
            absolute=arithmetic + ties,
            usual=None if fp32 else 0.505 * epsilon,
            usual_absolute=arithmetic,
        )

    # ---- problem ----------------------------------------------------------------------------------------------------

    def make_problem(self, **params: Any) -> Problem:
        """The problem with ``dtype``, ``heads``, ``kv_heads``, ``head_dim``, ``rope_dim``, ``neox``, ``table`` (dtype
        of cos_sin_cache), ``cache`` (``none``, ``auto``, ``fp8``, ``fp8_per_head``), ``qk_norm``, ``q_fp8``,
        ``return_k`` and ``deinterleave`` (left out: no).
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
        cache = params["cache"]
        if cache not in CACHES:
            raise UnsupportedCall(f"{self.name}: cache {cache!r} is none of {', '.join(CACHES)}")
        widths = {name: int(params[name]) for name in ("heads", "kv_heads", "head_dim", "rope_dim")}
        if cache == "fp8_per_head" and widths["kv_heads"] == 1:
            cache = "fp8"
        problem = Problem(
            self.name,
            (
                ("dtype", names["dtype"]),
                *widths.items(),
                ("neox", int(bool(params["neox"]))),
                ("table", names["table"]),
                ("cache", cache),
                *((name, int(bool(params[name]))) for name in ("qk_norm", "q_fp8", "return_k")),
                *((("deinterleave", 1),) if params.get("deinterleave") else ()),
            ),
        )
        if problem["neox"] and deinterleaves(problem):
            raise UnsupportedCall(f"{problem}: halves, as NeoX pairs them, are not de-interleaved")
        if min(widths.values()) < 1 or widths["rope_dim"] > widths["head_dim"]:
            raise UnsupportedCall(f"{problem}: heads and widths must be positive, rope_dim at most head_dim")
        widest_vector(problem)  # raises where not even the narrowest vectors fit
        return problem

    def model_problems(self, model: Mapping[str, Any], dtype: str) -> Sequence[Problem]:
        """First with a cache that is written in place, paged or transformers' StaticCache, from which attention reads
        the keys; then with one that grows, or none: the keys are returned.
        """
        heads = model.get("num_attention_heads")
        width = model.get("head_dim") or (heads and model.get("hidden_size") and model["hidden_size"] // heads)
        if model.get("kv_lora_rank") or not (heads and width):
            return []
        rope = model.get("rope_parameters")  # where newer configs have what older ones have at the top
        partial = model.get("partial_rotary_factor") or (rope or {}).get("partial_rotary_factor") or 1
        return [
            self.make_problem(
                dtype=dtype,
                heads=heads,
                kv_heads=model.get("num_key_value_heads") or heads,
                head_dim=width,
                rope_dim=int(width * partial),
                neox=model.get("model_type") not in _GPTJ_STYLE,
                table=dtype,
                cache=cache,
                qk_norm=model.get("model_type") in _QK_NORMED,
                q_fp8=False,
                return_k=cache == "none",
            )
            for cache in ("auto", "none")
        ]

    def problem_of(self, *args: Any) -> Problem:
        q, k, v, positions, table, slots, k_cache, v_cache, _, _, q_scale, q_weight, k_weight, _, *flags = args
        is_neox, return_k, deinterleave, _ = flags
        for name, tensor, shape in (
            ("q", q, "[T, H, D]"),
            ("k", k, "[T, KV, D]"),
            ("v", v, "[T, KV, D]"),
            ("positions", positions, "[T]"),
            ("cos_sin_cache", table, "[P, R]"),
            ("slot_mapping", slots, "[T]"),
            ("k_cache", k_cache, "[blocks, block_size, KV, D]"),
            ("v_cache", v_cache, "[blocks, block_size, KV, D]"),
            ("q_weight", q_weight, "[D]"),
            ("k_weight", k_weight, "[D]"),
        ):
            if tensor is None:
                continue
            if tensor.dim() != shape.count(",") + 1:
                raise BadInput(f"{self.name}: {name} {list(tensor.shape)} is not {shape}")
            if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
                raise BadInput(f"{self.name}: the last dimension of {name} is not contiguous")
            if tensor.device != q.device:
                raise BadInput(f"{self.name}: {name} is on {tensor.device}, q on {q.device}")
        tokens, (_, heads, width), rope_dim = positions.shape[0], q.shape, table.shape[1]
        for name, tensor, wanted in (("k", k, (k.shape[1], width)), ("v", v, (k.shape[1], width))):
            if tuple(tensor.shape[1:]) != wanted:
                raise BadInput(f"{self.name}: {name} {list(tensor.shape)} is not [T, {wanted[0]}, {wanted[1]}]")
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            if tensor.shape[0] < tokens:
                raise BadInput(f"{self.name}: {name} has {tensor.shape[0]} rows, positions {tokens}")
        if not 2 <= rope_dim <= width or rope_dim % 2:
            raise BadInput(f"{self.name}: rows of cos_sin_cache have {rope_dim} elements, no even number up to {width}")
        for name, tensor in (("positions", positions), ("slot_mapping", slots)):
            if tensor is not None and tensor.dtype != torch.int64:
                raise BadInput(f"{self.name}: {name} is {tensor.dtype}, it must be int64")
        if is_neox and deinterleave:
            raise BadInput(f"{self.name}: with is_neox there are no neighbours to deinterleave")
        if (q_weight is None) != (k_weight is None):
            raise BadInput(f"{self.name}: q_weight and k_weight must both be given, or neither")
        for name, tensor in (("q_weight", q_weight), ("k_weight", k_weight)):
            if tensor is not None and tensor.shape[0] != width:
                raise BadInput(f"{self.name}: {name} has {tensor.shape[0]} elements, a head {width}")
        if q_scale is not None and not _is_scale(q_scale, q, 1):
            raise BadInput(f"{self.name}: q_scale must be one fp32 value on q's device")
        cache = self._cache_of(args) if _writes(args) else "none"
        activations = {tensor.dtype for tensor in (q, k, v, q_weight, k_weight) if tensor is not None}
        if len(activations) > 1:
            raise UnsupportedCall(f"{self.name}: q, k, v and the weights are not all of one dtype")
        return self.make_problem(
            dtype=q.dtype,
            heads=heads,
            kv_heads=k.shape[1],
            head_dim=width,
            rope_dim=rope_dim,
            neox=is_neox,
            table=table.dtype,
            cache=cache,
            qk_norm=q_weight is not None,
            q_fp8=q_scale is not None,
            return_k=return_k,
            deinterleave=deinterleave,
        )

    def _cache_of(self, args: Sequence[Any]) -> str:
        """The kind of cache that a call writes. Raises BadInput, UnsupportedCall."""
        q, k, k_cache, v_cache = args[Q], args[K], args[K_CACHE], args[V_CACHE]
        heads, width = k.shape[1:]
        for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
            if cache is None or tuple(cache.shape[2:]) != (heads, width):
                shape = None if cache is None else list(cache.shape)
                raise BadInput(f"{self.name}: {name} {shape} is not [blocks, block_size, {heads}, {width}]")
            if cache.dtype not in (q.dtype, E4M3):
                raise UnsupportedCall(f"{self.name}: {name} is {cache.dtype}, neither {q.dtype} nor float8_e4m3fn")
        if k_cache.shape != v_cache.shape or k_cache.dtype != v_cache.dtype:
            raise BadInput(
                f"{self.name}: k_cache {list(k_cache.shape)} {k_cache.dtype} and v_cache {list(v_cache.shape)} "
                f"{v_cache.dtype} are not alike"
            )
        if k_cache.dtype == q.dtype:
            return "auto"
        scales = args[K_SCALE], args[V_SCALE]
        for name, scale in zip(("k_scale", "v_scale"), scales, strict=True):
            if not (_is_scale(scale, q, 1) or (_is_scale(scale, q, heads) and scale.dim() == 1)):
                raise BadInput(f"{self.name}: an fp8 cache needs {name}: fp32 on q's device, one value or [{heads}]")
        if scales[0].numel() != scales[1].numel():
            raise UnsupportedCall(
                f"{self.name}: k_scale and v_scale are not both one value, nor both one for each head"
            )
        return "fp8" if scales[0].numel() == 1 else "fp8_per_head"

    def example_args(
        self, problem: Problem, tokens: int, device: torch.device, generator: torch.Generator
    ) -> tuple[Any, ...]:
        """q, k and v are slices of one projection's result; slots are random rows of NHD caches with blocks of 16."""
        dtype = DTYPES[str(problem["dtype"])]
        heads, kv_heads, width = (problem.int(name) for name in ("heads", "kv_heads", "head_dim"))

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=device, generator=generator).to(dtype)

        q, k, v = random(tokens, heads + 2 * kv_heads, width).split([heads, kv_heads, kv_heads], dim=1)
        angles = torch.rand(4096, problem.int("rope_dim") // 2, device=device, generator=generator) * 6.28
        table = torch.cat([angles.cos(), angles.sin()], dim=-1).to(DTYPES[str(problem["table"])])
        slots = k_cache = v_cache = k_scale = v_scale = None
        if problem["cache"] != "none":
            blocks = -(-tokens // 16) + 1
            slots = torch.randperm(blocks * 16, device=device, generator=generator)[:tokens]
            cached = E4M3 if fp8_cache(problem) else dtype
            k_cache, v_cache = (random(blocks, 16, kv_heads, width).to(cached) for _ in range(2))
        if fp8_cache(problem):
            count = 1 if problem["cache"] == "fp8" else kv_heads
            k_scale, v_scale = (0.5 + torch.rand(count, device=device, generator=generator) for _ in range(2))
        return (
            q,
            k,
            v,
            torch.randint(0, 4096, (tokens,), device=device, generator=generator),
            table,
            slots,
            k_cache,
            v_cache,
            k_scale,
            v_scale,
            torch.full((1,), 0.37, device=device) if problem["q_fp8"] else None,
            1 + 0.1 * random(width) if problem["qk_norm"] else None,
            1 + 0.1 * random(width) if problem["qk_norm"] else None,
            1e-6,
            bool(problem["neox"]),
            bool(problem["return_k"]),
            deinterleaves(problem),
            False,
        )

    def check_args(
        self, problem: Problem, tokens: int, device: torch.device, generator: torch.Generator
    ) -> tuple[Any, ...]:
        """q, k and v have rows behind the last token, and q, k, v, the table and the caches strides of their own. The
        caches' layout, block size and scales are random; some slots are negative, some beyond the cache, some missing.
        With a norm, rows are of very different size, and eps matters.
        """
        args = list(self.example_args(problem, tokens, device, generator))
        heads, kv_heads, width = (problem.int(name) for name in ("heads", "kv_heads", "head_dim"))

        def drawn(low: int, high: int) -> int:
            return int(torch.randint(low, high + 1, (), device=device, generator=generator))

        for index, count in ((Q, heads), (K, kv_heads), (V, kv_heads)):
            rows, gap = tokens + drawn(0, 2), drawn(0, 2)
            values = torch.randn(rows * (count + gap), width, device=device, generator=generator)
            if problem["qk_norm"] and index != V:
                values *= 10 ** (4 * torch.rand(len(values), 1, device=device, generator=generator) - 2)
            apart = rows_apart(values.to(args[Q].dtype), drawn(1, 3))
            args[index] = apart.unflatten(0, (rows, count + gap))[:, :count]
        args[TABLE] = rows_apart(args[TABLE], 1)
        args[EPS] = 0.01
        if problem["q_fp8"]:
            args[Q_SCALE] = _SMALLEST_SCALE + torch.rand(1, device=device, generator=generator)
        if problem["cache"] != "none":
            size, dtype = drawn(1, 20), args[K_CACHE].dtype
            blocks = -(-tokens // size) + 2
            # None is in the first block: a kernel that takes the block size for a larger one misses them all.
            slots = size + torch.randperm((blocks - 1) * size, device=device, generator=generator)
            slots = slots[: max(tokens - drawn(0, tokens // 3), 1)]
            args[SLOTS_FROM_END] = bool(drawn(0, 1))
            slots[1::6] = -1 - blocks * size * args[SLOTS_FROM_END]
            slots[4::6] = slots[4::6] - blocks * size if args[SLOTS_FROM_END] else -1
            slots[2::7] = blocks * size + drawn(0, size)  # in what lies behind the cache
            slots[3::11] += 1 << 32  # in the cache again for a kernel that takes 32 bits
            args[SLOTS] = slots
            for index in (K_CACHE, V_CACHE):
                args[index] = _cache_apart(blocks, size, kv_heads, width, dtype, drawn(0, 3), device, generator)
        if fp8_cache(problem):
            for index in (K_SCALE, V_SCALE):
                args[index] = _SMALLEST_SCALE + torch.rand(len(args[index]), device=device, generator=generator)
        return tuple(args)

    def sweep_problems(self) -> Sequence[Problem]:
        names = ("dtype", "heads", "kv_heads", "head_dim", "rope_dim", "neox", "table", "cache")
        flags = ("qk_norm", "q_fp8", "return_k", "deinterleave")
        rows = (
            ("bf16", 4, 2, 128, 128, 1, "bf16", "auto", 0, 0, 0, 0),
            ("bf16", 4, 2, 128, 128, 1, "bf16", "auto", 1, 0, 0, 0),
            ("bf16", 3, 3, 96, 96, 0, "bf16", "fp8_per_head", 0, 1, 0, 0),
            ("bf16", 2, 1, 80, 80, 1, "fp32", "fp8", 1, 1, 1, 0),
            ("fp16", 3, 1, 80, 32, 1, "fp32", "fp8", 0, 0, 1, 0),
            ("fp16", 2, 2, 64, 32, 0, "fp32", "none", 1, 0, 1, 0),
            ("fp32", 2, 1, 64, 64, 0, "fp32", "auto", 0, 0, 1, 0),
            ("fp32", 1, 2, 256, 256, 1, "fp32", "fp8_per_head", 1, 1, 0, 0),
            ("fp16", 5, 2, 20, 4, 1, "fp16", "none", 0, 1, 0, 0),
            ("bf16", 4, 2, 80, 32, 0, "bf16", "auto", 1, 0, 1, 1),
            ("fp16", 3, 2, 64, 64, 0, "fp32", "fp8_per_head", 0, 1, 0, 1),
            ("fp32", 2, 1, 32, 8, 0, "fp32", "fp8", 0, 0, 1, 1),
        )
        return [self.make_problem(**dict(zip((*names, *flags), row, strict=True))) for row in rows]

    def random_problem(self, source: random.Random) -> Problem:
        """Up to 6 heads of up to 256 elements."""
        while True:
            dtype = source.choice(list(DTYPES))
            width = 4 * source.choice([source.randint(1, 64), 16, 20, 24, 32, 64])
            style = source.choice(["NeoX", "GPT-J", "apart"])
            try:
                return self.make_problem(
                    dtype=dtype,
                    heads=source.randint(1, 6),
                    kv_heads=source.randint(1, 4),
                    head_dim=width,
                    rope_dim=source.choice([width, 4 * source.randint(1, width // 4)]),
                    neox=style == "NeoX",
                    deinterleave=style == "apart",
                    table=source.choice([dtype, "fp32"]),
                    cache=source.choice(CACHES),
                    qk_norm=source.random() < 0.5,
                    q_fp8=source.random() < 0.5,
                    return_k=source.random() < 0.5,
                )
            except UnsupportedCall:
                continue

    def bytes_moved(self, problem: Problem, tokens: int) -> int:
        """Of activations and caches: what all layers share stays in the caches."""
        size, heads, kv_heads = element_bytes(problem), problem.int("heads"), problem.int("kv_heads")
        read = heads_of(problem) * size
        written = heads * (1 if problem["q_fp8"] else size) + problem.int("return_k") * kv_heads * size
        if problem["cache"] != "none":
            written += 2 * kv_heads * (1 if fp8_cache(problem) else size)
        return tokens * problem.int("head_dim") * (read + written)

    # ---- kernels ----------------------------------------------------------------------------------------------------

    def spec(self, kind: str, problem: Problem, config: Config) -> KernelSpec:
        if language_of(config) == TRITON:
            return triton.spec(kind, problem, config, self.binding(problem))
        return kernels.spec(kind, problem, config)

    def binding(self, problem: Problem) -> Binding:
        return kernels.binding(problem)

    def launch_shape(self, problem: Problem, config: Config) -> LaunchShape:
        shape_of = triton.launch_shape if language_of(config) == TRITON else kernels.launch_shape
        return shape_of(problem, config)


def _writes(args: Sequence[Any]) -> bool:
    """Whether a call writes to a cache."""
    slots, caches = args[SLOTS], [args[index] for index in (K_CACHE, V_CACHE)]
    return slots is not None and slots.numel() > 0 and any(cache is not None and cache.numel() > 0 for cache in caches)


def _slots(args: Sequence[Any]) -> torch.Tensor:
    """Of the tokens that have one, counted from the beginning; negative ones that are padded stay so."""
    slots = args[SLOTS][: args[POSITIONS].shape[0]]
    return counted_from_start(slots, args[K_CACHE]) if args[SLOTS_FROM_END] else slots


def _in_cache(args: Sequence[Any]) -> torch.Tensor:
    """For each token that has a slot whether that is one of the cache's."""
    slots, (blocks, size, *_) = _slots(args), args[K_CACHE].shape
    return (slots >= 0) & (slots < blocks * size)


def _is_scale(scale: torch.Tensor | None, like: torch.Tensor, count: int) -> bool:
    return scale is not None and (scale.numel(), scale.dtype, scale.device) == (count, torch.float32, like.device)


def _for_heads(scale: torch.Tensor) -> torch.Tensor:
    """One scale, or one for each head, beside rows [T, KV, D]."""
    return scale.reshape(-1, 1)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    normed = x.float()
    normed = normed * torch.rsqrt(normed.square().mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight


def _cache_apart(
    blocks: int,
    size: int,
    heads: int,
    width: int,
    dtype: torch.dtype,
    layout: int,
    device: torch.device,
    generator: torch.Generator,
) -> torch.Tensor:
    """A cache [blocks, size, heads, width] within a larger tensor: NHD (``layout`` 0, 1) or HND (2, 3), with blocks
    before and behind it, and between its blocks, rows and heads more of the same.
    """
    sizes = (blocks + 4, size + 2, heads + 1) if layout < 2 else (blocks + 4, heads + 1, size + 2)
    values = torch.randn(sizes[0] * sizes[1] * sizes[2], width, device=device, generator=generator)
    wide = rows_apart(values.to(dtype), 1 + layout % 2).unflatten(0, sizes)
    return (wide if layout < 2 else wide.transpose(1, 2))[1 : 1 + blocks, 1 : 1 + size, :heads]
