"""What a kernel has before it in a model, for timing: a kernel that stands in for a matrix product.

A kernel is not as fast in a model as behind itself. Launched again and again, with programmatic dependent launch, it
loads what it needs while its predecessor still stores, and hides that not all of its blocks find room at once. Behind a
matrix product, whose blocks fill the multiprocessors and which lets it start late or not at all, it does neither. But
some products do let it start early; a norm of one token is then launched for next to nothing.

So two of three calls that are timed come behind a stand-in that takes the whole GPU, and the third behind the call
before it. docs/performance.md ("In a layer") says how much nearer to a layer's ranking that comes for kernels that
multiply, and that it is no better for norms.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace

import torch

from autofuse.cache_db import TIMED
from autofuse.cache_db.store import Provenance
from autofuse.targets import KernelSpec, kind_of_arch, target_of, toolchain
from autofuse.tuner.budgets import Effort
from autofuse.tuner.measure import Beside, Ring, Runner, runner, time_alone

__all__ = ["StandIn", "spec_of", "stand_in", "way_of_timing"]

_THREADS = 512  # whole blocks of which are all the threads that a multiprocessor of any GPU has
_STEPS = 32  # 1.6 µs on an H200, of which its launch is 1.1
_HOLDING = 2048  # 30 µs on an H200: the host takes less to launch a graph of some hundred kernels
_RESERVED = 1024  # bytes of shared memory, of each block, which NVIDIA's driver takes; elsewhere they stay free
_OWN = 128  # and at most so many for the kernel's own variable
_CALLS = 64  # in a CUDA graph
_ROUND_US = 500.0
_HOLDS_S = 2.0  # how long a calibration does: clocks follow the load
_WARMING_S = 0.1  # until the clock of an idle GPU is up


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
        self._device, self._effort = device, replace(effort, round_us=_ROUND_US)
        self._alone: Runner | None = None
        self._calibrated = -math.inf

    def __call__(self) -> None:
        self._kernel.launch(self._blocks, _STEPS)

    def hold(self) -> None:
        """Without it, rounds of 50 to 200 µs look 0.6 to 5 % longer, and spread 1.3 to 2.4 times as wide (an H200)."""
        self._kernel.launch(self._blocks, _HOLDING)

    def calibrate(self) -> None:
        """Times it by itself, unless that was done just now: how long it takes depends on the GPU's clock."""
        if time.monotonic() - self._calibrated < _HOLDS_S:
            return
        if self._alone is None:
            ring = Ring.of([()] * _CALLS, self._device)
            self._alone = runner(self, ring, self._device, self._effort, warm=False, hold=self.hold)
            begin = time.monotonic()
            while time.monotonic() - begin < _WARMING_S:
                self._alone.warm(1)
        self._alone.warm(self._effort.warmup_rounds)
        self.us = time_alone(self._alone, self._effort.trial_rounds).median_us
        self._calibrated = time.monotonic()


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
    """The device's, to be calibrated before it is used; None on a CPU, where a call begins after the one before it has
    ended.
    """
    return None if device.type == "cpu" else StandIn(device, effort)


def way_of_timing(kind: str) -> Provenance:
    """What provenance says of it. It does not say that rounds begin with a busy GPU: without, those of a millisecond
    looked up to 0.5 % longer, which is what ties.
    """
    return {} if kind == "cpu" else {TIMED: "behind stand-ins"}
