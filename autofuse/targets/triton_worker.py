"""Compiles one Triton kernel. Run by ``autofuse.targets.triton`` in a process of its own, as a script.

It imports Triton and nothing of autofuse: PyTorch would take longer to import than the kernel to compile. A compiler
that crashes, never ends or litters takes only this process with it.

Standard input: the request as JSON, see ``main``. The binary, ``log`` and ``answer.json`` go into the request's folder.
"""

from __future__ import annotations

import json
import re
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

__all__ = ["main"]


def main() -> None:
    """Reads a request and compiles.

    Its fields: ``path`` (``sys.path``), ``folder`` (where the package ``kernels`` is and where to write), ``module``
    and ``entry`` (of the kernel), ``signature`` (type and divisor of each run-time argument), ``constants`` (name →
    value; what the kernel does not take is left out), ``options`` (of Triton's backend), ``target`` (backend, arch,
    lanes).
    """
    request = json.load(sys.stdin)
    sys.path[:] = [request["folder"], *request["path"]]
    answer: dict[str, Any]
    try:
        answer = _compiled(request)
    except BaseException as error:  # of whatever kind: the parent makes one line of it
        text = "".join(traceback.format_exception(error))
        answer = {"error": _one_line(error), "log": text}
    Path(request["folder"], "answer.json").write_text(json.dumps(answer), encoding="utf-8")


def _compiled(request: dict[str, Any]) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(import_module(f"kernels.{request['module']}"), request["entry"])
    names, types = list(kernel.arg_names), request["signature"]
    constants = {name: request["constants"][name] for name in names[len(types) :]}
    signature = {name: type_ for name, (type_, _) in zip(names, types, strict=False)}
    signature |= dict.fromkeys(constants, "constexpr")
    attributes = {(i,): [["tt.divisibility", divisor]] for i, (_, divisor) in enumerate(types) if divisor > 1}
    source = ASTSource(kernel, signature, constants, attributes)
    done = triton.compile(source, target=GPUTarget(*request["target"]), options=request["options"])
    facts = done.metadata._asdict()
    hidden = {name: facts.get(name) for name in ("global_scratch_size", "profile_scratch_size")}
    extension = "cubin" if "cubin" in done.asm else "hsaco"
    Path(request["folder"], "kernel.bin").write_bytes(done.asm[extension])
    return {
        "name": facts["name"],
        "num_warps": facts["num_warps"],
        "shared_bytes": facts["shared"],
        "scratch": {name: size for name, size in hidden.items() if size},
        "tensor_memory": facts.get("tmem_size") or 0,
        "assembly": done.asm["ptx"] if "ptx" in done.asm else done.asm["amdgcn"],
    }


def _one_line(error: BaseException) -> str:
    """What was wrong in the first place: where a function was called in vain, Triton says no more than that."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines()]
    said = [line for line in lines if line and not re.fullmatch(r"\^+|at \d+:\d+:", line)]
    worth = next((line for line in reversed(said) if "error" in line.lower()), said[-1] if said else "")
    return f"{type(error).__name__}: {worth}"


if __name__ == "__main__":
    main()
