"""Buckets of T: where a problem is tuned, and how far what was measured at one T speaks for another."""

from __future__ import annotations

__all__ = ["RANGE_BUCKETS", "REACH", "buckets_serving", "within_reach"]

RANGE_BUCKETS = (1, 64, 1024, 8192)
"""Where a problem is tuned, or given default configs, if T is only known to lie in a range. From the last one on a
kernel is bound by bandwidth: what is measured there, or above, holds for every larger T."""

REACH = 2
"""By which factor T may lie outside of what was tuned. A config that wins at T=1 can lose to the unfused code at
T=2048."""


def buckets_serving(low: int, high: int) -> tuple[int, ...]:
    """The buckets for T from ``low`` to ``high``: one static T is its own; a range has those of RANGE_BUCKETS that
    serve a T in it, which are those inside and the first above.

    Example:
        >>> buckets_serving(5, 5), buckets_serving(2, 500)
        ((5,), (64, 1024))
    """
    low = max(low, 1)
    if high <= low:
        return (low,)
    above = [tokens for tokens in RANGE_BUCKETS if tokens >= low] or [low]
    return (*(tokens for tokens in above if tokens < high), *[tokens for tokens in above if tokens >= high][:1])


def within_reach(first: int, last: int, low: int, high: int) -> bool:
    """Whether the bucket that runs T=``low``, ``first``, and the one that runs T=``high``, ``last``, are near enough.

    Both are where tuning at ``buckets_serving(low, high)`` puts them, or within REACH of it.

    Example:
        >>> within_reach(64, 64, 100, 100), within_reach(64, 64, 200, 200), within_reach(8192, 8192, 10**6, 10**6)
        (True, False, True)
        >>> within_reach(64, 8192, 2, 1 << 31), within_reach(64, 1024, 2, 1 << 31)
        (True, False)
    """
    wanted = buckets_serving(low, high)
    far_enough = min(max(high, 1), wanted[-1])
    return first <= REACH * wanted[0] and (last >= RANGE_BUCKETS[-1] or REACH * last >= far_enough)
