"""Mutations of fp8_group_quant and mla_dual_rms_norm_quant."""

from __future__ import annotations

from autofuse.ops import Config, Problem
from mutations.mutation import NOT_ITS_OWN, OFF, OVERLAP, RACE, STANDSTILL, UNWRITTEN, WRONG, Mutation, Subject
from mutations.norms import NORMS

UNIT = "Units::run(x[u], given"

# 7 tokens of 3 groups end inside a block; columns of scales have a gap between them.
QUANT = Subject(
    Problem.parse("fp8_group_quant(dtype=bf16,width=384,norm=0,cast_before_weight=0,group=128,ue8m0=0,layout=2)"),
    Config.parse("X_WARPS=2,ROWS=1,UNROLL=2,LOADS=2,SPREAD=1,READ_ONCE=0,PDL=1,PREFETCH=1"),
    tokens=7,
)
# Neither rows nor columns of the scales fill their tiles; a group has two lanes.
GAP = f"{OFF}|unknown-crash"  # what AddressSanitizer calls 4 bytes of 8
NVFP4 = Subject(
    Problem.parse("fp8_group_quant(dtype=bf16,width=208,norm=0,cast_before_weight=0,group=16,ue8m0=0,layout=0)"),
    {**QUANT.config, "LOADS": 1, "SPREAD": 0},
    tokens=37,
)
NORMS_QUANT = Subject(
    Problem.parse(
        "mla_dual_rms_norm_quant(dtype=bf16,q_lora_rank=320,kv_lora_rank=72,cast_before_weight=1,group=64,ue8m0=1,layout=1)"
    ),
    {**NORMS.config, "VEC_BYTES": 16, "Q_WARPS": 2, "KV_WARPS": 1},
    tokens=11,
)
MUTATIONS = [
    Mutation(*texts, file, subject=QUANT)
    for file, *texts in (
        ("quant.cuh", "the largest is of half a group", "LANES / 2; offset", "LANES / 4; offset", WRONG),
        ("quant.cuh", "signs count", "magnitudes = word & 0x7fff7fffu", "magnitudes = word", WRONG),
        ("quant.cuh", "a reciprocal does for a division", "if (UE8M0) return guess", "return guess", WRONG),
        ("quant.cuh", "448 is divided by roughly", "return a < INFINITE ? quotient : a", "return guess", WRONG),
        ("quant.cuh", "zeros have another scale", "0x2edbe6ffu", "0x2edbe6f0u", WRONG),
        ("quant.cuh", "columns have no gaps", "(i64(tokens) + 3) / 4 * 4", "i64(tokens)", GAP),
        ("quant.cuh", "columns are row-major", "group * column + token", "token * groups + group", GAP),
        ("quant.cuh", "vectors are stored side by side", "element(lane, v), some", "lane * 16 + v * 8, some", WRONG),
        ("fp8_group_quant.cu", "lanes without a group skip the shuffle", UNIT, f"if (unit.exists) {UNIT}", STANDSTILL),
        ("fp8_group_quant.cu", "rows past the end are read", "if (!unit.exists) continue;", "", OFF),
        ("fp8_group_quant.cu", "rows are dense", "token * p.x_stride", "token * X_WIDTH", NOT_ITS_OWN),
        (
            "fp8_group_quant.cu",
            "the kernel does not wait",
            "        wait_for_previous_kernel();\n",
            "",
            "before waiting",
        ),
        (
            "fp8_group_quant.cu",
            "blocks overlap by a unit",
            "blockIdx.x) * PER_BLOCK",
            "blockIdx.x) * (PER_BLOCK - 1)",
            OFF,
        ),
    )
]
MUTATIONS += [
    Mutation(*texts, "quant.cuh", subject=NVFP4)
    for texts in (
        ("a tile's rows are in order", "row % 32 * 16 + row / 32 * 4", "row * 4", f"{WRONG}|{OVERLAP}"),
        ("padded rows are left as they are", "i64(-tokens & 127) * words", "0", UNWRITTEN),
        ("padded columns are left as they are", "column % 4; ++column", "column < 0; ++column", UNWRITTEN),
        ("a byte's halves are swapped", "e2m1_bits(a) | e2m1_bits(b) << 4", "e2m1_bits(b) | e2m1_bits(a) << 4", WRONG),
        ("the global scale stays in the values", "(rounded * global_reciprocal)", "rounded", WRONG),
        (
            "values are divided by what the scale was",
            "float rounded = e4m3_value(bits)",
            "float rounded = scale",
            WRONG,
        ),
    )
]
MUTATIONS += [
    Mutation(*texts, file, subject=NORMS_QUANT)
    for file, *texts in (
        ("quant.cuh", "a lane has its neighbour's group", "at.vector / LANES,", "(at.vector + 1) / LANES,", OFF),
        ("quant.cuh", "powers of two are rounded down", "+ 0x7fffffu) &", ") &", WRONG),
        ("quant.cuh", "rows past the end are quantised", "% LANES, at.exists()", "% LANES, true", OFF),
        ("mla_dual_rms_norm_quant.cu", "kv is normed with q's eps", "p.kv_eps", "p.q_eps", WRONG),
        ("mla_dual_rms_norm_quant.cu", "teams share their sums", "sums + team * TEAM_WARPS * UNROLL", "sums", RACE),
    )
]
