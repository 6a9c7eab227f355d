"""The kernel of mla_rope_kv_cache_cat in Triton: its search space, and what is launched in either language."""

from __future__ import annotations

from autofuse.ops import mla_rope_kv_cache_cat_kernels as kernels
from autofuse.ops.base import DTYPES, KernelSource
from autofuse.ops.binding import LaunchShape
from autofuse.ops.languages import IN_TRITON, TRITON, language_of
from autofuse.ops.mla_rope_kv_cache_cat_kernels import element_bytes, fp8_query, kind_of_cache
from autofuse.ops.problem import Config, Problem
from autofuse.ops.rope import in_halves
from autofuse.ops.space import Constraint, SearchSpace, Tunable
from autofuse.ops.triton import NUM_WARPS, PDL, READ_ONCE, VEC_BYTES, on_amd, power_of_two, triton_spec
from autofuse.targets import KernelSpec

__all__ = ["TRITON_KERNELS", "launch_shape", "spec"]

_VALUES = 64  # of rows that a thread may hold; the rest of 255 registers is for addresses and arithmetic
_WARP = 32
_LATENTS = 1  # KV_ROWS of the default


def _whole_vectors(config: Config, problem: Problem, tokens: int) -> bool:
    size, table = element_bytes(problem), DTYPES[str(problem["table"])].itemsize
    rows = [problem.int(name) * size for name in ("nope_dim", "rope_dim", "latent_dim")]
    return all(row % config["VEC_BYTES"] == 0 for row in (*rows, problem.int("rope_dim") * table))


def _columns(problem: Problem) -> tuple[int, int]:
    """Of a row of the query, and of what is cached of a token, padded."""
    rope = 2 * power_of_two(problem.int("rope_dim") // 2)
    nope = power_of_two(problem.int("nope_dim")) if problem.int("nope_dim") else 0
    latent = power_of_two(problem.int("latent_dim")) if kind_of_cache(problem).code else 0
    return nope + rope, latent + rope


def _fits_registers(config: Config, problem: Problem, tokens: int) -> bool:
    query, cached = _columns(problem)
    return max(config["Q_ROWS"] * query, config["KV_ROWS"] * cached) <= _VALUES * _WARP * config["NUM_WARPS"]


_SPACE = SearchSpace(
    (
        IN_TRITON,
        NUM_WARPS,
        Tunable("Q_ROWS", (4, 1, 2, 8, 16, 32), "rows of the query in a block: more loads in flight, fewer blocks"),
        Tunable("KV_ROWS", (_LATENTS, 2, 4), "tokens of the cache in a block: the same"),
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
        Constraint(f"a thread holds at most {_VALUES} values of its rows", _fits_registers),
        Constraint(
            "a block has no more lanes than values of the query",
            lambda c, p, t: c["NUM_WARPS"] == 1 or c["Q_ROWS"] * _columns(p)[0] >= _WARP * c["NUM_WARPS"],
        ),
        Constraint(
            "a block that takes more than there is does nothing for the rest",
            lambda c, p, t: c["KV_ROWS"] <= max(t, 1) and c["Q_ROWS"] <= max(2 * t * p.int("heads"), 4),
        ),
    ),
)


def _default(problem: Problem, tokens: int) -> Config:
    query, cached = _columns(problem)
    plain = Config.of(TRITON=1, Q_ROWS=4, KV_ROWS=_LATENTS, VEC_BYTES=16, READ_ONCE=0, PDL=0)
    needed = power_of_two(-(-max(4 * query, cached) // (_VALUES * _WARP)))
    warps = max(needed, min(4, max(4 * query // _WARP, 1)))
    if warps > max(NUM_WARPS.values):
        plain, warps = Config.of(plain, Q_ROWS=1), max(NUM_WARPS.values)
    return Config.of(plain, NUM_WARPS=warps, VEC_BYTES=16 if _whole_vectors(plain, problem, tokens) else 4)


def _guess(problem: Problem, tokens: int) -> dict[str, int]:
    wide, heads = problem.int("nope_dim") > 256, tokens * problem.int("heads")
    if heads <= 512:
        return {"PDL": 1, "NUM_WARPS": 4, "Q_ROWS": 1 if wide else 4, "KV_ROWS": 1}
    once = int(heads <= 1 << 15)  # the L2 holds no more bytes
    return {"PDL": 1, "NUM_WARPS": 4, "Q_ROWS": 4 if wide else 8, "KV_ROWS": 4, "READ_ONCE": once}


TRITON_KERNELS = {
    "cuda": KernelSource("mla_rope_kv_cache_cat.py", _SPACE, _default, _guess),
    "hip": on_amd(KernelSource("mla_rope_kv_cache_cat.py", _SPACE, _default)),
}


def spec(kind: str, problem: Problem, config: Config) -> KernelSpec:
    """What to compile for a config, of whichever language."""
    if language_of(config) != TRITON:
        return kernels.spec(kind, problem, config)
    nope, rope, latent = (problem.int(name) for name in ("nope_dim", "rope_dim", "latent_dim"))
    return triton_spec(
        TRITON_KERNELS[kind].file,
        "mla_rope_kv_cache_cat",
        kernels.binding(problem),
        config,
        {
            "HEADS": problem.int("heads"),
            "NOPE": nope,
            "ROPE": rope,
            "LATENT": latent,
            "NOPE_BLOCK": power_of_two(nope),
            "HALF_BLOCK": power_of_two(rope // 2),
            "LATENT_BLOCK": power_of_two(latent),
            "NEOX": problem.int("neox"),
            "IN_HALVES": int(in_halves(problem)),
            "CACHE": kind_of_cache(problem).code,
            "APART": int(kind_of_cache(problem).apart),
            "Q_FP8": int(fp8_query(problem)),
            "FP8_NATIVE": 1,
        },
        align=config["VEC_BYTES"],
    )


def launch_shape(problem: Problem, config: Config) -> LaunchShape:
    """The grid of a config, of whichever language, and the alignment it needs."""
    if language_of(config) != TRITON:
        return kernels.launch_shape(problem, config)
    return LaunchShape(
        units_per_token=problem.int("heads"),
        units_per_block=config["Q_ROWS"],
        more_per_token=1,
        more_per_block=config["KV_ROWS"],
        align=config["VEC_BYTES"],
    )
