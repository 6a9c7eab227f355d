"""mla_v_up_quant in Triton: each head's o_latent times its W_UV, quantised in the product's epilogue.

A block multiplies TOKENS tokens of a head by COLUMNS columns of W_UV, DEPTH rows of it at a time, in fp32; the sums are
rounded to the model's dtype and quantised while they are in registers. Blocks of the same columns lie side by side, so
that all but the first find W_UV in L2.

Arguments: as Params in mla_v_up_quant.cu. Constants of the problem: HEADS, LATENT, V_DIM, and those of quant.py.
Tunables:
  TOKENS       of a block: W_UV is loaded less often, against fewer blocks
  COLUMNS      of a block: o_latent is loaded less often, against fewer blocks; whole groups, and a part of V_DIM
  DEPTH        of a step: fewer steps, against shared memory
  NUM_STAGES   steps that are loaded ahead (Triton's option)
  PDL, NUM_WARPS   as in mla_dual_rms_norm.py; the next kernel starts (2) when the last step is loaded
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .quant import quantise, zero_padded_scales


@triton.jit
def mla_v_up_quant(
    x_ptr,
    w_ptr,
    scale_ptr,
    values_ptr,
    scales_ptr,
    x_token,
    x_head,
    w_head,
    w_row,
    tokens,
    HEADS: tl.constexpr,
    LATENT: tl.constexpr,
    V_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    UE8M0: tl.constexpr,
    SCALE_LAYOUT: tl.constexpr,
    FP8_NATIVE: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL == 1:
        gdc_launch_dependents()
    if PDL > 0:
        gdc_wait()  # the kernel before may write whatever is read or written below
    parts: tl.constexpr = V_DIM // COLUMNS
    token_blocks = tl.cdiv(tokens, TOKENS)
    number = tl.program_id(0) // token_blocks
    head, part = number // parts, number % parts
    token = ((tl.program_id(0) % token_blocks).to(tl.int64) * TOKENS + tl.arange(0, TOKENS))[:, None]
    exists = token < tokens
    depth = tl.arange(0, DEPTH)
    x_from = x_ptr + token * x_token + head * x_head + depth[None, :]
    w_from = w_ptr + head * w_head + depth[:, None] * w_row + (part * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    sums = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for _ in range(0, LATENT, DEPTH):
        sums = tl.dot(tl.load(x_from, exists, other=0.0), tl.load(w_from), sums)
        x_from += DEPTH
        w_from += DEPTH * w_row
    if PDL == 2:
        gdc_launch_dependents()
    quantise(
        sums.to(x_ptr.dtype.element_ty), token, head * V_DIM + part * COLUMNS, exists, scale_ptr, values_ptr,
        scales_ptr, tokens, HEADS * V_DIM, COLUMNS, GROUP, UE8M0, SCALE_LAYOUT, FP8_NATIVE,
    )  # fmt: skip
    if GROUP == 16:
        zero_padded_scales(scales_ptr, tokens, HEADS * V_DIM // 16)
