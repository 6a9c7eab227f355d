"""Drawings as SVG: they need neither a script nor a file beside the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

from autofuse.cache_db import Winner
from autofuse.report_page.content import Curve

__all__ = ["gain_bar", "share_bar", "times_plot"]

_BAR_WIDTH, _BAR_HEIGHT = 110, 18  # CSS pixels
_LEAST_GAIN, _MOST_GAIN = 0.5, 8.0  # the ends of its logarithmic axis
_WIDTH, _HEIGHT = 640, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 180, 14, 42  # margins: µs at the left, names at the right, T below
_LABEL = 16  # pixels between two lines' names
_SHOWN = 24  # characters of a name

_COLOURS = {"autofuse": "fused", "eager": "eager", "compile": "compile", "graph": "graph", "limit": "limit"}
_PEER_COLOURS = ("peer0", "peer1", "peer2", "peer3")


def gain_bar(winner: Winner) -> str:
    """A gain's interval on a logarithmic axis with a mark at 1."""
    low, middle, high, one = (_bar_x(each) for each in (winner.gain_low, winner.gain, winner.gain_high, 1.0))
    y = _BAR_HEIGHT / 2
    label = f"{winner.gain:.2f}×, 95 % between {winner.gain_low:.2f}× and {winner.gain_high:.2f}×"
    return (
        f'<svg width="{_BAR_WIDTH}" height="{_BAR_HEIGHT}" role="img" aria-label="{label}"><title>{label}</title>'
        f'<line class="axis" x1="0" x2="{_BAR_WIDTH}" y1="{y}" y2="{y}"/>'
        f'<line class="one" x1="{one:.1f}" x2="{one:.1f}" y1="2" y2="{_BAR_HEIGHT - 2}"/>'
        f'<line class="span" x1="{low:.1f}" x2="{max(high, low + 1):.1f}" y1="{y}" y2="{y}"/>'
        f'<circle class="dot" cx="{middle:.1f}" cy="{y}" r="3.5"/></svg>'
    )


def times_plot(curve: Curve) -> str:
    """Time over T, both logarithmic: the fused kernel, what it was compared with, other libraries' kernels, the limit.

    "" for a single T.
    """
    lines = _lines(curve)
    tokens = sorted({t for line in lines.values() for t, _ in line})
    times = [us for line in lines.values() for _, us in line]
    if len(tokens) < 2:
        return ""
    low_t, high_t = tokens[0], tokens[-1]
    low_us, high_us = min(times), max(max(times), min(times) * 1.01)

    def x(t: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * math.log(t / low_t) / math.log(high_t / low_t)

    def y(us: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - math.log(us / low_us) / math.log(high_us / low_us))

    label = f"Time in µs over T, {escape(str(curve.problem))}: the table below has the figures"
    parts = [
        f'<svg class="plot" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}"><title>{label}</title>',
        f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{_HEIGHT - _BOTTOM}" y2="{_HEIGHT - _BOTTOM}"/>',
    ]
    parts += [f'<text x="{x(t):.0f}" y="{_HEIGHT - 20}" text-anchor="middle">{t}</text>' for t in _apart(tokens, x)]
    parts.append(f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2:.0f}" y="{_HEIGHT - 4}" text-anchor="middle">tokens</text>')
    for us in _ticks(low_us, high_us):
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(us):.1f}" y2="{y(us):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y(us) + 4:.0f}" text-anchor="end">{us:g} µs</text>')
    ends = {name: y(line[-1][1]) for name, line in lines.items()}
    heights = _spread(ends)
    for name, line in sorted(lines.items(), key=lambda item: item[0] == "autofuse"):  # ours on top
        colour = _colour(name, [*curve.peers])
        points = " ".join(f"{x(t):.1f},{y(us):.1f}" for t, us in line)
        parts.append(f'<polyline class="line {colour}" points="{points}"/>')
        parts += [f'<circle class="{colour}" cx="{x(t):.1f}" cy="{y(us):.1f}" r="3"/>' for t, us in line]
        shown = name if len(name) <= _SHOWN else f"{name[: _SHOWN - 1]}…"
        where = f'x="{_WIDTH - _RIGHT + 14}" y="{heights[name] + 4:.0f}"'
        parts.append(f'<text class="{colour}" {where}>{escape(shown)}</text>')
    return "".join([*parts, "</svg>\n"])


def _colour(name: str, peers: Sequence[str]) -> str:
    return _PEER_COLOURS[peers.index(name) % len(_PEER_COLOURS)] if name in peers else _COLOURS[name]


def _apart(tokens: Sequence[int], x: Callable[[float], float]) -> list[int]:
    """Those whose numbers do not run into one another; the first and the last are among them."""

    def clear(left: int, right: int) -> bool:
        return x(right) - x(left) > 4.5 * (len(str(left)) + len(str(right))) + 4

    shown = [tokens[0]]
    for t in tokens[1:-1]:
        if clear(shown[-1], t) and clear(t, tokens[-1]):
            shown.append(t)
    return [*shown, tokens[-1]]


def _spread(ends: Mapping[str, float]) -> dict[str, float]:
    """Heights for the names of lines, near the lines' ends, none upon another and none below the axis."""
    names = sorted(ends, key=lambda name: ends[name])
    heights: list[float] = []
    for name in names:
        heights.append(max(ends[name], heights[-1] + _LABEL if heights else -math.inf))
    lowest = float(_HEIGHT - _BOTTOM)
    for place in reversed(range(len(heights))):
        heights[place] = min(heights[place], lowest)
        lowest = heights[place] - _LABEL
    return dict(zip(names, heights, strict=True))


def _lines(curve: Curve) -> Mapping[str, Sequence[tuple[int, float]]]:
    lines: dict[str, list[tuple[int, float]]] = {}
    for bucket in curve.buckets:
        tokens = bucket.winner.tokens
        lines.setdefault("autofuse", []).append((tokens, bucket.winner.time_us))
        for kind, time_us in bucket.baselines_us.items():
            lines.setdefault(kind, []).append((tokens, time_us))
        if bucket.floor_us:
            lines.setdefault("limit", []).append((tokens, bucket.floor_us))
    tuned = [bucket.winner.tokens for bucket in curve.buckets]
    for name, times in curve.peers.items():
        inside = [(t, us) for t, us in sorted(times.items()) if tuned[0] <= t <= tuned[-1]]
        if inside and name not in lines:
            lines[name] = inside
    return lines


def share_bar(share: float) -> str:
    """A share from 0 to 1 as a bar."""
    length = max(1.0, share * _BAR_WIDTH)
    return (
        f'<svg width="{_BAR_WIDTH}" height="{_BAR_HEIGHT}" role="img" aria-label="{share:.0%}">'
        f'<rect class="whole" width="{_BAR_WIDTH}" height="8" y="5" rx="4"/>'
        f'<rect class="share" width="{length:.1f}" height="8" y="5" rx="4"/></svg>'
    )


def _ticks(low: float, high: float) -> list[float]:
    """Powers of ten, and where these are few 2 and 5 times them."""
    powers = [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    for steps in ((1,), (1, 2, 5)):
        ticks = [step * power for power in powers for step in steps if low <= step * power <= high]
        if len(ticks) > 2:
            break
    return ticks


def _bar_x(gain: float) -> float:
    """Where on the axis a gain lies; beyond its ends, at them."""
    share = math.log(min(max(gain, _LEAST_GAIN), _MOST_GAIN) / _LEAST_GAIN) / math.log(_MOST_GAIN / _LEAST_GAIN)
    return 4 + share * (_BAR_WIDTH - 8)
