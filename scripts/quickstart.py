#!/usr/bin/env python3
"""The main job, end to end: looks for what can be fused in Hugging Face transformers' DeepSeek-V3, tunes that on this
machine, compiles the model with it, and shows what was fused, what was left alone and why, how far the results are from
eager ones, and what it took before and after.

    python scripts/quickstart.py

The model has random weights and few, small layers, but DeepSeek-V3's own latent widths and shapes of heads. What is
tuned or compiled already is not tuned or compiled again.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

import autofuse
from autofuse.cli.app import run
from autofuse.cli.output import print_table
from autofuse.graph.report import GraphReport
from autofuse.graph.report_store import last_reports
from autofuse.targets import parse_device, target_of

TOKENS = {"decode": 1, "prefill": 1024}
LAYERS = 3
VOCABULARY = 1024
MOST_ROUNDS = 200
ROUNDS_S = 8.0  # of measuring each call
OURS: dict[str, Any] = {"backend": "autofuse", "dynamic": False}  # of torch.compile

Call = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Outcome:
    """One call of the model: per backend its latency in µs (medians), and the largest difference from eager."""

    latency_us: dict[str, float]
    difference: dict[str, float]


def main() -> None:
    begin = time.perf_counter()
    device = parse_device("auto")
    target = target_of(device)
    model = deepseek_v3(device)
    ids = {name: torch.arange(tokens, device=device).reshape(1, -1) % VOCABULARY for name, tokens in TOKENS.items()}
    heading(f"1. autofuse.explain(model, ...): DeepSeek-V3, {LAYERS} small layers, bf16")
    for name, tokens in TOKENS.items():
        with torch.no_grad():
            found = autofuse.explain(torch.compile(model, **OURS), input_ids=ids[name], use_cache=False)
        print(f"{name}, T={tokens}: {found.sites} sites, {found.fused} of them tuned and faster fused", flush=True)

    heading(f"2. Tune what was found and is not tuned, for {target}")
    command = ["tune", "--captured", "--effort", "quick", "--device", str(device)]
    print(f"$ autofuse {' '.join(command)}", flush=True)
    if code := run(command):
        sys.exit(code)

    heading('3. torch.compile(model, backend="autofuse")')
    outcomes = {}
    for name, tokens in TOKENS.items():
        before = last_reports()
        calls = backends(model, ids[name])
        differences = compare(calls)
        reports = [report for report in last_reports() if not any(report is other for other in before)]
        show_sites(f"{name}, T={tokens}", reports)
        outcomes[name] = Outcome(interleaved_medians(calls, device), differences)

    heading("4. Before and after")
    show_outcomes(outcomes, device)
    print(f"All of this took {time.perf_counter() - begin:.0f} s.")


def deepseek_v3(device: torch.device) -> torch.nn.Module:
    """transformers' DeepSeek-V3 with random weights: DeepSeek-V3's latent widths and heads' shapes, all else small."""
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=512,
        num_hidden_layers=LAYERS,
        first_k_dense_replace=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=1536,
        kv_lora_rank=512,
        attn_implementation="sdpa",
    )
    return DeepseekV3ForCausalLM(config).to(device=device, dtype=torch.bfloat16).eval()


def backends(model: torch.nn.Module, ids: torch.Tensor) -> dict[str, Call]:
    """The model's call, by who runs it; the compiled ones for the shape of ``ids``."""

    def call(function: Callable[..., Any]) -> Call:
        @torch.no_grad()
        def logits() -> torch.Tensor:
            return function(input_ids=ids, use_cache=False).logits

        return logits

    plain = torch.compile(model, dynamic=False)
    return {"eager": call(model), "torch.compile": call(plain), "autofuse": call(torch.compile(model, **OURS))}


def compare(calls: dict[str, Call]) -> dict[str, float]:
    """Compiles what needs compiling; the largest difference of the logits from eager ones."""
    torch.compiler.reset()  # of the shape before
    eager = calls["eager"]().float()
    differences = {}
    for name, call in calls.items():
        begin = time.perf_counter()
        differences[name] = (call().float() - eager).abs().max().item()
        if name != "eager":
            print(f"{name}: first call, with compilation, {time.perf_counter() - begin:.1f} s", flush=True)
    return differences


def interleaved_medians(calls: dict[str, Call], device: torch.device) -> dict[str, float]:
    """Median latency of one call in µs; the calls take turns, so a clock that drifts drifts for all."""
    rounds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(3):
        for call in calls.values():
            call()
    end = time.perf_counter() + ROUNDS_S
    while time.perf_counter() < end and len(rounds["eager"]) < MOST_ROUNDS:
        for name, call in calls.items():
            synchronize(device)
            start = time.perf_counter_ns()
            call()
            synchronize(device)
            rounds[name].append((time.perf_counter_ns() - start) / 1e3)
    return {name: statistics.median(times) for name, times in rounds.items()}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def show_sites(title: str, reports: list[GraphReport]) -> None:
    sites = [site for report in reports for site in report.sites]
    print(f"\n{title}: {sum(site.fused for site in sites)} of {len(sites)} sites fused")
    for site in sites:
        verdict = f"fused, plan {site.plan}" if site.fused else "left alone"
        print(f"  {site.where or site.source}: {site.op} {verdict}")
    for site in {(site.plan, site.reason): site for site in sites}.values():
        subject = f"plan {site.plan}: {site.plan_text}" if site.fused else f"left alone: {site.problem}"
        print(f"  {subject}\n    {site.rule}: {site.reason}")
    for report in reports:
        for miss in report.near_misses:
            print(f"  {miss}")
        cached = "; compiled earlier, taken from Inductor's cache" if report.from_cache else ""
        print(f"  {report.pass_seconds * 1e3:.1f} ms in the pass{cached}")
    print(flush=True)


def show_outcomes(outcomes: dict[str, Outcome], device: torch.device) -> None:
    rows = []
    for name, outcome in outcomes.items():
        latency, difference = outcome.latency_us, outcome.difference
        rows.append(
            [
                f"{name}, T={TOKENS[name]}",
                *(f"{latency[backend]:.0f}" for backend in ("eager", "torch.compile", "autofuse")),
                f"{latency['torch.compile'] / latency['autofuse']:.3f}×",
                *(f"{difference[backend]:.4f}" for backend in ("torch.compile", "autofuse")),
            ]
        )
    columns = ["call", ">eager µs", ">torch.compile µs", ">autofuse µs", ">torch.compile ÷ autofuse"]
    differences = [">difference from eager: torch.compile", ">autofuse"]
    print_table(f"{LAYERS} layers on {target_of(device)}, interleaved medians", [*columns, *differences], rows)


def heading(text: str) -> None:
    print(f"\n{text}\n{'=' * len(text)}", flush=True)


if __name__ == "__main__":
    main()
