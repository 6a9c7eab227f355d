"""mla_rope_kv_cache_cat in Triton: rotates q_pe and k_pe, writes (kv_c, k_pe) into the paged latent cache, and lays
q_nope and the rotated q_pe side by side, in one launch.

First come the blocks that write the cache, KV_ROWS tokens each: they need slots and scales, and so take longest. Then
those of the query, Q_ROWS rows (a head of a token each). Every byte crosses memory once, but for the rotary table.

Arguments: as RopeParams in mla_rope.cuh. Constants of the problem: as there, and
  NOPE_BLOCK, HALF_BLOCK, LATENT_BLOCK   powers of two that hold NOPE, ROPE / 2 and LATENT columns
  IN_HALVES                              NEOX or DEINTERLEAVE: rotated pairs are written half a row apart
Tunables:
  Q_ROWS, KV_ROWS  rows of a block: more loads in flight, fewer blocks
  READ_ONCE, PDL, NUM_WARPS, VEC_BYTES   as in mla_dual_rms_norm.py
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .fp8 import as_stored, to_fp8
from .rope import cache_rows, counted_slots, load_pairs, rotate_pairs, store_pairs

# Rows of fp8_ds_mla, in bytes: 512 fp8 values of kv_c, an fp32 scale of each group of them, k_pe.
DS_MLA_GROUP: tl.constexpr = tl.constexpr(128)
DS_MLA_SCALES: tl.constexpr = tl.constexpr(512)
DS_MLA_K_PE: tl.constexpr = tl.constexpr(528)
SMALLEST_NORMAL: tl.constexpr = tl.constexpr(2.0**-126)


@triton.jit
def write_latents(
    kv_c,
    row,
    exists,
    scale,
    LATENT: tl.constexpr,
    LATENT_BLOCK: tl.constexpr,
    CACHE: tl.constexpr,
    FP8_NATIVE: tl.constexpr,
):
    """``row``, ``exists``: [rows, 1], where the cache's rows begin and which there are. ``scale``: of CACHE 2."""
    columns = tl.arange(0, LATENT_BLOCK)[None, :]
    inside = exists & (columns < LATENT)
    if CACHE == 3:
        rows: tl.constexpr = kv_c.shape[0]
        groups: tl.constexpr = LATENT_BLOCK // DS_MLA_GROUP
        values = tl.reshape(kv_c.to(tl.float32), (rows, groups, DS_MLA_GROUP))
        scales = tl.maximum(tl.div_rn(tl.max(tl.abs(values), axis=2), 448.0), SMALLEST_NORMAL)
        codes = to_fp8(tl.div_rn(values, scales[:, :, None]), FP8_NATIVE)
        tl.store(row + columns, tl.reshape(codes, (rows, LATENT_BLOCK)), inside)
        scale_at = (row + DS_MLA_SCALES).to(tl.pointer_type(tl.float32), bitcast=True)
        tl.store(scale_at + tl.arange(0, groups)[None, :], scales, exists)
    else:
        tl.store(row + columns, as_stored(kv_c, scale, CACHE == 2, FP8_NATIVE), inside)


@triton.jit
def write_cache(
    first,
    kv_c_ptr,
    k_pe_ptr,
    positions_ptr,
    table_ptr,
    slots_ptr,
    kv_scale_ptr,
    k_pe_out_ptr,
    kv_c_token,
    k_pe_token,
    table_row,
    kv_cache_ptr,
    kv_cache_block,
    kv_cache_row,
    kv_cache_blocks,
    kv_cache_block_size,
    k_pe_cache_ptr,
    k_pe_cache_block,
    k_pe_cache_row,
    k_pe_cache_blocks,
    k_pe_cache_block_size,
    tokens,
    slot_count,
    slots_from_end,
    ROPE: tl.constexpr,
    LATENT: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    LATENT_BLOCK: tl.constexpr,
    NEOX: tl.constexpr,
    IN_HALVES: tl.constexpr,
    CACHE: tl.constexpr,
    APART: tl.constexpr,
    FP8_NATIVE: tl.constexpr,
    KV_ROWS: tl.constexpr,
    READ_ONCE: tl.constexpr,
    PDL: tl.constexpr,
):
    """The tokens from ``first`` on: k_pe rotated, and the rows of the cache."""
    HALF: tl.constexpr = ROPE // 2
    token = (first + tl.arange(0, KV_ROWS)).to(tl.int64)[:, None]
    exists = token < tokens
    position = tl.load(positions_ptr + token, exists, other=0)
    x, y = load_pairs(k_pe_ptr + token * k_pe_token, exists, HALF, HALF_BLOCK, NEOX, READ_ONCE)
    if CACHE:
        has_slot = exists & (token < slot_count)
        slot = tl.load(slots_ptr + token, has_slot, other=0)
        columns = tl.arange(0, LATENT_BLOCK)[None, :]
        kv_c = tl.load(
            kv_c_ptr + token * kv_c_token + columns,
            exists & (columns < LATENT),
            other=0.0,
            eviction_policy="evict_first" if READ_ONCE else "",
        )
        scale = tl.load(kv_scale_ptr) if CACHE == 2 else 1.0
    if PDL == 2:
        gdc_launch_dependents()
    x, y = rotate_pairs(x, y, table_ptr + position * table_row, exists, HALF, HALF_BLOCK)
    store_pairs(k_pe_out_ptr + token * ROPE, exists, x, y, HALF, HALF_BLOCK, IN_HALVES)
    if CACHE:
        slot = counted_slots(slot, kv_cache_blocks, kv_cache_block_size, slots_from_end)
        offset, there = cache_rows(slot, kv_cache_blocks, kv_cache_block_size, kv_cache_block, kv_cache_row)
        row, written = kv_cache_ptr + offset, has_slot & there
        write_latents(kv_c, row, written, scale, LATENT, LATENT_BLOCK, CACHE, FP8_NATIVE)
        if APART:
            offset, there = cache_rows(slot, k_pe_cache_blocks, k_pe_cache_block_size, k_pe_cache_block, k_pe_cache_row)
            key, written = k_pe_cache_ptr + offset, has_slot & there
        elif CACHE == 3:
            key = (row + DS_MLA_K_PE).to(k_pe_ptr.dtype, bitcast=True)
        else:
            key = row + LATENT
        x, y = as_stored(x, scale, CACHE == 2, FP8_NATIVE), as_stored(y, scale, CACHE == 2, FP8_NATIVE)
        store_pairs(key, written, x, y, HALF, HALF_BLOCK, IN_HALVES)


@triton.jit
def write_query(
    first,
    q_nope_ptr,
    q_pe_ptr,
    positions_ptr,
    table_ptr,
    q_scale_ptr,
    q_out_ptr,
    q_nope_token,
    q_nope_head,
    q_pe_token,
    q_pe_head,
    table_row,
    tokens,
    HEADS: tl.constexpr,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    NOPE_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    NEOX: tl.constexpr,
    IN_HALVES: tl.constexpr,
    Q_FP8: tl.constexpr,
    FP8_NATIVE: tl.constexpr,
    Q_ROWS: tl.constexpr,
    READ_ONCE: tl.constexpr,
    PDL: tl.constexpr,
):
    """The query's rows from ``first`` (int64) on."""
    HALF: tl.constexpr = ROPE // 2
    row = first + tl.arange(0, Q_ROWS)[:, None]
    token = row // HEADS
    head = row - token * HEADS
    exists = token < tokens
    position = tl.load(positions_ptr + token, exists, other=0)
    q_pe = q_pe_ptr + token * q_pe_token + head * q_pe_head
    x, y = load_pairs(q_pe, exists, HALF, HALF_BLOCK, NEOX, READ_ONCE)
    scale = tl.load(q_scale_ptr) if Q_FP8 else 1.0
    out = q_out_ptr + row * (NOPE + ROPE)
    if NOPE:
        columns = tl.arange(0, NOPE_BLOCK)[None, :]
        inside = exists & (columns < NOPE)
        q_nope = q_nope_ptr + token * q_nope_token + head * q_nope_head + columns
        q_nope = tl.load(q_nope, inside, eviction_policy="evict_first" if READ_ONCE else "")
    if PDL == 2:
        gdc_launch_dependents()
    if NOPE:
        tl.store(out + columns, as_stored(q_nope, scale, Q_FP8, FP8_NATIVE), inside)
    x, y = rotate_pairs(x, y, table_ptr + position * table_row, exists, HALF, HALF_BLOCK)
    x, y = as_stored(x, scale, Q_FP8, FP8_NATIVE), as_stored(y, scale, Q_FP8, FP8_NATIVE)
    store_pairs(out + NOPE, exists, x, y, HALF, HALF_BLOCK, IN_HALVES)


@triton.jit
def mla_rope_kv_cache_cat(
    q_nope_ptr,
    q_pe_ptr,
    kv_c_ptr,
    k_pe_ptr,
    positions_ptr,
    table_ptr,
    slots_ptr,
    kv_scale_ptr,
    q_scale_ptr,
    q_out_ptr,
    k_pe_out_ptr,
    q_nope_token,
    q_nope_head,
    q_pe_token,
    q_pe_head,
    kv_c_token,
    k_pe_token,
    table_row,
    kv_cache_ptr,
    kv_cache_block,
    kv_cache_row,
    kv_cache_blocks,
    kv_cache_block_size,
    k_pe_cache_ptr,
    k_pe_cache_block,
    k_pe_cache_row,
    k_pe_cache_blocks,
    k_pe_cache_block_size,
    tokens,
    slot_count,
    table_rows,
    slots_from_end,
    HEADS: tl.constexpr,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    LATENT: tl.constexpr,
    NOPE_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    LATENT_BLOCK: tl.constexpr,
    NEOX: tl.constexpr,
    IN_HALVES: tl.constexpr,
    CACHE: tl.constexpr,
    APART: tl.constexpr,
    Q_FP8: tl.constexpr,
    FP8_NATIVE: tl.constexpr,
    Q_ROWS: tl.constexpr,
    KV_ROWS: tl.constexpr,
    READ_ONCE: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL == 1:
        gdc_launch_dependents()
    if PDL > 0:
        gdc_wait()  # the kernel before may write whatever is read or written below
    block = tl.program_id(0)
    kv_blocks = tl.cdiv(tokens, KV_ROWS)
    if block < kv_blocks:
        write_cache(
            block * KV_ROWS, kv_c_ptr, k_pe_ptr, positions_ptr, table_ptr, slots_ptr, kv_scale_ptr, k_pe_out_ptr,
            kv_c_token, k_pe_token, table_row, kv_cache_ptr, kv_cache_block, kv_cache_row, kv_cache_blocks,
            kv_cache_block_size, k_pe_cache_ptr, k_pe_cache_block, k_pe_cache_row, k_pe_cache_blocks,
            k_pe_cache_block_size, tokens, slot_count, slots_from_end, ROPE, LATENT, HALF_BLOCK, LATENT_BLOCK, NEOX,
            IN_HALVES, CACHE, APART, FP8_NATIVE, KV_ROWS, READ_ONCE, PDL,
        )  # fmt: skip
    else:
        write_query(
            (block - kv_blocks).to(tl.int64) * Q_ROWS, q_nope_ptr, q_pe_ptr, positions_ptr, table_ptr, q_scale_ptr,
            q_out_ptr, q_nope_token, q_nope_head, q_pe_token, q_pe_head, table_row, tokens, HEADS, NOPE, ROPE,
            NOPE_BLOCK, HALF_BLOCK, NEOX, IN_HALVES, Q_FP8, FP8_NATIVE, Q_ROWS, READ_ONCE, PDL,
        )  # fmt: skip
