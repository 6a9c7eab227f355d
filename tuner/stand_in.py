"""What a kernel has before it in a model, for timing: a kernel that stands in for a matrix product.

A kernel is not as fast in a model as behind itself. Launched again and again, with programmatic dependent launch, it
loads what it needs while its predecessor still stores, and hides that not all of its blocks find room at once. Behind a
matrix product, whose blocks fill the multiprocessors and which lets it start late or not at all, it does neither. But
some products do let it start early; a norm of one token is then launched for next to nothing.

So two of three calls that are timed come behind a stand-in that takes the whole GPU, and the third behind the call
before it. What this was chosen by: 100 configs each of three ops at T = 1, 64 and 256, timed on an H200 in an MLA layer
and by themselves. In the layer, the fastest of those that were timed back to back took 0.5 µs more than the fastest
there (the mean of eight; at most 1.6), the fastest of those that were timed so 0.1 µs (at most 0.3).
"""

from __future__ import annotations

import torch

from autofuse.targets import KernelSpec, kind_of_arch, target_of, toolchain
from autofuse.tuner.budgets import Effort
from autofuse.tuner.measure import Beside, Ring, Runner, runner, time_alone

__all__ = ["BEHIND_STAND_INS", "StandIn", "spec_of", "stand_in"]

BEHIND_STAND_INS = "behind stand-ins"
"""Says of a time that it was taken so."""

_THREADS = 512  # whole blocks of which are all the threads that a multiprocessor of any GPU has
_STEPS = 32  # 1.6 µs on an H200, of which its launch is 1.1
_RESERVED = 1024  # bytes of shared memory, of each block, which the driver takes (on NVIDIA)
_OWN = 128  # and at most so many for the kernel's own variable
_CALLS = 64  # in a CUDA graph


class StandIn(Beside):
    """The kernel on one GPU. Calling it launches it on the current stream."""

    def __init__(self, device: torch.device, effort: Effort) -> None:
        target = target_of(device)
        chain = toolchain(target.kind)
        properties = torch.cuda.get_device_properties(device)
        each = max(properties.max_threads_per_multi_processor // _THREADS, 1)
        spec = spec_of(target.arch, each)
        self._kernel = chain.load(spec, chain.compile(spec, target.arch), device)
        self._blocks = properties.multi_processor_count * each
        self._device, self._effort = device, effort
        self._alone: Runner | None = None

    def __call__(self) -> None:
        self._kernel.launch(self._blocks, _STEPS)

    def calibrate(self) -> None:
        """Times it by itself, anew: how long it takes depends on the GPU's clock."""
        if self._alone is None:
            ring = Ring.of([()] * _CALLS, self._device)
            self._alone = runner(self, ring, self._device, self._effort, warm=False)
        self._alone.warm(self._effort.warmup_rounds)
        self.us = time_alone(self._alone, self._effort.trial_rounds).median_us


def spec_of(arch: str, blocks: int) -> KernelSpec:
    """The kernel, so many blocks of which fill a multiprocessor."""
    kind = kind_of_arch(arch)
    whole = (toolchain(kind).most_shared_bytes(arch) or 0) + _RESERVED  # a block may have nearly all of it
    return KernelSpec(
        "stand_in.cu",
        "stand_in",
        {"THREADS": _THREADS, **({"WARP_SIZE": 64} if kind == "hip" else {})},
        params_format="i",
        block=_THREADS,
        shared_bytes=max((whole // blocks - _RESERVED) // _OWN * _OWN - _OWN, 0),
        programmatic_launch=kind == "cuda",
    )


def stand_in(device: torch.device, effort: Effort) -> StandIn | None:
    """The device's, calibrated; None on a CPU, where a call begins after the one before it has ended."""
    if device.type == "cpu":
        return None
    made = StandIn(device, effort)
    made.calibrate()
    return made
