"""mla_dual_rms_norm: the two RMSNorms of an MLA layer in one launch."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from autofuse.errors import BadInput, UnsupportedCall
from autofuse.ops.base import DTYPES, FusedOp, KernelSource, Tolerance, dtype_name
from autofuse.ops.binding import Binding, Field, FieldKind, LaunchShape, Result, TensorArg
from autofuse.ops.common import THREADING, THREADING_CONSTRAINTS, most_threads, rows_apart
from autofuse.ops.languages import IN_TRITON, TRITON, language_of
from autofuse.ops.problem import Config, Problem
from autofuse.ops.rms_norm import rms_norm, rms_norm_exact
from autofuse.ops.space import Constraint, SearchSpace, Tunable
from autofuse.ops.triton import NUM_WARPS, PDL, READ_ONCE, VEC_BYTES, on_amd, power_of_two, triton_spec
from autofuse.targets import KernelSpec

__all__ = [
    "CPU_SPACE",
    "GPU_SPACE",
    "HIP_SPACE",
    "MlaDualRmsNorm",
    "cpu_default",
    "cuda_guess",
    "gpu_default",
    "hip_default",
]

_WARP = 32
_MAX_THREADS = 1024
_NAMED_BARRIERS = 15  # per block, besides __syncthreads'
_FEW_BLOCKS = 64
_ROW_REGISTERS = 96  # 32-bit registers that a thread may spend on rows in flight; the rest of 255 is for arithmetic


def _element_bytes(problem: Problem) -> int:
    return DTYPES[str(problem["dtype"])].itemsize


def _lanes(config: Mapping[str, int]) -> int:
    """Lanes of a warp: a constant of each vendor's space, 32 where it is not given."""
    return config.get("WARP_SIZE", _WARP)


def _halves(config: Config, problem: Problem) -> tuple[tuple[int, int], tuple[int, int]]:
    """(vectors in a row, lanes that share it) of the q and of the kv half."""
    size = config["VEC_BYTES"] // _element_bytes(problem)
    return (
        (problem.int("q_lora_rank") // size, _lanes(config) * config["Q_WARPS"]),
        (problem.int("kv_lora_rank") // size, _lanes(config) * config["KV_WARPS"]),
    )


def _whole_vectors(config: Config, problem: Problem, tokens: int) -> bool:
    row_bytes = (problem.int(name) * _element_bytes(problem) for name in ("q_lora_rank", "kv_lora_rank"))
    return all(row % config["VEC_BYTES"] == 0 for row in row_bytes)


def _no_idle_warp(config: Config, problem: Problem, tokens: int) -> bool:
    warp = _lanes(config)
    return all(lanes == warp or vectors > lanes - warp for vectors, lanes in _halves(config, problem))


def _fits_registers(config: Config, problem: Problem, tokens: int) -> bool:
    words = config["VEC_BYTES"] // 4
    return all(
        -(-vectors // lanes) * words * (config["UNROLL"] + 1) <= _ROW_REGISTERS
        for vectors, lanes in _halves(config, problem)
    )


GPU_SPACE = SearchSpace(
    (
        Tunable(
            "Q_WARPS", (6, 1, 2, 3, 8), "warps for a q row: lower latency, against a barrier and fewer rows in flight"
        ),
        Tunable("KV_WARPS", (2, 1, 4), "the same for a kv row"),
        Tunable("ROWS", (1, 2, 3, 4, 7), "tokens side by side in a block: fewer blocks, against less even load"),
        Tunable(
            "UNROLL", (1, 2, 4), "tokens in turn in a team: more loads in flight, against registers and fewer blocks"
        ),
        Tunable("VEC_BYTES", (16, 8, 4), "bytes per load: fewer instructions, against more alignment and idle lanes"),
        Tunable(
            "READ_ONCE", (0, 1), "activations leave the caches after reading: room for others, against readers to come"
        ),
        Tunable(
            "PDL", (1, 2, 0), "overlap with the kernels before and after, theirs early (1) or late (2): hides launches"
        ),
        Tunable(
            "PREFETCH", (0, 1, 2, 3), "with PDL, blocks per SM that pull rows into L2 while waiting: hides DRAM latency"
        ),
    ),
    (
        Constraint("a row must be a whole number of vectors", _whole_vectors),
        Constraint("each warp needs at least one vector of its row", _no_idle_warp),
        Constraint(f"the rows in flight must fit {_ROW_REGISTERS} registers of a thread", _fits_registers),
        Constraint(
            f"a block has at most {_MAX_THREADS} threads",
            lambda c, p, t: c["ROWS"] * (c["Q_WARPS"] + c["KV_WARPS"]) * _lanes(c) <= _MAX_THREADS,
        ),
        Constraint(
            f"a block has {_NAMED_BARRIERS} named barriers, two for each of its ROWS",
            lambda c, p, t: 2 * c["ROWS"] <= _NAMED_BARRIERS,
        ),
        Constraint(
            "a block that takes more tokens than there are does nothing for the rest",
            lambda c, p, t: c["ROWS"] * c["UNROLL"] <= max(t, 1),
        ),
        Constraint(
            "only a kernel with PDL waits, so only it can prefetch meanwhile",
            lambda c, p, t: c["PDL"] > 0 or c["PREFETCH"] == 0,
        ),
        Constraint(
            f"up to {_FEW_BLOCKS} blocks all run at once, one on each SM",
            lambda c, p, t: c["PREFETCH"] <= 1 or t > _FEW_BLOCKS * c["ROWS"] * c["UNROLL"],
        ),
    ),
)


# What AMD has no choice in: CDNA's warps of 64 lanes, and nothing like programmatic dependent launch.
_HIP_FIXED = {
    "WARP_SIZE": (64, "lanes of a warp"),
    "PDL": (0, "only NVIDIA has it"),
    "PREFETCH": (0, "only with PDL"),
}
HIP_SPACE = SearchSpace(
    (
        *(tunable for tunable in GPU_SPACE.tunables if tunable.name not in _HIP_FIXED),
        *(Tunable(name, (value,), trades) for name, (value, trades) in _HIP_FIXED.items()),
    ),
    GPU_SPACE.constraints,
)


_TRITON_VALUES = 64  # fp32 values of a row that a thread may hold; the rest of 255 registers is for arithmetic


def _fits_triton_registers(config: Config, problem: Problem, tokens: int) -> bool:
    lanes = _WARP * config["NUM_WARPS"]
    halves = (("q_lora_rank", config["Q_ROWS"]), ("kv_lora_rank", config["KV_ROWS"]))
    return all(rows * power_of_two(problem.int(name)) <= _TRITON_VALUES * lanes for name, rows in halves)


def _fills_triton_warps(config: Config, problem: Problem, tokens: int) -> bool:
    """A block with more lanes than elements computes each several times."""
    elements = config["Q_ROWS"] * power_of_two(problem.int("q_lora_rank"))
    return config["NUM_WARPS"] == 1 or elements >= _WARP * config["NUM_WARPS"]


TRITON_SPACE = SearchSpace(
    (
        IN_TRITON,
        NUM_WARPS,
        Tunable("Q_ROWS", (1, 2, 4, 8), "tokens of q in a block: fewer blocks, against less even load and registers"),
        Tunable("KV_ROWS", (1, 2, 4, 8), "the same of kv"),
        VEC_BYTES,
        READ_ONCE,
        PDL,
    ),
    (
        Constraint("a row must be a whole number of vectors", _whole_vectors),
        Constraint(
            "narrower loads are for rows that no wider ones divide",
            lambda c, p, t: c["VEC_BYTES"] == 16 or not _whole_vectors(Config.of(c, VEC_BYTES=16), p, t),
        ),
        Constraint(f"a thread holds at most {_TRITON_VALUES} values of its rows", _fits_triton_registers),
        Constraint("a block has no more lanes than elements of q", _fills_triton_warps),
        Constraint(
            "a block that takes more tokens than there are does nothing for the rest",
            lambda c, p, t: max(c["Q_ROWS"], c["KV_ROWS"]) <= max(t, 1),
        ),
        Constraint(
            "kv rows are the shorter ones: a block takes as many or more", lambda c, p, t: c["Q_ROWS"] <= c["KV_ROWS"]
        ),
    ),
)


CPU_SPACE = SearchSpace(
    (
        *THREADING,
        Tunable("TASK_ROWS", (1, 8), "tokens per task: less overhead, against less even load"),
        Tunable("UNROLL", (2, 1, 4), "vector pairs per loop iteration: hides latency, against registers and a tail"),
        Tunable("VECTOR_BYTES", (64, 32), "SIMD width: fewer instructions, against a lower clock on some CPUs"),
    ),
    (
        *THREADING_CONSTRAINTS,
        Constraint(
            "every thread needs a task",
            lambda c, p, t: (c["THREADS"] - 1) * c["TASK_ROWS"] < max(t, 1),
        ),
        Constraint(
            "one thread takes the tasks in order, whatever their size",
            lambda c, p, t: c["THREADS"] > 1 or c["TASK_ROWS"] == 1,
        ),
    ),
)


def gpu_default(problem: Problem, tokens: int) -> Config:
    row_bytes = [problem.int(name) * _element_bytes(problem) for name in ("q_lora_rank", "kv_lora_rank")]
    vec_bytes = next(size for size in (16, 8, 4) if all(row % size == 0 for row in row_bytes))
    q_vectors, kv_vectors = (row // vec_bytes for row in row_bytes)
    q_warps = next((w for w in (8, 6, 3, 2, 1) if q_vectors >= w * _WARP), 1)
    kv_warps = next((w for w in (4, 2, 1) if kv_vectors >= w * _WARP), 1)
    return Config.of(
        Q_WARPS=q_warps, KV_WARPS=kv_warps, ROWS=1, UNROLL=1, VEC_BYTES=vec_bytes, READ_ONCE=0, PDL=0, PREFETCH=0
    )


def cuda_guess(problem: Problem, tokens: int) -> dict[str, int]:
    if tokens <= 32:
        return {"PDL": 1, "VEC_BYTES": 8}
    early = {"PDL": 1, "READ_ONCE": 1}
    if tokens <= 512:
        return {**early, "PREFETCH": 1}
    if tokens <= 2048:
        return {**early, "PREFETCH": 2, "ROWS": 2}
    return {**early, "PREFETCH": 2, "ROWS": 3, "Q_WARPS": 3, "KV_WARPS": 1}


def hip_default(problem: Problem, tokens: int) -> Config:
    # Half the warps of 32 lanes, twice as wide.
    config = gpu_default(problem, tokens)
    q_warps, kv_warps = (
        next(w for w in (3, 2, 1) if w <= max(config[name] // 2, 1)) for name in ("Q_WARPS", "KV_WARPS")
    )
    fixed = {name: value for name, (value, _) in _HIP_FIXED.items()}
    return Config.of(config, Q_WARPS=q_warps, KV_WARPS=kv_warps, **fixed)


def triton_default(problem: Problem, tokens: int) -> Config:
    plain = Config.of(TRITON=1, Q_ROWS=1, KV_ROWS=1, VEC_BYTES=16, READ_ONCE=0, PDL=0)
    vec_bytes = 16 if _whole_vectors(plain, problem, tokens) else 4
    widest = power_of_two(max(problem.int("q_lora_rank"), problem.int("kv_lora_rank")))
    fewest = -(-widest // (_WARP * _TRITON_VALUES))
    most = max(power_of_two(problem.int("q_lora_rank")) // _WARP, 1)
    warps = max(power_of_two(fewest), min(4, most))
    return Config.of(plain, NUM_WARPS=warps, VEC_BYTES=vec_bytes)


def triton_guess(problem: Problem, tokens: int) -> dict[str, int]:
    if tokens <= 32:
        return {"PDL": 1, "NUM_WARPS": 8}
    if tokens <= 512:
        return {"PDL": 1, "NUM_WARPS": 2, "READ_ONCE": 1}
    return {"PDL": 2, "NUM_WARPS": 2, "Q_ROWS": 2, "KV_ROWS": 4, "READ_ONCE": 1}


def cpu_default(problem: Problem, tokens: int) -> Config:
    threads = 1 if tokens <= 32 else most_threads(tokens)
    return Config.of(THREADS=threads, SERIAL_ROWS=0, TASK_ROWS=1, UNROLL=2, VECTOR_BYTES=32)


class MlaDualRmsNorm(FusedOp):
    """RMSNorm of the q latent and of the kv latent of an MLA layer, in one launch.

    ``out = x · rsqrt(mean(x², -1) + eps) · weight`` for each of the two (Zhang & Sennrich 2019, "Root Mean Square Layer
    Normalization"), in fp32.

    Arguments:
        q_c: [T, q_lora_rank], bf16, fp16 or fp32; rows may be strided, the last dimension is contiguous.
        q_weight: [q_lora_rank], contiguous, q_c's dtype.
        kv_c: [T, kv_lora_rank], as q_c.
        kv_weight: [kv_lora_rank], as q_weight.
        q_eps, kv_eps: added to the mean of squares.
        cast_before_weight: True rounds the normalised row to the dtype before it is multiplied by the weight (as
            Hugging Face and vLLM do), False multiplies in fp32 and rounds once (as ``torch.nn.functional.rms_norm``).

    Returns: both normed, contiguous, q_c's dtype.
    """

    name = "mla_dual_rms_norm"
    schema = (
        "(Tensor q_c, Tensor q_weight, Tensor kv_c, Tensor kv_weight, float q_eps, float kv_eps, "
        'bool cast_before_weight, str plan="") -> (Tensor, Tensor)'
    )
    kernels = {  # noqa: RUF012 (a ClassVar of the base class)
        "cuda": KernelSource("mla_dual_rms_norm.cu", GPU_SPACE, gpu_default, cuda_guess),
        "hip": KernelSource("mla_dual_rms_norm.cu", HIP_SPACE, hip_default),
        "cpu": KernelSource("mla_dual_rms_norm.cpp", CPU_SPACE, cpu_default),
    }

    triton_kernels = {  # noqa: RUF012
        "cuda": KernelSource("mla_dual_rms_norm.py", TRITON_SPACE, triton_default, triton_guess),
        "hip": on_amd(KernelSource("mla_dual_rms_norm.py", TRITON_SPACE, triton_default)),
    }

    def reference(self, *args: Any) -> tuple[torch.Tensor, ...]:
        q_c, q_weight, kv_c, kv_weight, q_eps, kv_eps, cast_before_weight = args
        return (
            rms_norm(q_c, q_weight, q_eps, cast_before_weight),
            rms_norm(kv_c, kv_weight, kv_eps, cast_before_weight),
        )

    def exact(self, *args: Any) -> tuple[torch.Tensor, ...]:
        q_c, q_weight, kv_c, kv_weight, q_eps, kv_eps, cast_before_weight = args
        return tuple(
            rms_norm_exact(x, weight, eps, cast_before_weight)
            for x, weight, eps in ((q_c, q_weight, q_eps), (kv_c, kv_weight, kv_eps))
        )

    def fake(self, *args: Any) -> tuple[torch.Tensor, ...]:
        q_c, _, kv_c, *_ = args
        return torch.empty_like(q_c, memory_format=torch.contiguous_format), torch.empty_like(
            kv_c, memory_format=torch.contiguous_format
        )

    def tolerance(self, problem: Problem, result: int = 0) -> Tolerance:
        # One unit in the last place at most for each rounding: fp32 arithmetic may land on the other side of a tie,
        # once
        # before the weight and once after. fp32 itself: a sum of N squares, each rounded, in any order.
        # Ties are rare, and ``exact`` rounds before the weight as well: usually only the last rounding is seen, half a
        # unit at most, and 1 % of that for fp32 arithmetic. Without the first rounding some 10 % are beyond that.
        epsilon = torch.finfo(DTYPES[str(problem["dtype"])]).eps
        if problem["dtype"] == "fp32":
            return Tolerance(relative=16 * epsilon, absolute=1e-6)
        roundings = 1 + problem.int("cast_before_weight")
        return Tolerance(relative=roundings * epsilon, absolute=1e-6, usual=0.505 * epsilon)

    def make_problem(self, **params: Any) -> Problem:
        """The problem with ``dtype`` (a torch.dtype or its short name), ``q_lora_rank``, ``kv_lora_rank`` and
        ``cast_before_weight``.
        """
        dtype = params["dtype"]
        name = dtype if isinstance(dtype, str) else dtype_name(dtype)
        if name not in DTYPES:
            raise UnsupportedCall(f"{self.name}: dtype {name!r} is none of {', '.join(DTYPES)}")
        widths = [int(params[width]) for width in ("q_lora_rank", "kv_lora_rank")]
        cast = bool(params["cast_before_weight"]) and name != "fp32"  # fp32 has nothing to cast to
        problem = Problem(
            self.name,
            (
                ("dtype", name),
                ("q_lora_rank", widths[0]),
                ("kv_lora_rank", widths[1]),
                ("cast_before_weight", int(cast)),
            ),
        )
        for width in widths:
            if width <= 0 or width * DTYPES[name].itemsize % 4:
                raise UnsupportedCall(
                    f"{self.name}: a row of {width} {name} elements is not a whole number of 4-byte words"
                )
        # Eight warps of 16-byte vectors, the registers filled with one row and the weights.
        limit = 8 * _WARP * _ROW_REGISTERS * 2 // DTYPES[name].itemsize
        if max(widths) > limit:
            raise UnsupportedCall(
                f"{self.name}: a row of {max(widths)} {name} elements is more than the {limit} of the widest kernel"
            )
        return problem

    def model_problems(self, model: Mapping[str, Any], dtype: str) -> Sequence[Problem]:
        widths = {name: model.get(name) for name in ("q_lora_rank", "kv_lora_rank")}
        # DeepSeek-V2-Lite has no q latent. Hugging Face's and vLLM's RMSNorms both cast before the weight.
        return [self.make_problem(dtype=dtype, cast_before_weight=True, **widths)] if all(widths.values()) else []

    def problem_of(self, *args: Any) -> Problem:
        q_c, q_weight, kv_c, kv_weight, _, _, cast_before_weight = args
        for name, x, weight in (("q", q_c, q_weight), ("kv", kv_c, kv_weight)):
            if x.dim() != 2 or weight.dim() != 1 or x.shape[1] != weight.shape[0]:
                raise BadInput(
                    f"{self.name}: {name}_c {list(x.shape)} and {name}_weight {list(weight.shape)} "
                    "are not [T, width] and [width]"
                )
        if q_c.shape[0] != kv_c.shape[0]:
            raise BadInput(f"{self.name}: q_c has {q_c.shape[0]} rows, kv_c {kv_c.shape[0]}")
        if len({q_c.device, q_weight.device, kv_c.device, kv_weight.device}) > 1:
            raise BadInput(f"{self.name}: its tensors are on different devices")
        if len({q_c.dtype, q_weight.dtype, kv_c.dtype, kv_weight.dtype}) > 1:
            raise UnsupportedCall(f"{self.name}: q_c, kv_c and the weights are not all of one dtype")
        return self.make_problem(
            dtype=q_c.dtype,
            q_lora_rank=q_c.shape[1],
            kv_lora_rank=kv_c.shape[1],
            cast_before_weight=cast_before_weight,
        )

    def example_args(
        self, problem: Problem, tokens: int, device: torch.device, generator: torch.Generator
    ) -> tuple[Any, ...]:
        """Both latents are slices of one [T, q_lora_rank + kv_lora_rank + 64], as a fused projection leaves them
        (64: the rotary part of the key).
        """
        dtype = DTYPES[str(problem["dtype"])]
        q_width, kv_width = problem.int("q_lora_rank"), problem.int("kv_lora_rank")

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=device, generator=generator).to(dtype)

        latents = random(tokens, q_width + kv_width + 64)
        return (
            latents[:, :q_width],
            1 + 0.1 * random(q_width),
            latents[:, q_width : q_width + kv_width],
            1 + 0.1 * random(kv_width),
            1e-6,
            1e-6,
            bool(problem["cast_before_weight"]),
        )

    def check_args(
        self, problem: Problem, tokens: int, device: torch.device, generator: torch.Generator
    ) -> tuple[Any, ...]:
        """Each half has an eps of its own that matters, and a base of its own with rows of another length. Rows are
        1e-3 to 1e3 in size, the first 1; the middle one is zero.
        """
        _, q_weight, _, kv_weight, *_ = self.example_args(problem, 0, device, generator)
        sizes = 10 ** (6 * torch.rand(tokens, 1, device=device, generator=generator) - 3)
        sizes[:1] = 1
        if tokens > 1:
            sizes[tokens // 2] = 0

        def latent(name: str, apart: int) -> torch.Tensor:
            values = sizes * torch.randn(tokens, problem.int(name), device=device, generator=generator)
            return rows_apart(values.to(DTYPES[str(problem["dtype"])]), apart)

        q_c, kv_c = latent("q_lora_rank", 1), latent("kv_lora_rank", 2)
        if q_c.stride(0) == kv_c.stride(0):
            kv_c = rows_apart(kv_c, 3)
        return q_c, q_weight, kv_c, kv_weight, 0.3, 2.0, bool(problem["cast_before_weight"])

    def sweep_problems(self) -> Sequence[Problem]:
        return [
            self.make_problem(dtype=dtype, q_lora_rank=q, kv_lora_rank=kv, cast_before_weight=cast)
            for dtype in DTYPES
            for q, kv in ((1536, 512), (96, 40), (24, 2), (250, 514))
            for cast in ((True, False) if dtype != "fp32" else (False,))
        ]

    def random_problem(self, source: random.Random) -> Problem:
        """Rows of 4 to 257 vectors of 4, 8 or 16 bytes."""
        dtype, vector = source.choice(list(DTYPES)), source.choice((4, 8, 16, 16))
        widths = (int(2 ** source.uniform(2, 8.01)) * vector // DTYPES[dtype].itemsize for _ in range(2))
        return self.make_problem(
            dtype=dtype,
            **dict(zip(("q_lora_rank", "kv_lora_rank"), widths, strict=True)),
            cast_before_weight=source.random() < 0.5,
        )

    def bytes_moved(self, problem: Problem, tokens: int) -> int:
        width = problem.int("q_lora_rank") + problem.int("kv_lora_rank")
        return (2 * tokens + 1) * width * _element_bytes(problem)

    def spec(self, kind: str, problem: Problem, config: Config) -> KernelSpec:
        if language_of(config) == TRITON:
            return self._triton_spec(kind, problem, config)
        block = 1 if kind == "cpu" else _lanes(config) * config["ROWS"] * (config["Q_WARPS"] + config["KV_WARPS"])
        return KernelSpec(
            source=self.kernel_source(kind).file,
            entry=self.name,
            defines={
                "ELEMENT": str(problem["dtype"]),
                "Q_WIDTH": problem.int("q_lora_rank"),
                "KV_WIDTH": problem.int("kv_lora_rank"),
                "CAST_BEFORE_WEIGHT": problem.int("cast_before_weight"),
                **config,
            },
            params_format=self.binding(problem).params_format,
            block=block,
            programmatic_launch=bool(config.get("PDL", 0)),
        )

    def _triton_spec(self, kind: str, problem: Problem, config: Config) -> KernelSpec:
        widths = {"Q": problem.int("q_lora_rank"), "KV": problem.int("kv_lora_rank")}
        return triton_spec(
            self.kernel_source(kind, config).file,
            self.name,
            self.binding(problem),
            config,
            {
                **{f"{name}_WIDTH": width for name, width in widths.items()},
                **{f"{name}_BLOCK": power_of_two(width) for name, width in widths.items()},
                "CAST_BEFORE_WEIGHT": problem.int("cast_before_weight"),
            },
            align=config["VEC_BYTES"],
        )

    def binding(self, problem: Problem) -> Binding:
        dtype = DTYPES[str(problem["dtype"])]
        q_width, kv_width = problem.int("q_lora_rank"), problem.int("kv_lora_rank")
        return Binding(
            tensors=(
                TensorArg(0, dtype, (None, q_width)),
                TensorArg(1, dtype, (q_width,)),
                TensorArg(2, dtype, (None, kv_width)),
                TensorArg(3, dtype, (kv_width,)),
            ),
            constants=() if problem["dtype"] == "fp32" else ((6, bool(problem["cast_before_weight"])),),
            fields=(
                Field(FieldKind.POINTER, 0),
                Field(FieldKind.POINTER, 1),
                Field(FieldKind.RESULT, 0),
                Field(FieldKind.POINTER, 2),
                Field(FieldKind.POINTER, 3),
                Field(FieldKind.RESULT, 1),
                Field(FieldKind.STRIDE, 0, 0),
                Field(FieldKind.STRIDE, 2, 0),
                Field(FieldKind.TOKENS),
                Field(FieldKind.FLOAT, 4),
                Field(FieldKind.FLOAT, 5),
            ),
            params_format="PPPPPPqqiff",
            results=(Result(dtype, (None, q_width)), Result(dtype, (None, kv_width))),
        )

    def launch_shape(self, problem: Problem, config: Config) -> LaunchShape:
        if "VEC_BYTES" not in config:  # the CPU kernel splits the work itself and loads from any address
            return LaunchShape()
        if language_of(config) == TRITON:
            return LaunchShape(
                units_per_block=config["Q_ROWS"],
                more_per_token=1,
                more_per_block=config["KV_ROWS"],
                align=config["VEC_BYTES"],
            )
        return LaunchShape(units_per_block=config["ROWS"] * config["UNROLL"], align=config["VEC_BYTES"])
