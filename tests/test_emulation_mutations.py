"""The emulator finds what is wrong with a kernel: each mutation of a right kernel's source is caught."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from emulation import EmulationError, emulate, unavailable

from autofuse.ops import Config, get_op

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "can be emulated")

KERNEL, HEADER = "mla_dual_rms_norm.cu", "gpu.cuh"
NORMS = get_op("mla_dual_rms_norm")
# Both rows end inside a step of their warps; 11 tokens end inside a block, and inside a team's turn.
PROBLEM = NORMS.make_problem(dtype="bf16", q_lora_rank=264, kv_lora_rank=72, cast_before_weight=True)
CONFIG = {"Q_WARPS": 3, "KV_WARPS": 2, "ROWS": 2, "UNROLL": 2, "VEC_BYTES": 4, "READ_ONCE": 1, "PDL": 1, "PREFETCH": 1}
TOKENS = 11

WRONG = "times the tolerance"
STANDSTILL = "no thread can go on"
OUTSIDE = "buffer-overflow"
NOT_ITS_OWN = f"{OUTSIDE}|use-after-poison"  # outside a tensor, or between its rows
RACE = f"depends on the order|{WRONG}"
UNWRITTEN = "were not written"
OVERLAP = "was written by block"
MASK = "lacks the calling lane"


@dataclass(frozen=True)
class Mutation:
    """An edit of a source, what the emulator says of it, and where it shows if not in CONFIG at 32 lanes."""

    name: str
    old: str
    new: str
    caught: str
    file: str = KERNEL
    config: dict[str, int] = field(default_factory=dict)
    warp_size: int = 32


LOAD_GUARD = "if (token < tokens && in_row(i)) {"
STORE = "if (token < tokens && in_row(i)) result.store(out + i64(token) * WIDTH + i * Vec::SIZE);"
BARRIER = "sync_team(barrier, LANES);"
SHUFFLES = "for (int offset = WARP_SIZE / 2; offset > 0; offset /= 2)"
ALL_LANES = "~0ull >> (64 - WARP_SIZE)"
MEETING = "if (WARPS > 1 || (!NAMED_BARRIERS && TEAM_WARPS > 2)) {"

MUTATIONS = [
    Mutation("the barrier is missing", BARRIER, "", RACE),
    Mutation("the barrier waits for a warp too many", BARRIER, "sync_team(barrier, LANES + WARP_SIZE);", STANDSTILL),
    Mutation(
        "the halves share a barrier", "2 + 2 * team", "1 + 2 * team", "is for 64 threads here and for 96 elsewhere"
    ),
    Mutation("lanes without a vector skip the barrier", BARRIER, f"if (lane < VECTORS) {BARRIER}", STANDSTILL),
    Mutation("rows past the end skip the barrier", BARRIER, f"if (first + ROWS < tokens) {BARRIER}", RACE),
    Mutation(
        "a block barrier that one half skips", MEETING, "if (WARPS > 1) {", STANDSTILL, KERNEL, {"KV_WARPS": 1}, 64
    ),
    Mutation("the sum starts at half the offset", SHUFFLES, SHUFFLES.replace("/ 2;", "/ 4;", 1), WRONG, HEADER),
    Mutation("the sum stops an offset early", SHUFFLES, SHUFFLES.replace("> 0", "> 1"), WRONG, HEADER),
    Mutation(
        "the sum is over 32 lanes of 64", SHUFFLES, SHUFFLES.replace("WARP_SIZE / 2", "16"), WRONG, HEADER, {}, 64
    ),
    Mutation("the shuffle's mask lacks a lane", ALL_LANES, "~0ull >> (65 - WARP_SIZE)", MASK, HEADER),
    Mutation("the shuffle's mask is of 32 lanes", ALL_LANES, "0xffffffffu", MASK, HEADER, {}, 64),
    Mutation(
        "lanes without a vector skip the shuffle",
        "= warp_sum(sum[u])",
        "= lane < 40 ? warp_sum(sum[u]) : 0",
        STANDSTILL,
    ),
    Mutation(
        "a branch that AMD must take as a whole is not uniform",
        "warp_uniform(warp -",
        "warp_uniform(lane + warp -",
        "warp_uniform",
    ),
    Mutation("the tail of a row is not guarded", LOAD_GUARD, "if (token < tokens) {", NOT_ITS_OWN),
    Mutation("rows past the end are read", LOAD_GUARD, "if (in_row(i)) {", f"{OUTSIDE}, READ"),
    Mutation("rows past the end are written", STORE, STORE.replace("token < tokens && ", ""), f"{OUTSIDE}, WRITE"),
    Mutation("the row's bound is one vector short", "vector < VECTORS;", "vector < VECTORS - 1;", UNWRITTEN),
    Mutation("the row's bound is one vector long", "vector < VECTORS;", "vector <= VECTORS;", NOT_ITS_OWN),
    Mutation(
        "the tail of a row is dropped", "(VECTORS + LANES - 1) / LANES;", "(VECTORS + LANES / 2) / LANES;", UNWRITTEN
    ),
    Mutation("one vector is not written", STORE, STORE.replace("in_row(i)", "in_row(i) && i != 5"), UNWRITTEN),
    Mutation("the input's row stride is its width", "x + token * stride", "x + token * WIDTH", NOT_ITS_OWN),
    Mutation("the output's row stride is too short", "* WIDTH + i", "* (WIDTH - Vec::SIZE) + i", OVERLAP),
    Mutation("blocks overlap by a token", "blockIdx.x * (ROWS * UNROLL)", "blockIdx.x * (ROWS * UNROLL - 1)", OVERLAP),
    Mutation("blocks leave a token out", "blockIdx.x * (ROWS * UNROLL)", "blockIdx.x * (ROWS * UNROLL + 1)", UNWRITTEN),
    Mutation("teams share their sums", "sums + team * TEAM_WARPS * UNROLL", "sums", RACE),
    Mutation("shared memory is too small", "sums[ROWS * TEAM_WARPS * UNROLL]", "sums[TEAM_WARPS * UNROLL]", OUTSIDE),
    Mutation(
        "the weight is of the neighbouring vector", "weight + i * Vec::SIZE", "weight + (i ^ 1) * Vec::SIZE", WRONG
    ),
    Mutation("kv is normed with q's eps", "p.kv_eps", "p.q_eps", WRONG),
    Mutation(
        "vectors are wider than the alignment",
        "Vector<Element, VEC_BYTES>",
        "Vector<Element, 2 * VEC_BYTES>",
        "misaligned",
    ),
    Mutation("inputs are read before the wait", "            wait_for_previous_kernel();\n", "", "before waiting"),
    Mutation(
        "an input is written",
        STORE,
        f"{STORE} if (lane == 0) result.store(const_cast<Element*>(weight));",
        "input . was changed|order",
    ),
]


def run(config: Config, warp_size: int) -> None:
    """Raises EmulationError, for a wrong result as well."""
    args = list(NORMS.example_args(PROBLEM, TOKENS, torch.device("cpu"), torch.Generator().manual_seed(0)))
    args[4:6] = 0.5, 2.0  # an eps of its own for each half
    results = emulate(NORMS, PROBLEM, config, args, warp_size=warp_size)
    for result, exact in zip(results, NORMS.exact(*args), strict=True):
        if not (error := NORMS.tolerance(PROBLEM).error(result, exact)) <= 1.0:
            raise EmulationError(f"a result is {error:.3g} times the tolerance from the reference")


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: re.sub(r"\W+", "-", mutation.name))
def test_is_caught(mutation: Mutation, edit_kernels: Callable[[str, str, str], None]) -> None:
    edit_kernels(mutation.file, mutation.old, mutation.new)
    with pytest.raises(EmulationError, match=mutation.caught):
        run(Config.of(CONFIG, **mutation.config), mutation.warp_size)


@pytest.mark.parametrize(
    ("config", "warp_size"), {(Config.of(CONFIG, **each.config), each.warp_size): None for each in MUTATIONS}
)
def test_the_kernel_itself_passes(config: Config, warp_size: int) -> None:
    run(config, warp_size)
