"""The backend on a GPU: the same results under CUDA graphs, and plans that outlive their database."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import deepseek

from autofuse.cache_db import TunedDatabase
from autofuse.ops import get_op
from autofuse.tuner.budgets import Effort
from autofuse.tuner.job import Bucket, tune_buckets

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_results_stay_those_of_eager_in_every_mode(mode: str) -> None:
    model = deepseek(3).to(DEVICE)
    ids = torch.arange(16, device=DEVICE).reshape(2, 8)
    torch.compiler.reset()
    options = {"autofuse.untuned": "fuse"}
    if mode != "default":
        options["triton.cudagraphs"] = True
    compiled = torch.compile(model, backend="autofuse", options=options)
    with torch.no_grad():
        for shift in range(4):  # warm-up, recording, replays on other inputs
            moved = (ids + shift) % model.config.vocab_size
            expected = model(input_ids=moved, use_cache=False).logits
            result = compiled(input_ids=moved, use_cache=False).logits.clone()
            torch.testing.assert_close(result, expected, rtol=0.05, atol=0.05)


RUN = """
import json, sys, torch
import autofuse
from autofuse.graph.report_store import last_reports
from torch._dynamo.utils import counters

def norms(latents, q_weight, kv_weight):
    q, kv, _ = latents.split([1536, 512, 64], dim=-1)
    def norm(x, weight):
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
    return norm(q, q_weight), norm(kv, kv_weight)

torch.manual_seed(0)
args = [torch.randn(shape, device="cuda").bfloat16() for shape in ((64, 2112), (1536,), (512,))]
with torch.no_grad():
    results = torch.compile(norms, backend="autofuse")(*args)
    expected = norms(*args)
(report,) = last_reports()
print(json.dumps({
    "plans": [site.plan_text for site in report.sites if site.fused],
    "hits": counters["inductor"]["fxgraph_cache_hit"],
    "right": all(torch.allclose(a.float(), b.float(), rtol=0.02, atol=0.02) for a, b in zip(results, expected)),
}))
"""


def run(environment: dict[str, str]) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", RUN], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_second_process_runs_the_same_plan_and_a_new_winner_makes_a_new_one(
    tmp_path: Path, database_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Effort
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    problem = get_op("mla_dual_rms_norm").make_problem(
        dtype="bf16", q_lora_rank=1536, kv_lora_rank=512, cast_before_weight=True
    )
    with TunedDatabase(database_path) as database:
        tune_buckets([Bucket(problem, 64)], DEVICE, database, tiny)
    environment = dict(os.environ)
    first, second = run(environment), run(environment)
    assert first["right"]
    assert second["right"]
    assert first["hits"] == 0
    assert second["hits"] == 1
    assert first["plans"] == second["plans"] != []

    with TunedDatabase(database_path) as database:
        (winner,) = database.winners()
        other = next(
            trial
            for trial in database.trials(winner.target, problem, 64, winner.source_hash)
            if trial.status == "ok" and trial.config != winner.config
        )
        database.record_winner(type(winner)(**{**winner.__dict__, "config": other.config, "measured_at": ""}))
    third = run(environment)
    assert third["right"]
    assert third["hits"] == 0
    assert str(other.config) in third["plans"][0]
