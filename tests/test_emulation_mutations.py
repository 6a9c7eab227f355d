"""The emulator finds what is wrong with a kernel: each mutation of a right kernel's source is caught."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

import pytest
import torch
from emulation import EmulationError, run_ahead, unavailable, verify, wanted

from autofuse.ops import Config, Problem, get_op

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "can be emulated")

WRONG = "times the tolerance"
STANDSTILL = "no thread can go on"
OUTSIDE = "buffer-overflow"
NOT_ITS_OWN = f"{OUTSIDE}|use-after-poison"  # outside a tensor, or between its rows
RACE = f"depends on the order|{WRONG}"
UNWRITTEN = "were not written"
OVERLAP = "was written by block"
MASK = "lacks the calling lane"


@dataclass(frozen=True)
class Subject:
    """A launch of a kernel, with an op's ``check_args``, in which mutations of the kernel show."""

    problem: Problem
    config: Mapping[str, int]
    tokens: int


# Both rows end inside a step of their warps; 11 tokens end inside a block, and inside a team's turn.
NORMS = Subject(
    get_op("mla_dual_rms_norm").make_problem(dtype="bf16", q_lora_rank=264, kv_lora_rank=72, cast_before_weight=True),
    {"Q_WARPS": 3, "KV_WARPS": 2, "ROWS": 2, "UNROLL": 2, "VEC_BYTES": 4, "READ_ONCE": 1, "PDL": 1, "PREFETCH": 1},
    tokens=11,
)


@dataclass(frozen=True, eq=False)
class Mutation:
    """An edit of a source, what the emulator says of it, and where it shows: in the subject's config but for what
    ``config`` changes of it.
    """

    name: str
    old: str
    new: str
    caught: str
    file: str = "rms_norm.cuh"
    config: Mapping[str, int] = field(default_factory=dict)
    warp_size: int = 32
    subject: Subject = NORMS


KERNEL, ROWS, HEADER = "mla_dual_rms_norm.cu", "rms_norm.cuh", "gpu.cuh"
LOAD_GUARD = "if (token < tokens && in_row(i)) {"
STORE = "if (at.exists()) result.store("
EXISTS = "return token < tokens && in_row(vector);"
FINISH = "finish(Place{token, tokens, i}, values);"
BARRIER = "sync_team(barrier, LANES);"
SHUFFLES = "for (int offset = WARP_SIZE / 2; offset > 0; offset /= 2)"
ALL_LANES = "~0ull >> (64 - WARP_SIZE)"
MEETING = "(WARPS > 1 || (!NAMED_BARRIERS && TEAM_WARPS > 2))"

MUTATIONS = [
    Mutation("the barrier is missing", BARRIER, "", RACE),
    Mutation("the barrier waits for a warp too many", BARRIER, "sync_team(barrier, LANES + WARP_SIZE);", STANDSTILL),
    Mutation(
        "the halves share a barrier",
        "2 + 2 * team",
        "1 + 2 * team",
        "is for 64 threads here and for 96 elsewhere",
        KERNEL,
    ),
    Mutation("lanes without a vector skip the barrier", BARRIER, f"if (lane < VECTORS) {BARRIER}", STANDSTILL),
    Mutation("rows past the end skip the barrier", BARRIER, f"if (first + ROWS < tokens) {BARRIER}", RACE),
    Mutation("a block barrier that one half skips", MEETING, "(WARPS > 1)", STANDSTILL, KERNEL, {"KV_WARPS": 1}, 64),
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
        KERNEL,
    ),
    Mutation("the tail of a row is not guarded", LOAD_GUARD, "if (token < tokens) {", NOT_ITS_OWN),
    Mutation("rows past the end are read", LOAD_GUARD, "if (in_row(i)) {", f"{OUTSIDE}, READ"),
    Mutation("rows past the end are written", EXISTS, EXISTS.replace("token < tokens && ", ""), f"{OUTSIDE}, WRITE"),
    Mutation("the row's bound is one vector short", "vector < VECTORS;", "vector < VECTORS - 1;", UNWRITTEN),
    Mutation("the row's bound is one vector long", "vector < VECTORS;", "vector <= VECTORS;", NOT_ITS_OWN),
    Mutation(
        "the tail of a row is dropped", "(VECTORS + LANES - 1) / LANES;", "(VECTORS + LANES / 2) / LANES;", UNWRITTEN
    ),
    Mutation("one vector is not written", STORE, STORE.replace("exists()", "exists() && at.vector != 5"), UNWRITTEN),
    Mutation("the input's row stride is its width", "x + token * stride", "x + token * WIDTH", NOT_ITS_OWN),
    Mutation("the output's row stride is too short", "* WIDTH + at", "* (WIDTH - SIZE) + at", OVERLAP),
    Mutation(
        "blocks overlap by a token", "blockIdx.x * (ROWS * UNROLL)", "blockIdx.x * (ROWS * UNROLL - 1)", OVERLAP, KERNEL
    ),
    Mutation(
        "blocks leave a token out",
        "blockIdx.x * (ROWS * UNROLL)",
        "blockIdx.x * (ROWS * UNROLL + 1)",
        UNWRITTEN,
        KERNEL,
    ),
    Mutation("teams share their sums", "sums + team * TEAM_WARPS * UNROLL", "sums", RACE, KERNEL),
    Mutation(
        "shared memory is too small", "sums[ROWS * TEAM_WARPS * UNROLL]", "sums[TEAM_WARPS * UNROLL]", OUTSIDE, KERNEL
    ),
    Mutation(
        "the weight is of the neighbouring vector", "weight + i * Vec::SIZE", "weight + (i ^ 1) * Vec::SIZE", WRONG
    ),
    Mutation("kv is normed with q's eps", "p.kv_eps", "p.q_eps", WRONG, KERNEL),
    Mutation(
        "vectors are wider than the alignment",
        "Vector<Element, VEC_BYTES>",
        "Vector<Element, 2 * VEC_BYTES>",
        "misaligned",
    ),
    Mutation("inputs are read before the wait", "            wait_for_previous_kernel();\n", "", "before waiting"),
    Mutation(
        "an input is written",
        FINISH,
        f"{FINISH} if (lane == 0) rows[u][s].store(const_cast<Element*>(weight));",
        "input . was changed|order",
    ),
]


# ---- mla_rope_kv_cache_cat ------------------------------------------------------------------------------------------

# Some tokens are padded, some have slots beyond the cache, and some are beyond the slots.
ROPE = Subject(
    Problem.parse(
        "mla_rope_kv_cache_cat(dtype=bf16,heads=3,nope_dim=24,rope_dim=16,latent_dim=40,neox=0,table=fp32,cache=auto)"
    ),
    Config.parse("THREADS=64,UNROLL=2,VEC_BYTES=16,CHUNK=64,READ_ONCE=0,PDL=1,PREFETCH=4,GUESS=1"),
    tokens=23,
)
# In a warp of 64 lanes, half may have groups of kv_c while the other half has none.
DS_MLA = Subject(
    Problem.parse(
        "mla_rope_kv_cache_cat(dtype=bf16,heads=1,nope_dim=0,rope_dim=64,latent_dim=512,neox=1,table=bf16,"
        "cache=fp8_ds_mla,query=fp8)"
    ),
    {**ROPE.config, "UNROLL": 1, "VEC_BYTES": 32},
    tokens=23,
)
OFF = f"{NOT_ITS_OWN}|SEGV|misaligned|{OVERLAP}|{UNWRITTEN}|{RACE}"  # a wrong address: it depends on where that leads
NO_SLOT = "if (slot < 0 || slot >= i64(cache.blocks) * cache.block_size) return -1;"
SLOT = "unit.token < p.slot_count ? slot_of("
CLAMPED = "early[u] < 0 ? 0 : early[u] < p.table_rows ? int(early[u]) : p.table_rows - 1"

MUTATIONS += [
    Mutation(*texts, "mla_rope.cuh", subject=ROPE)
    for texts in (
        ("padded tokens are written", "rows[u] >= 0", "true", OFF),
        ("slots beyond the cache are written", NO_SLOT, "if (slot < 0) return -1;", OFF),
        ("padded slots count from the end", "given < 0 && from_end", "given < 0 && !from_end", f"{OFF}|{WRONG}"),
        ("tokens beyond the slots have one", SLOT, "true ? slot_of(", f"{OUTSIDE}, READ"),
        ("blocks of the cache are dense", "if (cache.block == cache.block_size * cache.row)", "if (true)", OFF),
        ("a wrong guess is believed", "positions[u] != guesses[u]", "guesses[u] < 0", WRONG),
        ("a guess may be any row", CLAMPED, "int(early[u])", OFF),
        ("the position is what was read early", "read_past_l1(p.positions", "read_early(p.positions", OFF),
        ("the kernel does not wait", "        wait_for_previous_kernel();\n", "", "before waiting"),
        ("angles are loaded early", "prefetch(guessed[u]);", "guesses[u] += int(*guessed[u]);", "before waiting"),
        ("sines are cosines", "sines.load(from + HALF)", "sines.load(from)", WRONG),
        ("k_pe is cached in kv_c's place", "row + (APART ? 0 : LATENT) + at", "row + at", OFF),
        ("rows past the end are read", "left < CHUNK ? left : CHUNK", "CHUNK", OFF),
        ("rotated queries are in nope's place", "* Q_ROW + NOPE + at", "* Q_ROW + at", OFF),
        ("q_pe is read with k_pe's stride", "token * p.q_pe_token", "token * p.k_pe_token", OFF),
        (
            "blocks overlap by a unit",
            "(unsigned long long)block * PER",
            "(unsigned long long)block * (PER_BLOCK - 1); //",
            OFF,
        ),
    )
]
MUTATIONS += [
    Mutation(*texts, "mla_rope.cuh", warp_size=64, subject=DS_MLA)
    for texts in (
        ("the largest is of half a group", "DS_MLA_LANES / 2; offset", "DS_MLA_LANES / 4; offset", WRONG),
        ("lanes without kv_c skip the shuffle", "warp_uniform(some)", "unit.kind == KV_C", STANDSTILL),
        ("scales are the neighbouring group's", "[at / DS_MLA_GROUP]", "[at / DS_MLA_GROUP ^ 1]", WRONG),
        ("scales have no smallest", "scale > SMALLEST_NORMAL ? scale : SMALLEST_NORMAL", "scale", WRONG),
        ("k_pe is where it is in other caches", "row + DS_MLA_K_PE", "row + LATENT", OFF),
        ("the query is divided by the cache's scale", "if (unit.kind == KV_C) scales", "scales", WRONG),
        ("NeoX's partner is the neighbour", "p.k_pe_out + unit.to + HALF", "p.k_pe_out + unit.to + SIZE", OFF),
    )
]


# Pairs that come out as halves, two vectors of them for a thread.
ROPE_APART = Subject(
    Problem.parse(
        "mla_rope_kv_cache_cat(dtype=bf16,heads=3,nope_dim=24,rope_dim=32,latent_dim=40,neox=0,table=fp32,cache=fp8_apart,"
        "query=fp8,deinterleave=1)"
    ),
    ROPE.config,
    tokens=23,
)
MUTATIONS += [
    Mutation(*texts, file, subject=ROPE_APART)
    for file, *texts in (
        ("rope.cuh", "pairs are taken apart in one vector", "2 * e + 1 < N ? x[2 * e + 1]", "e < N ? x[e]", WRONG),
        ("rope.cuh", "odd elements are even ones", "y[e] = odd[e]", "y[e] = x[e]", WRONG),
        ("mla_rope.cuh", "pairs stay together", "if constexpr (DEINTERLEAVE) dei", "if (false) dei", WRONG),
        ("mla_rope.cuh", "what is read is half a row apart", "DEINTERLEAVE ? SIZE : HALF", "HALF", OFF),
        ("mla_rope.cuh", "vectors are read in their place", "DEINTERLEAVE ? 2 * at : at", "at", WRONG),
        ("mla_rope.cuh", "angles are pairs of vectors'", "(OF_TWO ? at : at / 2)", "at / 2", WRONG),
        (
            "mla_rope.cuh",
            "halves of k_pe are cached as neighbours",
            "unit.at + HALF, rows[u]",
            "unit.at + SIZE, rows[u]",
            OFF,
        ),
    )
]


# ---- fp8_group_quant, mla_dual_rms_norm_quant -----------------------------------------------------------------------

# 7 tokens of 3 groups end inside a block; columns of scales have a gap between them.
UNIT = "Units::run(x[u], given"
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
MUTATIONS += [
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

MUTATIONS += [
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


# ---- mla_q_absorb_rope_kv_cache -------------------------------------------------------------------------------------

# A second tile of tokens is not full; two blocks share a head's columns.
ABSORB = Subject(
    Problem.parse(
        "mla_q_absorb_rope_kv_cache(dtype=bf16,heads=2,nope_dim=128,rope_dim=16,latent_dim=64,neox=0,table=bf16,cache=auto,"
        "qk_nope_dim=64,w_constant=1)"
    ),
    Config.parse(
        "STAGED=1,THREADS=128,W_COLUMNS=64,TOKENS=16,EARLY=1,PDL=1,PREFETCH=1,GUESS=0,UNROLL=1,VEC_BYTES=16,CHUNK=64,"
        "READ_ONCE=0"
    ),
    tokens=70,
)
ABSORB_DIRECT = Subject(ABSORB.problem, {**ABSORB.config, "STAGED": 0, "THREADS": 64, "TOKENS": 32}, tokens=37)
MUTATIONS += [
    Mutation(*texts, "mla_q_absorb_rope_kv_cache.cu", subject=ABSORB)
    for texts in (
        ("copies of other threads are not waited for", "    __syncthreads();\n", "", RACE),
        ("copies are not waited for", "wait_for_copies<0>", "wait_for_copies<8>", WRONG),
        ("rows past the end are copied", "if (row < rows)\n", "if (true)\n", OFF),
        ("rows past the end are written", "if (token < at.tokens)\n", "if (true)\n", f"{OFF}|{OVERLAP}"),
        (
            "blocks have the same columns",
            "column(int(block % SHARERS) * BLOCK_COLUMNS)",
            "column(0)",
            f"{OVERLAP}|{UNWRITTEN}",
        ),
        ("w_uk's rows are dense", "at.weights(p) + row * p.w_row + piece", "at.weights(p) + row * NOPE + piece", OFF),
        (
            "q_nope is read early as well",
            "if (EARLY) copy_w",
            "if (EARLY) copy_queries(at.queries(p.rope), p.rope.q_nope_token, 1, x_tiles), copy_w",
            "before waiting",
        ),
        (
            "the columns lie where rotated ones do",
            "* Q_ROW + at.column",
            "* Q_ROW + ROPE + at.column",
            f"{OVERLAP}|{UNWRITTEN}",
        ),
        (
            "one block too few multiplies",
            "(p.rope.tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS",
            "p.rope.tokens / BLOCK_TOKENS",
            f"{UNWRITTEN}|{OFF}|{OVERLAP}",
        ),
    )
]
MUTATIONS += [
    Mutation(*texts, "mla_q_absorb_rope_kv_cache.cu", subject=ABSORB_DIRECT)
    for texts in (
        ("rows past the end are read", "= Product::row(i) < count;", "= true;", OFF),
        ("rows past the end are written", "if (token >= at.tokens) continue;", "", f"{OFF}|{OVERLAP}"),
        ("the second tile is the first", "        x += TILE * row;\n", "", WRONG),
        ("warps have the same columns", "warp_uniform(threadIdx.x / WARP_SIZE) * Product::COLUMNS;", "0;", UNWRITTEN),
    )
]


# ---- mla_v_up_quant -------------------------------------------------------------------------------------------------

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
MUTATIONS += [
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


# ---- Another kernel: a Subject of its own, and MUTATIONS += [Mutation(…, subject=THAT), …], here. --------------------


Launch = tuple[Problem, Config, int, int]  # and the warp size, and T


def launch(mutation: Mutation) -> Launch:
    subject = mutation.subject
    return subject.problem, Config.of(subject.config, **mutation.config), mutation.warp_size, subject.tokens


def run(launch: Launch, edits: tuple[tuple[str, str, str], ...] = ()) -> None:
    problem, config, warp_size, tokens = launch
    op = get_op(problem.op)
    args = op.check_args(problem, tokens, torch.device("cpu"), torch.Generator().manual_seed(0))
    verify(op, problem, config, args, warp_size=warp_size, edits=edits)


def run_mutation(mutation: Mutation) -> None:
    run(launch(mutation), ((mutation.file, mutation.old, mutation.new),))


@pytest.fixture(scope="module")
def mutated(request: pytest.FixtureRequest) -> Iterator[dict[Mutation, Future[None]]]:
    with run_ahead(run_mutation, wanted(request, "mutation")) as outcomes:
        yield outcomes


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: re.sub(r"\W+", "-", mutation.name))
def test_is_caught(mutation: Mutation, mutated: dict[Mutation, Future[None]]) -> None:
    with pytest.raises(EmulationError, match=mutation.caught):
        mutated[mutation].result()


@pytest.mark.parametrize("launch", dict.fromkeys(map(launch, MUTATIONS)), ids=str)
def test_the_kernel_itself_passes(launch: Launch) -> None:
    run(launch)
