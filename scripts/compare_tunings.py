#!/usr/bin/env python3
"""How much it matters which of two tunings' databases one has: both winners of each bucket, side by side on one device.

    autofuse tune --model deepseek-v3 --tp 8 --database one.db
    autofuse tune --model deepseek-v3 --tp 8 --database two.db --seed 1
    python scripts/compare_tunings.py one.db two.db --json benchmarks/h200/two_tunings.json

Times of two jobs differ by more than their winners do: a kernel of a microsecond takes some percent more or less in
another process. So here one process times both configs in turns. Besides: whether both tunings decide alike between the
fused kernel and the unfused code, where the interval of the gain leaves no doubt. The exit code is 1 where they do not,
or where a winner of one is slower than the other's by more than --within.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.progress import track

from autofuse.cache_db import TunedDatabase, Winner
from autofuse.cache_db.records import now
from autofuse.errors import AutofuseError, BadInput
from autofuse.ops import get_op
from autofuse.targets import Target, parse_device, target_of
from autofuse.tuner.budgets import effort
from autofuse.tuner.compile_ahead import compile_pool
from autofuse.tuner.device_lock import device_lock
from autofuse.tuner.failures import CandidateFailed
from autofuse.tuner.isolation import IsolatedBench
from autofuse.tuner.job import provenance_of
from autofuse.tuner.measure import gain

__all__ = ["Pair", "pairs", "summary"]


@dataclass(frozen=True)
class Pair:
    """The winners of one bucket in two databases.

    Attributes:
        ratio: time of the second ÷ time of the first, measured now; 1 where both are the same config.
    """

    one: Winner
    two: Winner
    ratio: float = 1.0
    low: float = 1.0
    high: float = 1.0

    @property
    def slower(self) -> float:
        """How many times as long the slower of both takes."""
        return max(self.ratio, 1 / self.ratio)

    @property
    def alike(self) -> bool | None:
        """Whether both decide alike between fused and unfused; None where one's interval leaves that open."""
        verdicts = [_verdict(winner) for winner in (self.one, self.two)]
        return None if None in verdicts else verdicts[0] == verdicts[1]

    def as_dict(self) -> dict[str, Any]:
        return {
            "problem": str(self.one.problem),
            "tokens": self.one.tokens,
            "configs": [str(self.one.config), str(self.two.config)],
            "recorded_us": [self.one.time_us, self.two.time_us],
            "gains": [self.one.gain, self.two.gain],
            "ratio": self.ratio,
            "interval": [self.low, self.high],
            "alike": self.alike,
        }


def _verdict(winner: Winner) -> bool | None:
    if winner.gain_low > 1:
        return True
    return False if winner.gain_high < 1 else None


def pairs(one: Path, two: Path, target: Target) -> list[Pair]:
    """What both databases have a winner of that runs the kernels of this installation. Raises BadInput for nothing."""
    found = []
    for path in (one, two):
        if not path.is_file():
            raise BadInput(f"{path} is no file")
        with TunedDatabase(path, read_only=True) as database:
            rows = database.winners(target)
        found.append({(w.problem, w.tokens): w for w in rows if w.source_hash in _sources(w, target)})
    both = [Pair(found[0][key], found[1][key]) for key in found[0] if key in found[1]]
    if not both:
        raise BadInput(f"{one} and {two} have no bucket of {target} in common that present kernels won")
    return both


def _sources(winner: Winner, target: Target) -> tuple[str, ...]:
    return get_op(winner.problem.op).source_hashes(target.kind)


def measured(both: list[Pair], options: argparse.Namespace) -> list[Pair]:
    device = parse_device(options.device)
    target = target_of(device)
    done = []
    with compile_pool(target.kind, target.arch) as pool, IsolatedBench(device, effort("default")) as bench:
        compiling = []
        for pair in both:
            op = get_op(pair.one.problem.op)
            configs = [pair.one.config, pair.two.config] if pair.one.config != pair.two.config else []
            compiling.append(pool.submit([op.spec(target.kind, pair.one.problem, config) for config in configs]))
        for pair, futures in track(
            list(zip(both, compiling, strict=True)), console=Console(stderr=True), transient=True
        ):
            if not futures:
                done.append(pair)
                continue
            for future in futures:
                future.result()
            bench.open(pair.one.problem, pair.one.tokens, "+".join(_sources(pair.one, target)))
            try:
                compared = bench.interleave([pair.two.config, pair.one.config], options.rounds, seed=0)
            except CandidateFailed as failed:
                print(f"{pair.one.problem} T={pair.one.tokens}: {failed.subject}: {failed}", file=sys.stderr)
                continue
            found = gain(*compared.timings)
            done.append(Pair(pair.one, pair.two, found.median, found.low, found.high))
    if not done:
        raise BadInput("not one pair of winners could be timed")
    return done


def summary(done: list[Pair], within: float) -> dict[str, Any]:
    """Over all buckets."""
    slower = sorted(pair.slower for pair in done)
    return {
        "buckets": len(done),
        "same_config": sum(pair.one.config == pair.two.config for pair in done),
        "within": sum(each <= 1 + within for each in slower),
        "median_slower": median(slower),
        "worst_slower": slower[-1],
        "decided": sum(pair.alike is not None for pair in done),
        "decided_apart": sum(pair.alike is False for pair in done),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("one", type=Path)
    parser.add_argument("two", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--within", type=float, default=0.02, help="how much slower the worse of both may be")
    parser.add_argument("--json", type=Path, help="write all that was measured there")
    options = parser.parse_args()
    try:
        device = parse_device(options.device)
        with device_lock([device], on_wait=lambda line: print(line, file=sys.stderr)):
            done = measured(pairs(options.one, options.two, target_of(device)), options)
    except AutofuseError as error:
        sys.exit(f"compare_tunings: {error}")
    total = summary(done, options.within)
    for pair in sorted(done, key=lambda pair: pair.slower, reverse=True):
        if pair.slower > 1 + options.within or pair.alike is False:
            print(f"{pair.one.problem} T={pair.one.tokens}: {pair.ratio:.3f} [{pair.low:.3f}, {pair.high:.3f}]")
            print(f"    {pair.one.config}\n    {pair.two.config}")
    print(
        f"{total['buckets']} buckets, {total['same_config']} with the same config; {total['within']} within "
        f"{options.within:.0%}, median {total['median_slower']:.4f}, worst {total['worst_slower']:.3f}; "
        f"{total['decided_apart']} of {total['decided']} decided apart"
    )
    if options.json:
        facts = {"measured_at": now(), "rounds": options.rounds, **provenance_of(device)}
        content = {**facts, "summary": total, "pairs": [pair.as_dict() for pair in done]}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    sys.exit(total["within"] < total["buckets"] or total["decided_apart"] > 0)


if __name__ == "__main__":
    main()
