"""Compiles as torch.compile does, but runs the graph after Inductor's passes instead of code generated from it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch._inductor.compile_fx
from torch._dynamo.utils import detect_fake_mode
from torch._inductor.virtualized import V

__all__ = ["interpret", "without_code_generation"]


def interpret(gm: torch.fx.GraphModule, example_inputs: list[Any], **options: Any) -> Callable[..., Any]:
    """In place of Inductor's code generation: its post-grad passes, custom ones included, then plain FX."""
    from torch._inductor.fx_passes.post_grad import post_grad_passes, view_to_reshape

    with V.set_fake_mode(detect_fake_mode(example_inputs)):
        view_to_reshape(gm)
        post_grad_passes(gm, is_inference=options.get("is_inference", False))
    gm.graph.lint()
    gm.recompile()

    def run(args: list[Any]) -> Any:
        inputs = list(args)
        args.clear()
        return gm(*inputs)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


@contextmanager
def without_code_generation() -> Iterator[None]:
    """Everything of a compilation but Inductor's code generation and caches: tenths of a second, not seconds."""
    original = torch._inductor.compile_fx.compile_fx
    torch._dynamo.reset()
    torch._inductor.compile_fx.compile_fx = functools.partial(original, inner_compile=interpret)
    try:
        with torch._functorch.config.patch(enable_autograd_cache=False):
            yield
    finally:
        torch._inductor.compile_fx.compile_fx = original
