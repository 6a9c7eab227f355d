"""The emulator finds what is wrong with a kernel: each mutation of a right kernel's source is caught."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import Future

import pytest
import torch
from emulation import EmulationError, run_ahead, unavailable, verify, wanted
from mutations import MUTATIONS, Mutation

from autofuse.ops import Config, Problem, get_op

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "can be emulated")

Launch = tuple[Problem, Config, int, int]  # and the warp size, and T


def launch(mutation: Mutation) -> Launch:
    subject = mutation.subject
    return subject.problem, Config.of(subject.config, **mutation.config), mutation.warp_size, subject.tokens


def run(launch: Launch, edits: tuple[tuple[str, str, str], ...] = ()) -> None:
    problem, config, warp_size, tokens = launch
    op = get_op(problem.op)
    args = op.check_args(problem, tokens, torch.device("cpu"), torch.Generator().manual_seed(0))
    verify(op, problem, config, args, warp_size=warp_size, edits=edits)


def run_mutation(mutation: Mutation) -> None:
    run(launch(mutation), ((mutation.file, mutation.old, mutation.new),))


@pytest.fixture(scope="module")
def mutated(request: pytest.FixtureRequest) -> Iterator[dict[Mutation, Future[None]]]:
    with run_ahead(run_mutation, wanted(request, "mutation")) as outcomes:
        yield outcomes


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: re.sub(r"\W+", "-", mutation.name))
def test_is_caught(mutation: Mutation, mutated: dict[Mutation, Future[None]]) -> None:
    with pytest.raises(EmulationError, match=mutation.caught):
        mutated[mutation].result()


@pytest.mark.parametrize("launch", dict.fromkeys(map(launch, MUTATIONS)), ids=str)
def test_the_kernel_itself_passes(launch: Launch) -> None:
    run(launch)
