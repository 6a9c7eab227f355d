"""One case of scripts/model_table.py: a model compiled in one way, without autofuse and with it, beside eager."""

from __future__ import annotations

import itertools
import logging
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from autofuse.graph.backend import Watch, watching
from autofuse.graph.report import GraphReport
from hf_models import MODELS, VOCABULARY, dynamic_cache, static_cache

__all__ = ["DTYPES", "GRADS", "MODES", "SHAPES", "Case", "Outcome", "all_cases", "quiet", "run_case"]

MODES = ("prefill", "decode, StaticCache", "decode, DynamicCache")
SHAPES = ("static", "mark_dynamic", "dynamic=True")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
GRADS = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
LEGAL_ONLY = {"autofuse.level": "O3", "autofuse.untuned": "fuse"}
"""Every fusion is on and needs no measurement: only what is legal decides."""

TIMES_PLAIN = 2.0
UNITS = 4.0
"""A compiled model may differ from eager by ``TIMES_PLAIN`` times what it does without autofuse, or by ``UNITS`` units
in the last place of a tensor's largest value, whichever is more. Both round the same sums, each in other places: which
of the two comes out nearer to eager is chance, and where Inductor happens to round as eager does, it does not differ at
all.
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
    def sizes(self) -> list[tuple[int, int]]:
        """(batch, tokens) of the calls; two sizes where shapes are dynamic."""
        if self.mode == "prefill":
            return [(2, 8)] if self.shapes == "static" else [(2, 8), (2, 11)]
        # A StaticCache takes a second token without another graph.
        steps = [(2, 1), (2, 1)] if "StaticCache" in self.mode else [(2, 1)]
        return steps if self.shapes == "static" else [*steps, (3, 1)]


@dataclass
class Outcome:
    """What became of a case.

    Attributes:
        graphs: that Dynamo made, with autofuse.
        sites: fusion → [found, fused], in all of them.
        reasons: why something was left alone → how often.
        difference, plain: the largest difference from eager, with autofuse and by torch.compile alone, of one tensor (a
            call's logits, a layer's keys or values): the one that comes nearest to what is allowed, or furthest beyond.
        largest: absolute value that eager computed, and ``allowed``: what ``difference`` may be, both of that tensor.
        error: why there are no differences; "" if there are.
    """

    graphs: int = 0
    sites: dict[str, list[int]] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)
    largest: float = 0.0
    difference: float = 0.0
    plain: float = 0.0
    allowed: float = 0.0
    error: str = ""

    @property
    def right(self) -> bool:
        """Whether it compiles and differs by no more than it may. NaN differs."""
        return not self.error and self.difference <= self.allowed

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def all_cases(models: Sequence[str]) -> list[Case]:
    """All ways to compile these models. Those that share most of what Inductor generates follow each other."""
    return [
        Case(model, mode, shapes, dtype, grad)
        for model, dtype, mode, shapes, grad in itertools.product(models, DTYPES, MODES, SHAPES, GRADS)
    ]


def run_case(case: Case) -> Outcome:
    """Compiles and compares. Whatever is raised on the way is the outcome's ``error``."""
    outcome = Outcome()
    try:
        model = MODELS[case.model](DTYPES[case.dtype])
        want = _results(case, model, model)
        plain = _results(case, model, _compiled(case, model, backend="inductor"))
        watch = Watch()
        token = watching.set(watch)
        try:
            got = _results(case, model, _compiled(case, model, backend="autofuse", options=LEGAL_ONLY))
        finally:
            watching.reset(token)
        _count(watch.reports, outcome)
        _compare(got, plain, want, torch.finfo(DTYPES[case.dtype]).eps, outcome)
    except Exception as error:  # whatever Dynamo, Inductor, a compiler or the model raises
        outcome.error = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return outcome


def _compiled(case: Case, model: nn.Module, **settings: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    # With None, only what is marked is dynamic, and it is an error if that cannot be.
    dynamic = {"static": False, "mark_dynamic": None, "dynamic=True": True}[case.shapes]
    return torch.compile(model, dynamic=dynamic, **settings)


def _results(case: Case, model: nn.Module, call: Callable[..., Any]) -> list[torch.Tensor]:
    """The logits of each call of ``call`` and what its cache then holds."""
    results: list[torch.Tensor] = []
    cache, batch = None, 0
    with GRADS[case.grad]():
        for step, (rows, tokens) in enumerate(case.sizes):
            if case.mode == "prefill" or rows != batch:
                cache, batch = _cache(case, model, rows), rows
            ids = _ids(rows, tokens, seed=step)
            if case.shapes == "mark_dynamic":
                _mark(case, ids, cache)
            logits = call(ids, past_key_values=cache, use_cache=True).logits
            held = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
            results += [tensor.detach().double().clone() for tensor in (logits, *held)]
    return results


def _ids(rows: int, tokens: int, seed: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def _cache(case: Case, model: nn.Module, rows: int) -> Any:
    """Empty for a prefill, else holding a prompt."""
    if case.mode == "prefill":
        return static_cache(model)
    make = static_cache if "StaticCache" in case.mode else dynamic_cache
    return make(model, _ids(rows, 5, seed=100))


def _mark(case: Case, ids: torch.Tensor, cache: Any) -> None:
    """Marks what differs from call to call: a prompt's length, or a decode step's batch and its cache's length."""
    torch._dynamo.mark_dynamic(ids, 1 if case.mode == "prefill" else 0)
    if case.mode == "prefill":
        return
    for layer in cache.layers:
        for tensor in (layer.keys, layer.values):
            torch._dynamo.mark_dynamic(tensor, [0, 2] if "DynamicCache" in case.mode else 0)


def _compare(
    got: Sequence[torch.Tensor],
    plain: Sequence[torch.Tensor],
    want: Sequence[torch.Tensor],
    eps: float,
    outcome: Outcome,
) -> None:
    """Takes the numbers of the tensor that is furthest beyond, or nearest to, what it may differ by; NaN is beyond."""
    worst = -1.0
    for mine, theirs, right in zip(got, plain, want, strict=True):
        difference, unfused = (mine - right).abs().max().item(), (theirs - right).abs().max().item()
        largest = right.abs().max().item()
        allowed = max(TIMES_PLAIN * unfused, UNITS * eps * largest)
        ratio = difference / allowed if allowed else difference
        ratio = math.inf if math.isnan(ratio) else ratio
        if ratio > worst:
            worst = ratio
            outcome.difference, outcome.plain, outcome.largest, outcome.allowed = difference, unfused, largest, allowed


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
