"""Mutations of mla_v_up_quant."""

from __future__ import annotations

from autofuse.ops import Config, Problem
from mutations.mutation import OFF, RACE, STANDSTILL, WRONG, Mutation, Subject

# Two blocks share a group; a second tile of tokens is not full.
V_UP = Subject(
    Problem.parse("mla_v_up_quant(dtype=bf16,heads=2,kv_lora_rank=192,v_head_dim=128,group=128,ue8m0=0,layout=2)"),
    Config.parse("STAGED=1,TOKENS=64,WARPS=1,TILES=1,STAGES=2,CLUSTER=2,PDL=1,PREFETCH=2,EARLY=0"),
    tokens=70,
)
# W_UV is promised to be constant, and loaded early.
V_UP_EARLY = Subject(
    Problem(V_UP.problem.op, (*V_UP.problem.params, ("w_constant", 1))), {**V_UP.config, "EARLY": 1}, tokens=70
)
# One block, two warpgroups with two rounds of tokens.
ROUNDS = {"CLUSTER": 1, "TOKENS": 256, "WARPS": 2}
V_UP_ROUNDS = Subject(V_UP.problem, {**V_UP.config, **ROUNDS}, tokens=150)
V_UP_DIRECT = Subject(
    V_UP.problem,
    {**V_UP.config, "STAGED": 0, "CLUSTER": 1, "TOKENS": 32, "TILES": 2, "WARPS": 2, "STAGES": 1},
    tokens=37,
)
MUTATIONS = [
    Mutation(*texts, file, subject=V_UP)
    for file, *texts in (
        (
            "mla_v_up_quant.cu",
            "copies of other threads are not waited for",
            "                __syncthreads();\n",
            "",
            RACE,
        ),
        (
            "mla_v_up_quant.cu",
            "a copy is waited for too late",
            "wait_for_copies<STAGES - 2>",
            "wait_for_copies<8>",
            WRONG,
        ),
        ("mla_v_up_quant.cu", "the other block's largest is not looked at", "if (other != self)", "if (false)", WRONG),
        ("mla_v_up_quant.cu", "a block awaits its own largest", "(PARTNERS - 1) * int", "PARTNERS * int", "was sent"),
        ("mla_v_up_quant.cu", "only one row is sent", "exchanged + row * PARTNERS + self", "exchanged + self", RACE),
        ("mla_v_up_quant.cu", "blocks have the same columns", "+ at.rank * COLUMNS + piece", "+ piece", WRONG),
        ("mla_v_up_quant.cu", "rows past the end are read", "if (i < rows) {", "if (true) {", OFF),
        (
            "mla_v_up_quant.cu",
            "heads are tokens apart",
            "row) * p.x_token + at.head * p.x_head",
            "row) * p.x_head",
            OFF,
        ),
        ("mla_v_up_quant.cu", "w_uv's rows are dense", "w_rows = W_ROWS * p.w_row", "w_rows = W_ROWS * V_DIM", OFF),
        ("mma.cuh", "words go half the way", "mask = 1; mask < 4", "mask = 1; mask < 2", WRONG),
        ("mla_v_up_quant.cu", "rows past the end are written", "if (exists) sixteen", "sixteen", OFF),
        (
            "mla_v_up_quant.cu",
            "the kernel does not wait",
            "        wait_for_previous_kernel();\n",
            "",
            "before waiting",
        ),
        ("mma.cuh", "rows of w are swapped", "element(row) | element(row + 1) << 16", "element(row) * 65537", WRONG),
    )
]
MUTATIONS += [
    Mutation(*texts, "mla_v_up_quant.cu", subject=V_UP_EARLY)
    for texts in (
        (
            "o_latent is read early as well",
            "if (EARLY) loader.begin_early();",
            "if (EARLY) loader.begin_early(), loader.next();",
            "before waiting",
        ),
        ("steps that were early come again", "&& step >= EARLY_STEPS", "&& step > 0", OFF),
    )
]
MUTATIONS += [
    Mutation(*texts, "mla_v_up_quant.cu", subject=V_UP_ROUNDS)
    for texts in (
        ("tiles are overwritten while they are read", "} else if (step > 0) {", "} else {", f"{RACE}|{OFF}"),
        (
            "a round is quantised as the next",
            "quantise(0, round - 1);\n        q",
            "quantise(0, round);\n        q",
            OFF,
        ),
        ("w_uv's second half is its first", "+ piece / W_TILE_PIECES * Product", "+ 0 * Product", WRONG),
        (
            "warpgroups share a barrier",
            "sync_team(1 + warpgroup",
            "sync_team(1 + 0 * warpgroup",
            f"{STANDSTILL}|{RACE}",
        ),
    )
]
MUTATIONS += [
    Mutation(*texts, file, subject=V_UP_DIRECT)
    for file, *texts in (
        ("mla_v_up_quant.cu", "warps share their sums", "(latent_warp * TOKENS + row)", "(row)", RACE),
        ("mla_v_up_quant.cu", "sums are read too early", "    __syncthreads();\n    quantise", "    quantise", RACE),
        ("mla_v_up_quant.cu", "a warp's part is left out", "warp < WARPS; ++warp", "warp < WARPS - 1; ++warp", WRONG),
        ("mma.cuh", "columns of w change places", "part % 2 ? first >> 16", "part % 2 == 0 ? first >> 16", WRONG),
        ("mma.cuh", "both halves are the first", "x[1].words[2 * half], x", "x[1].words[0], x", WRONG),
    )
]
MUTATIONS += [
    Mutation(*texts, "mma.cuh", warp_size=64, subject=V_UP_DIRECT)
    for texts in (
        ("sums of 64 lanes are in columns", "some[i] = sums[0][4 * i + part]", "some[i] = sums[0][i + part]", WRONG),
        ("lanes of a row are neighbours", "lane() % 4 : lane() / 16", "lane() % 4 : lane() % 4", OFF),
    )
]
