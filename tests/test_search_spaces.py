"""Search spaces: what a constraint refuses is never completed, and nothing else is left out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from autofuse.ops import OPS, Config, FusedOp, Problem, SearchSpace, get_op
from autofuse.ops.space import Constraint, Tunable
from autofuse.tuner.api import model_buckets

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


def test_wishes_come_true_together_or_one_after_the_other() -> None:
    tunables = (Tunable("A", (0, 1), ""), Tunable("B", (0, 1), ""), Tunable("C", (0, 1), ""))
    space = SearchSpace(tunables, (Constraint("B goes with A", lambda c, p, t: c["B"] <= c["A"]),))
    plain = Config.of(A=0, B=0, C=0)
    assert space.towards(plain, {"B": 1, "A": 1}, ANY, 1) == Config.of(A=1, B=1, C=0)  # alone, B would be refused
    assert space.towards(plain, {"B": 1, "C": 1}, ANY, 1) == Config.of(A=0, B=0, C=1)
    assert space.towards(plain, {"A": 1, "C": 7}, ANY, 1) == Config.of(A=1, B=0, C=0)
    assert space.towards(plain, {"X": 1, "A": 1}, ANY, 1) == Config.of(A=1, B=0, C=0)
    assert space.towards(plain, {}, ANY, 1) == plain


TOKENS = (1, 2, 16, 64, 200, 1024, 4096, 8192)


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_guesses_are_of_the_space_whatever_the_problem(op: FusedOp) -> None:
    kernels = [op.kernels["cuda"], *(kernel for kind, kernel in op.triton_kernels.items() if kind == "cuda")]
    for kernel, problem, tokens in itertools.product(kernels, op.sweep_problems(), TOKENS):
        default, *guessed = kernel.first_configs(problem, tokens)
        assert default == kernel.default(problem, tokens)
        assert all(kernel.space.refusal(config, problem, tokens) is None for config in guessed)


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_defaults_are_of_the_space_whatever_the_problem(op: FusedOp) -> None:
    spaces = [*op.kernels.values(), *op.triton_kernels.values()]
    refused = [
        (kernel.file, str(problem), tokens, why)
        for kernel, problem, tokens in itertools.product(spaces, op.sweep_problems(), TOKENS)
        if (why := kernel.space.refusal(kernel.default(problem, tokens), problem, tokens))
    ]
    assert refused == []


def test_guesses_for_a_model_are_whole() -> None:
    for model, tp in (("deepseek-v3", 8), ("deepseek-v3", 1), ("llama-3-8b", 1), ("qwen3-8b", 1)):
        for bucket in model_buckets(model, TOKENS, tp=tp):
            op = get_op(bucket.problem.op)
            for kernel in (op.kernels["cuda"], op.triton_kernels.get("cuda")):
                if kernel is not None:
                    assert kernel.guess is not None
                    wishes = kernel.guess(bucket.problem, bucket.tokens)
                    guessed = kernel.first_configs(bucket.problem, bucket.tokens)[-1]
                    assert {name: guessed[name] for name in wishes} == wishes, (bucket, kernel.file)


def test_less_of_a_tunable_makes_a_config_fit() -> None:
    space = SearchSpace(
        (Tunable("A", (4, 1, 2, 8), ""), Tunable("B", (0, 1), "")),
        (Constraint("A is at most T", lambda c, p, t: c["A"] <= t), Constraint("B is 0", lambda c, p, t: c["B"] == 0)),
    )
    assert space.with_less(Config.of(A=4, B=0), "A", ANY, 9) == Config.of(A=4, B=0)
    assert space.with_less(Config.of(A=4, B=0), "A", ANY, 3) == Config.of(A=2, B=0)
    assert space.with_less(Config.of(A=4, B=0), "A", ANY, 0) == Config.of(A=4, B=0)  # none does
    assert space.with_less(Config.of(A=4, B=1), "A", ANY, 3) == Config.of(A=4, B=1)


def test_a_space_without_tunables_has_one_config() -> None:
    assert list(SearchSpace(()).configs(ANY, 1)) == [Config.of()]
