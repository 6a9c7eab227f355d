"""From a call of ``torch.ops.autofuse.<op>`` to a launched kernel.

The first call of a kind (op, plan, problem, device) parses its plan, compiles or finds the kernels, and binds them;
each later one finds the binding and launches: natively where the native dispatcher could be built, else here. Whatever
a kernel cannot do, the op's reference does: a call never fails for want of a kernel.
"""

from __future__ import annotations

import logging
import os
from _thread import interrupt_main
from bisect import bisect_left
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from autofuse.errors import AutofuseError, BadInput, UnsuitedPlan, UnsupportedCall
from autofuse.ops import OPS, Binding, Config, FusedOp, LaunchShape, Problem
from autofuse.ops.buckets import RANGE_BUCKETS
from autofuse.runtime.native import NativeDispatcher, Variant, load_native
from autofuse.runtime.plan import Plan
from autofuse.targets import Kernel, Target, target_of, toolchain

__all__ = ["BoundPlan", "OpRegistry", "bind_plan", "load_kernel", "registry", "resolve_plan"]

logger = logging.getLogger("autofuse.runtime")

_NATIVE_KEYS = ("CPU", "CUDA")
# The implementation in Python serves all devices, and stays below the native one: no call ever finds none.
_PYTHON_KEY = "CompositeExplicitAutograd"
_ANY_TOKENS = 1 << 20  # so many that no constraint about too few tokens stands in the way
CHECK_INDICES = os.environ.get("AUTOFUSE_CHECK_INDICES", "0") != "0"
"""Whether every call on a GPU waits until its positions and slots can be looked at, rather than the first of a kind."""


def load_kernel(op: FusedOp, problem: Problem, config: Config, device: torch.device) -> Kernel:
    """Compiles (or finds) and loads one config of ``op`` on ``device``.

    Raises: CompileError, LaunchError, TargetUnavailable, UnsupportedCall.
    """
    target = target_of(device)
    chain = toolchain(target.kind)
    spec = op.spec(target.kind, problem, config)
    return chain.load(spec, chain.compile(spec, target.arch), device)


@dataclass(frozen=True)
class BoundPlan:
    """A plan whose kernels are loaded on a device.

    Calling it with the op's arguments (without ``plan``) launches, in Python; ``binding`` must accept them.
    """

    op: FusedOp
    device: torch.device
    binding: Binding
    variants: tuple[Variant, ...]

    def __call__(self, *args: Any) -> tuple[torch.Tensor, ...]:
        variant = self._variant(args)
        if variant.kernel is None or not self.binding.launchable(args, variant.shape.align):
            return self.op.reference(*args)
        results = self.binding.allocate(args)
        self._launch(variant, args, results)
        return results

    def launch(self, args: Sequence[Any], results: Sequence[torch.Tensor]) -> None:
        """Launches the kernel, which writes into ``results``. Raises UnsupportedCall where the reference would run."""
        variant = self._variant(args)
        if variant.kernel is None or not self.binding.launchable(args, variant.shape.align):
            raise UnsupportedCall(f"{self.op.name}: strides, addresses or sizes do not suit the kernel")
        self._launch(variant, args, results)

    def _variant(self, args: Sequence[Any]) -> Variant:
        bucket = bisect_left(self.variants, self.binding.tokens(args), key=lambda variant: variant.tokens)
        return self.variants[min(bucket, len(self.variants) - 1)]

    def _launch(self, variant: Variant, args: Sequence[Any], results: Sequence[torch.Tensor]) -> None:
        assert variant.kernel is not None
        if tokens := self.binding.tokens(args):
            variant.kernel.launch(variant.shape.blocks(tokens), *self.binding.params(args, results))


def bind_plan(op: FusedOp, plan: Plan, device: torch.device) -> BoundPlan:
    """Loads a plan's kernels.

    Raises: UnsuitedPlan (a plan for another arch or another source of the kernel, or with a config outside the op's
        search space, which may compute anything), UnsupportedCall, CompileError, LaunchError, TargetUnavailable.
    """
    target = target_of(device)
    if plan.arch != target.arch:
        raise UnsuitedPlan(f"the plan is for {plan.arch}, the device is {target}")
    if not plan.made_for(op.plan_source(target.kind, plan.configs)):
        raise UnsuitedPlan(f"plan {plan.name} was tuned with another version of the kernel: compile the model again")
    for config in plan.configs:
        if config is None:
            continue
        space = op.kernel_source(target.kind, config).space
        if why := space.refusal(config, plan.problem, _ANY_TOKENS):
            raise UnsuitedPlan(f"config {config} of plan {plan.name} is not of the search space: {why}")
    kernels: dict[Config, Kernel] = {}
    variants = []
    for tokens, config in plan.buckets:
        if config is None:
            variants.append(Variant(tokens, None, LaunchShape()))
            continue
        if config not in kernels:
            kernels[config] = load_kernel(op, plan.problem, config, device)
        variants.append(Variant(tokens, kernels[config], op.launch_shape(plan.problem, config)))
    return BoundPlan(op, device, op.binding(plan.problem), tuple(variants))


def resolve_plan(op: FusedOp, problem: Problem, target: Target) -> Plan:
    """The plan of a call that names none: the database's winners, else the op's default configs; then the problem is
    noted there, for ``autofuse tune --captured``, at all T: no later call comes by here.

    Raises DatabaseError, UnsupportedCall.
    """
    # Here: compiled graphs bring their plans and never need the database.
    from autofuse.cache_db import Captured, Snapshot, default_path
    from autofuse.cache_db.notebook import notebook

    winners = Snapshot.load(None, target).buckets(problem, *op.source_hashes(target.kind))
    buckets = tuple((winner.tokens, winner.config) for winner in winners)
    if not buckets:
        if why := notebook.write(default_path(), [Captured(target, problem, RANGE_BUCKETS[0], RANGE_BUCKETS[-1])]):
            logger.warning(why)
        buckets = tuple((tokens, op.default_config(target.kind, problem, tokens)) for tokens in RANGE_BUCKETS)
    return Plan(target.arch, problem, buckets)


class _PythonDispatcher:
    """One op's implementation in Python: binds what is called for the first time, and launches what is bound."""

    def __init__(self, op: FusedOp, registry: OpRegistry) -> None:
        self._op = op
        self._registry = registry
        self._bound: dict[tuple[str, torch.device], list[BoundPlan]] = {}
        self._refused: set[Hashable] = set()
        self._warned: set[str] = set()

    def __call__(self, args: Sequence[Any], plan: str) -> tuple[torch.Tensor, ...]:
        """Runs a call whose plan was split off."""
        device = next(arg.device for arg in args if isinstance(arg, torch.Tensor))
        known = self._bound.setdefault((plan, device), [])
        for each in known:
            if each.binding.accepts(args):
                self._check_indices(args, device, CHECK_INDICES)
                return each(*args)
        kind = (
            plan,
            *((arg.dtype, arg.device, arg.shape[1:]) if isinstance(arg, torch.Tensor) else arg for arg in args),
        )
        if kind in self._refused:
            self._check(args)
            self._check_indices(args, device, CHECK_INDICES)
            return self._op.reference(*args)
        bound = self._bind(plan, args, device)
        self._check_indices(args, device, on_gpu=True)  # while binding takes its time anyway
        if bound is None or not bound.binding.accepts(args):
            self._refused.add(kind)  # the reasons were said once, and need no second search
            return self._op.reference(*args)
        known.append(bound)
        self._registry.remember(bound, plan)
        return bound(*args)

    def _check(self, args: Sequence[Any]) -> None:
        """Raises BadInput for arguments that make no sense together; what is only unsupported passes."""
        with suppress(UnsupportedCall):
            self._op.problem_of(*args)

    def _check_indices(self, args: Sequence[Any], device: torch.device, on_gpu: bool) -> None:
        """Raises BadInput for positions and slots that do not exist; on a GPU, where that means waiting for it, only
        ``on_gpu``, and not while a CUDA graph is captured.
        """
        if device.type != "cpu" and (not on_gpu or torch.cuda.is_current_stream_capturing()):
            return
        self._op.check_indices(args)

    def _bind(self, text: str, args: Sequence[Any], device: torch.device) -> BoundPlan | None:
        op = self._op
        try:
            problem = op.problem_of(*args)
            plan = Plan.parse(text) if text else resolve_plan(op, problem, target_of(device))
            if plan.problem != problem:
                raise UnsuitedPlan(f"the plan is for {plan.problem}, the call is {problem}")
            return bind_plan(op, plan, device)
        except BadInput:
            raise
        except UnsuitedPlan as fault:
            self._warn(fault)
        except UnsupportedCall as reason:
            logger.info("%s runs its reference: %s", op.name, reason)
        except AutofuseError as error:
            self._warn(error)
        return None

    def _warn(self, error: AutofuseError) -> None:
        """One warning per cause, however many kinds of calls meet it."""
        if str(error) not in self._warned:
            self._warned.add(str(error))
            logger.warning("%s runs its reference: %s", self._op.name, error)


class OpRegistry:
    """The ops as PyTorch knows them.

    ``define`` registers each op with ``Library.define`` + ``impl``, in Python: 3.5 µs a call, against 10 to 15 for
    ``torch.library.custom_op``. ``go_native`` puts the native dispatcher over that, where it can be had.
    """

    def __init__(self) -> None:
        self._library = torch.library.Library("autofuse", "FRAGMENT")
        self._bound: list[tuple[BoundPlan, str]] = []
        self._native: NativeDispatcher | None = None
        self._tried_native = False

    def define(self) -> None:
        """Defines every op in ``torch.ops.autofuse``. Called once, when autofuse is imported."""
        for op in OPS.values():
            self._define(op)

    def add(self, op: FusedOp) -> None:
        """Makes an op of one's own known, to PyTorch and to the tuner.

        The tuner's worker process knows it by importing the module that the op's class is in: importing that module
        must add the op, and it must not be ``__main__``. Raises BadInput for a name that is taken.
        """
        if op.name in OPS:
            raise BadInput(f"there is an op {op.name!r} already")
        self._define(op)
        OPS[op.name] = op
        if self._native is not None:
            self._native.register(op, _NATIVE_KEYS)

    def _define(self, op: FusedOp) -> None:
        implementation = _PythonDispatcher(op, self)
        self._library.define(op.name + op.schema, tags=(torch.Tag.pt2_compliant_tag,))
        self._library.define(f"_unbound_{op.name}{op.schema_without_plan}")
        torch.library.register_fake(f"autofuse::{op.name}", _fake(op), lib=self._library)
        self._library.impl(op.name, self._as_pytorch_op(op, implementation), _PYTHON_KEY)
        self._library.impl(f"_unbound_{op.name}", self._for_native(op, implementation), _PYTHON_KEY)

    def go_native(self) -> bool:
        """Switches to the native dispatcher if it can be had; True if calls are native now. Cheap after the first
        time.
        """
        if not self._tried_native:
            self._tried_native = True
            self._native = None if CHECK_INDICES else load_native()
            if self._native is not None:
                for op in OPS.values():
                    self._native.register(op, _NATIVE_KEYS)
                for bound, plan in self._bound:
                    self._native.bind(bound.op, plan, bound.device, bound.binding, bound.variants)
        return self._native is not None

    def remember(self, bound: BoundPlan, plan: str) -> None:
        """Lets the native dispatcher launch this plan, from now on or from when there is one."""
        self._bound.append((bound, plan))
        if self._native is not None:
            self._native.bind(bound.op, plan, bound.device, bound.binding, bound.variants)

    @staticmethod
    def _as_pytorch_op(op: FusedOp, implementation: _PythonDispatcher) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            try:
                return implementation(*op.split_plan(args))
            except BadInput:
                raise
            except AutofuseError as error:
                raise RuntimeError(str(error)) from error  # what PyTorch's own ops raise

        return call

    def _for_native(self, op: FusedOp, implementation: _PythonDispatcher) -> Callable[..., Any]:
        """For the calls that the native dispatcher hands on.

        PyTorch's C ABI loses an exception's text, so the native dispatcher is told it beforehand.
        """

        def call(*args: Any) -> Any:
            native = self._native
            assert native is not None
            try:
                return implementation(op.with_defaults(args), native.current_plan())
            except KeyboardInterrupt:
                interrupt_main()  # raised again as soon as Python runs
                native.set_error(f"{op.name} was interrupted")
            except BadInput as error:
                native.set_error(str(error), is_value_error=True)
            except Exception as error:
                native.set_error(str(error) if isinstance(error, (AutofuseError, RuntimeError)) else repr(error))
            return tuple(torch.empty(0) for _ in range(op.result_count))  # dropped, in favour of the error

        return call


def _fake(op: FusedOp) -> Callable[..., Any]:
    return lambda *args: op.fake(*op.split_plan(args)[0])


registry = OpRegistry()
