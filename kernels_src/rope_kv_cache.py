"""rope_kv_cache in Triton: rotates q and k, and writes rotated k and v into the paged KV cache, in one launch; where
there are weights, an RMSNorm of each q and k head comes before the rotation.

First come the blocks that write the cache, KV_ROWS rows each (a head of k and of v, of a token), then those of q,
Q_ROWS rows each. Every byte crosses memory once, but for the rotary table.

Arguments: as Params in rope_kv_cache.cu. Constants of the problem: as there, and
  HALF_BLOCK, REST_BLOCK, HEAD_BLOCK   powers of two that hold ROPE / 2, HEAD_DIM - ROPE and HEAD_DIM columns
  IN_HALVES                            NEOX or DEINTERLEAVE: rotated pairs are written half of ROPE apart
Tunables:
  Q_ROWS, KV_ROWS  rows of a block: more loads in flight, fewer blocks
  READ_ONCE, PDL, NUM_WARPS, VEC_BYTES   as in mla_dual_rms_norm.py
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .fp8 import as_stored
from .rope import cache_rows, counted_slots, load_pairs, rotate_pairs, store_pairs


@triton.jit
def weighed(x, weight, inverse_rms):
    """RMSNorm with the roundings of Hugging Face and vLLM: of the normed value, and of its product with the weight."""
    normed = (x.to(tl.float32) * inverse_rms).to(x.dtype)
    return (normed.to(tl.float32) * weight.to(tl.float32)).to(x.dtype)


@triton.jit
def normed_head(
    x,
    y,
    rest,
    weight_ptr,
    eps,
    HEAD_DIM: tl.constexpr,
    ROPE: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    NEOX: tl.constexpr,
):
    """Heads as ``load_pairs`` gives them and, where ROPE is less than HEAD_DIM, what lies behind."""
    one = tl.zeros((1, 1), tl.int32)
    weight_x, weight_y = load_pairs(weight_ptr + one, one == 0, ROPE // 2, HALF_BLOCK, NEOX, 0)
    squares = tl.sum(x.to(tl.float32) * x.to(tl.float32) + y.to(tl.float32) * y.to(tl.float32), 1, keep_dims=True)
    if ROPE < HEAD_DIM:
        squares += tl.sum(rest.to(tl.float32) * rest.to(tl.float32), 1, keep_dims=True)
    inverse_rms = tl.rsqrt(squares * (1.0 / HEAD_DIM) + eps)
    if ROPE < HEAD_DIM:
        columns = tl.arange(0, REST_BLOCK)[None, :]
        weight = tl.load(weight_ptr + ROPE + columns, columns < HEAD_DIM - ROPE, other=0.0)
        rest = weighed(rest, weight, inverse_rms)
    return weighed(x, weight_x, inverse_rms), weighed(y, weight_y, inverse_rms), rest


@triton.jit
def load_rest(
    row, exists, HEAD_DIM: tl.constexpr, ROPE: tl.constexpr, REST_BLOCK: tl.constexpr, READ_ONCE: tl.constexpr
):
    """What is not rotated of each row."""
    columns = tl.arange(0, REST_BLOCK)[None, :]
    inside = exists & (columns < HEAD_DIM - ROPE)
    return tl.load(row + ROPE + columns, inside, other=0.0, eviction_policy="evict_first" if READ_ONCE else "")


@triton.jit
def store_head(
    row,
    exists,
    x,
    y,
    rest,
    scale,
    FP8: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROPE: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    IN_HALVES: tl.constexpr,
    FP8_NATIVE: tl.constexpr,
):
    x, y = as_stored(x, scale, FP8, FP8_NATIVE), as_stored(y, scale, FP8, FP8_NATIVE)
    store_pairs(row, exists, x, y, ROPE // 2, HALF_BLOCK, IN_HALVES)
    if ROPE < HEAD_DIM:
        columns = tl.arange(0, REST_BLOCK)[None, :]
        inside = exists & (columns < HEAD_DIM - ROPE)
        tl.store(row + ROPE + columns, as_stored(rest, scale, FP8, FP8_NATIVE), inside)


@triton.jit
def write_query(
    first,
    q_ptr,
    positions_ptr,
    table_ptr,
    q_weight_ptr,
    q_scale_ptr,
    q_out_ptr,
    q_token,
    q_head,
    table_row,
    tokens,
    eps,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROPE: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    NEOX: tl.constexpr,
    IN_HALVES: tl.constexpr,
    QK_NORM: tl.constexpr,
    Q_FP8: tl.constexpr,
    FP8_NATIVE: tl.constexpr,
    Q_ROWS: tl.constexpr,
    READ_ONCE: tl.constexpr,
    PDL: tl.constexpr,
):
    """The heads of q from ``first`` (int64) on, counted through all tokens."""
    row = first + tl.arange(0, Q_ROWS)[:, None]
    token = row // HEADS
    exists = token < tokens
    position = tl.load(positions_ptr + token, exists, other=0)
    q = q_ptr + token * q_token + (row - token * HEADS) * q_head
    x, y = load_pairs(q, exists, ROPE // 2, HALF_BLOCK, NEOX, READ_ONCE)
    if ROPE < HEAD_DIM:
        rest = load_rest(q, exists, HEAD_DIM, ROPE, REST_BLOCK, READ_ONCE)
    else:
        rest = x
    scale = tl.load(q_scale_ptr) if Q_FP8 else 1.0
    if PDL == 2:
        gdc_launch_dependents()
    if QK_NORM:
        x, y, rest = normed_head(x, y, rest, q_weight_ptr, eps, HEAD_DIM, ROPE, HALF_BLOCK, REST_BLOCK, NEOX)
    x, y = rotate_pairs(x, y, table_ptr + position * table_row, exists, ROPE // 2, HALF_BLOCK)
    store_head(
        q_out_ptr + row * HEAD_DIM, exists, x, y, rest, scale, Q_FP8,
        HEAD_DIM, ROPE, HALF_BLOCK, REST_BLOCK, IN_HALVES, FP8_NATIVE,
    )  # fmt: skip


@triton.jit
def write_cache(
    first,
    k_ptr,
    v_ptr,
    positions_ptr,
    table_ptr,
    slots_ptr,
    k_weight_ptr,
    k_out_ptr,
    k_token,
    k_head,
    v_token,
    v_head,
    table_row,
    k_cache_ptr,
    k_scale_ptr,
    k_cache_block,
    k_cache_row,
    k_cache_head,
    k_cache_blocks,
    k_cache_block_size,
    v_cache_ptr,
    v_scale_ptr,
    v_cache_block,
    v_cache_row,
    v_cache_head,
    v_cache_blocks,
    v_cache_block_size,
    tokens,
    slot_count,
    eps,
    slots_from_end,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROPE: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    NEOX: tl.constexpr,
    IN_HALVES: tl.constexpr,
    CACHE: tl.constexpr,
    QK_NORM: tl.constexpr,
    RETURN_K: tl.constexpr,
    FP8_NATIVE: tl.constexpr,
    KV_ROWS: tl.constexpr,
    READ_ONCE: tl.constexpr,
    PDL: tl.constexpr,
):
    """The heads of k and v from ``first`` (int64) on, counted through all tokens."""
    row = first + tl.arange(0, KV_ROWS)[:, None]
    token = row // KV_HEADS
    head = row - token * KV_HEADS
    exists = token < tokens
    position = tl.load(positions_ptr + token, exists, other=0)
    k = k_ptr + token * k_token + head * k_head
    x, y = load_pairs(k, exists, ROPE // 2, HALF_BLOCK, NEOX, READ_ONCE)
    if ROPE < HEAD_DIM:
        rest = load_rest(k, exists, HEAD_DIM, ROPE, REST_BLOCK, READ_ONCE)
    else:
        rest = x
    k_scale, v_scale = 1.0, 1.0
    if CACHE:
        has_slot = exists & (token < slot_count)
        slot = tl.load(slots_ptr + token, has_slot, other=0)
        columns = tl.arange(0, HEAD_BLOCK)[None, :]
        v = tl.load(
            v_ptr + token * v_token + head * v_head + columns,
            exists & (columns < HEAD_DIM),
            other=0.0,
            eviction_policy="evict_first" if READ_ONCE else "",
        )
        if CACHE == 2:
            k_scale, v_scale = tl.load(k_scale_ptr), tl.load(v_scale_ptr)
        if CACHE == 3:
            k_scale, v_scale = tl.load(k_scale_ptr + head), tl.load(v_scale_ptr + head)
    if PDL == 2:
        gdc_launch_dependents()
    if QK_NORM:
        x, y, rest = normed_head(x, y, rest, k_weight_ptr, eps, HEAD_DIM, ROPE, HALF_BLOCK, REST_BLOCK, NEOX)
    x, y = rotate_pairs(x, y, table_ptr + position * table_row, exists, ROPE // 2, HALF_BLOCK)
    if RETURN_K:
        store_head(
            k_out_ptr + row * HEAD_DIM, exists, x, y, rest, 1.0, 0,
            HEAD_DIM, ROPE, HALF_BLOCK, REST_BLOCK, IN_HALVES, FP8_NATIVE,
        )  # fmt: skip
    if CACHE:
        slot = counted_slots(slot, k_cache_blocks, k_cache_block_size, slots_from_end)
        offset, there = cache_rows(slot, k_cache_blocks, k_cache_block_size, k_cache_block, k_cache_row)
        store_head(
            k_cache_ptr + offset + head * k_cache_head, has_slot & there, x, y, rest, k_scale, CACHE >= 2,
            HEAD_DIM, ROPE, HALF_BLOCK, REST_BLOCK, IN_HALVES, FP8_NATIVE,
        )  # fmt: skip
        offset, there = cache_rows(slot, v_cache_blocks, v_cache_block_size, v_cache_block, v_cache_row)
        # A slot means another row where blocks have another size. (Triton 3.9's interpreter refuses masks of scalars.)
        same_blocks = tl.zeros_like(slot) + v_cache_block_size == k_cache_block_size
        written = has_slot & there & same_blocks & (columns < HEAD_DIM)
        out = v_cache_ptr + offset + head * v_cache_head + columns
        tl.store(out, as_stored(v, v_scale, CACHE >= 2, FP8_NATIVE), written)


@triton.jit
def rope_kv_cache(
    q_ptr,
    k_ptr,
    v_ptr,
    positions_ptr,
    table_ptr,
    slots_ptr,
    q_weight_ptr,
    k_weight_ptr,
    q_scale_ptr,
    q_out_ptr,
    k_out_ptr,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    table_row,
    k_cache_ptr,
    k_scale_ptr,
    k_cache_block,
    k_cache_row,
    k_cache_head,
    k_cache_blocks,
    k_cache_block_size,
    v_cache_ptr,
    v_scale_ptr,
    v_cache_block,
    v_cache_row,
    v_cache_head,
    v_cache_blocks,
    v_cache_block_size,
    tokens,
    slot_count,
    table_rows,
    eps,
    slots_from_end,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROPE: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    NEOX: tl.constexpr,
    IN_HALVES: tl.constexpr,
    CACHE: tl.constexpr,
    QK_NORM: tl.constexpr,
    Q_FP8: tl.constexpr,
    RETURN_K: tl.constexpr,
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
    # As a 64-bit count of heads: there may be more than 32 bits count.
    kv_blocks = tl.cdiv(tokens.to(tl.int64) * KV_HEADS, KV_ROWS).to(tl.int32) if CACHE or RETURN_K else 0
    if block < kv_blocks:
        write_cache(
            block.to(tl.int64) * KV_ROWS, k_ptr, v_ptr, positions_ptr, table_ptr, slots_ptr, k_weight_ptr, k_out_ptr,
            k_token, k_head, v_token, v_head, table_row, k_cache_ptr, k_scale_ptr, k_cache_block, k_cache_row,
            k_cache_head, k_cache_blocks, k_cache_block_size, v_cache_ptr, v_scale_ptr, v_cache_block, v_cache_row,
            v_cache_head, v_cache_blocks, v_cache_block_size, tokens, slot_count, eps, slots_from_end, KV_HEADS,
            HEAD_DIM, ROPE, HALF_BLOCK, REST_BLOCK, HEAD_BLOCK, NEOX, IN_HALVES, CACHE, QK_NORM, RETURN_K,
            FP8_NATIVE, KV_ROWS, READ_ONCE, PDL,
        )  # fmt: skip
    else:
        write_query(
            (block - kv_blocks).to(tl.int64) * Q_ROWS, q_ptr, positions_ptr, table_ptr, q_weight_ptr, q_scale_ptr,
            q_out_ptr, q_token, q_head, table_row, tokens, eps, HEADS, HEAD_DIM, ROPE, HALF_BLOCK, REST_BLOCK, NEOX,
            IN_HALVES, QK_NORM, Q_FP8, FP8_NATIVE, Q_ROWS, READ_ONCE, PDL,
        )  # fmt: skip
