"""A worker process of ``compile_ahead``: reads kernel specs as JSON lines, answers each with one JSON line."""

from __future__ import annotations

import json
import sys

from autofuse.errors import AutofuseError
from autofuse.targets import KernelSpec, toolchain

__all__ = ["main"]


def main(kind: str, arch: str) -> None:
    """Serves until standard input ends."""
    for line in sys.stdin:
        try:
            artifact = toolchain(kind).compile(KernelSpec(**json.loads(line)), arch)
            answer: dict[str, object] = {"seconds": artifact.seconds}
        except AutofuseError as error:
            answer = {"error": type(error).__name__, "message": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
