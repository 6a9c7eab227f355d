"""The buckets of a job, handed out one at a time to whoever is ready to tune one."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from autofuse.errors import BadInput
from autofuse.ops import Problem

__all__ = ["Bucket", "BucketQueue", "Share"]

logger = logging.getLogger("autofuse.tuner")


@dataclass(frozen=True)
class Bucket:
    """One thing to tune: a problem at T tokens."""

    problem: Problem
    tokens: int


@dataclass(frozen=True)
class Share:
    """A bucket, and how many seconds it may take; None for as long as it takes."""

    bucket: Bucket
    budget_s: float | None


class BucketQueue:
    """What is left of a job.

    Each bucket gets an equal share of the time that is left when it is taken, so what one does not need is the others'.
    Those of one problem are taken one after the other while there are others: what is found for one T is tried first at
    the next.

    Args:
        budget_s: how long all of it may take; None for as long as it takes.
        takers: how many take from it at the same time.

    Raises BadInput for a bucket without tokens.

    Example:
        >>> queue = BucketQueue([Bucket(Problem("op", ()), 64)])
        >>> queue.take(), queue.take()
        (Share(bucket=Bucket(problem=Problem(op='op', params=()), tokens=64), budget_s=None), None)
    """

    def __init__(self, buckets: Iterable[Bucket], budget_s: float | None = None, takers: int = 1) -> None:
        self._left = deque(buckets)
        self._end = None if budget_s is None else time.monotonic() + budget_s
        self._takers = takers
        self._under_way: dict[object, Problem] = {}
        for bucket in self._left:
            if bucket.tokens < 1:
                raise BadInput(f"tokens {bucket.tokens}: a bucket has at least one token")

    def take(self, taker: object = None) -> Share | None:
        """The next bucket; None where there is none, or no time for it.

        Args: taker: who takes it, and has finished the one it took before.
        """
        mine = self._under_way.pop(taker, None)
        if not self._left:
            return None
        share_s = None
        if self._end is not None:
            share_s = (self._end - time.monotonic()) / math.ceil(len(self._left) / self._takers)
            if share_s <= 0:
                logger.info("the time is over with %d buckets to tune", len(self._left))
                self._left.clear()
                return None
        others = set(self._under_way.values())
        free = [bucket for bucket in self._left if bucket.problem not in others]
        following = (bucket for bucket in free if bucket.problem == mine)
        bucket = next(following, free[0] if free else self._left[0])
        self._left.remove(bucket)
        self._under_way[taker] = bucket.problem
        return Share(bucket, share_s)
