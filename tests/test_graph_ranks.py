"""Ranks of a distributed job: two processes of a gloo group, each with a database of its own, decide alike."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RANK = """
import json, os, sys
from pathlib import Path
sys.path[:0] = {paths!r}
import torch
import torch.distributed as dist
import autofuse.graph.ranks as ranks_module
from autofuse.cache_db import default_path
from autofuse.graph import decide as decide_module
from autofuse.graph.decide import Knowledge
from autofuse.graph.settings import Settings
from autofuse.graph.report_store import last_reports
from deciding import CPU, compared, decide, tuned, winner
from models import HIDDEN, MlaLatents, without_code_generation

rank, folder = int(sys.argv[1]), Path(sys.argv[2])


def decided(name, prepare, tokens=16, options=None, together=True, **more):
    os.environ["AUTOFUSE_DB"] = str(folder / f"{{name}}-{{rank}}.db")
    prepare()
    group = folder / f"{{name}}.group"
    dist.init_process_group("gloo", init_method=f"file://{{group}}", rank=rank, world_size=2)
    made = []
    for each in tokens if isinstance(tokens, list) else [tokens]:
        made.append(decide(each, options, **more))
    answer = {{
        "known": str(Knowledge.of(CPU, Settings.parse(options)[0])),
        "plans": [str(decision.plan) for decision in made],
        "rules": [decision.rule for decision in made],
    }}
    dist.barrier()
    dist.destroy_process_group()
    os.environ.pop("AUTOFUSE_DB_PATH", None)
    print(json.dumps([name, answer]), flush=True)


def only(which, *winners):
    return lambda: tuned(*winners) if rank == which else None


def below():
    # Only the lowest rank is told of a database below its own, which compared a winner with eager PyTorch.
    if rank:
        return
    tuned(winner(4096, 1.5))
    own, lower = os.environ["AUTOFUSE_DB"], str(folder / "site.db")
    os.environ["AUTOFUSE_DB"] = lower
    compared(winner(16, 1.5, baseline="eager"))
    os.environ |= {{"AUTOFUSE_DB": own, "AUTOFUSE_DB_PATH": lower}}
    print(json.dumps(["one process", [str(Knowledge.of(CPU, Settings())), str(decide(16).plan)]]), flush=True)


asked = []


def tune(problem, tokens, device, path, budget_s):
    asked.append(tokens)
    tuned(*(winner(each, 1.5) for each in tokens))


def fails(*_):
    asked.append("fails")
    raise OSError("no process is left")


decided("first only", only(0, winner(16, 1.5)))
decided("each its own", lambda: tuned(winner(16, 1.5 if rank else 0.7)))
decided("eager", lambda: compared(winner(16, 1.5, baseline="eager")) if rank == 0 else None)
decided("eager alone", lambda: tuned(winner(16, 1.5, baseline="eager")) if rank == 0 else None)
decided("damaged", lambda: default_path().write_text("nothing of ours " * 99) if rank == 0 else tuned(winner(16, 1.5)))
decided("tuned", lambda: None, [16, 256, 16], {{"autofuse.untuned": "tune"}}, tune=tune)
print(json.dumps(["asked", asked]), flush=True)
asked.clear()
decided("below", below, [16, 256, 16], {{"autofuse.untuned": "tune"}}, tune=tune)
print(json.dumps(["asked above", asked]), flush=True)
asked.clear()
decided("only below", below)
decided("cannot be tuned", lambda: None, [64], {{"autofuse.untuned": "tune"}}, tune=fails)
print(json.dumps(["failed", asked]), flush=True)



def compiled(name):
    os.environ["AUTOFUSE_DB"] = str(folder / f"{{name}}-{{rank}}.db")
    only(0, winner(4, 1.5))()
    dist.init_process_group("gloo", init_method=f"file://{{folder / name}}.group", rank=rank, world_size=2)
    with without_code_generation(), torch.no_grad():
        torch.compile(MlaLatents(), backend="autofuse")(torch.randn(4, HIDDEN, dtype=torch.bfloat16))
    report = last_reports()[-1]
    print(json.dumps([name, [report.key, *([site.verdict, site.plan] for site in report.sites)]]), flush=True)
    dist.barrier()
    dist.destroy_process_group()


compiled("compiled")
ranks_module.RANK_WAIT_S = 0.3
if rank == 1:  # the lowest comes late
    os.environ["AUTOFUSE_DB"] = str(folder / "late-1.db")
    tuned(winner(16, 1.5))
dist.init_process_group("gloo", init_method=f"file://{{folder / 'late.group'}}", rank=rank, world_size=2)
if rank == 1:
    decision = decide(16)
dist.barrier()
if rank == 0:
    os.environ["AUTOFUSE_DB"] = str(folder / "late-0.db")
    decision = decide(16)
print(json.dumps(["late", {{"plans": [str(decision.plan)]}}]), flush=True)
dist.barrier()
dist.destroy_process_group()
print(json.dumps(["alone", ranks_module.ranks.several]), flush=True)
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    """What each of two ranks says, by name."""
    folder = tmp_path_factory.mktemp("ranks")
    tests = Path(__file__).parent
    program = RANK.format(paths=[str(tests), str(tests.parent / "scripts")])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(rank), str(folder)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
        )
        for rank in range(2)
    ]
    written = [process.communicate(timeout=300)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0]
    return [dict(json.loads(line) for line in text.splitlines()) for text in written]


@pytest.mark.parametrize(
    ("name", "rule", "fuses"),
    [
        ("first only", "exact", True),
        ("each its own", "exact", False),
        ("eager", "exact", True),
        ("eager alone", "baseline", False),
        ("damaged", "untuned", False),
    ],
)
def test_all_decide_by_what_the_lowest_rank_knows(name: str, rule: str, fuses: bool, said: list[dict]) -> None:
    first, second = (each[name] for each in said)
    assert first == second
    assert first["rules"] == [rule]
    assert (first["plans"] != ["None"]) == fuses


def test_what_nobody_measured_is_tuned_by_one_rank_for_all(said: list[dict]) -> None:
    first, second = (each["tuned"] for each in said)
    assert first == second
    assert first["rules"] == ["exact"] * 3
    assert "None" not in first["plans"]
    assert sorted(said[0]["asked"] + said[1]["asked"]) == [[16], [256]]


def test_they_ask_the_databases_below_as_one_process_does(said: list[dict]) -> None:
    first, second = (each["only below"] for each in said)
    assert first == second
    assert [first["known"], *first["plans"]] == said[0]["one process"]
    assert first["rules"] == ["exact"]
    assert "None" not in first["plans"]


def test_what_is_tuned_meanwhile_is_known_above_the_databases_below(said: list[dict]) -> None:
    first, second = (each["below"] for each in said)
    assert first == second
    assert first["rules"] == ["exact"] * 3
    assert first["plans"][0] == first["plans"][2] != "None"
    assert said[0]["asked above"] + said[1]["asked above"] == [[256]]


def test_what_one_rank_cannot_tune_no_other_tries(said: list[dict]) -> None:
    assert said[0]["cannot be tuned"] == said[1]["cannot be tuned"]
    assert said[0]["cannot be tuned"]["plans"] == ["None"]
    assert said[0]["failed"] + said[1]["failed"] == ["fails"]


def test_a_rank_that_comes_late_is_not_waited_for_and_agrees_with_who_was_there(said: list[dict]) -> None:
    assert said[0]["late"] == said[1]["late"]
    assert said[0]["late"]["plans"] != ["None"]


def test_they_compile_the_same_graph(said: list[dict]) -> None:
    """The key covers what Inductor's caches depend on."""
    assert said[0]["compiled"] == said[1]["compiled"]
    _, *sites = said[0]["compiled"]
    assert [verdict for verdict, _ in sites] == ["fused"]


def test_without_a_group_nobody_is_asked(said: list[dict]) -> None:
    assert [each["alone"] for each in said] == [False, False]
