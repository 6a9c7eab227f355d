"""Computes on fake tensors: what the ``meta["val"]`` of a new node is, and whether rows can be seen some other way.

PyTorch's own mode takes 0.3 ms for a view and several for a fused op: it keeps results by all properties of all
arguments. A pass computes some 30 for each layer of a model, which would be most of its time. So views and our own
operators, on tensors without symbols, are computed here by their meta kernels alone, which is what PyTorch's mode asks
in the end. All else is left to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch._dispatch.python import no_python_dispatcher
from torch._guards import detect_fake_mode
from torch._higher_order_ops.auto_functionalize import auto_functionalized_v2, auto_functionalized_v2_dense
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["fake_mode_of", "on_fakes"]

aten = torch.ops.aten

_BY_META_KERNEL = frozenset(
    (
        aten.as_strided.default,
        aten.clone.default,
        aten.expand.default,
        aten.permute.default,
        aten.reshape.default,
        aten.select.int,
        aten.slice.Tensor,
        aten.transpose.int,
        aten.unsqueeze.default,
        aten.view.default,
    )
)
"""Operators whose meta kernel is all that PyTorch's mode asks, once composite ones (reshape) are taken apart."""


_computing_on: ContextVar[FakeTensorMode | None] = ContextVar("autofuse_computing_on", default=None)


def fake_mode_of(values: Any) -> FakeTensorMode | None:
    """The mode of ``on_fakes`` within it; else the one that a graph is compiled under, else that of the fake tensors
    among ``values``, if there is one.
    """
    return _computing_on.get() or detect_fake_mode(values)


@contextmanager
def on_fakes(mode: FakeTensorMode | None) -> Iterator[None]:
    """Operators called within compute on fake tensors of ``mode``, and add no guards; None changes nothing.

    Entered again within itself, it costs nothing: whoever has much to compute enters it once.
    """
    if mode is None or mode is _computing_on.get():
        yield
        return
    token = _computing_on.set(mode)
    try:
        with _OnFakes(mode), nullcontext() if mode.shape_env is None else mode.shape_env.suppress_guards():
            yield
    finally:
        _computing_on.reset(token)


class _OnFakes(TorchDispatchMode):
    """``mode``, with a short way for what is common in rewrites."""

    supports_higher_order_operators = True

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._mode = mode

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # asked for by PyTorch itself whenever it makes a view
            return args[0].device
        if func is auto_functionalized_v2 and _is_ours(args[0]):
            with self:
                return auto_functionalized_v2_dense(*args, **kwargs)
        if func in _BY_META_KERNEL or _is_ours(func):
            tensors = self._static_tensors(args, kwargs)
            if tensors:
                with in_kernel_invocation_manager(self._mode), no_python_dispatcher():
                    made = func(*args, **kwargs)
                device = tensors[0].device
                if isinstance(made, torch.Tensor):
                    return FakeTensor(self._mode, made, device)
                return tuple(FakeTensor(self._mode, each, device) for each in made)
        with self._mode:
            return func(*args, **kwargs)

    def _static_tensors(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[FakeTensor]:
        """The tensors among some arguments; empty where a meta kernel would not tell all of the result: for symbols,
        constants, and tensors of other kinds.
        """
        found: list[FakeTensor] = []
        todo = [*args, *kwargs.values()]
        for value in todo:  # which grows meanwhile
            if isinstance(value, torch.Tensor):
                if not isinstance(value, FakeTensor) or value.fake_mode is not self._mode:
                    return []
                if value.constant is not None or value.real_tensor is not None or value._has_symbolic_sizes_strides:
                    return []
                found.append(value)
            elif isinstance(value, (list, tuple)):
                todo += value
            elif isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
                return []
        return found


def _is_ours(func: Any) -> bool:
    """Whether ``func`` is a fused op, whose results are all on the device of its first tensor."""
    return isinstance(func, torch._ops.OpOverload) and func.namespace == "autofuse"
