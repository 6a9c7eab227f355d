"""Computes on fake tensors: what the ``meta["val"]`` of a new node is, and whether rows can be seen some other way.

PyTorch's own mode takes 0.3 ms for a view and several for a fused op: it keeps results by all properties of all
arguments. A pass computes some 30 for each layer of a model, which would be most of its time. So views and our own
operators, on tensors without symbols, are computed here by their meta kernels alone, which is what PyTorch's mode asks
in the end. All else is left to it.

Even so, an operator that is dispatched to a mode costs several times what its meta kernel does. ``compute`` asks the
kernel itself; ``on_layouts`` lets whoever only wants to know how views lie in memory do without fake tensors.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch._dispatch.python import no_python_dispatcher
from torch._guards import detect_fake_mode
from torch._higher_order_ops.auto_functionalize import auto_functionalized_v2, auto_functionalized_v2_dense
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["compute", "fake_mode_of", "layout_view", "on_fakes", "on_layouts"]

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
_known_results: ContextVar[dict[Hashable, list[Any]] | None] = ContextVar("autofuse_known_results", default=None)
"""The layouts and dtypes of the results of fused ops, within ``on_fakes``."""


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
    token, results = _computing_on.set(mode), _known_results.set({})
    try:
        with _OnFakes(mode), nullcontext() if mode.shape_env is None else mode.shape_env.suppress_guards():
            yield
    finally:
        _computing_on.reset(token)
        _known_results.reset(results)


@contextmanager
def on_layouts(*values: torch.Tensor | int | torch.SymInt | None) -> Iterator[None]:
    """Views made within, of these tensors with these sizes, have the right dtype, sizes, strides and offset. Nothing
    else is said of them: they may be fake tensors or meta tensors. Adds no guards.
    """
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    mode = fake_mode_of(tensors)
    if mode is not None and all(_is_known(value, mode) for value in values if value is not None):
        with _meta_kernels(mode):
            yield
    else:
        with on_fakes(mode):
            yield


def layout_view(value: torch.Tensor, view: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """``view(value)``, as ``on_layouts`` says; of what that gave, too."""
    with on_layouts(value):
        return view(value)


def compute(mode: FakeTensorMode | None, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What ``target`` makes of arguments on fake tensors of ``mode``, as within ``on_fakes``. Raises what it raises."""
    if target is operator.getitem:
        return args[0][args[1]]
    if mode is not None and (_is_ours(target) or _is_ours_functional(target, args)):
        made = _by_meta_kernel(mode, target, args, kwargs)
        if made is not None:
            return made
    with on_fakes(mode):  # views among them: that a tensor is a view is noted where it is dispatched
        return target(*args, **kwargs)


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
        is_functional = _is_ours_functional(func, args)
        if is_functional or func in _BY_META_KERNEL or _is_ours(func):
            made = _by_meta_kernel(self._mode, func, args, kwargs)
            if made is not None:
                return made
        if is_functional:
            with self:
                return auto_functionalized_v2_dense(*args, **kwargs)
        with self._mode:
            return func(*args, **kwargs)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # Dynamo traces nothing while a pass runs, and keeping it out takes as long as a view does


def _by_meta_kernel(mode: FakeTensorMode, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The result, if the meta kernel tells all of it; else None."""
    tensors = _static_tensors(mode, args, kwargs)
    if not tensors:
        return None
    with _meta_kernels(mode):
        if func in _BY_META_KERNEL:
            made = func(*args, **kwargs)
        else:
            made = _made_before(func, args, kwargs)
    device = tensors[0].device
    if isinstance(made, torch.Tensor):
        return FakeTensor(mode, made, device)
    return tuple(FakeTensor(mode, each, device) for each in made)


def _made_before(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What a fused op makes on meta tensors: as for arguments that lay so before, as in a model's other layers.

    A fused op's results are new tensors, whose layouts depend on its arguments' layouts and values alone.
    """
    known = _known_results.get()
    key = (func, _layouts(args), tuple(kwargs), _layouts(kwargs.values()))
    if known is not None and key in known:
        return tuple(torch.empty_strided(*layout, dtype=dtype, device="meta") for *layout, dtype in known[key])
    made = (auto_functionalized_v2_dense if func is auto_functionalized_v2 else func)(*args, **kwargs)
    if known is not None and isinstance(made, tuple) and all(map(_is_whole, made)):
        known[key] = [(tuple(each.shape), each.stride(), each.dtype) for each in made]
    return made


def _layouts(values: Iterable[Any]) -> tuple[Hashable, ...]:
    """All that an operator on meta tensors can tell of its arguments; values with their types, as 1 equals True."""
    found: list[Hashable] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            sizes, bytes_ = (tuple(value.shape), value.stride()), value.untyped_storage().nbytes()
            found.append((*sizes, value.storage_offset(), value.dtype, value.fake_device, bytes_))  # type: ignore[attr-defined]
        elif isinstance(value, (list, tuple)):
            found.append((type(value), _layouts(value)))
        else:
            found.append((type(value), value))
    return tuple(found)


def _is_whole(value: torch.Tensor) -> bool:
    """Whether ``empty_strided`` makes the like of it."""
    if value._is_view() or value.storage_offset() or value.requires_grad:
        return False
    span = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True)) + 1
    return value.untyped_storage().nbytes() == (span if value.numel() else 0) * value.element_size()


@contextmanager
def _meta_kernels(mode: FakeTensorMode) -> Iterator[None]:
    """Operators called within on fake tensors of ``mode`` run their meta kernels, and give meta tensors."""
    with in_kernel_invocation_manager(mode), no_python_dispatcher():
        yield


def _static_tensors(mode: FakeTensorMode, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[FakeTensor]:
    """The tensors among some arguments; empty where a meta kernel would not tell all of the result: for symbols,
    constants, and tensors of other kinds.
    """
    found: list[FakeTensor] = []
    todo = [*args, *kwargs.values()]
    for value in todo:  # which grows meanwhile
        if isinstance(value, torch.Tensor):
            if not isinstance(value, FakeTensor) or not _is_static(value, mode):
                return []
            found.append(value)
        elif isinstance(value, (list, tuple)):
            todo += value
        elif isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return []
    return found


def _is_static(value: torch.Tensor, mode: FakeTensorMode) -> bool:
    """Whether ``value`` is a fake tensor of ``mode``, without symbols or known contents."""
    if not isinstance(value, FakeTensor) or value.fake_mode is not mode:
        return False
    return value.constant is None and value.real_tensor is None and not value._has_symbolic_sizes_strides


def _is_known(value: torch.Tensor | int | torch.SymInt, mode: FakeTensorMode) -> bool:
    """Whether nothing of a size, or of a tensor's layout, is a symbol."""
    if isinstance(value, torch.Tensor):
        return _is_static(value, mode) or type(value) is torch.Tensor
    return isinstance(value, int)


def _is_ours_functional(func: Any, args: Sequence[Any]) -> bool:
    """Whether it is the functional form of a fused op that writes to its arguments."""
    return func is auto_functionalized_v2 and _is_ours(args[0])


def _is_ours(func: Any) -> bool:
    """Whether ``func`` is a fused op, whose results are all on the device of its first tensor."""
    return isinstance(func, torch._ops.OpOverload) and func.namespace == "autofuse"
