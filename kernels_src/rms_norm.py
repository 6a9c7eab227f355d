"""RMSNorm of tiles of rows, for kernels in Triton."""

import triton
import triton.language as tl


@triton.jit
def rms_normed(x, weight, eps, WIDTH: tl.constexpr, CAST_BEFORE_WEIGHT: tl.constexpr):
    """x · rsqrt(mean(x²) + eps) · weight in fp32, rounded to x's dtype; with CAST_BEFORE_WEIGHT also before weighing.

    ``x``: [rows, columns], whole rows of WIDTH elements, zeros behind. ``weight``: [1, columns].
    """
    dtype = x.dtype
    x = x.to(tl.float32)
    mean = tl.sum(x * x, axis=1, keep_dims=True) * (1.0 / WIDTH)
    normed = x * tl.rsqrt(mean + eps)
    if CAST_BEFORE_WEIGHT:
        normed = normed.to(dtype).to(tl.float32)
    return (normed * weight.to(tl.float32)).to(dtype)
