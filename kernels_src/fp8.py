"""Values as fp8 e4m3 (OCP: 448 is the largest, no infinities), for kernels in Triton."""

import triton
import triton.language as tl


@triton.jit
def to_fp8(x, FP8_NATIVE: tl.constexpr):
    """The bytes of fp32 values: saturated, rounded to nearest even; NaN stays NaN. FP8_NATIVE: by the compiler's own
    conversion, which not every GPU has.
    """
    x = tl.clamp(x, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    if FP8_NATIVE:
        code = x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        bits = x.to(tl.uint32, bitcast=True)
        size = bits & 0x7FFFFFFF
        # 20 bits of the mantissa go, and 120 from the exponent's bias, which is 7 instead of 127.
        normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
        # Below 2**-6 codes are multiples of 2**-9: the unit in the last place of a number from 2**14 on.
        tiny = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
        number = tl.where(size < 0x3C800000, tiny, normal)
        number = tl.where(size > 0x7F800000, 0x7F, number)
        code = (number | ((bits >> 24) & 0x80)).to(tl.uint8)
    return code


@triton.jit
def as_stored(x, scale, FP8: tl.constexpr, FP8_NATIVE: tl.constexpr):
    """Values of a model's dtype as memory holds them: as they are, or as the fp8 of value ÷ scale."""
    if FP8:
        stored = to_fp8(tl.div_rn(x.to(tl.float32), scale), FP8_NATIVE)
    else:
        stored = x
    return stored
