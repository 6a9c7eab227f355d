"""What kernels in Triton share that quantise their result. The formats are defined in autofuse/ops/quant.py; here is
their arithmetic, bit for bit.

Constants of the problem: as in quant.cuh, WIDTH (of a row), and COLUMNS of a tile: a multiple of GROUP, a power of two.
"""

import triton
import triton.language as tl

from .fp8 import to_fp8


@triton.jit
def e2m1_codes(values):
    """e2m1 (OCP "Microscaling Formats", 5.3.3): 0, 0.5, 1, 1.5, 2, 3, 4, 6, and a sign, as int32. Nearest, ties to an
    even code, saturated; NaN is 6.
    """
    size = tl.abs(values)
    code = (size > 0.25).to(tl.int32) + (size >= 0.75).to(tl.int32) + (size > 1.25).to(tl.int32)
    code += (size >= 1.75).to(tl.int32) + (size > 2.5).to(tl.int32) + (size >= 3.5).to(tl.int32)
    code += (size > 5.0).to(tl.int32)
    sign = (values.to(tl.int32, bitcast=True) >> 28) & 8
    return tl.where(values == values, code | sign, 7)


@triton.jit
def e4m3_value(code):
    """What the bytes of fp8 numbers that are not negative stand for, as fp32."""
    code = code.to(tl.int32)
    normal = ((code << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    return tl.where(code < 8, code.to(tl.float32) * 0.001953125, tl.where(code == 0x7F, float("nan"), normal))


@triton.jit
def scale_index(token, group, tokens, GROUPS: tl.constexpr, SCALE_LAYOUT: tl.constexpr):
    """Where the scale of a group is, of GROUPS in a row."""
    if SCALE_LAYOUT == 0:
        index = token * GROUPS + group
    elif SCALE_LAYOUT == 1:
        index = group.to(tl.int64) * tokens + token
    else:
        index = group.to(tl.int64) * ((tokens.to(tl.int64) + 3) // 4 * 4) + token
    return index


@triton.jit
def swizzled_index(token, group, GROUPS: tl.constexpr):
    """In tiles of 128 tokens × 4 groups, tokens 32 apart side by side (NVFP4)."""
    tile = token // 128 * ((GROUPS + 3) // 4) + group // 4
    row = token % 128
    return tile * 512 + row % 32 * 16 + row // 32 * 4 + group % 4


@triton.jit
def zero_padded_scales(scales_ptr, tokens, GROUPS: tl.constexpr):
    """The scales of padded rows, from tokens to the next multiple of 128, become zeros: a part by each block."""
    columns: tl.constexpr = (GROUPS + 3) // 4 * 4
    step: tl.constexpr = 512
    end = (-tokens & 127) * columns
    first = tl.program_id(0) * step
    while first < end:
        at = first + tl.arange(0, step)
        token = (tokens + at // columns).to(tl.int64)
        tl.store(scales_ptr + swizzled_index(token, at % columns, GROUPS), tl.zeros((step,), tl.uint8), at < end)
        first += tl.num_programs(0) * step


@triton.jit
def quantise(
    x,
    token,
    first,
    exists,
    scale_ptr,
    values_ptr,
    scales_ptr,
    tokens,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    UE8M0: tl.constexpr,
    SCALE_LAYOUT: tl.constexpr,
    FP8_NATIVE: tl.constexpr,
):
    """Writes the values and the scales of a tile.

    ``x``: [rows, COLUMNS], of the model's dtype, zeros where there is nothing. ``token`` (int64), ``first`` (the column
    that a tile's row begins with), ``exists``: [rows, 1].
    """
    rows: tl.constexpr = x.shape[0]
    columns = first + tl.arange(0, COLUMNS)[None, :]
    x = x.to(tl.float32)
    if GROUP == 0:
        codes = to_fp8(x * tl.div_rn(1.0, tl.load(scale_ptr)), FP8_NATIVE)
        tl.store(values_ptr + token * WIDTH + columns, codes, exists & (columns < WIDTH))
    else:
        GROUPS: tl.constexpr = WIDTH // GROUP
        in_tile: tl.constexpr = COLUMNS // GROUP
        group = first // GROUP + tl.arange(0, in_tile)[None, :]
        grouped = tl.reshape(x, (rows, in_tile, GROUP))
        # On bits: magnitudes compare as integers, and a NaN is larger than all else.
        largest = tl.max(grouped.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=2)
        if GROUP == 16:
            given = tl.load(scale_ptr)
            amax = largest.to(tl.float32, bitcast=True)
            # Not by the compiler's conversion: for bytes of it that are both computed with and stored, ptxas 12.8 (of
            # Triton 3.6) makes code for sm_90 that stores what was in a register before.
            scale = to_fp8(given * (amax * (1.0 / 6.0)), False)
            rounded = e4m3_value(scale)
            factor = tl.where(rounded == 0.0, 0.0, tl.div_rn(1.0, rounded * tl.div_rn(1.0, given)))
            codes = tl.reshape(e2m1_codes(grouped * factor[:, :, None]), (rows, COLUMNS // 2, 2))
            low, high = tl.split(codes)
            pairs = first // 2 + tl.arange(0, COLUMNS // 2)[None, :]
            packed = (low | (high << 4)).to(tl.uint8)
            tl.store(values_ptr + token * (WIDTH // 2) + pairs, packed, exists & (pairs < WIDTH // 2))
            # Columns that are padded belong to the row, and are zero.
            shown = tl.where(group < GROUPS, scale, 0).to(tl.uint8)
            inside = exists & (group < (GROUPS + 3) // 4 * 4)
            tl.store(scales_ptr + swizzled_index(token, group, GROUPS), shown, inside)
        else:
            amax = tl.maximum(largest, 0x2EDBE6FF).to(tl.float32, bitcast=True)  # 1e-10
            scale = tl.div_rn(amax, 448.0)
            if UE8M0:
                up = ((scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
                scale = tl.where(scale < float("inf"), up, scale)
            codes = tl.reshape(to_fp8(tl.div_rn(grouped, scale[:, :, None]), FP8_NATIVE), (rows, COLUMNS))
            tl.store(values_ptr + token * WIDTH + columns, codes, exists & (columns < WIDTH))
            at = scale_index(token, group, tokens, GROUPS, SCALE_LAYOUT)
            tl.store(scales_ptr + at, scale, exists & (group < GROUPS))
