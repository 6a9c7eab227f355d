"""mla_v_up_quant: from attention's latent output to the quantised values of each head, in one launch."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from autofuse.errors import BadInput, UnsupportedCall
from autofuse.ops import mla_v_up_quant_triton as triton
from autofuse.ops.base import DTYPES, FusedOp, KernelSource, Tolerance, dtype_name
from autofuse.ops.binding import Binding, Field, FieldKind, LaunchShape, TensorArg
from autofuse.ops.common import THREADING, rows_apart
from autofuse.ops.languages import TRITON, language_of
from autofuse.ops.problem import Config, Problem
from autofuse.ops.quant import NVFP4, STATIC, QuantFormat, ScaleLayout
from autofuse.ops.space import Constraint, SearchSpace, Tunable
from autofuse.targets import KernelSpec

__all__ = ["MlaVUpQuant"]

_DTYPES = ("bf16", "fp16")  # that tensor cores multiply
_VEC_BYTES = 16
_MAX_THREADS = 1024
_SM_REGISTERS = 65536
_THREAD_REGISTERS = 255
_OTHER_REGISTERS = 48  # of a thread: addresses, W_UV rearranged, and what the compiler needs
_SHARED_BYTES = 227 << 10  # of a block (sm_90)
_LDS_BYTES = 64 << 10  # the same on AMD
_SMALL_SHARED_BYTES = 48 << 10  # what every GPU has

# Of kernels_src/mma.cuh: what a warp multiplies at once, and a warpgroup.
_WARP_ROWS, _WARP_COLUMNS, _WARP_DEPTH = 16, 64, 32
_TILE = 64
_STAGED_COLUMNS = (32, 64, 128)
_MOST_WARP_TOKENS = 128  # more sums than registers, or more of them in shared memory than fit
_WIDEST = 512  # of v_head_dim: eight warps

_X, _W, _SCALE, _GROUP, _UE8M0, _LAYOUT, _W_CONSTANT = range(7)  # the op's arguments


def _w_is_constant(problem: Problem) -> bool:
    return bool(dict(problem.params).get("w_constant", 0))


def _lanes(config: Mapping[str, int]) -> int:
    """Lanes of a warp: a constant of each vendor's space, 32 where it is not given."""
    return config.get("WARP_SIZE", 32)


def _threads(config: Config, problem: Problem) -> int:
    if config["STAGED"]:
        return 4 * _lanes(config) * config["WARPS"]
    columns, tokens = problem.int("v_head_dim") // _WARP_COLUMNS, config["TOKENS"] // (config["TILES"] * _WARP_ROWS)
    return max(columns * tokens, 1) * config["WARPS"] * _lanes(config)


def _steps(config: Config, problem: Problem) -> int:
    """STAGED 1: of a round."""
    return problem.int("kv_lora_rank") // (config["TILES"] * _TILE)


def _rounds(config: Config) -> int:
    """STAGED 1: tiles of tokens that a warpgroup multiplies one after the other."""
    return -(-config["TOKENS"] // (_TILE * config["WARPS"]))


def _columns(config: Config, problem: Problem) -> int:
    """Of a block."""
    return problem.int("v_head_dim") // config["CLUSTER"]


def _shared_bytes(config: Config, problem: Problem) -> int:
    """STAGED 0: sums. STAGED 1: operands on their way; where blocks share columns, a word for each row and block, and
    16 bytes for what says that they are there.
    """
    tokens, cluster = config["TOKENS"], config["CLUSTER"]
    if not config["STAGED"]:
        return config["WARPS"] * tokens * (problem.int("v_head_dim") + 8) * 4
    weights = _steps(config, problem) if _rounds(config) > 1 else config["STAGES"]
    rows = weights * _columns(config, problem) + config["STAGES"] * config["WARPS"] * _TILE  # as wide as a step
    return rows * config["TILES"] * _TILE * 2 + (4 * cluster * tokens + 16 if cluster > 1 else 0)


def _whole_tiles(config: Config, problem: Problem, tokens: int) -> bool:
    latent = problem.int("kv_lora_rank")
    if config["STAGED"]:
        return latent % (config["TILES"] * _TILE) == 0 and config["TOKENS"] % _TILE == 0
    shared = config["WARPS"] * _WARP_DEPTH
    return (
        latent % shared == 0
        and latent // shared % config["STAGES"] == 0
        and config["TOKENS"] % (_WARP_ROWS * config["TILES"]) == 0
    )


def _staged_fits(config: Config, problem: Problem, tokens: int) -> bool:
    rounds, steps = _rounds(config), _steps(config, problem)
    return not config["STAGED"] or (
        config["WARPS"] <= min(4, config["TOKENS"] // _TILE)
        and 2 <= config["STAGES"] <= max(rounds * steps, 2)
        and (rounds == 1 or config["CLUSTER"] == 1)
    )


def _columns_fit(config: Config, problem: Problem, tokens: int) -> bool:
    if not config["STAGED"]:
        return config["CLUSTER"] == 1
    columns, group = _columns(config, problem), problem.int("group")
    # All threads copy a row of W_UV's tiles each, or part of it, and no more rows at once than a tile has.
    return (
        columns * config["CLUSTER"] == problem.int("v_head_dim")
        and columns in _STAGED_COLUMNS
        and config["WARPS"] * 16 <= columns
        and (not group or group % columns == 0 or columns % group == 0)
    )


def _fits_registers(config: Config, problem: Problem, tokens: int) -> bool:
    """STAGED 0: the sums, and what is on its way of both operands."""
    if config["STAGED"]:
        return True
    tiles, lanes = config["TILES"], _lanes(config)
    sums = tiles * _WARP_ROWS * _WARP_COLUMNS // lanes
    step = (_WARP_COLUMNS + tiles * _WARP_ROWS) * _WARP_DEPTH // 2 // lanes
    registers = sums + config["STAGES"] * step + _OTHER_REGISTERS
    return registers <= min(_THREAD_REGISTERS, _SM_REGISTERS // _threads(config, problem))


def _not_too_large(config: Config, problem: Problem, tokens: int) -> bool:
    smallest = _TILE if config["STAGED"] else _WARP_ROWS * config["TILES"]
    return config["TOKENS"] <= max(2 * tokens - 1, smallest)


_CONSTRAINTS = (
    Constraint("operands must be whole tiles, for all that share them", _whole_tiles),
    Constraint(
        "the staged kernel has up to 4 warpgroups, 2 stages and no more than steps, and only one round in clusters",
        _staged_fits,
    ),
    Constraint("the staged kernel's blocks have 32, 64 or 128 columns, whole groups or shares of one", _columns_fit),
    Constraint(
        f"the kernel without stages adds up to {_MOST_WARP_TOKENS} tokens' sums",
        lambda c, p, t: bool(c["STAGED"]) or (c["TOKENS"] <= _MOST_WARP_TOKENS and c["STAGES"] <= 4),
    ),
    Constraint(
        f"a block has at most {_MAX_THREADS} threads",
        lambda c, p, t: _threads(c, p) <= _MAX_THREADS,
    ),
    Constraint("sums and operands on their way must fit a thread's registers", _fits_registers),
    Constraint("a block that takes twice the tokens there are, or more, multiplies zeros", _not_too_large),
)

_GPU_SPACE = SearchSpace(
    (
        Tunable("STAGED", (0, 1), "operands pass through shared memory, W_UV stays there: for many tokens"),
        Tunable("TOKENS", (64, 16, 32, 128, 256, 512, 1024, 2048), "tokens of a block: less of W_UV, fewer blocks"),
        Tunable("WARPS", (4, 1, 2, 8), "warps (staged: warpgroups) for the same columns: latency, against sums"),
        Tunable("TILES", (1, 2, 4), "tiles of 16 tokens of a warp: less of W_UV, against registers"),
        Tunable("STAGES", (1, 2, 3, 4, 5, 6, 8), "steps that are loaded ahead: latency, against room"),
        Tunable("CLUSTER", (1, 2, 4), "blocks that share a head's columns: more SMs for few heads, against o_latent"),
        Tunable("PDL", (1, 2, 3, 0), "overlap with the kernels before and after, theirs early (1) or later (2, 3)"),
        Tunable("PREFETCH", (1, 2, 0), "with PDL: W_UV (1), o_latent too (2), are pulled into L2 while waiting"),
        Tunable("EARLY", (1, 0), "with PDL and a W_UV that is constant: it is loaded while waiting"),
    ),
    (
        *_CONSTRAINTS,
        Constraint(
            f"a block has {_SHARED_BYTES >> 10} KB of shared memory",
            lambda c, p, t: _shared_bytes(c, p) <= _SHARED_BYTES,
        ),
        Constraint(
            "only a kernel with PDL waits, so only it can prefetch meanwhile",
            lambda c, p, t: c["PDL"] > 0 or c["PREFETCH"] == 0,
        ),
        Constraint(
            "only a kernel with PDL waits, and only a W_UV that is constant is there before that",
            lambda c, p, t: c["EARLY"] == 0 or (c["PDL"] > 0 and _w_is_constant(p)),
        ),
    ),
)

# What AMD has no choice in: CDNA's warps of 64 lanes, 64 KB of shared memory, and nothing like clusters or programmatic
# dependent launch.
_HIP_FIXED = {
    "WARP_SIZE": (64, "lanes of a warp"),
    "STAGED": (0, "W_UV does not fit shared memory"),
    "CLUSTER": (1, "only NVIDIA has them"),
    "PDL": (0, "only NVIDIA has it"),
    "PREFETCH": (0, "only with PDL"),
    "EARLY": (0, "only with PDL"),
}
_HIP_SPACE = SearchSpace(
    (
        *(tunable for tunable in _GPU_SPACE.tunables if tunable.name not in _HIP_FIXED),
        *(Tunable(name, (value,), trades) for name, (value, trades) in _HIP_FIXED.items()),
    ),
    (
        *_CONSTRAINTS,
        Constraint(
            f"a block has {_LDS_BYTES >> 10} KB of shared memory",
            lambda c, p, t: _shared_bytes(c, p) <= _LDS_BYTES,
        ),
    ),
)

_CPU_SPACE = SearchSpace(
    (
        THREADING[0],
        Tunable("ROWS", (6, 4, 2), "tokens in registers: less of W_UV is read, against registers"),
        Tunable("VECTOR_BYTES", (64, 32), "SIMD width: fewer instructions, against a lower clock on some CPUs"),
    ),
    (Constraint("every thread needs a head", lambda c, p, t: c["THREADS"] <= p.int("heads")),),
)


def _direct_default(problem: Problem, tokens: int) -> Config:
    latent, width = problem.int("kv_lora_rank"), problem.int("v_head_dim")
    config = Config.of(STAGED=0, TOKENS=16, TILES=1, STAGES=1, CLUSTER=1, PDL=0, PREFETCH=0, EARLY=0)
    if tokens > 16:
        config = Config.of(config, TOKENS=32 if width > 128 or tokens <= 32 else 64, TILES=2)
    for warps in (4, 2, 1):
        chosen = Config.of(config, WARPS=warps)
        if latent % (warps * _WARP_DEPTH) == 0 and _shared_bytes(chosen, problem) <= _SMALL_SHARED_BYTES:
            return chosen
    return Config.of(config, TOKENS=16, TILES=1, WARPS=1)


def _cuda_default(problem: Problem, tokens: int) -> Config:
    config = Config.of(STAGED=1, TOKENS=64, WARPS=1, TILES=1, STAGES=2, CLUSTER=1, PDL=0, PREFETCH=0, EARLY=0)
    fits = problem.int("kv_lora_rank") % _TILE == 0 and problem.int("v_head_dim") in _STAGED_COLUMNS
    return config if fits else _direct_default(problem, tokens)


def _cuda_guess(problem: Problem, tokens: int) -> dict[str, int]:
    staged = {"STAGED": 1, "PDL": 1, "WARPS": 1, "TOKENS": 64}
    if tokens <= 128:
        early = int(_w_is_constant(problem))
        return {**staged, "STAGES": 4, "TILES": 2, "CLUSTER": 4, "EARLY": early, "PREFETCH": 2}
    if tokens <= 512:
        return {**staged, "STAGES": 8, "CLUSTER": 2}
    if tokens <= 2048:
        return {**staged, "STAGES": 4, "WARPS": 2, "TOKENS": 128}
    return {**staged, "STAGES": 3, "TILES": 2, "WARPS": 2, "TOKENS": 512 if tokens <= 4096 else 1024}


def _hip_default(problem: Problem, tokens: int) -> Config:
    return Config.of(_direct_default(problem, tokens), **{name: value for name, (value, _) in _HIP_FIXED.items()})


def _cpu_default(problem: Problem, tokens: int) -> Config:
    threads = max(count for count in THREADING[0].values if count <= problem.int("heads"))
    return Config.of(THREADS=threads, ROWS=6, VECTOR_BYTES=64)


class MlaVUpQuant(FusedOp):
    """Multiplies attention's output in the latent space by each head's W_UV and quantises the result.

    MLA's value up-projection (DeepSeek-V2 technical report, section 2.1.2, absorbed form): ``o[t, n] = o_latent[t, n] ·
    w_uv[n]`` in fp32, rounded to the model's dtype, as the unfused product would leave it; then quantised as
    fp8_group_quant does a row of all heads, N · v_head_dim wide. ``autofuse.ops.quant`` says what the formats are.

    Arguments:
        o_latent: [T, N, kv_lora_rank], bf16 or fp16; strided any way but in the last dimension.
        w_uv: [N, kv_lora_rank, v_head_dim], o_latent's dtype; strided any way but in the last dimension.
        scale: one fp32 value on the same device; for ``group`` 0 what o is divided by, for 16 the global scale, 448 · 6
            ÷ amax(o) or thereabouts. None for other groups.
        group: 64 or 128 (group FP8), 0 (static FP8) or 16 (NVFP4). Kernels want v_head_dim to be a multiple.
        ue8m0: for group FP8: scales are powers of two.
        layout: a ScaleLayout, for group FP8: how scales lie in memory.
        w_constant: a promise that w_uv was written long ago, as a model's weights are: not by a kernel launched just
            before, which may still be running when this one begins (programmatic dependent launch). It may then be read
            at once. graph passes promise it for a model's parameters and buffers that the graph does not write.

    Returns:
        values: [T, N · v_head_dim], float8_e4m3fn, contiguous. NVFP4: [T, N · v_head_dim / 2], uint8, the first of two
            in the low half.
        scales: as fp8_group_quant's.
    """

    name = "mla_v_up_quant"
    schema = (
        "(Tensor o_latent, Tensor w_uv, Tensor? scale, int group, bool ue8m0, int layout, bool w_constant=False, "
        'str plan="")'
        " -> (Tensor, Tensor)"
    )
    shared = (_SCALE,)
    kernels = {  # noqa: RUF012 (a ClassVar of the base class)
        "cuda": KernelSource("mla_v_up_quant.cu", _GPU_SPACE, _cuda_default, _cuda_guess),
        "hip": KernelSource("mla_v_up_quant.cu", _HIP_SPACE, _hip_default),
        "cpu": KernelSource("mla_v_up_quant.cpp", _CPU_SPACE, _cpu_default),
    }
    triton_kernels = triton.TRITON_KERNELS

    # ---- meaning ----------------------------------------------------------------------------------------------------

    def reference(self, *args: Any) -> tuple[torch.Tensor, ...]:
        x, w, scale, *flags, _ = args
        o = torch.bmm(x.transpose(0, 1), w).transpose(0, 1).flatten(1)
        return self._format(o.shape[1], *flags).quantise(o, scale)

    def exact(self, *args: Any) -> tuple[torch.Tensor, ...]:
        x, w, scale, *flags, _ = args
        o = torch.bmm(x.double().transpose(0, 1), w.double()).transpose(0, 1).flatten(1)
        return self._format(o.shape[1], *flags).exact(o.to(x.dtype).double(), scale)

    def fake(self, *args: Any) -> tuple[torch.Tensor, ...]:
        self._check(*args)
        x, w, _, *flags, _ = args
        width = x.shape[1] * w.shape[2]
        return self._format(width, *flags).empty(x.shape[0], width, x.device)

    def tolerance(self, problem: Problem, result: int = 0) -> Tolerance:
        # Sums of products in fp32, in any order, then three roundings: to the dtype, of the scale, to FP8 (or FP4).
        # Where a sum lands on the other side of a tie, o is off by one unit in its last place, and may be its group's
        # amax: then the group's scale is as well, and all its values move by that much before they are rounded. Rare,
        # but a group can be most of a small result: what is usual allows for it too.
        dtype = str(problem["dtype"])
        tolerance = QuantFormat.of(problem).tolerance(result, dtype)
        if result == 0 and tolerance.usual:
            return replace(tolerance, usual=tolerance.usual + torch.finfo(DTYPES[dtype]).eps)
        return tolerance

    # ---- problem ----------------------------------------------------------------------------------------------------

    def make_problem(self, **params: Any) -> Problem:
        """The problem with ``dtype``, ``heads``, ``kv_lora_rank``, ``v_head_dim``, ``group``, ``ue8m0`` (False),
        ``layout`` (row-major) and ``w_constant`` (False; left out where it is).
        """
        dtype = params["dtype"]
        name = dtype if isinstance(dtype, str) else dtype_name(dtype)
        if name not in _DTYPES:
            raise UnsupportedCall(f"{self.name}: dtype {name!r} is none of {', '.join(_DTYPES)}")
        heads, latent, width = (int(params[each]) for each in ("heads", "kv_lora_rank", "v_head_dim"))
        quant = self._format(heads * width, int(params["group"]), params.get("ue8m0", False), params.get("layout", 0))
        if heads < 1 or latent < 1 or latent % _WARP_DEPTH or width < 1 or width % _WARP_COLUMNS or width > _WIDEST:
            raise UnsupportedCall(
                f"{self.name}: kv_lora_rank {latent} is no multiple of {_WARP_DEPTH}, or v_head_dim {width} none of "
                f"{_WARP_COLUMNS} up to {_WIDEST}"
            )
        if quant.group and width % quant.group:
            raise UnsupportedCall(f"{self.name}: v_head_dim {width} is no multiple of the group, {quant.group}")
        constant = (("w_constant", 1),) if params.get("w_constant") else ()
        return Problem(
            self.name,
            (
                ("dtype", name),
                ("heads", heads),
                ("kv_lora_rank", latent),
                ("v_head_dim", width),
                *quant.params,
                *constant,
            ),
        )

    def model_problems(self, model: Mapping[str, Any], dtype: str) -> Sequence[Problem]:
        names = {"heads": "num_attention_heads", "kv_lora_rank": "kv_lora_rank", "v_head_dim": "v_head_dim"}
        sizes = {name: model.get(key) for name, key in names.items()}
        if not all(sizes.values()) or dtype not in _DTYPES:
            return []
        try:  # in the format of DeepSeek-V3's checkpoints
            return [self.make_problem(dtype=dtype, group=128, w_constant=True, **sizes)]
        except (BadInput, UnsupportedCall):
            return []

    def problem_of(self, *args: Any) -> Problem:
        self._check(*args)
        x, w, _, group, ue8m0, layout, w_constant = args
        if x.dtype != w.dtype:
            raise UnsupportedCall(f"{self.name}: o_latent is {x.dtype}, w_uv {w.dtype}")
        return self.make_problem(
            dtype=x.dtype,
            heads=x.shape[1],
            kv_lora_rank=x.shape[2],
            v_head_dim=w.shape[2],
            group=group,
            ue8m0=ue8m0,
            layout=layout,
            w_constant=w_constant,
        )

    def _check(self, *args: Any) -> None:
        """Raises BadInput for arguments that make no sense together."""
        x, w, scale, group, ue8m0, layout, _ = args
        if x.dim() != 3 or w.dim() != 3 or x.shape[1:] != w.shape[:2]:
            raise BadInput(
                f"{self.name}: o_latent {list(x.shape)} and w_uv {list(w.shape)} are not [T, heads, kv_lora_rank] and "
                "[heads, kv_lora_rank, v_head_dim]"
            )
        for name, tensor in (("o_latent", x), ("w_uv", w)):
            if not tensor.dtype.is_floating_point:
                raise BadInput(f"{self.name}: {name} is {tensor.dtype}, which is no floating dtype")
            if tensor.shape[2] > 1 and tensor.stride(2) != 1:
                raise BadInput(
                    f"{self.name}: the last dimension of {name}, of stride {tensor.stride(2)}, must be contiguous"
                )
        if x.device != w.device:
            raise BadInput(f"{self.name}: o_latent is on {x.device}, w_uv on {w.device}")
        self._format(w.shape[0] * w.shape[2], group, ue8m0, layout).check_scale(self.name, scale, x.device)

    def _format(self, width: int, group: int, ue8m0: bool, layout: int) -> QuantFormat:
        return QuantFormat.checked(self.name, width, group, ue8m0, layout)

    def example_args(
        self, problem: Problem, tokens: int, device: torch.device, generator: torch.Generator
    ) -> tuple[Any, ...]:
        """o_latent is contiguous, as attention leaves it; its values are of size 1, as are the products'."""
        dtype = DTYPES[str(problem["dtype"])]
        heads, latent, width = (problem.int(name) for name in ("heads", "kv_lora_rank", "v_head_dim"))
        group, scale = problem.int("group"), None

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=device, generator=generator)

        if group in (STATIC, NVFP4):
            scale = torch.full((1,), 0.01 if group == STATIC else 448 * 6 / 5.0, device=device)
        return (
            random(tokens, heads, latent).to(dtype),
            (random(heads, latent, width) * latent**-0.5).to(dtype),
            scale,
            group,
            bool(problem["ue8m0"]),
            problem.int("layout"),
            _w_is_constant(problem),
        )

    def check_args(
        self, problem: Problem, tokens: int, device: torch.device, generator: torch.Generator
    ) -> tuple[Any, ...]:
        """Rows and heads of both operands lie apart, each in its own way; o_latent's heads lie outside of its tokens.
        Rows of o_latent are 1e-2 to 1e2 in size, each head its own, the first 1; every fifth is zero. Groups of w_uv's
        columns have a size of their own, too. A given scale is random, and such that some values are too large.
        """
        x, w, scale, *flags = self.example_args(problem, tokens, device, generator)
        heads, latent, width = (problem.int(name) for name in ("heads", "kv_lora_rank", "v_head_dim"))

        def sizes(*shape: int) -> torch.Tensor:
            return 10 ** (2 * torch.rand(*shape, device=device, generator=generator) - 1)

        rows = sizes(tokens, heads, 1) ** 2
        rows.view(-1)[2::5] = 0
        rows[:1, :1] = 1
        columns = sizes(heads, 1, width // 16).repeat_interleave(16, dim=2)
        x = (x * rows).transpose(0, 1).reshape(heads * tokens, latent).to(x.dtype)
        w = (w * columns).reshape(heads * latent, width).to(w.dtype)
        if scale is not None:
            scale = scale * (0.5 + torch.rand(1, device=device, generator=generator))
        return (
            rows_apart(x, 1).unflatten(0, (heads, tokens)).transpose(0, 1),
            rows_apart(w, 2).unflatten(0, (heads, latent)),
            scale,
            *flags,
        )

    def sweep_problems(self) -> Sequence[Problem]:
        return [
            self.make_problem(heads=heads, kv_lora_rank=latent, v_head_dim=width, **rest)
            for heads, latent, width, rest in (
                (1, 256, 128, {"dtype": "bf16", "group": 128}),
                (2, 128, 128, {"dtype": "fp16", "group": 64, "ue8m0": True, "layout": ScaleLayout.TMA_ALIGNED}),
                (2, 64, 128, {"dtype": "bf16", "group": NVFP4}),
                (3, 64, 128, {"dtype": "fp16", "group": STATIC}),
                (1, 256, 64, {"dtype": "bf16", "group": 64, "layout": ScaleLayout.COLUMN_MAJOR}),
                (1, 96, 192, {"dtype": "bf16", "group": NVFP4}),
                (1, 64, 256, {"dtype": "bf16", "group": 128, "ue8m0": True}),
                (2, 192, 128, {"dtype": "bf16", "group": 128, "w_constant": True}),
            )
        ]

    def random_problem(self, source: random.Random) -> Problem:
        """Any format, up to 4 heads, kv_lora_rank up to 256 and v_head_dim up to 256."""
        group = source.choice((STATIC, NVFP4, 64, 128))
        grouped = group in (64, 128)
        return self.make_problem(
            dtype=source.choice(_DTYPES),
            heads=source.randint(1, 4),
            kv_lora_rank=_WARP_DEPTH * source.randint(1, 8),
            v_head_dim=source.choice((128, 256) if group == 128 else (64, 128, 192, 256)),
            group=group,
            ue8m0=grouped and source.random() < 0.5,
            layout=source.choice(list(ScaleLayout)) if grouped else ScaleLayout.ROW_MAJOR,
            w_constant=source.random() < 0.5,
        )

    def bytes_moved(self, problem: Problem, tokens: int) -> int:
        heads, latent, width = (problem.int(name) for name in ("heads", "kv_lora_rank", "v_head_dim"))
        quant = QuantFormat.of(problem)
        read = heads * latent * (tokens + width) * DTYPES[str(problem["dtype"])].itemsize
        return read + quant.bytes_written(tokens, heads * width) + (4 if quant.needs_scale else 0)

    # ---- kernels ----------------------------------------------------------------------------------------------------

    def spec(self, kind: str, problem: Problem, config: Config) -> KernelSpec:
        if language_of(config) == TRITON:
            return triton.spec(kind, problem, config, self.binding(problem))
        return KernelSpec(
            source=self.kernel_source(kind).file,
            entry=self.name,
            defines={
                "ELEMENT": str(problem["dtype"]),
                "HEADS": problem.int("heads"),
                "LATENT": problem.int("kv_lora_rank"),
                "V_DIM": problem.int("v_head_dim"),
                "W_CONSTANT": int(_w_is_constant(problem)),
                **QuantFormat.of(problem).defines,
                **config,
            },
            params_format=self.binding(problem).params_format,
            block=1 if kind == "cpu" else _threads(config, problem),
            shared_bytes=0 if kind == "cpu" else _shared_bytes(config, problem),
            programmatic_launch=bool(config.get("PDL", 0)),
        )

    def binding(self, problem: Problem) -> Binding:
        dtype, quant = DTYPES[str(problem["dtype"])], QuantFormat.of(problem)
        heads, latent, width = (problem.int(name) for name in ("heads", "kv_lora_rank", "v_head_dim"))
        return Binding(
            tensors=(
                TensorArg(_X, dtype, (None, heads, latent)),
                TensorArg(_W, dtype, (heads, latent, width), constant=_w_is_constant(problem)),
                *quant.scale_args(_SCALE),
            ),
            absent=() if quant.needs_scale else (_SCALE,),
            constants=(
                (_GROUP, quant.group),
                (_UE8M0, quant.ue8m0),
                (_LAYOUT, int(quant.layout)),
                (_W_CONSTANT, _w_is_constant(problem)),
            ),
            fields=(
                Field(FieldKind.POINTER, _X),
                Field(FieldKind.POINTER, _W),
                quant.scale_field(_SCALE),
                Field(FieldKind.RESULT, 0),
                Field(FieldKind.RESULT, 1),
                Field(FieldKind.STRIDE, _X, 0),
                Field(FieldKind.STRIDE, _X, 1),
                Field(FieldKind.STRIDE, _W, 0),
                Field(FieldKind.STRIDE, _W, 1),
                Field(FieldKind.TOKENS),
            ),
            params_format="PPPPPqqqqi",
            results=quant.results(heads * width),
        )

    def launch_shape(self, problem: Problem, config: Config) -> LaunchShape:
        if language_of(config) == TRITON:
            return triton.launch_shape(problem, config)
        if "TOKENS" not in config:  # the CPU kernel splits the work itself and loads from any address
            return LaunchShape()
        return LaunchShape(
            units_per_block=config["TOKENS"], repeat=problem.int("heads") * config["CLUSTER"], align=_VEC_BYTES
        )
