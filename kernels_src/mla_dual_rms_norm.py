"""mla_dual_rms_norm in Triton: two RMSNorms of each token in one launch, the q latent's and the kv latent's.

    out = x · rsqrt(mean(x²) + eps) · weight        per row, in fp32; see CAST_BEFORE_WEIGHT for the rounding

A block takes Q_ROWS consecutive tokens of q, or KV_ROWS of kv: first come the blocks of q, as the longer rows take
longer. A row stays in registers between the sum of squares and the scaling: every byte crosses memory once. A row is
padded with zeros to a power of two, which costs registers and no traffic.

Arguments: as Params in mla_dual_rms_norm.cu.
Constants of the problem: Q_WIDTH, KV_WIDTH, CAST_BEFORE_WEIGHT.
Tunables:
  Q_ROWS, KV_ROWS  tokens of a block: fewer, fuller blocks
  READ_ONCE        mark the activations as dead after reading
  PDL              programmatic dependent launch: this kernel starts while the one before it still runs, and lets the
                   one after it start 1: at once, or 2: when its own loads are on their way; 0: neither
  NUM_WARPS        of a block (Triton's option)
  VEC_BYTES        what rows and addresses are multiples of, up to which the compiler may widen loads (by the arguments'
                   divisors)
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .rms_norm import rms_normed


@triton.jit
def normed_rows(
    x_ptr,
    stride,
    weight_ptr,
    out_ptr,
    first,
    tokens,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    CAST_BEFORE_WEIGHT: tl.constexpr,
    READ_ONCE: tl.constexpr,
    PDL: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)[None, :]
    rows = first + tl.arange(0, ROWS)[:, None]
    # Constant where the width is a power of two: then nothing is masked along a row.
    inside = columns < WIDTH
    exists = (rows < tokens) & inside
    row = rows.to(tl.int64)
    x = tl.load(x_ptr + row * stride + columns, exists, other=0.0, eviction_policy="evict_first" if READ_ONCE else "")
    weight = tl.load(weight_ptr + columns, inside, other=0.0)
    if PDL == 2:
        gdc_launch_dependents()
    tl.store(out_ptr + row * WIDTH + columns, rms_normed(x, weight, eps, WIDTH, CAST_BEFORE_WEIGHT), exists)


@triton.jit
def mla_dual_rms_norm(
    q_ptr,
    q_weight_ptr,
    q_out_ptr,
    kv_ptr,
    kv_weight_ptr,
    kv_out_ptr,
    q_stride,
    kv_stride,
    tokens,
    q_eps,
    kv_eps,
    Q_WIDTH: tl.constexpr,
    KV_WIDTH: tl.constexpr,
    Q_BLOCK: tl.constexpr,
    KV_BLOCK: tl.constexpr,
    CAST_BEFORE_WEIGHT: tl.constexpr,
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
    q_blocks = tl.cdiv(tokens, Q_ROWS)
    if block < q_blocks:
        normed_rows(
            q_ptr, q_stride, q_weight_ptr, q_out_ptr, block * Q_ROWS, tokens, q_eps,
            Q_WIDTH, Q_BLOCK, Q_ROWS, CAST_BEFORE_WEIGHT, READ_ONCE, PDL,
        )  # fmt: skip
    else:
        normed_rows(
            kv_ptr, kv_stride, kv_weight_ptr, kv_out_ptr, (block - q_blocks) * KV_ROWS, tokens, kv_eps,
            KV_WIDTH, KV_BLOCK, KV_ROWS, CAST_BEFORE_WEIGHT, READ_ONCE, PDL,
        )  # fmt: skip
