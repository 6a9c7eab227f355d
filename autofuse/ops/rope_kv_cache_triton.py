"""The kernel of rope_kv_cache in Triton: its search space, what to compile, and its grid."""

from __future__ import annotations

from autofuse.ops.base import DTYPES, KernelSource
from autofuse.ops.binding import Binding, LaunchShape
from autofuse.ops.languages import IN_TRITON
from autofuse.ops.problem import Config, Problem
from autofuse.ops.rope import in_halves
from autofuse.ops.rope_kv_cache_kernels import CACHES, element_bytes
from autofuse.ops.space import Constraint, SearchSpace, Tunable
from autofuse.ops.triton import NUM_WARPS, PDL, READ_ONCE, VEC_BYTES, on_amd, power_of_two, triton_spec
from autofuse.targets import KernelSpec

__all__ = ["TRITON_KERNELS", "launch_shape", "spec"]

_VALUES = 64  # of rows that a thread may hold; the rest of 255 registers is for addresses and arithmetic
_WARP = 32
_ROWS = 4  # of the default


def _whole_vectors(config: Config, problem: Problem, tokens: int) -> bool:
    size, table = element_bytes(problem), DTYPES[str(problem["table"])].itemsize
    rows = (problem.int("head_dim") * size, problem.int("rope_dim") * size, problem.int("rope_dim") * table)
    return all(row % config["VEC_BYTES"] == 0 for row in rows)


def _handles_k(problem: Problem) -> bool:
    return problem["cache"] != "none" or bool(problem["return_k"])


def _columns(problem: Problem) -> tuple[int, int]:
    """Of a row of q, and of one of k and v, padded."""
    rest = problem.int("head_dim") - problem.int("rope_dim")
    head = 2 * power_of_two(problem.int("rope_dim") // 2) + (power_of_two(rest) if rest else 0)
    return head, head + (power_of_two(problem.int("head_dim")) if problem["cache"] != "none" else 0)


def _fits_registers(config: Config, problem: Problem, tokens: int) -> bool:
    q, kv = _columns(problem)
    return max(config["Q_ROWS"] * q, config["KV_ROWS"] * kv) <= _VALUES * _WARP * config["NUM_WARPS"]


_SPACE = SearchSpace(
    (
        IN_TRITON,
        NUM_WARPS,
        Tunable("Q_ROWS", (_ROWS, 1, 2, 8, 16, 32), "heads of q in a block: more loads in flight, fewer blocks"),
        Tunable("KV_ROWS", (_ROWS, 1, 2, 8, 16), "heads of k and v in a block: the same"),
        VEC_BYTES,
        READ_ONCE,
        PDL,
    ),
    (
        Constraint("a head, and what is rotated of it, must be a whole number of vectors", _whole_vectors),
        Constraint(
            "narrower loads are for heads that no wider ones divide",
            lambda c, p, t: c["VEC_BYTES"] == 16 or not _whole_vectors(Config.of(c, VEC_BYTES=16), p, t),
        ),
        Constraint(f"a thread holds at most {_VALUES} values of its rows", _fits_registers),
        Constraint(
            "a block has no more lanes than values of q",
            lambda c, p, t: c["NUM_WARPS"] == 1 or c["Q_ROWS"] * _columns(p)[0] >= _WARP * c["NUM_WARPS"],
        ),
        Constraint(
            "a block that takes more than there is does nothing for the rest",
            lambda c, p, t: (
                c["Q_ROWS"] <= max(2 * t * p.int("heads"), _ROWS)
                and c["KV_ROWS"] <= max(2 * t * p.int("kv_heads"), _ROWS)
            ),
        ),
        Constraint(
            "KV_ROWS is nothing where k and v are left alone",
            lambda c, p, t: _handles_k(p) or c["KV_ROWS"] == _ROWS,
        ),
    ),
)


def _default(problem: Problem, tokens: int) -> Config:
    q, kv = _columns(problem)
    plain = Config.of(TRITON=1, Q_ROWS=_ROWS, KV_ROWS=_ROWS, VEC_BYTES=16, READ_ONCE=0, PDL=0)
    needed = power_of_two(-(-_ROWS * max(q, kv) // (_VALUES * _WARP)))
    warps = max(needed, min(4, max(_ROWS * q // _WARP, 1)))
    if warps > max(NUM_WARPS.values):
        plain, warps = Config.of(plain, Q_ROWS=1, KV_ROWS=1), max(NUM_WARPS.values)
    return Config.of(plain, NUM_WARPS=warps, VEC_BYTES=16 if _whole_vectors(plain, problem, tokens) else 4)


def _guess(problem: Problem, tokens: int) -> dict[str, int]:
    return {"PDL": 1, "NUM_WARPS": 4, "Q_ROWS": 4, "KV_ROWS": 4 if tokens > 1 else 1, "READ_ONCE": int(tokens > 32)}


TRITON_KERNELS = {
    "cuda": KernelSource("rope_kv_cache.py", _SPACE, _default, _guess),
    "hip": on_amd(KernelSource("rope_kv_cache.py", _SPACE, _default)),
}


def spec(kind: str, problem: Problem, config: Config, binding: Binding) -> KernelSpec:
    """What to compile for a config."""
    head_dim, rope = problem.int("head_dim"), problem.int("rope_dim")
    return triton_spec(
        TRITON_KERNELS[kind].file,
        "rope_kv_cache",
        binding,
        config,
        {
            "HEADS": problem.int("heads"),
            "KV_HEADS": problem.int("kv_heads"),
            "HEAD_DIM": head_dim,
            "ROPE": rope,
            "HALF_BLOCK": power_of_two(rope // 2),
            "REST_BLOCK": power_of_two(head_dim - rope),
            "HEAD_BLOCK": power_of_two(head_dim),
            "NEOX": problem.int("neox"),
            "IN_HALVES": int(in_halves(problem)),
            "CACHE": CACHES.index(str(problem["cache"])),
            "QK_NORM": problem.int("qk_norm"),
            "Q_FP8": problem.int("q_fp8"),
            "RETURN_K": problem.int("return_k"),
            "FP8_NATIVE": 1,
        },
        align=config["VEC_BYTES"],
    )


def launch_shape(problem: Problem, config: Config) -> LaunchShape:
    """The grid of a config, and the alignment it needs."""
    return LaunchShape(
        units_per_token=problem.int("heads"),
        units_per_block=config["Q_ROWS"],
        more_per_token=problem.int("kv_heads") if _handles_k(problem) else 0,
        more_per_block=config["KV_ROWS"],
        align=config["VEC_BYTES"],
    )
