"""Drawings as SVG: they need neither a script nor a file beside the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from autofuse.cache_db import Winner
from autofuse.report_page.content import Curve

__all__ = ["gain_bar", "times_plot"]

_BAR_WIDTH, _BAR_HEIGHT = 140, 18  # CSS pixels
_LEAST_GAIN, _MOST_GAIN = 0.5, 8.0  # the ends of its logarithmic axis
_WIDTH, _HEIGHT = 640, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 120, 12, 34  # margins: µs at the left, names at the right, T below
_LABEL = 13  # pixels between two lines' names

_COLOURS = {"autofuse": "fused", "eager": "eager", "compile": "compile", "graph": "graph", "limit": "limit"}


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
    """Time over T, both logarithmic: the fused kernel, what it was compared with, and the limit; "" for a single T."""
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
    parts += [f'<text x="{x(t):.0f}" y="{_HEIGHT - 14}" text-anchor="middle">{t}</text>' for t in tokens]
    for us in _ticks(low_us, high_us):
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(us):.1f}" y2="{y(us):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y(us) + 4:.0f}" text-anchor="end">{us:g} µs</text>')
    label_y = -math.inf
    for name, line in sorted(lines.items(), key=lambda item: y(item[1][-1][1])):
        points = " ".join(f"{x(t):.1f},{y(us):.1f}" for t, us in line)
        parts.append(f'<polyline class="line {_COLOURS[name]}" points="{points}"/>')
        parts += [f'<circle class="{_COLOURS[name]}" cx="{x(t):.1f}" cy="{y(us):.1f}" r="2.5"/>' for t, us in line]
        label_y = max(label_y + _LABEL, y(line[-1][1]) + 4)
        parts.append(f'<text class="{_COLOURS[name]}" x="{x(line[-1][0]) + 8:.0f}" y="{label_y:.0f}">{name}</text>')
    return "".join([*parts, "</svg>\n"])


def _lines(curve: Curve) -> Mapping[str, Sequence[tuple[int, float]]]:
    lines: dict[str, list[tuple[int, float]]] = {}
    for bucket in curve.buckets:
        tokens = bucket.winner.tokens
        lines.setdefault("autofuse", []).append((tokens, bucket.winner.time_us))
        for kind, time_us in bucket.baselines_us.items():
            lines.setdefault(kind, []).append((tokens, time_us))
        if bucket.floor_us:
            lines.setdefault("limit", []).append((tokens, bucket.floor_us))
    return lines


def _ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [10.0**power for power in powers if low <= 10.0**power <= high]


def _bar_x(gain: float) -> float:
    """Where on the axis a gain lies; beyond its ends, at them."""
    share = math.log(min(max(gain, _LEAST_GAIN), _MOST_GAIN) / _LEAST_GAIN) / math.log(_MOST_GAIN / _LEAST_GAIN)
    return 4 + share * (_BAR_WIDTH - 8)
