"""Mutations of mla_q_absorb_rope_kv_cache."""

from __future__ import annotations

from autofuse.ops import Config, Problem
from mutations.mutation import OFF, OVERLAP, RACE, UNWRITTEN, WRONG, Mutation, Subject

# A second block's tokens are few; two blocks share a head's columns.
ABSORB = Subject(
    Problem.parse(
        "mla_q_absorb_rope_kv_cache(dtype=bf16,heads=2,nope_dim=128,rope_dim=16,latent_dim=64,neox=0,table=bf16,cache=auto,"
        "qk_nope_dim=64,w_constant=1)"
    ),
    Config.parse(
        "STAGED=1,THREADS=128,W_COLUMNS=64,TOKENS=64,EARLY=1,PDL=1,PREFETCH=1,GUESS=0,UNROLL=1,VEC_BYTES=16,CHUNK=64,"
        "READ_ONCE=0"
    ),
    tokens=70,
)
# A block has three rounds, of which the last one's tokens are few.
ABSORB_ROUNDS = Subject(ABSORB.problem, {**ABSORB.config, "TOKENS": 256}, tokens=134)
ABSORB_DIRECT = Subject(ABSORB.problem, {**ABSORB.config, "STAGED": 0, "THREADS": 64, "TOKENS": 32}, tokens=37)
MUTATIONS = [
    Mutation(*texts, "mla_q_absorb_rope_kv_cache.cu", subject=ABSORB)
    for texts in (
        ("copies of other threads are not waited for", "            __syncthreads();\n", "", RACE),
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
            "(p.rope.tokens + TOKENS - 1) / TOKENS",
            "p.rope.tokens / TOKENS",
            f"{UNWRITTEN}|{OFF}|{OVERLAP}",
        ),
    )
]
MUTATIONS += [
    Mutation(*texts, "mla_q_absorb_rope_kv_cache.cu", subject=ABSORB_ROUNDS)
    for texts in (
        ("the next round's rows take the present one's place", "BUFFERS = ROUNDS > 1 ? 2 : 1", "BUFFERS = 1", WRONG),
        ("copies of other threads are not waited for", "sync_team(1 + warpgroup, WARPGROUP);", "", RACE),
        (
            "all rounds have the first one's rows",
            "x_tiles + round % BUFFERS * X_TILES_BYTES, w_tiles",
            "x_tiles, w_tiles",
            WRONG,
        ),
        ("the last round is left out", "first >= at.tokens) break;", "first + 64 >= at.tokens) break;", UNWRITTEN),
        ("a round too many is copied", "if (row < rows)\n", "if (true)\n", OFF),
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
