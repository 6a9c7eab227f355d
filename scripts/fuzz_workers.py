"""Runs a fuzzer's seeds in processes of one thread each.

A process gets a few seeds and ends: so memory stays bounded, whatever PyTorch keeps of what it has compiled. It prints
``begin SEED`` before each seed, and a line of JSON for each case of it. One that dies, or says nothing for too long, is
a failure of the seed that it had begun, and the next process goes on behind that.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

__all__ = ["SEEDS_PER_PROCESS", "run_seeds"]

SEEDS_PER_PROCESS = 40
LONGEST_SILENCE_S = 900.0
"""Of a process that still may come to something: a layer that Inductor compiles takes seconds, on a crowded machine
minutes.
"""


def run_seeds(
    command: Callable[[int, int], Sequence[str]],
    seeds: range,
    jobs: int,
    received: Callable[[Mapping[str, Any]], None],
    died: Callable[[int, str], None],
    silence_s: float = LONGEST_SILENCE_S,
) -> None:
    """Runs all ``seeds`` in ``jobs`` processes at a time.

    Args:
        command: (first seed, number of seeds) → what a process runs.
        received: is called with each case; ``died`` with a seed and why its process ended. Never two at a time.
    """
    lock = threading.Lock()
    parts = [seeds[at : at + SEEDS_PER_PROCESS] for at in range(0, len(seeds), SEEDS_PER_PROCESS)]

    def run(part: range) -> None:
        while part:
            begun, why = _run_process(command(part[0], len(part)), received, lock, silence_s)
            if why is None:
                return
            seed = part[0] if begun is None else begun
            with lock:
                died(seed, why)
            part = range(seed + 1, part.stop)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run, parts))


def _run_process(
    command: Sequence[str], received: Callable[[Mapping[str, Any]], None], lock: threading.Lock, silence_s: float
) -> tuple[int | None, str | None]:
    """(the seed that was begun last, why the process ended; None if it had done all)"""
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    begun: int | None = None
    last = "its start"
    silent = False
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=one_thread)
        assert process.stdout is not None

        def stop() -> None:
            nonlocal silent
            silent = True
            process.kill()

        timer = threading.Timer(silence_s, stop)
        timer.start()
        for line in process.stdout:
            timer.cancel()
            if line.startswith("begin "):
                begun = int(line.split()[1])
                last = "its start"
            elif line.startswith("{"):
                case = json.loads(line)
                last = f"case {case['case']}"
                with lock:
                    received(case)
            timer = threading.Timer(silence_s, stop)
            timer.start()
        status = process.wait()
        timer.cancel()
        if status == 0:
            return begun, None
        errors.seek(0)
        said = " ".join(errors.read()[-1000:].split())
    what = f"said nothing for {silence_s:g} s" if silent else f"ended with status {status}"
    return begun, f"the process {what}, after {last}: {said}"
