"""Baselines: what the unfused code takes, eagerly and through plain ``torch.compile``."""

from __future__ import annotations

import logging
import types
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
import torch._functorch.config
from torch._inductor.compile_fx import compile_fx, compile_fx_inner

from autofuse.ops import FusedOp

__all__ = ["baseline_calls", "compiled_reference"]

logger = logging.getLogger("autofuse.tuner")

Call = Callable[..., Any]
_SHOWN = 300  # characters of another library's error in a warning


def baseline_calls(
    op: FusedOp, args: Sequence[Any], running: AbstractContextManager[None] | None = None
) -> dict[str, Call]:
    """The reference as functions of the op's arguments, by kind:

    - ``eager``: operator by operator;
    - ``compile``: through ``torch.compile`` with static shapes, as a user calls it;
    - ``graph`` (CPU only): just the code that Inductor generated, without the guards and wrappers around it. That is
      what the site costs inside a larger compiled graph, where those are paid once for all. Under a CUDA graph the two
      are one.

    Where Inductor cannot compile (its compiler is missing, or is not ours), ``eager`` is all there is: one warning.

    Args:
        args: example arguments to compile for.
        running: entered for what runs on the device, which compiling does not.
    """
    calls: dict[str, Call] = {"eager": op.unfused}
    try:
        compiled, generated = compiled_reference(op, args, running=running)
    except Exception as error:  # whatever Inductor, Triton or a compiler raises
        why = " ".join(str(error).split())[:_SHOWN]
        logger.warning("%s: no baseline through torch.compile, which fails: %s: %s", op.name, type(error).__name__, why)
        return calls
    calls["compile"] = compiled
    if generated is not None and all(not isinstance(arg, torch.Tensor) or arg.device.type == "cpu" for arg in args):
        calls["graph"] = generated
    return calls


def compiled_reference(
    op: FusedOp,
    args: Sequence[Any],
    options: dict[str, Any] | None = None,
    running: AbstractContextManager[None] | None = None,
) -> tuple[Call, Call | None]:
    """The compiled reference as a user calls it, and only its generated code (None if it cannot be had alone).

    Args:
        options: Inductor's, as for ``torch.compile(options=...)``.
        running: entered for what runs on the device, which compiling does not.
    """
    order: list[int] = []  # Dynamo's of the tensors: that of their first use
    graphs: list[Callable[[list[torch.Tensor]], Any]] = []
    on_device = ExitStack()

    def inner(*inner_args: Any, **inner_kwargs: Any) -> Any:
        graph = compile_fx_inner(*inner_args, **inner_kwargs)
        graphs.append(graph)
        return graph

    def backend(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        order.extend(i for each in inputs for i, arg in enumerate(args) if arg is each)
        call = compile_fx(module, inputs, inner_compile=inner, config_patches=options)
        on_device.enter_context(running or nullcontext())  # Dynamo calls it next
        if any(each.device.type == "cuda" for each in inputs):
            on_device.callback(torch.cuda.synchronize)
        return call

    compiled = torch.compile(_fresh(op.unfused), backend=backend, dynamic=False)
    with on_device:
        # A hit in AOTAutograd's cache would not call our inner_compile.
        with torch.no_grad(), torch._functorch.config.patch(enable_autograd_cache=False):
            expected = compiled(*args)
        if len(graphs) != 1:
            return compiled, None
        graph, taken = graphs[0], tuple(order)  # a later call may compile again

        def generated(*call_args: Any) -> Any:
            return graph([call_args[i] for i in taken])

        try:
            same = all(torch.equal(a, b) for a, b in zip(generated(*args), expected, strict=True))
        except (RuntimeError, AssertionError, TypeError, ValueError):  # the graph takes other inputs than Dynamo
            same = False
    return compiled, generated if same else None


def _fresh(method: Call) -> Call:
    """A copy with a code object of its own: Dynamo counts recompilations, and gives up, per code object."""
    function = method.__func__ if isinstance(method, types.MethodType) else method
    code = function.__code__
    copy = types.FunctionType(
        code.replace(), function.__globals__, code.co_name, function.__defaults__, function.__closure__
    )
    return types.MethodType(copy, method.__self__) if isinstance(method, types.MethodType) else copy
