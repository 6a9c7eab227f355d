"""``autofuse ops``: the fused ops, what they compute, and what can be tuned about them."""

from __future__ import annotations

from typing import Any

from autofuse.cli.options import JsonOption, OpOption, checked_op
from autofuse.cli.output import console, print_json
from autofuse.kernels_src import source_hash
from autofuse.ops import OPS, FusedOp, KernelSource

__all__ = ["ops"]


def ops(op: OpOption = None, json: JsonOption = False) -> None:
    """List the fused ops.

    Of each: schema, targets, tunables with what each trades, constraints with their reasons.

    Example: autofuse ops --op mla_dual_rms_norm
    """
    name = checked_op(op)
    chosen = [OPS[name]] if name else list(OPS.values())
    if json:
        print_json([_as_dict(each) for each in chosen])
        return
    out = console()
    for each in chosen:
        facts = _as_dict(each)
        out.print(each.name, style="bold")
        out.print(f"  {facts['doc']}", markup=False, soft_wrap=True)
        out.print(f"  torch.ops.autofuse.{each.name}{each.schema}", markup=False, soft_wrap=True)
        for kind, kernel in [*facts["targets"].items(), *facts["triton"].items()]:
            out.print(f"  {kind}: {kernel['source']}", markup=False)
            for tunable in kernel["tunables"]:
                values = ", ".join(map(str, tunable["values"]))
                out.print(f"    {tunable['name']} = {values}: {tunable['trades']}", markup=False, soft_wrap=True)
            for reason in kernel["constraints"]:
                out.print(f"    only if: {reason}", markup=False, soft_wrap=True)


def _as_dict(op: FusedOp) -> dict[str, Any]:
    return {
        "name": op.name,
        "doc": (type(op).__doc__ or "").strip().splitlines()[0],
        "schema": op.schema,
        "targets": {kind: _kernel(kernel) for kind, kernel in op.kernels.items()},
        "triton": {kind: _kernel(kernel) for kind, kernel in op.triton_kernels.items()},
    }


def _kernel(kernel: KernelSource) -> dict[str, Any]:
    return {
        "source": kernel.file,
        "source_hash": source_hash(kernel.file),
        "tunables": [
            {"name": tunable.name, "values": tunable.values, "trades": tunable.trades}
            for tunable in kernel.space.tunables
        ],
        "constraints": [constraint.reason for constraint in kernel.space.constraints],
    }
