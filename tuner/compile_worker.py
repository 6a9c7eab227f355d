"""A worker process of ``compile_ahead``: reads [kind, arch, kernel spec] as JSON lines, answers each with one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from autofuse import kernels_src
from autofuse.errors import AutofuseError
from autofuse.targets import KernelSpec, toolchain

__all__ = ["main"]


def main() -> None:
    """Serves until standard input ends. ``sys.argv[1]``: the folder of the kernel sources."""
    kernels_src.FOLDER = Path(sys.argv[1])
    for line in sys.stdin:
        kind, arch, spec = json.loads(line)
        try:
            artifact = toolchain(kind).compile(KernelSpec(**spec), arch)
            answer: dict[str, object] = {"seconds": artifact.seconds}
        except AutofuseError as error:
            answer = {"error": type(error).__name__, "message": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
