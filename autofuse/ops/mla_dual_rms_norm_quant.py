"""mla_dual_rms_norm_quant: the two RMSNorms of an MLA layer in one launch, and the q latent to group FP8."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch

from autofuse.errors import BadInput, UnsupportedCall
from autofuse.ops.base import DTYPES, FusedOp, KernelSource, Tolerance
from autofuse.ops.binding import Binding, Field, FieldKind, LaunchShape, Result, TensorArg
from autofuse.ops.mla_dual_rms_norm import (
    CPU_SPACE,
    GPU_SPACE,
    HIP_SPACE,
    MlaDualRmsNorm,
    cpu_default,
    gpu_default,
    hip_default,
)
from autofuse.ops.problem import Config, Problem
from autofuse.ops.quant import QuantFormat, ScaleLayout
from autofuse.ops.rms_norm import rms_norm, rms_norm_exact
from autofuse.ops.space import SearchSpace, Tunable
from autofuse.targets import KernelSpec

__all__ = ["MlaDualRmsNormQuant"]

_VEC_BYTES = 16
_WARP = 32
_CAST, _GROUP, _UE8M0, _LAYOUT = range(6, 10)  # of the op's arguments


def _with_widest_vectors(space: SearchSpace) -> SearchSpace:
    tunables = (
        Tunable("VEC_BYTES", (_VEC_BYTES,), "bytes per load: a group is not to span warps")
        if tunable.name == "VEC_BYTES"
        else tunable
        for tunable in space.tunables
    )
    return SearchSpace(tuple(tunables), space.constraints)


class _Norms(MlaDualRmsNorm):
    """The part of the op that is mla_dual_rms_norm; speaks in the op's name."""

    name = "mla_dual_rms_norm_quant"


_NORMS = _Norms()


def _cuda_guess(problem: Problem, tokens: int) -> dict[str, int]:
    if tokens <= 512:
        return {"PDL": 1, "PREFETCH": 1, "READ_ONCE": int(tokens > 32)}
    halves = {"PDL": 1, "READ_ONCE": 1, "PREFETCH": 2, "ROWS": 2, "Q_WARPS": 3, "KV_WARPS": 1}
    return halves if tokens <= 2048 else {**halves, "PREFETCH": 1, "UNROLL": 2}


class MlaDualRmsNormQuant(FusedOp):
    """``mla_dual_rms_norm`` whose normed q latent is rounded to the model's dtype, then quantised for an FP8 q_b_proj.

    Arguments:
        q_c, q_weight, kv_c, kv_weight, q_eps, kv_eps, cast_before_weight: as mla_dual_rms_norm's; q_lora_rank is a
            multiple of ``group``.
        group: 64 or 128: elements of the q latent that share a scale.
        ue8m0: scales are powers of two.
        layout: a ScaleLayout: how the scales lie in memory. See ``autofuse.ops.quant``.

    Returns: the q latent [T, q_lora_rank], float8_e4m3fn, contiguous; its scales [T, q_lora_rank / group], fp32; the kv
    latent [T, kv_lora_rank], normed, contiguous, kv_c's dtype.
    """

    name = "mla_dual_rms_norm_quant"
    schema = (
        "(Tensor q_c, Tensor q_weight, Tensor kv_c, Tensor kv_weight, float q_eps, float kv_eps, "
        'bool cast_before_weight, int group, bool ue8m0, int layout, str plan="") -> (Tensor, Tensor, Tensor)'
    )
    kernels = {  # noqa: RUF012 (a ClassVar of the base class)
        "cuda": KernelSource("mla_dual_rms_norm_quant.cu", _with_widest_vectors(GPU_SPACE), gpu_default, _cuda_guess),
        "hip": KernelSource("mla_dual_rms_norm_quant.cu", _with_widest_vectors(HIP_SPACE), hip_default),
        "cpu": KernelSource("mla_dual_rms_norm_quant.cpp", CPU_SPACE, cpu_default),
    }

    # ---- meaning ----------------------------------------------------------------------------------------------------

    def reference(self, *args: Any) -> tuple[torch.Tensor, ...]:
        q_c, q_weight, kv_c, kv_weight, q_eps, kv_eps, cast_before_weight, *flags = args
        q = rms_norm(q_c, q_weight, q_eps, cast_before_weight)
        kv = rms_norm(kv_c, kv_weight, kv_eps, cast_before_weight)
        return *self._format(q_c.shape[1], *flags).quantise(q), kv

    def exact(self, *args: Any) -> tuple[torch.Tensor, ...]:
        q_c, q_weight, kv_c, kv_weight, q_eps, kv_eps, cast_before_weight, *flags = args
        q = rms_norm_exact(q_c, q_weight, q_eps, cast_before_weight).to(q_c.dtype).double()
        kv = rms_norm_exact(kv_c, kv_weight, kv_eps, cast_before_weight)
        return *self._format(q_c.shape[1], *flags).exact(q), kv

    def fake(self, *args: Any) -> tuple[torch.Tensor, ...]:
        self._check(*args)
        q_c, kv_c = args[0], args[2]
        values, scales = self._format(q_c.shape[1], *args[_GROUP:]).empty(q_c.shape[0], q_c.shape[1], q_c.device)
        return values, scales, torch.empty_like(kv_c, memory_format=torch.contiguous_format)

    def tolerance(self, problem: Problem, result: int = 0) -> Tolerance:
        if result == 2:
            return _NORMS.tolerance(problem, 1)
        return QuantFormat.of(problem).tolerance(result, str(problem["dtype"]))

    # ---- problem ----------------------------------------------------------------------------------------------------

    def make_problem(self, **params: Any) -> Problem:
        """The problem with mla_dual_rms_norm's parameters, ``group``, ``ue8m0`` (False) and ``layout`` (row-major)."""
        flags = (int(params["group"]), params.get("ue8m0", False), int(params.get("layout", 0)))
        norms = _NORMS.make_problem(**params)
        quant = self._format(norms.int("q_lora_rank"), *flags)
        kv_bytes = norms.int("kv_lora_rank") * DTYPES[str(norms["dtype"])].itemsize
        if kv_bytes % _VEC_BYTES:
            raise UnsupportedCall(f"{self.name}: a kv row of {kv_bytes} bytes is not a whole number of 16 bytes")
        return Problem(self.name, (*norms.params, *quant.params))

    def model_problems(self, model: Mapping[str, Any], dtype: str) -> Sequence[Problem]:
        widths = {name: model.get(name) for name in ("q_lora_rank", "kv_lora_rank")}
        if not all(widths.values()) or int(widths["q_lora_rank"] or 0) % 128:
            return []
        # The format of DeepSeek-V3's checkpoints.
        return [self.make_problem(dtype=dtype, cast_before_weight=True, group=128, **widths)]

    def problem_of(self, *args: Any) -> Problem:
        self._check(*args)
        norms = _NORMS.problem_of(*args[:_GROUP])
        group, ue8m0, layout = args[_GROUP:]
        return self.make_problem(**dict(norms.params), group=group, ue8m0=ue8m0, layout=layout)

    def _check(self, *args: Any) -> None:
        """Raises BadInput for arguments that make no sense together."""
        with suppress(UnsupportedCall):
            _NORMS.problem_of(*args[:_GROUP])
        for name, x in (("q_c", args[0]), ("kv_c", args[2])):
            if x.shape[1] > 1 and x.stride(1) != 1:
                raise BadInput(
                    f"{self.name}: the last dimension of {name}, of stride {x.stride(1)}, must be contiguous"
                )
        self._format(args[0].shape[1], *args[_GROUP:])

    def _format(self, width: int, group: int, ue8m0: bool, layout: int) -> QuantFormat:
        quant = QuantFormat.checked(self.name, width, group, ue8m0, layout)
        if quant.needs_scale:
            raise BadInput(f"{self.name}: group is {group}, neither 64 nor 128")
        return quant

    def example_args(
        self, problem: Problem, tokens: int, device: torch.device, generator: torch.Generator
    ) -> tuple[Any, ...]:
        """Both latents are slices of one projection, as mla_dual_rms_norm's."""
        return *_NORMS.example_args(problem, tokens, device, generator), *self._flags(problem)

    def check_args(
        self, problem: Problem, tokens: int, device: torch.device, generator: torch.Generator
    ) -> tuple[Any, ...]:
        """As mla_dual_rms_norm's."""
        return *_NORMS.check_args(problem, tokens, device, generator), *self._flags(problem)

    def _flags(self, problem: Problem) -> tuple[int, bool, int]:
        quant = QuantFormat.of(problem)
        return quant.group, quant.ue8m0, int(quant.layout)

    def sweep_problems(self) -> Sequence[Problem]:
        names = ("dtype", "q_lora_rank", "kv_lora_rank", "cast_before_weight", "group", "ue8m0", "layout")
        return [
            self.make_problem(**dict(zip(names, values, strict=True)))
            for values in (
                ("bf16", 1536, 512, True, 128, False, ScaleLayout.ROW_MAJOR),
                ("bf16", 320, 40, False, 64, True, ScaleLayout.TMA_ALIGNED),
                ("fp16", 384, 8, True, 128, False, ScaleLayout.COLUMN_MAJOR),
                ("fp32", 128, 772, False, 64, True, ScaleLayout.ROW_MAJOR),
                ("fp32", 2048, 4, False, 128, False, ScaleLayout.TMA_ALIGNED),
            )
        ]

    def random_problem(self, source: random.Random) -> Problem:
        """A q row of up to 24 groups, a kv row of up to 256 vectors, as often narrow as wide."""
        dtype, group = source.choice(list(DTYPES)), source.choice((64, 128))
        return self.make_problem(
            dtype=dtype,
            q_lora_rank=source.randint(1, 24) * group,
            kv_lora_rank=int(2 ** source.uniform(0, 8)) * _VEC_BYTES // DTYPES[dtype].itemsize,
            cast_before_weight=source.random() < 0.5,
            group=group,
            ue8m0=source.random() < 0.5,
            layout=source.choice(list(ScaleLayout)),
        )

    def bytes_moved(self, problem: Problem, tokens: int) -> int:
        size, q_width, kv_width = (
            DTYPES[str(problem["dtype"])].itemsize,
            problem.int("q_lora_rank"),
            problem.int("kv_lora_rank"),
        )
        read = (tokens + 1) * (q_width + kv_width) * size
        return read + QuantFormat.of(problem).bytes_written(tokens, q_width) + tokens * kv_width * size

    # ---- kernels ----------------------------------------------------------------------------------------------------

    def spec(self, kind: str, problem: Problem, config: Config) -> KernelSpec:
        block = 1
        if kind != "cpu":
            lanes = config.get("WARP_SIZE", _WARP)
            block = lanes * config["ROWS"] * (config["Q_WARPS"] + config["KV_WARPS"])
        return KernelSpec(
            source=self.kernel_source(kind).file,
            entry=self.name,
            defines={
                "ELEMENT": str(problem["dtype"]),
                "Q_WIDTH": problem.int("q_lora_rank"),
                "KV_WIDTH": problem.int("kv_lora_rank"),
                "CAST_BEFORE_WEIGHT": problem.int("cast_before_weight"),
                **QuantFormat.of(problem).defines,
                **config,
            },
            params_format=self.binding(problem).params_format,
            block=block,
            programmatic_launch=bool(config.get("PDL", 0)),
        )

    def binding(self, problem: Problem) -> Binding:
        dtype, quant = DTYPES[str(problem["dtype"])], QuantFormat.of(problem)
        q_width, kv_width = problem.int("q_lora_rank"), problem.int("kv_lora_rank")
        flags = ((_GROUP, quant.group), (_UE8M0, quant.ue8m0), (_LAYOUT, int(quant.layout)))
        cast = () if problem["dtype"] == "fp32" else ((_CAST, bool(problem["cast_before_weight"])),)
        return Binding(
            tensors=(
                TensorArg(0, dtype, (None, q_width)),
                TensorArg(1, dtype, (q_width,)),
                TensorArg(2, dtype, (None, kv_width)),
                TensorArg(3, dtype, (kv_width,)),
            ),
            constants=(*flags, *cast),
            fields=(
                Field(FieldKind.POINTER, 0),
                Field(FieldKind.POINTER, 1),
                Field(FieldKind.RESULT, 0),
                Field(FieldKind.RESULT, 1),
                Field(FieldKind.POINTER, 2),
                Field(FieldKind.POINTER, 3),
                Field(FieldKind.RESULT, 2),
                Field(FieldKind.STRIDE, 0, 0),
                Field(FieldKind.STRIDE, 2, 0),
                Field(FieldKind.TOKENS),
                Field(FieldKind.FLOAT, 4),
                Field(FieldKind.FLOAT, 5),
            ),
            params_format="PPPPPPPqqiff",
            results=(*quant.results(q_width), Result(dtype, (None, kv_width))),
        )

    def launch_shape(self, problem: Problem, config: Config) -> LaunchShape:
        return _NORMS.launch_shape(problem, config)
