"""fp8_group_quant: a row, normed or as it is, to FP8 or FP4 values and their scales in one launch."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from autofuse.errors import BadInput, UnsupportedCall
from autofuse.ops import fp8_group_quant_triton as triton
from autofuse.ops.base import DTYPES, FusedOp, KernelSource, Tolerance, dtype_name
from autofuse.ops.binding import Binding, Field, FieldKind, LaunchShape, TensorArg
from autofuse.ops.common import THREADING, THREADING_CONSTRAINTS, most_threads, rows_apart
from autofuse.ops.languages import TRITON, language_of
from autofuse.ops.problem import Config, Problem
from autofuse.ops.quant import NVFP4, STATIC, QuantFormat, ScaleLayout
from autofuse.ops.rms_norm import rms_norm, rms_norm_exact
from autofuse.ops.space import Constraint, SearchSpace, Tunable
from autofuse.targets import KernelSpec

__all__ = ["Fp8GroupQuant"]

_WARP = 32
_VEC_BYTES = 16
_MAX_THREADS = 1024
_NAMED_BARRIERS = 15  # per block, besides __syncthreads'
_SM_REGISTERS = 65536  # of 32 bits, for all threads of a block
_ROW_REGISTERS = 96  # that a thread may spend on what is in flight: half of its own at most, the rest is for arithmetic
_WIDEST_TEAM = 16  # warps of a normed row

_X, _SCALE, _WEIGHT, _EPS, _CAST, _GROUP, _UE8M0, _LAYOUT = range(8)  # the op's arguments


def _warp(config: Mapping[str, int]) -> int:
    """Lanes of a warp: a constant of each vendor's space, 32 where it is not given."""
    return config.get("WARP_SIZE", _WARP)


def _block(config: Config, problem: Problem) -> int:
    """Threads of a block. Where nothing is normed they are as many for any width of a warp, as is the grid."""
    return config["ROWS"] * config["X_WARPS"] * (_warp(config) if problem.int("norm") else _WARP)


def _vector(problem: Problem) -> int:
    """Elements in 16 bytes."""
    return _VEC_BYTES // DTYPES[str(problem["dtype"])].itemsize


def _lane_elements(config: Config, problem: Problem) -> int:
    return config["LOADS"] * _vector(problem)


def _unit(config: Config, problem: Problem) -> int:
    """Elements of a unit of work: a group, or what a lane loads."""
    return problem.int("group") or _lane_elements(config, problem)


def _lanes(config: Config, problem: Problem) -> int:
    """Lanes that share a unit."""
    return _unit(config, problem) // _lane_elements(config, problem)


def _units_per_block(config: Config, problem: Problem) -> int:
    if problem.int("norm"):
        return config["ROWS"] * config["UNROLL"]
    return _block(config, problem) // _lanes(config, problem) * config["UNROLL"]


def _whole_units(config: Config, problem: Problem, tokens: int) -> bool:
    elements = _lane_elements(config, problem)
    return problem.int("group") % elements == 0 and problem.int("width") % elements == 0


def _no_idle_warp(config: Config, problem: Problem, tokens: int) -> bool:
    vectors = problem.int("width") // _vector(problem)
    return not problem.int("norm") or config["X_WARPS"] == 1 or vectors > (config["X_WARPS"] - 1) * _warp(config)


def _fits_registers(config: Config, problem: Problem, tokens: int) -> bool:
    vectors = config["LOADS"] * config["UNROLL"]
    if problem.int("norm"):
        row = problem.int("width") // _vector(problem)
        vectors = -(-row // (config["X_WARPS"] * _warp(config))) * (config["UNROLL"] + 1)
    return vectors * _VEC_BYTES // 4 <= min(_ROW_REGISTERS, _SM_REGISTERS // _block(config, problem) // 2)


def _has_work(config: Config, problem: Problem, tokens: int) -> bool:
    if problem.int("norm"):
        return _units_per_block(config, problem) <= max(tokens, 1)
    units = tokens * problem.int("width") // _unit(config, problem)
    return _units_per_block(config, problem) <= max(2 * units, 2 * _WARP // _lanes(config, problem))


_GPU_SPACE = SearchSpace(
    (
        Tunable("X_WARPS", (4, 2, 8, 16, 1, 3, 6), "warps of a block, or a normed row: fewer blocks, shorter rows"),
        Tunable("ROWS", (1, 2, 4), "normed rows side by side in a block: fewer blocks, against less even load"),
        Tunable("UNROLL", (1, 2, 4), "groups or rows in turn in a thread: more loads in flight, against registers"),
        Tunable("LOADS", (2, 1, 4), "vectors of 16 bytes that a lane has of a group: fewer shuffles, against lanes"),
        Tunable("SPREAD", (0, 1), "a lane's vectors lie apart: loads of whole lines, against narrower stores"),
        Tunable("READ_ONCE", (0, 1), "x leaves the caches after reading: room for others, against readers to come"),
        Tunable(
            "PDL", (1, 2, 0), "overlap with the kernels before and after, theirs early (1) or late (2): hides launches"
        ),
        Tunable(
            "PREFETCH", (0, 1, 2, 4), "with PDL, blocks per SM that pull x into L2 while waiting: hides DRAM latency"
        ),
    ),
    (
        Constraint(
            "a group must be whole lanes' loads",
            lambda c, p, t: bool(p.int("norm")) or (_whole_units(c, p, t) and _lanes(c, p) <= _WARP),
        ),
        Constraint(
            "a lane's only vector, or a group's only lane, has nothing to lie apart from",
            lambda c, p, t: c["SPREAD"] == 0 or (c["LOADS"] > 1 and _lanes(c, p) > 1),
        ),
        Constraint(
            "rows that are normed are spread over their lanes one vector at a time",
            lambda c, p, t: not p.int("norm") or (c["LOADS"] == 1 and c["SPREAD"] == 0),
        ),
        Constraint("only rows that are normed lie side by side", lambda c, p, t: bool(p.int("norm")) or c["ROWS"] == 1),
        Constraint(
            "blocks that norm nothing have 2, 4, 8 or 16 warps: an SM takes half as many blocks as warps",
            lambda c, p, t: bool(p.int("norm")) or c["X_WARPS"] in (2, 4, 8, 16),
        ),
        Constraint("each warp needs at least one vector of its row", _no_idle_warp),
        Constraint(
            f"what is in flight must fit half of a thread's registers, {_ROW_REGISTERS} at most", _fits_registers
        ),
        Constraint(
            f"a block has at most {_MAX_THREADS} threads",
            lambda c, p, t: _block(c, p) <= _MAX_THREADS,
        ),
        Constraint("a block that takes more than there is does nothing for the rest", _has_work),
        Constraint(
            "only a kernel with PDL waits, so only it can prefetch meanwhile",
            lambda c, p, t: c["PDL"] > 0 or c["PREFETCH"] == 0,
        ),
    ),
)

# What AMD has no choice in: CDNA's warps of 64 lanes, and nothing like programmatic dependent launch.
_HIP_FIXED = {
    "WARP_SIZE": (64, "lanes of a warp"),
    "PDL": (0, "only NVIDIA has it"),
    "PREFETCH": (0, "only with PDL"),
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


def _gpu_default(problem: Problem, tokens: int) -> Config:
    config = Config.of(X_WARPS=4, ROWS=1, UNROLL=1, LOADS=1, SPREAD=0, READ_ONCE=0, PDL=0, PREFETCH=0)
    if problem.int("norm"):
        fitting = (w for w in (4, 8) if _fits_registers(Config.of(config, X_WARPS=w), problem, tokens))
        warps = min(next(fitting, _WIDEST_TEAM), max(problem.int("width") // _vector(problem) // _WARP, 1))
        return Config.of(config, X_WARPS=warps)
    wide = Config.of(config, LOADS=2)
    chosen = wide if _whole_units(wide, problem, tokens) else config
    return _GPU_SPACE.with_less(chosen, "X_WARPS", problem, tokens)


def _cuda_guess(problem: Problem, tokens: int) -> dict[str, int]:
    if problem.int("norm"):
        return {"PDL": 1, "READ_ONCE": int(tokens > 32), "PREFETCH": 1}
    if tokens <= 32:
        return {"PDL": 1, "LOADS": 2, "SPREAD": 1}
    if tokens <= 128:
        return {"PDL": 1, "LOADS": 2, "READ_ONCE": 1, "PREFETCH": 2}
    return {"PDL": 1, "LOADS": 2, "SPREAD": 1, "READ_ONCE": 1, "PREFETCH": 4, "X_WARPS": 8}


def _hip_default(problem: Problem, tokens: int) -> Config:
    config = _gpu_default(problem, tokens)
    if problem.int("norm"):  # half the warps of 32 lanes, twice as wide
        config = Config.of(config, X_WARPS=max(config["X_WARPS"] // 2, 1))
    fixed = Config.of(config, **{name: value for name, (value, _) in _HIP_FIXED.items()})
    return _HIP_SPACE.with_less(fixed, "X_WARPS", problem, tokens)


def _cpu_default(problem: Problem, tokens: int) -> Config:
    few = max(1, (1 << 16) // problem.int("width"))
    return Config.of(THREADS=1 if tokens <= few else most_threads(tokens), SERIAL_ROWS=0, VECTOR_BYTES=32)


class Fp8GroupQuant(FusedOp):
    """Quantises the rows of x, and norms them before that if a weight is given.

    ``autofuse.ops.quant`` says what the formats are, where they come from, what becomes of infinities and NaN. Without
    a norm the results are defined bit for bit. With it, they are those of an RMSNorm (as in mla_dual_rms_norm) that is
    rounded to x's dtype and quantised then.

    Arguments:
        x: [T, width], bf16, fp16 or fp32; rows may be strided, the last dimension is contiguous; width is a multiple of
            ``group``.
        scale: one fp32 value on the same device; for ``group`` 0 what x is divided by, for 16 the global scale, 448 · 6
            ÷ amax(x) or thereabouts. None for other groups.
        norm_weight: [width], contiguous, x's dtype. None: no norm.
        norm_eps: added to the mean of squares.
        cast_before_weight: True rounds the normalised row to x's dtype before it is multiplied by the weight.
        group: 64 or 128 (group FP8), 0 (static FP8) or 16 (NVFP4).
        ue8m0: for group FP8: scales are powers of two.
        layout: a ScaleLayout, for group FP8: how scales lie in memory.

    Returns:
        values: [T, width], float8_e4m3fn, contiguous. NVFP4: [T, width / 2], uint8, the first of two in the low half.
        scales: group FP8: [T, width / group], fp32, laid out as ``layout`` says. Static FP8: [0], fp32. NVFP4:
            [T rounded up to 128, width / 16 rounded up to 4], float8_e4m3fn, swizzled, zero where padded.
    """

    name = "fp8_group_quant"
    schema = (
        "(Tensor x, Tensor? scale, Tensor? norm_weight, float norm_eps, bool cast_before_weight, int group, "
        'bool ue8m0, int layout, str plan="") -> (Tensor, Tensor)'
    )
    shared = (_SCALE,)
    kernels = {  # noqa: RUF012 (a ClassVar of the base class)
        "cuda": KernelSource("fp8_group_quant.cu", _GPU_SPACE, _gpu_default, _cuda_guess),
        "hip": KernelSource("fp8_group_quant.cu", _HIP_SPACE, _hip_default),
        "cpu": KernelSource("fp8_group_quant.cpp", _CPU_SPACE, _cpu_default),
    }

    triton_kernels = triton.TRITON_KERNELS

    # ---- meaning ----------------------------------------------------------------------------------------------------

    def reference(self, *args: Any) -> tuple[torch.Tensor, ...]:
        x, scale, weight, eps, cast_before_weight, *flags = args
        if weight is not None:
            x = rms_norm(x, weight, eps, cast_before_weight)
        return self._format(x.shape[1], *flags).quantise(x, scale)

    def exact(self, *args: Any) -> tuple[torch.Tensor, ...]:
        x, scale, weight, eps, cast_before_weight, *flags = args
        quant = self._format(x.shape[1], *flags)
        if weight is None:
            return quant.quantise(x, scale)
        return quant.exact(rms_norm_exact(x, weight, eps, cast_before_weight).to(x.dtype).double(), scale)

    def fake(self, *args: Any) -> tuple[torch.Tensor, ...]:
        self._check(*args)
        x, *_, group, ue8m0, layout = args
        return self._format(x.shape[1], group, ue8m0, layout).empty(x.shape[0], x.shape[1], x.device)

    def tolerance(self, problem: Problem, result: int = 0) -> Tolerance:
        return QuantFormat.of(problem).tolerance(result, str(problem["dtype"]) if problem.int("norm") else None)

    # ---- problem ----------------------------------------------------------------------------------------------------

    def make_problem(self, **params: Any) -> Problem:
        """The problem with ``dtype``, ``width``, ``norm`` (False), ``cast_before_weight`` (False), ``group``, ``ue8m0``
        (False) and ``layout`` (row-major).
        """
        dtype, width, norm = params["dtype"], int(params["width"]), bool(params.get("norm", False))
        name = dtype if isinstance(dtype, str) else dtype_name(dtype)
        if name not in DTYPES:
            raise UnsupportedCall(f"{self.name}: dtype {name!r} is none of {', '.join(DTYPES)}")
        quant = self._format(width, int(params["group"]), params.get("ue8m0", False), int(params.get("layout", 0)))
        cast = norm and bool(params.get("cast_before_weight", False)) and name != "fp32"  # fp32 has nothing to cast to
        problem = Problem(
            self.name,
            (
                ("dtype", name),
                ("width", width),
                ("norm", int(norm)),
                ("cast_before_weight", int(cast)),
                *quant.params,
            ),
        )
        if width <= 0 or width % _vector(problem):
            raise UnsupportedCall(f"{self.name}: a row of {width} {name} elements is not a whole number of 16 bytes")
        limit = _ROW_REGISTERS // 8 * _WIDEST_TEAM * _WARP * _vector(problem)
        if norm and width > limit:
            raise UnsupportedCall(f"{self.name}: {width} {name} elements are more than the widest kernel's {limit}")
        return problem

    def model_problems(self, model: Mapping[str, Any], dtype: str) -> Sequence[Problem]:
        # What an MLA model's o_proj is given, in the format of DeepSeek-V3's checkpoints.
        heads, head_dim = model.get("num_attention_heads"), model.get("v_head_dim")
        if not (heads and head_dim and model.get("kv_lora_rank")) or heads * head_dim % 128:
            return []
        return [self.make_problem(dtype=dtype, width=heads * head_dim, group=128)]

    def problem_of(self, *args: Any) -> Problem:
        self._check(*args)
        x, _, weight, _, cast_before_weight, group, ue8m0, layout = args
        if weight is not None and weight.dtype != x.dtype:
            raise UnsupportedCall(f"{self.name}: norm_weight is {weight.dtype}, x {x.dtype}")
        return self.make_problem(
            dtype=x.dtype,
            width=x.shape[1],
            norm=weight is not None,
            cast_before_weight=cast_before_weight,
            group=group,
            ue8m0=ue8m0,
            layout=layout,
        )

    def _check(self, *args: Any) -> None:
        """Raises BadInput for arguments that make no sense together."""
        x, scale, weight, _, _, group, ue8m0, layout = args
        if x.dim() != 2:
            raise BadInput(f"{self.name}: x {list(x.shape)} is not [T, width]")
        if not x.dtype.is_floating_point:
            raise BadInput(f"{self.name}: x is {x.dtype}, which is no floating dtype")
        if x.shape[1] > 1 and x.stride(1) != 1:
            raise BadInput(f"{self.name}: the last dimension of x, of stride {x.stride(1)}, must be contiguous")
        self._format(x.shape[1], group, ue8m0, layout).check_scale(self.name, scale, x.device)
        if weight is not None and (weight.dim() != 1 or weight.shape[0] != x.shape[1]):
            raise BadInput(f"{self.name}: norm_weight {list(weight.shape)} is not [{x.shape[1]}], as wide as x")
        if weight is not None and weight.device != x.device:
            raise BadInput(f"{self.name}: norm_weight is on {weight.device}, x on {x.device}")

    def _format(self, width: int, group: int, ue8m0: bool, layout: int) -> QuantFormat:
        return QuantFormat.checked(self.name, width, group, ue8m0, layout)

    def example_args(
        self, problem: Problem, tokens: int, device: torch.device, generator: torch.Generator
    ) -> tuple[Any, ...]:
        """x is contiguous, as attention leaves it."""
        dtype, width, group = DTYPES[str(problem["dtype"])], problem.int("width"), problem.int("group")
        x = torch.randn(tokens, width, device=device, generator=generator).to(dtype)
        weight = scale = None
        if problem.int("norm"):
            weight = (1 + 0.1 * torch.randn(width, device=device, generator=generator)).to(dtype)
        if group in (STATIC, NVFP4):
            scale = torch.full((1,), 0.01 if group == STATIC else 448 * 6 / 5.0, device=device)
        return (
            x,
            scale,
            weight,
            1e-6,
            bool(problem["cast_before_weight"]),
            group,
            bool(problem["ue8m0"]),
            problem.int("layout"),
        )

    def check_args(
        self, problem: Problem, tokens: int, device: torch.device, generator: torch.Generator
    ) -> tuple[Any, ...]:
        """Rows lie apart. Groups are 1e-3 to 1e3 in size (fp16: 1e-2 to 1e2), each its own, the first 1; every fifth is
        zero. Every third has few significant bits, so that there are ties, and begins with 52 and 39, or these times a
        power of two: 39 ÷ (52 ÷ 448) is next to a tie, on whose other side a product with the reciprocal is. A given
        scale is random, and such that some values are too large. The norm's eps matters.
        """
        _, scale, weight, _, *flags = self.example_args(problem, 0, device, generator)
        width, span = problem.int("width"), 2 if problem["dtype"] == "fp16" else 3
        group = problem.int("group") or _vector(problem)
        sizes = 10 ** (2 * span * torch.rand(tokens, width // group, device=device, generator=generator) - span)
        sizes.view(-1)[2::5] = 0
        sizes[:1, :1] = 1
        if problem.int("norm"):  # sizes within a row would leave all but the largest group nothing
            sizes = sizes[:, :1] + 0.3 * torch.rand(sizes.shape, device=device, generator=generator)
        values = torch.randn(tokens, width, device=device, generator=generator)
        coarse = torch.zeros_like(sizes, dtype=torch.bool)
        coarse.view(-1)[::3] = True
        sizes = torch.where(coarse, 2 ** sizes.log2().round(), sizes)
        few_bits = (values * 8).round().clamp(-51, 51) / 8
        few_bits[:, ::group], few_bits[:, 1::group] = 52 / 8, 39 / 8
        values = torch.where(coarse.repeat_interleave(group, 1), few_bits, values)
        x = (values * sizes.repeat_interleave(group, 1)).to(DTYPES[str(problem["dtype"])])
        if scale is not None:
            scale = scale * (0.5 + torch.rand(1, device=device, generator=generator))
        return rows_apart(x, 1), scale, weight, 0.3, *flags

    def sweep_problems(self) -> Sequence[Problem]:
        plain = (
            {"dtype": "bf16", "width": 2048, "group": 128},
            {"dtype": "fp16", "width": 320, "group": 64, "ue8m0": True, "layout": ScaleLayout.TMA_ALIGNED},
            {"dtype": "fp32", "width": 384, "group": 128, "layout": ScaleLayout.COLUMN_MAJOR},
            {"dtype": "bf16", "width": 200, "group": STATIC},
            {"dtype": "bf16", "width": 208, "group": NVFP4},
            {"dtype": "fp32", "width": 64, "group": NVFP4},
        )
        normed = (
            {"dtype": "bf16", "width": 2688, "group": 128, "cast_before_weight": True},
            {"dtype": "fp16", "width": 320, "group": 64, "ue8m0": True, "layout": ScaleLayout.COLUMN_MAJOR},
            {"dtype": "bf16", "width": 272, "group": NVFP4, "cast_before_weight": True},
            {"dtype": "fp32", "width": 24, "group": STATIC},
        )
        return [self.make_problem(**each) for each in plain] + [self.make_problem(norm=True, **each) for each in normed]

    def random_problem(self, source: random.Random) -> Problem:
        """Any format, with up to 24 groups in a row, or 48 vectors."""
        group = source.choice((STATIC, NVFP4, 64, 128))
        grouped = group in (64, 128)
        return self.make_problem(
            dtype=source.choice(list(DTYPES)),
            width=source.randint(1, 24) * group if group else source.randint(1, 48) * 8,
            norm=source.random() < 0.4,
            cast_before_weight=source.random() < 0.5,
            group=group,
            ue8m0=grouped and source.random() < 0.5,
            layout=source.choice(list(ScaleLayout)) if grouped else ScaleLayout.ROW_MAJOR,
        )

    def bytes_moved(self, problem: Problem, tokens: int) -> int:
        width, quant = problem.int("width"), QuantFormat.of(problem)
        rows = (tokens + problem.int("norm")) * width * DTYPES[str(problem["dtype"])].itemsize
        return rows + quant.bytes_written(tokens, width) + (4 if quant.needs_scale else 0)

    # ---- kernels ----------------------------------------------------------------------------------------------------

    def spec(self, kind: str, problem: Problem, config: Config) -> KernelSpec:
        if language_of(config) == TRITON:
            return triton.spec(kind, problem, config, self.binding(problem))
        return KernelSpec(
            source=self.kernel_source(kind).file,
            entry=self.name,
            defines={
                "ELEMENT": str(problem["dtype"]),
                "X_WIDTH": problem.int("width"),
                "NORM": problem.int("norm"),
                "CAST_BEFORE_WEIGHT": problem.int("cast_before_weight"),
                **QuantFormat.of(problem).defines,
                **({} if kind == "cpu" else {"VEC_BYTES": _VEC_BYTES}),
                **config,
            },
            params_format=self.binding(problem).params_format,
            block=1 if kind == "cpu" else _block(config, problem),
            programmatic_launch=bool(config.get("PDL", 0)),
        )

    def binding(self, problem: Problem) -> Binding:
        dtype, width, norm = DTYPES[str(problem["dtype"])], problem.int("width"), bool(problem["norm"])
        quant = QuantFormat.of(problem)
        flags = [(_GROUP, quant.group), (_UE8M0, quant.ue8m0), (_LAYOUT, int(quant.layout))]
        if norm and problem["dtype"] != "fp32":
            flags.append((_CAST, bool(problem["cast_before_weight"])))
        return Binding(
            tensors=(
                TensorArg(_X, dtype, (None, width)),
                *quant.scale_args(_SCALE),
                *((TensorArg(_WEIGHT, dtype, (width,)),) if norm else ()),
            ),
            absent=(*(() if quant.needs_scale else (_SCALE,)), *(() if norm else (_WEIGHT,))),
            constants=tuple(flags),
            fields=(
                Field(FieldKind.POINTER, _X),
                quant.scale_field(_SCALE),
                Field(FieldKind.POINTER, _WEIGHT) if norm else Field(FieldKind.NOTHING),
                Field(FieldKind.RESULT, 0),
                Field(FieldKind.RESULT, 1),
                Field(FieldKind.STRIDE, _X, 0),
                Field(FieldKind.TOKENS),
                Field(FieldKind.FLOAT, _EPS),
            ),
            params_format="PPPPPqif",
            results=quant.results(width),
        )

    def launch_shape(self, problem: Problem, config: Config) -> LaunchShape:
        if language_of(config) == TRITON:
            return triton.launch_shape(problem, config)
        if "LOADS" not in config:  # the CPU kernel splits the work itself and loads from any address
            return LaunchShape()
        units = 1 if problem.int("norm") else problem.int("width") // _unit(config, problem)
        return LaunchShape(units_per_token=units, units_per_block=_units_per_block(config, problem), align=_VEC_BYTES)
