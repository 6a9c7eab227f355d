"""fp8_group_quant in Triton: quantises each group of consecutive elements of a row by its own scale, or all by a given
one; see autofuse/ops/quant.py for the formats. Where NORM is set, a row is normed first (RMSNorm), in the same launch.

A block takes ROWS tiles of COLUMNS consecutive elements: with NORM whole rows, padded to a power of two, else one group
(NVFP4: four; static FP8: as many elements). Every byte crosses memory once.

Arguments: as Params in fp8_group_quant.cu. Constants of the problem: as there, and COLUMNS.
Tunables:
  ROWS   tiles of a block: more loads in flight, fewer blocks
  READ_ONCE, PDL, NUM_WARPS   as in mla_dual_rms_norm.py
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .quant import quantise, zero_padded_scales
from .rms_norm import rms_normed


@triton.jit
def fp8_group_quant(
    x_ptr,
    scale_ptr,
    weight_ptr,
    values_ptr,
    scales_ptr,
    x_stride,
    tokens,
    eps,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    NORM: tl.constexpr,
    CAST_BEFORE_WEIGHT: tl.constexpr,
    GROUP: tl.constexpr,
    UE8M0: tl.constexpr,
    SCALE_LAYOUT: tl.constexpr,
    FP8_NATIVE: tl.constexpr,
    ROWS: tl.constexpr,
    READ_ONCE: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL == 1:
        gdc_launch_dependents()
    if PDL > 0:
        gdc_wait()  # the kernel before may write whatever is read or written below
    TILES: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS  # of a row
    tile = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    token = tile // TILES
    first = (tile - token * TILES).to(tl.int32) * COLUMNS
    exists = token < tokens
    columns = first + tl.arange(0, COLUMNS)[None, :]
    x = tl.load(
        x_ptr + token * x_stride + columns,
        exists & (columns < WIDTH),
        other=0.0,
        eviction_policy="evict_first" if READ_ONCE else "",
    )
    if NORM:
        row = tl.arange(0, COLUMNS)[None, :]
        weight = tl.load(weight_ptr + row, row < WIDTH, other=0.0)
    if PDL == 2:
        gdc_launch_dependents()
    if NORM:
        x = rms_normed(x, weight, eps, WIDTH, CAST_BEFORE_WEIGHT)
    quantise(
        x, token, first, exists, scale_ptr, values_ptr, scales_ptr, tokens,
        WIDTH, COLUMNS, GROUP, UE8M0, SCALE_LAYOUT, FP8_NATIVE,
    )  # fmt: skip
    if GROUP == 16:
        zero_padded_scales(scales_ptr, tokens, WIDTH // 16)
