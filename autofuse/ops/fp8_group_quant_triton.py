"""The kernel of fp8_group_quant in Triton: its search space, what to compile, and its grid."""

from __future__ import annotations

from autofuse.ops.base import KernelSource
from autofuse.ops.binding import Binding, LaunchShape
from autofuse.ops.languages import IN_TRITON
from autofuse.ops.problem import Config, Problem
from autofuse.ops.quant import NVFP4, STATIC, QuantFormat
from autofuse.ops.space import Constraint, SearchSpace, Tunable
from autofuse.ops.triton import NUM_WARPS, PDL, READ_ONCE, on_amd, power_of_two, triton_spec
from autofuse.targets import KernelSpec

__all__ = ["TRITON_KERNELS", "launch_shape", "spec"]

_VALUES = 64  # of rows that a thread may hold; the rest of 255 registers is for addresses and arithmetic
_WARP = 32
_ALIGN = 16
_ROWS = 8  # of the default, where nothing is normed
_STATIC_COLUMNS = 128  # of a tile
_NVFP4_COLUMNS = 64  # the least: scales lie in tiles of four groups


def _columns(problem: Problem) -> int:
    """Of a tile."""
    group = problem.int("group")
    least = _NVFP4_COLUMNS if group == NVFP4 else group
    if problem.int("norm"):
        return max(power_of_two(problem.int("width")), least)
    return _STATIC_COLUMNS if group == STATIC else least


def _tiles(problem: Problem) -> int:
    """Of a token."""
    return -(-problem.int("width") // _columns(problem))


_SPACE = SearchSpace(
    (
        IN_TRITON,
        NUM_WARPS,
        Tunable(
            "ROWS", (_ROWS, 1, 2, 4, 16, 32, 64), "groups, or normed rows, in a block: fewer blocks, more registers"
        ),
        READ_ONCE,
        PDL,
    ),
    (
        Constraint(
            f"a thread holds at most {_VALUES} values of its rows",
            lambda c, p, t: c["ROWS"] * _columns(p) <= _VALUES * _WARP * c["NUM_WARPS"],
        ),
        Constraint(
            "a block has no more lanes than values",
            lambda c, p, t: c["NUM_WARPS"] == 1 or c["ROWS"] * _columns(p) >= _WARP * c["NUM_WARPS"],
        ),
        Constraint(
            "a block that takes more than there is does nothing for the rest",
            lambda c, p, t: c["ROWS"] <= max(2 * t * _tiles(p), 1 if p.int("norm") else _ROWS),
        ),
    ),
)


def _default(problem: Problem, tokens: int) -> Config:
    rows = 1 if problem.int("norm") else _ROWS
    values = rows * _columns(problem)
    warps = max(power_of_two(-(-values // (_VALUES * _WARP))), min(4, max(values // _WARP, 1)))
    return Config.of(TRITON=1, ROWS=rows, NUM_WARPS=warps, READ_ONCE=0, PDL=0)


def _guess(problem: Problem, tokens: int) -> dict[str, int]:
    if problem.int("norm"):
        return {"PDL": 1}
    rows, warps = (1, 4) if tokens <= 8 else (8, 8)
    return {"PDL": 1, "ROWS": rows, "NUM_WARPS": warps, "READ_ONCE": int(tokens > 32)}


TRITON_KERNELS = {
    "cuda": KernelSource("fp8_group_quant.py", _SPACE, _default, _guess),
    "hip": on_amd(KernelSource("fp8_group_quant.py", _SPACE, _default)),
}


def spec(kind: str, problem: Problem, config: Config, binding: Binding) -> KernelSpec:
    """What to compile for a config."""
    return triton_spec(
        TRITON_KERNELS[kind].file,
        "fp8_group_quant",
        binding,
        config,
        {
            "WIDTH": problem.int("width"),
            "COLUMNS": _columns(problem),
            "NORM": problem.int("norm"),
            "CAST_BEFORE_WEIGHT": problem.int("cast_before_weight"),
            **QuantFormat.of(problem).defines,
            "FP8_NATIVE": 1,
        },
        align=_ALIGN,
    )


def launch_shape(problem: Problem, config: Config) -> LaunchShape:
    """The grid of a config, and the alignment it needs."""
    return LaunchShape(units_per_token=_tiles(problem), units_per_block=config["ROWS"], align=_ALIGN)
