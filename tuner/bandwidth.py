"""What a device's memory can do, which no kernel that is bound by it can beat."""

from __future__ import annotations

import time

import torch

__all__ = ["bandwidth"]

_GPU_BYTES = 1 << 30
_CPU_BYTES = 64 << 20
_MEMORY_SHARE = 0.2  # of what is free on a GPU, at most, for each of the two tensors
_ROUNDS = 5


def bandwidth(device: torch.device) -> float:
    """Bytes per µs, read plus written, of an elementwise kernel over tensors that no cache holds: its best call."""
    size = _CPU_BYTES
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        size = max(min(_GPU_BYTES, int(free * _MEMORY_SHARE)), 1 << 20)
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    torch.neg(source, out=target)
    found = 2 * source.nbytes / min(_call_us(source, target) for _ in range(_ROUNDS))
    del source, target
    if device.type == "cuda":
        torch.cuda.empty_cache()  # or the next bucket's inputs have as much less
    return found


def _call_us(source: torch.Tensor, target: torch.Tensor) -> float:
    if source.device.type != "cuda":
        begin = time.perf_counter()
        torch.neg(source, out=target)
        return (time.perf_counter() - begin) * 1e6
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.device(source.device):
        first.record()
        torch.neg(source, out=target)
        last.record()
        last.synchronize()
    return first.elapsed_time(last) * 1e3
