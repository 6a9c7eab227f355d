"""The kernel of mla_v_up_quant in Triton: its search space, what to compile, and its grid."""

from __future__ import annotations

from autofuse.ops.base import DTYPES, KernelSource
from autofuse.ops.binding import Binding, LaunchShape
from autofuse.ops.languages import IN_TRITON
from autofuse.ops.problem import Config, Problem
from autofuse.ops.quant import QuantFormat
from autofuse.ops.space import Constraint, SearchSpace, Tunable
from autofuse.ops.triton import NUM_WARPS, PDL, on_amd, triton_spec
from autofuse.targets import KernelSpec

__all__ = ["TRITON_KERNELS", "launch_shape", "spec"]

_SUMS = 128  # that a thread may hold; the rest of 255 registers is for operands and addresses
_WARP = 32
_ALIGN = 16
_TOKENS, _DEPTH = (16, 32, 64, 128), (64, 32, 128)
_COLUMNS = (128, 64, 256)
_SHARED_BYTES = 227 << 10  # of a block (sm_90); what has less fails to launch


def _whole_columns(config: Config, problem: Problem, tokens: int) -> bool:
    columns, group = config["COLUMNS"], problem.int("group")
    return problem.int("v_head_dim") % columns == 0 and (not group or columns % group == 0)


def _fits_shared(config: Config, problem: Problem, tokens: int) -> bool:
    step = config["DEPTH"] * (config["TOKENS"] + config["COLUMNS"]) * DTYPES[str(problem["dtype"])].itemsize
    return config["NUM_STAGES"] * step <= _SHARED_BYTES


_SPACE = SearchSpace(
    (
        IN_TRITON,
        NUM_WARPS,
        Tunable("NUM_STAGES", (3, 2, 4, 5), "steps that are loaded ahead: hides latency, against shared memory"),
        Tunable("TOKENS", _TOKENS, "tokens of a block: W_UV is loaded less often, against fewer blocks"),
        Tunable("COLUMNS", _COLUMNS, "columns of W_UV of a block: o_latent is loaded less often, against fewer blocks"),
        Tunable("DEPTH", _DEPTH, "rows of W_UV of a step: fewer steps, against shared memory"),
        PDL,
    ),
    (
        Constraint("a block's columns are whole groups, and a part of v_head_dim", _whole_columns),
        Constraint("a step must divide kv_lora_rank", lambda c, p, t: p.int("kv_lora_rank") % c["DEPTH"] == 0),
        Constraint(
            "there are no more stages than steps, but for two",
            lambda c, p, t: c["NUM_STAGES"] <= max(p.int("kv_lora_rank") // c["DEPTH"], 2),
        ),
        Constraint(f"a block has {_SHARED_BYTES >> 10} KB of shared memory", _fits_shared),
        Constraint(
            f"a thread holds at most {_SUMS} sums",
            lambda c, p, t: c["TOKENS"] * c["COLUMNS"] <= _SUMS * _WARP * c["NUM_WARPS"],
        ),
        Constraint(
            "each lane has at least 8 sums", lambda c, p, t: c["TOKENS"] * c["COLUMNS"] >= 8 * _WARP * c["NUM_WARPS"]
        ),
        Constraint(
            "a block that takes twice the tokens there are, or more, multiplies zeros",
            lambda c, p, t: c["TOKENS"] <= max(2 * t - 1, _TOKENS[0]),
        ),
    ),
)


def _default(problem: Problem, tokens: int) -> Config:
    latent = problem.int("kv_lora_rank")
    depth = next(depth for depth in _DEPTH if latent % depth == 0)
    config = Config.of(TRITON=1, NUM_WARPS=4, NUM_STAGES=2, TOKENS=16, DEPTH=depth, PDL=0)
    fitting = (Config.of(config, COLUMNS=columns) for columns in _COLUMNS)
    return next(config for config in fitting if _whole_columns(config, problem, tokens))


def _guess(problem: Problem, tokens: int) -> dict[str, int]:
    return {"PDL": 1, "NUM_STAGES": 4, "TOKENS": 64 if tokens > 32 else 16, "NUM_WARPS": 8 if tokens > 32 else 4}


TRITON_KERNELS = {
    "cuda": KernelSource("mla_v_up_quant.py", _SPACE, _default, _guess),
    "hip": on_amd(KernelSource("mla_v_up_quant.py", _SPACE, _default)),
}


def spec(kind: str, problem: Problem, config: Config, binding: Binding) -> KernelSpec:
    """What to compile for a config."""
    return triton_spec(
        TRITON_KERNELS[kind].file,
        "mla_v_up_quant",
        binding,
        config,
        {
            "HEADS": problem.int("heads"),
            "LATENT": problem.int("kv_lora_rank"),
            "V_DIM": problem.int("v_head_dim"),
            **QuantFormat.of(problem).defines,
            "FP8_NATIVE": 1,
        },
        align=_ALIGN,
    )


def launch_shape(problem: Problem, config: Config) -> LaunchShape:
    """The grid of a config, and the alignment it needs."""
    parts = problem.int("heads") * (problem.int("v_head_dim") // config["COLUMNS"])
    return LaunchShape(units_per_block=config["TOKENS"], repeat=parts, align=_ALIGN)
