"""Search spaces: what a constraint refuses is never completed, and nothing else is left out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from autofuse.ops import OPS, Config, FusedOp, Problem, SearchSpace
from autofuse.ops.space import Constraint, Tunable

ANY = Problem("any", ())


def by_trying(space: SearchSpace, problem: Problem, tokens: int) -> Iterator[Config]:
    """Every combination, in the space's order, and what it refuses left out."""
    names = [tunable.name for tunable in space.tunables]
    for values in itertools.product(*(tunable.values for tunable in space.tunables)):
        config = Config.of(dict(zip(names, values, strict=True)))
        if space.refusal(config, problem, tokens) is None:
            yield config


def combinations(space: SearchSpace) -> int:
    count = 1
    for tunable in space.tunables:
        count *= len(tunable.values)
    return count


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_a_space_has_what_its_constraints_leave(op: FusedOp) -> None:
    problem = op.sweep_problems()[0]
    spaces = [kernel.space for kind in op.kernels for kernel in op.kernel_sources(kind)]
    small = [space for space in spaces if combinations(space) <= 20_000]
    assert small
    for space in small:
        for tokens in (1, 64):
            assert list(space.configs(problem, tokens)) == list(by_trying(space, problem, tokens))


def test_a_constraint_may_read_a_config_in_any_way() -> None:
    tunables = (Tunable("A", (1, 2, 3), ""), Tunable("B", (1, 2), ""), Tunable("C", (0, 1), ""))
    constraints = (
        Constraint("what is no tunable has its usual value", lambda c, p, t: c.get("WARP_SIZE", 32) == 32),
        Constraint("there is a B", lambda c, p, t: "B" in c and "D" not in c and len(c) == 3),
        Constraint("all at once", lambda c, p, t: sum(c.values()) != 5),
        Constraint("hashed", lambda c, p, t: hash(c) == hash(Config.of(c))),
        Constraint("compared", lambda c, p, t: c == Config.of(c) and c != Config.of(A=1, B=1, C=0)),
        Constraint("one or the other", lambda c, p, t: c["C"] == 0 or c["A"] == t),
    )
    space = SearchSpace(tunables, constraints)
    found = list(space.configs(ANY, 2))
    assert found == list(by_trying(space, ANY, 2))
    assert len(found) == 5
    assert all(type(config) is Config for config in found)


def test_what_breaks_a_constraint_is_not_completed() -> None:
    seen = []
    first = Constraint("A is 1", lambda c, p, t: c["A"] == 1)
    last = Constraint("C is looked at", lambda c, p, t: bool(seen.append((c["A"], c["C"]))) or True)
    space = SearchSpace(tuple(Tunable(name, (1, 2, 3), "") for name in "ABC"), (last, first))
    assert len(list(space.configs(ANY, 1))) == 9
    assert {a for a, _ in seen} == {1}


def test_a_space_without_tunables_has_one_config() -> None:
    assert list(SearchSpace(()).configs(ANY, 1)) == [Config.of()]
