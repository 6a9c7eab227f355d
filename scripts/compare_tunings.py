#!/usr/bin/env python3
"""How much it matters which of two tunings' databases one has: both winners of each bucket, side by side on one device.

    autofuse tune --model deepseek-v3 --tp 8 --database one.db
    autofuse tune --model deepseek-v3 --tp 8 --database two.db --seed 1
    python scripts/compare_tunings.py one.db two.db --json benchmarks/h200/two_tunings.json

Times of two jobs differ by more than their winners do: a kernel of a microsecond takes some percent more or less in
another process. So here one process times both configs in turns, with inputs at --places addresses. Besides: whether
both tunings decide alike between the fused kernel and the unfused code, where the interval of the gain leaves no doubt.
The exit code is 1 where they do not, or where a winner of one is slower than the other's by more than --within.
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

from autofuse.cache_db.agreement import CLOSE, Pair, pairs
from autofuse.cache_db.exchange import read_export
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

__all__ = ["Measured", "in_common", "summary"]


@dataclass(frozen=True)
class Measured:
    """Both winners of a bucket, timed side by side.

    Attributes:
        ratio: time of the second ÷ time of the first; 1 where both are the same config.
        low, high: its 95 % interval.
    """

    pair: Pair
    ratio: float = 1.0
    low: float = 1.0
    high: float = 1.0

    @property
    def slower(self) -> float:
        """How many times as long the slower of both takes."""
        return max(self.ratio, 1 / self.ratio)

    def as_dict(self) -> dict[str, Any]:
        one, two = self.pair.a, self.pair.b
        return {
            "problem": str(one.problem),
            "tokens": one.tokens,
            "configs": [str(one.config), str(two.config)],
            "recorded_us": [one.time_us, two.time_us],
            "gains": [one.gain, two.gain],
            "ratio": self.ratio,
            "interval": [self.low, self.high],
            "alike": alike(self.pair),
        }


def alike(pair: Pair) -> bool | None:
    """Whether both decide alike between fused and unfused; None where one's interval leaves that open."""
    if any(winner.gain_low <= 1 <= winner.gain_high for winner in (pair.a, pair.b)):
        return None
    return not pair.contradicts


def in_common(one: Path, two: Path, target: Target) -> list[Pair]:
    """What both databases have a winner of that runs the kernels of this installation. Raises BadInput for nothing."""
    both = [pair for pair in pairs(read_export(one), read_export(two)) if _present(pair, target)]
    if not both:
        raise BadInput(f"{one} and {two} have no bucket of {target} in common that present kernels won")
    return both


def _present(pair: Pair, target: Target) -> bool:
    known = get_op(pair.a.problem.op).source_hashes(target.kind)
    return all(winner.target == target and winner.source_hash in known for winner in (pair.a, pair.b))


def measured(both: list[Pair], options: argparse.Namespace) -> list[Measured]:
    """Times what differs. Raises BadInput if nothing could be timed."""
    device = parse_device(options.device)
    target = target_of(device)
    done = []
    with compile_pool(target.kind, target.arch) as pool, IsolatedBench(device, effort("default")) as bench:
        compiling = []
        for pair in both:
            op = get_op(pair.a.problem.op)
            configs = [] if pair.same_config else [pair.a.config, pair.b.config]
            compiling.append(pool.submit([op.spec(target.kind, pair.a.problem, config) for config in configs]))
        for pair, futures in track(
            list(zip(both, compiling, strict=True)), console=Console(stderr=True), transient=True
        ):
            if not futures:
                done.append(Measured(pair))
                continue
            for future in futures:
                future.result()
            problem, tokens = pair.a.problem, pair.a.tokens
            bench.open(problem, tokens, "+".join(get_op(problem.op).source_hashes(target.kind)))
            try:
                compared = bench.interleave(
                    [pair.b.config, pair.a.config], options.rounds, seed=0, places=options.places
                )
            except CandidateFailed as failed:
                print(f"{problem} T={tokens}: {failed.subject}: {failed}", file=sys.stderr)
                continue
            found = gain(*compared.timings)
            done.append(Measured(pair, found.median, found.low, found.high))
    if not done:
        raise BadInput("not one pair of winners could be timed")
    return done


def summary(done: list[Measured], within: float) -> dict[str, Any]:
    """Over all buckets."""
    slower = sorted(each.slower for each in done)
    verdicts = [alike(each.pair) for each in done]
    return {
        "buckets": len(done),
        "same_config": sum(each.pair.same_config for each in done),
        "within": sum(each <= 1 + within for each in slower),
        "median_slower": median(slower),
        "worst_slower": slower[-1],
        "decided": sum(verdict is not None for verdict in verdicts),
        "decided_apart": sum(verdict is False for verdict in verdicts),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("one", type=Path)
    parser.add_argument("two", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument(
        "--places", type=int, default=3, help="of the inputs in memory, which the rounds are spread over"
    )
    parser.add_argument("--within", type=float, default=CLOSE, help="how much slower the worse of both may be")
    parser.add_argument("--json", type=Path, help="write all that was measured there")
    options = parser.parse_args()
    try:
        device = parse_device(options.device)
        both = in_common(options.one, options.two, target_of(device))
        with device_lock([device], on_wait=lambda line: print(line, file=sys.stderr)):
            done = measured(both, options)
    except AutofuseError as error:
        sys.exit(f"compare_tunings: {error}")
    total = summary(done, options.within)
    for each in sorted(done, key=lambda each: each.slower, reverse=True):
        one, two = each.pair.a, each.pair.b
        if each.slower > 1 + options.within or alike(each.pair) is False:
            print(f"{one.problem} T={one.tokens}: {each.ratio:.3f} [{each.low:.3f}, {each.high:.3f}]")
            print(f"    {one.config}\n    {two.config}")
    print(
        f"{total['buckets']} buckets, {total['same_config']} with the same config; {total['within']} within "
        f"{options.within:.0%}, median {total['median_slower']:.4f}, worst {total['worst_slower']:.3f}; "
        f"{total['decided_apart']} of {total['decided']} decided apart"
    )
    if options.json:
        facts = {"measured_at": now(), "rounds": options.rounds, "places": options.places, **provenance_of(device)}
        content = {**facts, "summary": total, "pairs": [each.as_dict() for each in done]}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    sys.exit(total["within"] < total["buckets"] or total["decided_apart"] > 0)


if __name__ == "__main__":
    main()
