"""RoPE (Su et al. 2021, "RoFormer") of tiles of rows, for kernels in Triton: each pair (x, y) of elements becomes

    (x · cos - y · sin, y · cos + x · sin)

NeoX pairs element i with i + HALF, GPT-J even with odd neighbours. A row of the rotary table holds HALF cosines, then
HALF sines (vLLM's cos_sin_cache). A tile has HALF_BLOCK columns of pairs, a power of two, of which HALF exist.
"""

import triton
import triton.language as tl


@triton.jit
def load_pairs(row, exists, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, NEOX: tl.constexpr, READ_ONCE: tl.constexpr):
    """x and y of each row, as they are stored. ``row``, ``exists``: [rows, 1], addresses and which count."""
    policy: tl.constexpr = "evict_first" if READ_ONCE else ""
    if NEOX:
        pairs = tl.arange(0, HALF_BLOCK)[None, :]
        inside = exists & (pairs < HALF)
        x = tl.load(row + pairs, inside, other=0.0, eviction_policy=policy)
        y = tl.load(row + HALF + pairs, inside, other=0.0, eviction_policy=policy)
    else:
        columns = tl.arange(0, 2 * HALF_BLOCK)[None, :]
        both = tl.load(row + columns, exists & (columns < 2 * HALF), other=0.0, eviction_policy=policy)
        x, y = tl.split(tl.reshape(both, (both.shape[0], HALF_BLOCK, 2)))
    return x, y


@triton.jit
def rotate_pairs(x, y, table_row, exists, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr):
    """Rotates, and rounds to the dtype of x. ``table_row``: [rows, 1], where each row's cosines begin."""
    pairs = tl.arange(0, HALF_BLOCK)[None, :]
    inside = exists & (pairs < HALF)
    cos = tl.load(table_row + pairs, inside, other=0.0).to(tl.float32)
    sin = tl.load(table_row + HALF + pairs, inside, other=0.0).to(tl.float32)
    dtype = x.dtype
    x, y = x.to(tl.float32), y.to(tl.float32)
    return (x * cos - y * sin).to(dtype), (y * cos + x * sin).to(dtype)


@triton.jit
def store_pairs(row, exists, x, y, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, IN_HALVES: tl.constexpr):
    """IN_HALVES: all x, then all y (NeoX, or what was de-interleaved); else they are neighbours."""
    if IN_HALVES:
        pairs = tl.arange(0, HALF_BLOCK)[None, :]
        inside = exists & (pairs < HALF)
        tl.store(row + pairs, x, inside)
        tl.store(row + HALF + pairs, y, inside)
    else:
        columns = tl.arange(0, 2 * HALF_BLOCK)[None, :]
        both = tl.reshape(tl.join(x, y), (x.shape[0], 2 * HALF_BLOCK))
        tl.store(row + columns, both, exists & (columns < 2 * HALF))


@triton.jit
def counted_slots(slots, blocks, block_size, from_end):
    """Slots (int64) as they were given, or, with ``from_end``, the negative ones counted from the cache's end."""
    return tl.where((slots < 0) & (from_end != 0), slots + blocks.to(tl.int64) * block_size, slots)


@triton.jit
def cache_rows(slots, blocks, block_size, block_stride, row_stride):
    """Where the rows of slots (int64) begin in a paged cache, in elements, and which of them there are."""
    count = blocks.to(tl.int64) * block_size
    exists = (slots >= 0) & (slots < count)
    slots = tl.where(exists, slots, 0)
    if block_stride == block_size * row_stride:
        offsets = slots * row_stride  # no need to wait for a division
    elif count < 0x7FFFFFFF:
        block = (slots.to(tl.uint32) // block_size.to(tl.uint32)).to(tl.int64)
        offsets = block * block_stride + (slots - block * block_size) * row_stride
    else:
        block = slots // block_size
        offsets = block * block_stride + (slots - block * block_size) * row_stride
    return offsets, exists
