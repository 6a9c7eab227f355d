"""A kernel that only converts to fp8."""

import triton
import triton.language as tl

from autofuse.kernels_src.fp8 import to_fp8


@triton.jit
def store_fp8(x_ptr, out_ptr, count, BLOCK: tl.constexpr, FP8_NATIVE: tl.constexpr):  # noqa: N803
    columns = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + columns, columns < count, other=0.0)
    tl.store(out_ptr + columns, to_fp8(x, FP8_NATIVE), columns < count)
