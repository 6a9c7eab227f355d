"""One case of scripts/model_table.py: a model compiled in one way, without autofuse and with it, beside eager."""

from __future__ import annotations

import copy
import itertools
import logging
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from autofuse.graph.backend import Watch, watching
from autofuse.graph.report import GraphReport
from hf_models import MODELS, VOCABULARY, dynamic_cache, static_cache

__all__ = ["DTYPES", "GRADS", "MODES", "SHAPES", "SLACK", "Case", "Outcome", "all_cases", "quiet", "run_case"]

MODES = ("prefill", "decode, StaticCache", "decode, DynamicCache")
SHAPES = ("static", "mark_dynamic", "dynamic=True")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
GRADS = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
LEGAL_ONLY = {"autofuse.level": "O3", "autofuse.untuned": "fuse"}
"""Every fusion is on and needs no measurement: only what is legal decides."""

REPEATS = 8
"""Calls of each size: so many that chance is small beside SLACK."""
SLACK = 1.15
"""How much larger a difference may be than the one it is measured by. Both are rounding errors of the same sums, which
fall out otherwise; sampled by the calls of a case, their ratio scatters by some hundredths.
"""


@dataclass(frozen=True)
class Case:
    """A model and how it is compiled and called. Its text is all that it takes to run it again."""

    model: str
    mode: str
    shapes: str
    dtype: str
    grad: str

    def __str__(self) -> str:
        return "|".join((self.model, self.mode, self.shapes, self.dtype, self.grad))

    @classmethod
    def parse(cls, text: str) -> Case:
        """Reads ``str`` back. Raises ValueError."""
        parts = text.split("|")
        known = (MODELS, MODES, SHAPES, DTYPES, GRADS)
        if len(parts) != len(known) or any(part not in names for part, names in zip(parts, known, strict=True)):
            raise ValueError(f"{text!r} is no case: MODEL|MODE|SHAPES|DTYPE|GRAD")
        return cls(*parts)

    @property
    def calls(self) -> list[Call]:
        """Of two sizes where shapes are dynamic."""
        if self.mode == "prefill":
            sizes = [(2, 8), (2, 8 if self.shapes == "static" else 11)]
        else:
            sizes = [(2, 1), (2 if self.shapes == "static" else 3, 1)]
        # A StaticCache takes more tokens without another graph, to one that grows every length is another.
        stays = "StaticCache" in self.mode
        return [Call(*size, continues=stays and again) for size in sizes for again in [False] + [True] * (REPEATS - 1)]


@dataclass(frozen=True)
class Call:
    """One call of a model.

    Attributes:
        rows: requests in the batch.
        tokens: of each.
        continues: with the cache of the call before, else with one of its own.
    """

    rows: int
    tokens: int
    continues: bool


@dataclass
class Outcome:
    """What became of a case.

    Differences are those of one tensor in all calls together (the logits, a layer's keys or values): root mean squares,
    relative to that of what eager computed. It is the tensor that comes nearest to what is allowed, or is furthest
    beyond.

    Attributes:
        graphs: that Dynamo made, with autofuse.
        sites: fusion → [found, fused], in all of them.
        reasons: why something was left alone → how often.
        tensor: its name.
        differs, plain: from eager, with autofuse and by torch.compile alone.
        error, plain_error, eager_error: from the same model in fp64, with autofuse, by torch.compile alone, and eager.
        failure: why there are no differences; "" if there are.
    """

    graphs: int = 0
    sites: dict[str, list[int]] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)
    tensor: str = ""
    differs: float = 0.0
    plain: float = 0.0
    error: float = 0.0
    plain_error: float = 0.0
    eager_error: float = 0.0
    failure: str = ""

    @property
    def right(self) -> bool:
        """Whether it compiles and differs by no more than it may. NaN differs."""
        return not self.failure and self.excess <= SLACK

    @property
    def excess(self) -> float:
        """How many times as far from eager as torch.compile alone, or from fp64 as eager, whichever is less."""
        return min(_ratio(self.differs, self.plain), _ratio(self.error, self.eager_error))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def _ratio(difference: float, by: float) -> float:
    if math.isnan(difference):
        return math.inf
    return difference / by if by else (math.inf if difference else 0.0)


def all_cases(models: Sequence[str]) -> list[Case]:
    """All ways to compile these models. Those that share most of what Inductor generates follow each other."""
    return [
        Case(model, mode, shapes, dtype, grad)
        for model, dtype, mode, shapes, grad in itertools.product(models, DTYPES, MODES, SHAPES, GRADS)
    ]


def run_case(case: Case) -> Outcome:
    """Compiles and compares. Whatever is raised on the way is the outcome's ``failure``."""
    outcome = Outcome()
    try:
        model = MODELS[case.model](DTYPES[case.dtype])
        eager = _results(case, model, model)
        exact = _exact_results(case, model)
        plain = _results(case, model, _compiled(case, model, backend="inductor"))
        watch = Watch()
        token = watching.set(watch)
        try:
            fused = _results(case, model, _compiled(case, model, backend="autofuse", options=LEGAL_ONLY))
        finally:
            watching.reset(token)
        _count(watch.reports, outcome)
        _compare(fused, plain, eager, exact, outcome)
    except Exception as error:  # whatever Dynamo, Inductor, a compiler or the model raises
        outcome.failure = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return outcome


class _InFp64(TorchFunctionMode):
    """Where a model asks for fp32, as in its norms and rotary embeddings, it gets fp64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(lambda v: torch.float64 if v is torch.float32 else v, (args, kwargs or {}))
        return (torch.Tensor.double if func is torch.Tensor.float else func)(*args, **kwargs)


def _exact_results(case: Case, model: nn.Module) -> dict[str, torch.Tensor]:
    """What ``model`` would compute if nothing but its weights were rounded."""
    exact: Any = copy.deepcopy(model).double()
    exact.set_experts_implementation("eager")  # the others have no products in fp64
    with _InFp64():
        return _results(case, exact, exact)


def _compiled(case: Case, model: nn.Module, **settings: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    # With None, only what is marked is dynamic, and it is an error if that cannot be.
    dynamic = {"static": False, "mark_dynamic": None, "dynamic=True": True}[case.shapes]
    return torch.compile(model, dynamic=dynamic, **settings)


def _results(case: Case, model: nn.Module, call: Callable[..., Any]) -> dict[str, torch.Tensor]:
    """The logits of all calls of ``call``, and what a layer's cache holds after each: name → numbers in a row."""
    results: dict[str, list[torch.Tensor]] = {}
    cache = None
    with GRADS[case.grad]():
        for step, made in enumerate(case.calls):
            if not made.continues:
                cache = _cache(case, model, made.rows, seed=100 + step)
            ids = _ids(made.rows, made.tokens, seed=step)
            if case.shapes == "mark_dynamic":
                _mark(case, ids, cache)
            found = {"logits": call(ids, past_key_values=cache, use_cache=True).logits}
            for number, layer in enumerate(cache.layers):
                found |= {f"keys of layer {number}": layer.keys, f"values of layer {number}": layer.values}
            for name, tensor in found.items():
                results.setdefault(name, []).append(tensor.detach().double().clone().flatten())
    return {name: torch.cat(tensors) for name, tensors in results.items()}


def _ids(rows: int, tokens: int, seed: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def _cache(case: Case, model: nn.Module, rows: int, seed: int) -> Any:
    """Empty for a prefill, else holding a prompt."""
    if case.mode == "prefill":
        return static_cache(model)
    make = static_cache if "StaticCache" in case.mode else dynamic_cache
    return make(model, _ids(rows, 5, seed))


def _mark(case: Case, ids: torch.Tensor, cache: Any) -> None:
    """Marks what differs from call to call: a prompt's length, or a decode step's batch and its cache's length."""
    torch._dynamo.mark_dynamic(ids, 1 if case.mode == "prefill" else 0)
    if case.mode == "prefill":
        return
    for layer in cache.layers:
        for tensor in (layer.keys, layer.values):
            torch._dynamo.mark_dynamic(tensor, [0, 2] if "DynamicCache" in case.mode else 0)


def _compare(
    fused: Mapping[str, torch.Tensor],
    plain: Mapping[str, torch.Tensor],
    eager: Mapping[str, torch.Tensor],
    exact: Mapping[str, torch.Tensor],
    outcome: Outcome,
) -> None:
    """Takes the numbers of the tensor whose excess is the largest."""
    worst = -1.0
    for name, want in eager.items():
        judged = Outcome(
            tensor=name,
            differs=_distance(fused[name], want, want),
            plain=_distance(plain[name], want, want),
            error=_distance(fused[name], exact[name], want),
            plain_error=_distance(plain[name], exact[name], want),
            eager_error=_distance(want, exact[name], want),
        )
        if judged.excess > worst:
            worst = judged.excess
            for part in ("tensor", "differs", "plain", "error", "plain_error", "eager_error"):
                setattr(outcome, part, getattr(judged, part))


def _distance(one: torch.Tensor, other: torch.Tensor, unit: torch.Tensor) -> float:
    """Root mean square of the difference, in root mean squares of ``unit``. Raises ValueError for other shapes."""
    if one.shape != other.shape:
        raise ValueError(f"{list(one.shape)} numbers are compared with {list(other.shape)}")
    return ((one - other).norm() / unit.norm()).item()


def _count(reports: Sequence[GraphReport], outcome: Outcome) -> None:
    outcome.graphs = len(reports)
    reasons: Counter[str] = Counter()
    for report in reports:
        for site in report.sites:
            counts = outcome.sites.setdefault(site.fusion, [0, 0])
            counts[0] += 1
            counts[1] += site.fused
            if not site.fused:
                reasons[f"{site.fusion}: {general(site.reason)}"] += 1
        for miss in report.near_misses:
            reasons[f"no {miss.block}: {general(miss.reason)}"] += 1
        if report.note:
            reasons[f"note: {general(report.note)}"] += 1
    outcome.reasons = dict(sorted(reasons.items()))


def general(reason: str) -> str:
    """A reason without the numbers of its nodes, so that those of all layers are one."""
    return re.sub(r"\b([a-z][a-z_]*?)_\d+\b", r"\1", reason)


@contextmanager
def quiet() -> Iterator[None]:
    """Without what Dynamo and transformers warn of while these models are compiled."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("transformers").setLevel(logging.ERROR)
        yield
