"""Mutations of mla_rope_kv_cache_cat."""

from __future__ import annotations

from autofuse.ops import Config, Problem
from mutations.mutation import OFF, OUTSIDE, STANDSTILL, WRONG, Mutation, Subject

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
NO_SLOT = "if (slot < 0 || slot >= i64(cache.blocks) * cache.block_size) return -1;"
SLOT = "unit.token < p.slot_count ? slot_of("
CLAMPED = "early[u] < 0 ? 0 : early[u] < p.table_rows ? int(early[u]) : p.table_rows - 1"

MUTATIONS = [
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
