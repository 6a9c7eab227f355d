"""Mutations of mla_dual_rms_norm."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from autofuse.ops import get_op
from mutations.mutation import (
    MASK,
    NOT_ITS_OWN,
    OUTSIDE,
    OVERLAP,
    RACE,
    STANDSTILL,
    UNWRITTEN,
    WRONG,
    Mutation,
    Subject,
)

# Both rows end inside a step of their warps; 11 tokens end inside a block, and inside a team's turn.
NORMS = Subject(
    get_op("mla_dual_rms_norm").make_problem(dtype="bf16", q_lora_rank=264, kv_lora_rank=72, cast_before_weight=True),
    {"Q_WARPS": 3, "KV_WARPS": 2, "ROWS": 2, "UNROLL": 2, "VEC_BYTES": 4, "READ_ONCE": 1, "PDL": 1, "PREFETCH": 1},
    tokens=11,
)

KERNEL, ROWS, HEADER = "mla_dual_rms_norm.cu", "rms_norm.cuh", "gpu.cuh"
LOAD_GUARD = "if (token < tokens && in_row(i)) {"
STORE = "if (at.exists()) result.store("
EXISTS = "return token < tokens && in_row(vector);"
FINISH = "finish(Place{token, tokens, i}, values);"
BARRIER = "sync_team(barrier, LANES);"
SHUFFLES = "for (int offset = WARP_SIZE / 2; offset > 0; offset /= 2)"
ALL_LANES = "~0ull >> (64 - WARP_SIZE)"
MEETING = "(WARPS > 1 || (!NAMED_BARRIERS && TEAM_WARPS > 2))"


def of_norms(
    name: str,
    old: str,
    new: str,
    caught: str,
    file: str = ROWS,
    config: Mapping[str, int] = MappingProxyType({}),
    warp_size: int = 32,
) -> Mutation:
    return Mutation(name, old, new, caught, file, config, warp_size, subject=NORMS)


MUTATIONS = [
    of_norms("the barrier is missing", BARRIER, "", RACE),
    of_norms("the barrier waits for a warp too many", BARRIER, "sync_team(barrier, LANES + WARP_SIZE);", STANDSTILL),
    of_norms(
        "the halves share a barrier",
        "2 + 2 * team",
        "1 + 2 * team",
        "is for 64 threads here and for 96 elsewhere",
        KERNEL,
    ),
    of_norms("lanes without a vector skip the barrier", BARRIER, f"if (lane < VECTORS) {BARRIER}", STANDSTILL),
    of_norms("rows past the end skip the barrier", BARRIER, f"if (first + ROWS < tokens) {BARRIER}", RACE),
    of_norms("a block barrier that one half skips", MEETING, "(WARPS > 1)", STANDSTILL, KERNEL, {"KV_WARPS": 1}, 64),
    of_norms("the sum starts at half the offset", SHUFFLES, SHUFFLES.replace("/ 2;", "/ 4;", 1), WRONG, HEADER),
    of_norms("the sum stops an offset early", SHUFFLES, SHUFFLES.replace("> 0", "> 1"), WRONG, HEADER),
    of_norms(
        "the sum is over 32 lanes of 64", SHUFFLES, SHUFFLES.replace("WARP_SIZE / 2", "16"), WRONG, HEADER, {}, 64
    ),
    of_norms("the shuffle's mask lacks a lane", ALL_LANES, "~0ull >> (65 - WARP_SIZE)", MASK, HEADER),
    of_norms("the shuffle's mask is of 32 lanes", ALL_LANES, "0xffffffffu", MASK, HEADER, {}, 64),
    of_norms(
        "lanes without a vector skip the shuffle",
        "= warp_sum(sum[u])",
        "= lane < 40 ? warp_sum(sum[u]) : 0",
        STANDSTILL,
    ),
    of_norms(
        "a branch that AMD must take as a whole is not uniform",
        "warp_uniform(warp -",
        "warp_uniform(lane + warp -",
        "warp_uniform",
        KERNEL,
    ),
    of_norms("the tail of a row is not guarded", LOAD_GUARD, "if (token < tokens) {", NOT_ITS_OWN),
    of_norms("rows past the end are read", LOAD_GUARD, "if (in_row(i)) {", f"{OUTSIDE}, READ"),
    of_norms("rows past the end are written", EXISTS, EXISTS.replace("token < tokens && ", ""), f"{OUTSIDE}, WRITE"),
    of_norms("the row's bound is one vector short", "vector < VECTORS;", "vector < VECTORS - 1;", UNWRITTEN),
    of_norms("the row's bound is one vector long", "vector < VECTORS;", "vector <= VECTORS;", NOT_ITS_OWN),
    of_norms(
        "the tail of a row is dropped", "(VECTORS + LANES - 1) / LANES;", "(VECTORS + LANES / 2) / LANES;", UNWRITTEN
    ),
    of_norms("one vector is not written", STORE, STORE.replace("exists()", "exists() && at.vector != 5"), UNWRITTEN),
    of_norms("the input's row stride is its width", "x + token * stride", "x + token * WIDTH", NOT_ITS_OWN),
    of_norms("the output's row stride is too short", "* WIDTH + at", "* (WIDTH - SIZE) + at", OVERLAP),
    of_norms(
        "blocks overlap by a token", "blockIdx.x * (ROWS * UNROLL)", "blockIdx.x * (ROWS * UNROLL - 1)", OVERLAP, KERNEL
    ),
    of_norms(
        "blocks leave a token out",
        "blockIdx.x * (ROWS * UNROLL)",
        "blockIdx.x * (ROWS * UNROLL + 1)",
        UNWRITTEN,
        KERNEL,
    ),
    of_norms("teams share their sums", "sums + team * TEAM_WARPS * UNROLL", "sums", RACE, KERNEL),
    of_norms(
        "shared memory is too small", "sums[ROWS * TEAM_WARPS * UNROLL]", "sums[TEAM_WARPS * UNROLL]", OUTSIDE, KERNEL
    ),
    of_norms(
        "the weight is of the neighbouring vector", "weight + i * Vec::SIZE", "weight + (i ^ 1) * Vec::SIZE", WRONG
    ),
    of_norms("kv is normed with q's eps", "p.kv_eps", "p.q_eps", WRONG, KERNEL),
    of_norms(
        "vectors are wider than the alignment",
        "Vector<Element, VEC_BYTES>",
        "Vector<Element, 2 * VEC_BYTES>",
        "misaligned",
    ),
    of_norms("inputs are read before the wait", "            wait_for_previous_kernel();\n", "", "before waiting"),
    of_norms(
        "an input is written",
        FINISH,
        f"{FINISH} if (lane == 0) rows[u][s].store(const_cast<Element*>(weight));",
        "input . was changed|order",
    ),
]
