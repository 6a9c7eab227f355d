"""``autofuse why``: what became of the graphs that were compiled, or how one lookup in the database is answered."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Annotated, Optional

import typer

from autofuse.cache_db import Lookup, Snapshot, TunedDatabase, explain_lookup, rival_of
from autofuse.cli.options import DatabaseOption, DeviceOption, JsonOption
from autofuse.cli.output import print_json
from autofuse.errors import BadInput
from autofuse.models import PRESETS, model_config
from autofuse.ops import FusedOp, Problem, get_op
from autofuse.ops.languages import language_of
from autofuse.ops.problem import shortened, whole_number
from autofuse.targets import parse_device, target_of

__all__ = ["why"]

_MODEL = "deepseek-v3"


def why(
    op: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(help="A fused op, to walk one lookup; without it, the graphs that were compiled last."),
    ] = None,
    keys: Annotated[
        Optional[list[str]],  # noqa: UP045 (typer reads it at run time)
        typer.Argument(help="Parameters of the problem, e.g. q_lora_rank=1536; the others are those of --model."),
    ] = None,
    tokens: Annotated[str, typer.Option(help="T, or a range such as 2..64.")] = "1",
    model: Annotated[str, typer.Option(help="A preset, or a path to a config.json.")] = _MODEL,
    device: DeviceOption = "auto",
    last: Annotated[int, typer.Option(help="Without an op: how many graphs, the latest last.", min=1)] = 10,
    html: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Without an op: write them as one HTML page.", metavar="PATH"),
    ] = None,
    database: DatabaseOption = None,
    json: JsonOption = False,
) -> None:
    """Say what became of each site of a model, and why.

    Without an op: of each site of the graphs that were compiled last on this machine, in any process, where it is in
    the model, whether it is fused, what was measured, or what kept it from being fused.

    With an op: how one lookup is answered, step by step. Would this op be fused here, for this problem and T?

    Example: autofuse why --html report.html

    Example: autofuse why mla_dual_rms_norm dtype=bf16 q_lora_rank=1536 kv_lora_rank=512 --tokens 64
    """
    if op is None:
        _graphs(last, html, json)
        return
    if html is not None:
        raise BadInput("--html shows graphs: leave the op out")
    chosen = get_op(op)
    problem = _problem(chosen, keys or [], model)
    low, high = _range(tokens)
    target = target_of(parse_device(device))
    source_hashes = chosen.source_hashes(target.kind)
    snapshot = Snapshot.load(database, target)
    lines = explain_lookup(snapshot, problem, low, high, *source_hashes)
    answer = snapshot.lookup(problem, low, high, *source_hashes)
    lines += _languages(snapshot, answer)
    if json:
        facts = {
            "target": target,
            "problem": problem,
            "tokens": [low, high],
            "rule": answer.rule,
            "reason": answer.reason,
        }
        print_json({**facts, "beats_baseline": answer.beats_baseline, "winners": answer.winners, "steps": lines})
    else:
        typer.echo("\n".join(lines))


def _languages(snapshot: Snapshot, answer: Lookup) -> list[str]:
    """A line for each winner that answers and was compared with a kernel in another language."""
    if not answer.winners:
        return []
    path = next(islice(snapshot.layers(), answer.layer, None)).path
    with TunedDatabase(path, read_only=True) as database:
        rivals = [(winner, rival_of(database, winner)) for winner in answer.winners]
    return [f"language: T={w.tokens}: {language_of(w.config)}, {rival}: {rival.config}" for w, rival in rivals if rival]


def _graphs(last: int, html: Path | None, json: bool) -> None:
    """The reports that are kept beside Inductor's cache."""
    from autofuse.graph.report_html import html_page
    from autofuse.graph.report_store import store

    graphs = store.recent(last)
    if html is not None:
        html.write_text(html_page(graphs, "What autofuse did"), encoding="utf-8")
        typer.echo(f"{html}: {len(graphs)} graphs", err=json)
    if json:
        print_json({"graphs": [graph.as_dict() for graph in graphs]})
    elif html is None:
        typer.echo("\n\n".join(map(str, graphs)) or f"No graph was compiled yet: {store.folder} holds no report.")


def _problem(op: FusedOp, keys: list[str], model: str) -> Problem:
    """What ``--model`` makes of ``op`` in bf16, with some parameters replaced. Raises BadInput, UnsupportedCall."""
    from autofuse.tuner.api import checked_problem

    problems = op.model_problems(model_config(model), "bf16")
    if not problems:
        raise BadInput(f"model {model!r} has no use for {op.name}; the presets are {', '.join(PRESETS)}")
    params = dict(problems[0].params)
    for key in keys:
        name, equals, value = key.partition("=")
        if not equals or not value:
            raise BadInput(f"{key!r} is not of the form name=value")
        if name not in params:
            raise BadInput(f"{op.name} has no parameter {name!r}; it has {', '.join(params)}")
        number = whole_number(value)
        if isinstance(params[name], int) and number is None:
            raise BadInput(f"{shortened(key)}: {name} is a whole number of at most 18 digits")
        params[name] = number if isinstance(params[name], int) and number is not None else value
    return checked_problem(Problem(op.name, tuple(params.items())))


def _range(text: str) -> tuple[int, int]:
    low, dots, high = text.partition("..")
    first, last = whole_number(low), whole_number(high if dots else low)
    if first is None or last is None or first > last:
        raise BadInput(f"tokens {shortened(text)} is neither a whole number nor a range such as 2..64")
    return first, last
