"""Decisions on one site, from winners that a test makes up."""

from __future__ import annotations

from dataclasses import replace

import torch
from models import KV_RANK, Q_RANK

from autofuse.cache_db import Baseline, TunedDatabase, Winner, default_path
from autofuse.graph.decide import Decider, Knowledge
from autofuse.graph.fusions import Site
from autofuse.graph.fusions.mla_dual_rms_norm import MlaDualRMSNorm
from autofuse.graph.settings import Settings
from autofuse.ops import get_op
from autofuse.targets import target_of

CPU = torch.device("cpu")
PROBLEM = get_op("mla_dual_rms_norm").make_problem(
    dtype="bf16", q_lora_rank=Q_RANK, kv_lora_rank=KV_RANK, cast_before_weight=True
)


def winner(tokens, gain, source_hash=None, baseline="compile", **changes):
    op = get_op("mla_dual_rms_norm")
    made = Winner(
        target=target_of(CPU),
        problem=PROBLEM,
        tokens=tokens,
        config=op.default_config("cpu", PROBLEM, tokens),
        source_hash=source_hash or op.source_hash("cpu"),
        time_us=10.0,
        spread_us=0.1,
        baseline=baseline,
        baseline_us=10.0 * gain,
        gain=gain,
        gain_low=gain - 0.05,
        gain_high=gain + 0.05,
    )
    return replace(made, **changes)


def winner_of(problem, tokens, saved_us):
    """Any op's default config, which takes 10 µs, and so many less than the unfused code."""
    op = get_op(problem.op)
    config = op.default_config("cpu", problem, tokens)
    return winner(tokens, 1 + saved_us / 10, op.source_hash("cpu"), problem=problem, config=config)


def tuned(*winners):
    with TunedDatabase(default_path()) as database:
        for one in winners:
            database.record_winner(one)


def compared(*winners):
    """The code that Inductor would generate was measured for these buckets, and was slower than eager PyTorch."""
    with TunedDatabase(default_path()) as database:
        for one in winners:
            slower = one.baseline_us * 1.1
            database.record_baseline(Baseline(one.target, one.problem, one.tokens, "compile", slower, 0.1))
    tuned(*winners)


def decide(tokens, options=None, refusal=None, tune=None, **changes):
    """The decision on a site of ``tokens`` tokens."""
    settings, _ = Settings.parse(options)
    params = {"dtype": torch.bfloat16, "q_lora_rank": Q_RANK, "kv_lora_rank": KV_RANK, "cast_before_weight": True}
    site = Site(
        fusion="fuse_mla_dual_rms_norm",
        op="mla_dual_rms_norm",
        params=tuple({**params, **changes}.items()),
        tokens=tokens,
        device=CPU,
        blocks=(),
        refusal=refusal,
    )
    decider = Decider(settings, {CPU: Knowledge.of(CPU, settings)}, *([tune] if tune else []))
    decision = decider.decide(MlaDualRMSNorm(), site)
    decider.remember_untuned()
    return decision


def buckets(decision):
    return [tokens for tokens, _ in decision.plan.buckets]
