"""Compiling candidates side by side, ahead of their measurement.

A C++ compiler is a process of its own anyway, and Triton gets one, so threads that wait for it are enough. NVRTC runs
inside the calling process and two threads there compile no faster than one, so each thread has a worker process that
does it; what it compiles, the kernel cache hands over.
"""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict

from autofuse import errors, kernels_src
from autofuse.cores import usable_cores
from autofuse.errors import CompileError
from autofuse.targets import Artifact, KernelSpec, kind_of_arch, toolchain
from autofuse.tuner.budgets import COMPILE_LIMIT_S
from autofuse.tuner.processes import start_module

__all__ = ["CompilePool", "compile_pool"]

_MOST_WORKERS = 16
_SOME = 3  # fewer kernels than this compile faster than a worker process starts


class CompilePool:
    """Compiles kernels. Use ``compile_pool``, which ends its workers."""

    def __init__(self, kind: str, arch: str, workers: int | None = None) -> None:
        self._kind = kind
        self._arch = arch
        self._threads = ThreadPoolExecutor(min(workers or usable_cores(), _MOST_WORKERS), "autofuse-compile")
        self._local = threading.local()
        self._workers: list[subprocess.Popen[str]] = []

    def submit(self, specs: Iterable[KernelSpec], arch: str | None = None) -> list[Future[Artifact]]:
        """Starts compiling, for the pool's arch unless told another; each future gives its artifact or raises
        CompileError, TargetUnavailable or BadInput.
        """
        specs = list(specs)
        kind, arch = (self._kind, self._arch) if arch is None else (kind_of_arch(arch), arch)
        in_worker = kind == "cuda" and (len(specs) >= _SOME or bool(self._workers))
        return [
            self._threads.submit(self._in_worker if in_worker and spec.triton is None else _here, kind, arch, spec)
            for spec in specs
        ]

    def close(self) -> None:
        """Drops what has not begun and ends the workers."""
        self._threads.shutdown(wait=False, cancel_futures=True)  # or a thread would start another worker
        for worker in self._workers:
            worker.kill()
        self._threads.shutdown(wait=True)
        for worker in self._workers:
            worker.kill()
            worker.wait()

    def _in_worker(self, kind: str, arch: str, spec: KernelSpec) -> Artifact:
        worker = getattr(self._local, "worker", None)
        if worker is None or worker.poll() is not None:
            worker = start_module(
                "autofuse.tuner.compile_worker",
                [str(kernels_src.FOLDER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                bufsize=1,
            )
            self._local.worker = worker
            self._workers.append(worker)
        assert worker.stdin is not None
        assert worker.stdout is not None
        late = threading.Event()

        def end() -> None:
            late.set()
            worker.kill()

        limit = threading.Timer(COMPILE_LIMIT_S, end)
        limit.daemon = True
        limit.start()
        try:
            worker.stdin.write(json.dumps([kind, arch, {**asdict(spec), "defines": dict(spec.defines)}]) + "\n")
            answer = worker.stdout.readline()
        except OSError:
            answer = ""
        limit.cancel()
        if not answer:
            worker.kill()
            code = worker.wait()  # or the next kernel might go to a worker that is about to end
            if late.is_set():
                raise CompileError(f"{spec.source} does not compile within {COMPILE_LIMIT_S:.0f} s")
            raise CompileError(f"the compiler of {spec.source} died (exit code {code})")
        reply = json.loads(answer)
        if error := reply.get("error"):
            raise getattr(errors, error)(reply["message"])
        artifact = _here(kind, arch, spec)  # in the cache by now
        return Artifact(artifact.path, artifact.resources, reply["seconds"])


def _here(kind: str, arch: str, spec: KernelSpec) -> Artifact:
    return toolchain(kind).compile(spec, arch)


@contextmanager
def compile_pool(kind: str, arch: str, workers: int | None = None) -> Iterator[CompilePool]:
    """A pool for a ``with`` block. ``workers``: how many compile at a time; all cores, unless given."""
    pool = CompilePool(kind, arch, workers)
    try:
        yield pool
    finally:
        pool.close()
