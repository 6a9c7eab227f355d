"""Mutations of rope_kv_cache."""

from __future__ import annotations

from autofuse.ops import Config, Problem
from mutations.mutation import OFF, OUTSIDE, OVERLAP, WRONG, Mutation, Subject

# Groups of three heads end inside a token, a head leaves lanes idle, and some of what is left is not rotated.
GQA = Subject(
    Problem.parse(
        "rope_kv_cache(dtype=bf16,heads=4,kv_heads=2,head_dim=80,rope_dim=32,neox=1,table=bf16,cache=auto,"
        "qk_norm=1,q_fp8=0,return_k=1)"
    ),
    Config.parse("THREADS=64,UNROLL=3,VEC_BYTES=16,READ_ONCE=1,PDL=1,PREFETCH=4,GUESS=1"),
    tokens=27,
)
GQA_FP8 = Subject(
    Problem.parse(
        "rope_kv_cache(dtype=fp16,heads=3,kv_heads=3,head_dim=32,rope_dim=16,neox=0,table=fp32,cache=fp8_per_head,"
        "qk_norm=0,q_fp8=1,return_k=0)"
    ),
    {**GQA.config, "UNROLL": 2, "VEC_BYTES": 8},
    tokens=23,
)
# Part of a head is taken apart, behind a norm whose weights must be as well.
GQA_APART = Subject(
    Problem.parse(
        "rope_kv_cache(dtype=bf16,heads=4,kv_heads=2,head_dim=80,rope_dim=64,neox=0,table=fp32,cache=auto,"
        "qk_norm=1,q_fp8=0,return_k=1,deinterleave=1)"
    ),
    {**GQA.config, "VEC_BYTES": 8},
    tokens=23,
)
SLOT_OF = "CACHE && token < u32(p.slot_count) ? slot_of("
A_ROW = "position < 0 ? 0 : position < p.table_rows ? position : p.table_rows - 1"
ROUNDED = "round_to<Element>(values);\n"
FACTORS = "values[e] *= factors[e];\n    "
WORK = "own_token <= last_token && (LANES"

MUTATIONS = [
    Mutation(*texts, file, subject=GQA)
    for file, *texts in (
        ("rope_kv_cache.cu", "rows of padded tokens are written", "block < u32(cache.blocks) ?", "true ?", OFF),
        ("rope_kv_cache.cu", "tokens beyond the slots have one", SLOT_OF, "CACHE ? slot_of(", f"{OUTSIDE}, READ"),
        (
            "rope_kv_cache.cu",
            "padded slots count from the end",
            "given < 0 && p.",
            "given < 0 && !p.",
            f"{OFF}|{WRONG}",
        ),
        ("rope_kv_cache.cu", "a slot has 32 bits", "number = slot,", "number = u32(slot),", f"{OFF}|{WRONG}"),
        ("rope_kv_cache.cu", "blocks have a power of two of rows", "size & (size - 1) ? -1 :", "", f"{OFF}|{WRONG}"),
        ("rope_kv_cache.cu", "v has the strides of k's cache", "row.of(p.v_cache", "row.of(p.k_cache", OFF),
        ("rope_kv_cache.cu", "q has the stride of k", "token * p.q_token", "token * p.k_token", OFF),
        ("rope_kv_cache.cu", "idle lanes count", "own_lane >= PAIRS) sum", "own_lane > PAIRS) sum", WRONG),
        ("rope_kv_cache.cu", "a sum over half of the lanes", "offset = LANES / 2", "offset = LANES / 4", WRONG),
        (
            "rope_kv_cache.cu",
            "the normed value is not rounded",
            f"inverse_rms;\n    {ROUNDED}",
            "inverse_rms;\n",
            WRONG,
        ),
        ("rope_kv_cache.cu", "the weighed value is not rounded", f"{FACTORS}{ROUNDED}", FACTORS, WRONG),
        ("rope_kv_cache.cu", "k has q's weight", "weights[UNROLL > 1 && head >= HEADS]", "weights[0]", WRONG),
        ("rope_kv_cache.cu", "all is rotated", "if (lane < ROTATED) angles.rotate", "angles.rotate", WRONG),
        ("rope_kv_cache.cu", "the partner is a neighbour", "(rotated ? HALF", "(rotated ? SIZE", f"{OFF}|{WRONG}"),
        ("rope_kv_cache.cu", "a wrong guess is believed", "position != guess", "guess < 0", WRONG),
        ("rope_kv_cache.cu", "a guess may be any row", A_ROW, "position", OFF),
        ("rope_kv_cache.cu", "positions are read early", "read_past_l1(p.positions", "read_early(p.positions", OFF),
        ("rope_kv_cache.cu", "the kernel does not wait", "        wait_for_previous_kernel();\n", "", "before waiting"),
        ("rope_kv_cache.cu", "rows past the end are written", WORK, "(LANES", OVERLAP),
        (
            "rope_kv_cache.cu",
            "a thread is left out",
            "(unsigned long long)blockIdx.x * THREADS",
            "blockIdx.x * 65ull",
            OFF,
        ),
        ("rope.cuh", "pairs turn the other way", "- y[e] * sines[e]", "+ y[e] * sines[e]", WRONG),
    )
]
MUTATIONS += [
    Mutation(*texts, file, subject=GQA_FP8)
    for file, *texts in (
        ("rope_kv_cache.cu", "k's heads have one scale", "(CACHE == 3 ? head - HEADS : 0)", "0", WRONG),
        ("rope_kv_cache.cu", "v has k's scales", "p.v_cache.scale +", "p.k_cache.scale +", WRONG),
        ("rope_kv_cache.cu", "fp8 elements have two bytes", "FP8_CACHE ? 1 :", "FP8_CACHE ? 2 :", OFF),
        ("rope_kv_cache.cu", "q is not divided", "if (head < HEADS) return p.q_scale", "return p.k_cache.scale", WRONG),
        (
            "rope.cuh",
            "both vectors have x's angles",
            "cosines[1].load(row + (half + at) / 2)",
            "cosines[1].load(row)",
            WRONG,
        ),
    )
]


MUTATIONS += [
    Mutation(*texts, "rope_kv_cache.cu", subject=GQA_APART)
    for texts in (
        ("v is taken apart", "read = at.source(heads[u] < Q_AND_K)", "read = at.source(true)", WRONG),
        ("the norm's weights are in halves", "read = at.source(true)", "read = at", WRONG),
        ("what is not rotated is taken apart", "of_q_or_k && x < HALF", "of_q_or_k", OFF),
        (
            "rows behind the rotated part are shuffled",
            "if (DEINTERLEAVE && lane < ROTATED)",
            "if (DEINTERLEAVE)",
            WRONG,
        ),
        ("the second vector is half a row away", "from.y = 2 * x + SIZE", "from.y = 2 * x + HALF", OFF),
    )
]
