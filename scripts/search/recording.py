"""Measuring every config of a space, as the tuner measures one, for searches to be replayed on."""

from __future__ import annotations

import argparse
import os
import platform
import random
import time
from collections.abc import Iterator
from concurrent.futures import Future, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from autofuse.cache_db.records import now
from autofuse.errors import CompileError
from autofuse.ops import Config, get_op
from autofuse.targets import Artifact, parse_device, target_of, toolchain
from autofuse.tuner.api import model_buckets, parse_tokens
from autofuse.tuner.budgets import effort
from autofuse.tuner.compile_ahead import CompilePool, compile_pool
from autofuse.tuner.failures import CandidateFailed
from autofuse.tuner.isolation import IsolatedBench
from autofuse.tuner.job import Bucket
from search.recorded import Outcome, Recorded

__all__ = ["record"]

_SEED = 0  # of the subset, and of the order


def record(options: argparse.Namespace) -> Iterator[Path]:
    """Records the first problem that the model makes of each op, at each T. Gives the files as they are written.

    Raises BadInput, TargetUnavailable.
    """
    device = parse_device(options.device)
    target = target_of(device)
    names = [name.strip() for name in options.record.split(",")]
    for name in names:
        buckets = model_buckets(options.model, parse_tokens(options.tokens), ops=[name])
        first = [bucket for bucket in buckets if bucket.problem == buckets[0].problem]
        with compile_pool(target.kind, target.arch) as pool:
            for bucket in first:
                path = options.folder / _slug(target.device_name) / f"{name}_T{bucket.tokens}.json"
                _measured(bucket, device, pool, options.most).save(path)
                yield path


def _measured(bucket: Bucket, device: torch.device, pool: CompilePool, most: int) -> Recorded:
    op, target = get_op(bucket.problem.op), target_of(device)
    space = op.kernel_source(target.kind).space
    default = op.default_config(target.kind, bucket.problem, bucket.tokens)
    whole = list(space.configs(bucket.problem, bucket.tokens))
    order = random.Random(_SEED).sample(whole, min(most, len(whole)))
    if default not in order:
        order[-1] = default
    compiling = pool.submit([op.spec(target.kind, bucket.problem, config) for config in order])
    budgets = replace(effort("default"), race_margin=float(2**30))  # to the end: half a time is no data
    if target.kind == "cpu":
        wait(compiling)  # compilers would take cores from what is timed
    outcomes: dict[Config, Outcome] = {}
    start = time.monotonic()
    with IsolatedBench(device, budgets) as bench:
        bench.open(bucket.problem, bucket.tokens, op.source_hash(target.kind))
        for config, future in track(
            list(zip(order, compiling, strict=True)), description=f"{op.name} T={bucket.tokens}", transient=True
        ):
            outcomes[config] = _outcome(bench, config, future)
    provenance: dict[str, Any] = {
        "host": platform.node(),
        "torch": torch.__version__,
        **toolchain(target.kind).provenance(device),
        "source_hash": op.source_hash(target.kind),
        "measured_at": now(),
        "load_average": round(os.getloadavg()[0], 1),  # far above the threads that measure: the times are of little use
        "seconds": round(time.monotonic() - start, 1),
        "subset_seed": _SEED,
        "trial_rounds": budgets.trial_rounds,
    }
    return Recorded(
        str(target),
        bucket.problem,
        bucket.tokens,
        {tunable.name: tunable.values for tunable in space.tunables},
        default,
        len(whole),
        {config: outcomes[config] for config in whole if config in outcomes},
        provenance,
    )


def _outcome(bench: IsolatedBench, config: Config, compiling: Future[Artifact]) -> Outcome:
    try:
        compiling.result()
        bench.verify(config)
        return round(bench.time(config, None).timing.median_us, 4)
    except CompileError:
        return "compile_error"
    except CandidateFailed as failed:
        return failed.status


def _slug(device_name: str) -> str:
    return "_".join("".join(c if c.isalnum() else " " for c in device_name.lower()).split())
