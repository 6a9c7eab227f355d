"""Running what tests will ask for side by side, before they ask."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import pytest

__all__ = ["run_ahead", "wanted"]

T = TypeVar("T")


def wanted(request: pytest.FixtureRequest, param: str) -> list[object]:
    """The values of a parameter, in all tests of the requesting module that are going to run."""
    items = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    return [item.callspec.params[param] for item in items if param in item.callspec.params]


@contextmanager
def run_ahead(function: Callable[[T], None], values: Iterable[T]) -> Iterator[dict[T, Future[None]]]:
    """Calls ``function`` for each value, as many at a time as there are cores; what it raises, its future raises."""
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    try:
        yield {value: pool.submit(function, value) for value in values}
    finally:
        pool.shutdown(cancel_futures=True)
