"""The report as one HTML page: nothing is loaded from elsewhere, and there is no JavaScript."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from html import escape

from autofuse.ops.languages import language_of
from autofuse.report_page.content import Bucket, Curve, Limit, Report, every_tokens
from autofuse.report_page.plot import gain_bar, share_bar, times_plot
from autofuse.targets import Target

__all__ = ["html_page"]

_MOST_ROWS = 200  # of failures, and of history; the command line shows all
_MESSAGE = 300  # characters of a failure's message

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5b6675; --line: #dde2e9; --page: #f6f7f9; --card: #fff;
  --good: #11703d; --good-bg: #ddf3e5; --todo: #8a5a00; --todo-bg: #fdf0d2; --plain-bg: #e8ebf0;
  --eager: #8a5a00; --compile: #a3262b; --graph: #6b3fa0; --peer0: #1b62b5; --peer1: #0c7f86; --peer2: #a2378a;
  --peer3: #5f6b2d; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --soft: #9aa5b4; --line: #2f3742; --page: #14181e;
  --card: #1b2028; --good: #7fd8a4; --good-bg: #17392a; --todo: #f0c674; --todo-bg: #40331a; --plain-bg: #2a313b;
  --eager: #f0c674; --compile: #f2a1a3; --graph: #c3a6f0; --peer0: #86b8f5; --peer1: #6fd0d6; --peer2: #eba0da;
  --peer3: #c5d18a; } }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 80rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 0 0 .25rem; }
h3 { font: 600 14px/1.5 ui-monospace, monospace; margin: 1.5rem 0 .4rem; overflow-wrap: anywhere; }
p { margin: .25rem 0 .75rem; } .soft { color: var(--soft); } .mono { font: 13px/1.45 ui-monospace, monospace; }
ul.tiles { display: flex; flex-wrap: wrap; gap: .6rem; margin: 1rem 0 1.5rem; padding: 0; list-style: none; }
.tiles li { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .5rem .9rem; }
.tiles b { display: block; font-size: 1.35rem; line-height: 1.2; }
section { background: var(--card); border: 1px solid var(--line); border-radius: .8rem; padding: 1rem 1.25rem;
  margin: 0 0 1.25rem; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; } th { text-align: left; color: var(--soft); }
th, td { padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.mono, td.words { overflow-wrap: anywhere; min-width: 15rem; } .number { text-align: right; white-space: nowrap; }
th { vertical-align: bottom; } th.number { white-space: normal; }
td.good, td.plain, td.todo { text-align: center; padding: .3rem .5rem; white-space: nowrap; }
td.good { color: var(--good); background: var(--good-bg); } td.todo { color: var(--todo); background: var(--todo-bg); }
td.plain { background: var(--plain-bg); }
svg { vertical-align: middle; } svg.plot { flex: 1 1 30rem; max-width: 44rem; height: auto; }
.figures { display: flex; flex-wrap: wrap; gap: .5rem 2rem; align-items: flex-start; margin-bottom: .6rem; }
.axis { stroke: var(--soft); } .grid { stroke: var(--line); } .one { stroke: var(--soft); }
.span { stroke: currentColor; stroke-width: 5; stroke-linecap: round; opacity: .45; } .dot { fill: currentColor; }
.line { fill: none; stroke-width: 2; } text { font: 13px system-ui, sans-serif; fill: var(--soft); }
polyline.fused { stroke: var(--good); } circle.fused, text.fused { fill: var(--good); }
polyline.eager { stroke: var(--eager); } circle.eager, text.eager { fill: var(--eager); }
polyline.compile { stroke: var(--compile); } circle.compile, text.compile { fill: var(--compile); }
polyline.graph { stroke: var(--graph); } circle.graph, text.graph { fill: var(--graph); }
polyline.fused { stroke-width: 3; } text.fused { font-weight: 600; }
polyline.peer0 { stroke: var(--peer0); } circle.peer0, text.peer0 { fill: var(--peer0); }
polyline.peer1 { stroke: var(--peer1); } circle.peer1, text.peer1 { fill: var(--peer1); }
polyline.peer2 { stroke: var(--peer2); } circle.peer2, text.peer2 { fill: var(--peer2); }
polyline.peer3 { stroke: var(--peer3); } circle.peer3, text.peer3 { fill: var(--peer3); }
[class*="peer"].line { stroke-dasharray: 7 3; } .whole { fill: var(--plain-bg); } .share { fill: var(--peer0); }
a { color: inherit; text-decoration-color: var(--line); text-underline-offset: .2em; }
table.narrow { width: auto; font-size: 13px; } h4 { font-size: 14px; margin: .2rem 0; font-weight: 600; }
table.narrow td, table.narrow th { padding: .15rem .7rem .15rem 0; min-width: 0; }
table.narrow td.mono { white-space: nowrap; } td p { margin: 0; font-family: system-ui, sans-serif; }
polyline.limit { stroke: var(--soft); stroke-dasharray: 4 4; } circle.limit { fill: none; }
"""

Cell = tuple[str, str]
"""The HTML of a cell, and its class."""


def html_page(report: Report) -> str:
    """A whole page, UTF-8."""
    buckets = [bucket for curve in report.curves for bucket in curve.buckets]
    targets = list(dict.fromkeys(curve.target for curve in report.curves))
    faster = sum(bucket.winner.beats_baseline and not bucket.state for bucket in buckets)
    failed = sum(failure.count for failure in report.failures)
    tiles = (
        (len(targets), "target" if len(targets) == 1 else "targets"),
        (len(buckets), "buckets tuned"),
        (faster, "faster than unfused code"),
        (report.trials, "configs measured"),
        (failed, "of them failed"),
    )
    parts = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n',
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>What autofuse measured</title>\n',
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n<h1>What autofuse measured</h1>\n",
        f'<p class="soft mono">{escape(report.path)}</p>\n',
        f'<ul class="tiles">{"".join(f"<li><b>{count}</b>{words}</li>" for count, words in tiles)}</ul>\n',
        *(_coverage(target, [c for c in report.curves if c.target == target]) for target in targets),
        *(_target(target, report.limits.get(target), report.curves) for target in targets),
        _failures(report),
        _history(report),
        "</main>\n</body>\n</html>\n",
    ]
    if not targets:
        parts.insert(-3, "<section><p>Nothing was measured yet: <code>autofuse tune</code> does.</p></section>\n")
    return "".join(parts)


def _coverage(target: Target, curves: Sequence[Curve]) -> str:
    tokens = every_tokens(curves)
    rows = []
    for curve in curves:
        at = {bucket.winner.tokens: bucket for bucket in curve.buckets}
        name = f'<a href="#{_anchor(curve)}">{_breaking(curve.problem)}</a>'
        rows.append([(name, "mono"), *(_covered(at.get(t)) for t in tokens)])
    return (
        f'<section>\n<h2>Coverage: {escape(str(target))}</h2>\n<p class="soft">The gain over the fastest unfused code '
        "at each T that was tuned. Green is faster beyond the noise, grey is not; yellow has a "
        "mark, which the tables below tell.</p>\n"
        f"{_table([('op and problem', ''), *((f'T={t}', 'number') for t in tokens)], rows)}</section>\n"
    )


def _covered(bucket: Bucket | None) -> Cell:
    if bucket is None:
        return "", ""
    tone = "todo" if bucket.state else "good" if bucket.winner.beats_baseline else "plain"
    return f"{bucket.winner.gain:.2f}×", tone


def _target(target: Target, limit: Limit | None, curves: Iterable[Curve]) -> str:
    told = "The limit, the speed of light, is not known here."
    if limit is not None:
        told = (
            "The limit is the speed of light: the bytes that must move ÷ the memory bandwidth, "
            f"{_rate(limit.bytes_per_s)} ({limit.source})."
        )
    parts = [f'<section>\n<h2>{escape(str(target))}</h2>\n<p class="soft">{escape(told)}</p>\n']
    for curve in curves:
        if curve.target == target:
            heading = f'<h3 id="{_anchor(curve)}">{_breaking(curve.problem)}</h3>\n'
            figures = f'<div class="figures">{times_plot(curve)}{_worths(curve)}</div>\n'
            parts.append(f"{heading}{figures}{_buckets(curve)}")
    return "".join([*parts, "</section>\n"])


def _buckets(curve: Curve) -> str:
    kinds = list(dict.fromkeys(kind for bucket in curve.buckets for kind in bucket.baselines_us))
    heads = [("T", "number"), ("fused µs", "number"), *((f"{kind} µs", "number") for kind in kinds)]
    heads += [(f"{escape(name)} µs", "number") for name in curve.peers]
    heads += [("gain [95 %]", "number"), ("", ""), ("of the limit", "number"), ("config", ""), ("state", "")]
    rows = []
    for bucket in curve.buckets:
        winner, share = bucket.winner, bucket.share
        row = [(str(winner.tokens), "number"), (f"{_us(winner.time_us)} ± {_us(winner.spread_us / 2)}", "number")]
        row += [(_us(bucket.baselines_us.get(kind)), "number") for kind in kinds]
        row += [(_us(times.get(winner.tokens)), "number") for times in curve.peers.values()]
        row.append((f"{winner.gain:.2f}× [{winner.gain_low:.2f}, {winner.gain_high:.2f}]", "number"))
        row.append((gain_bar(winner), ""))
        row.append(("–" if share is None else f"{share:.0%}", "number"))
        language = f"{language_of(winner.config)}, {bucket.rival}" if bucket.rival else ""
        config = _breaking(winner.config) + (f'<p class="soft">{escape(language)}</p>' if language else "")
        row += [(config, "mono"), (escape(bucket.state or "fresh"), "")]
        rows.append(row)
    return _table(heads, rows)


def _worths(curve: Curve) -> str:
    if not curve.worths:
        return ""
    rows = []
    for worth in curve.worths:
        best = ", ".join(f"{value}: {ratio:.2f}×" for value, ratio in worth.best.items())
        rows.append(
            [(worth.tunable, "mono"), (f"{worth.share:.0%}", "number"), (share_bar(worth.share), ""), (best, "")]
        )
    heads = [("tunable", ""), ("worth", "number"), ("", ""), ("value: time of its best config ÷ the best of all", "")]
    return f"<div>\n<h4>What each tunable is worth</h4>\n{_table(heads, rows, 'narrow')}</div>\n"


def _anchor(curve: Curve) -> str:
    """Letters and digits alone, whatever the database holds."""
    return "p" + hashlib.sha256(f"{curve.target}|{curve.problem}".encode()).hexdigest()[:12]


def _failures(report: Report) -> str:
    rows = [
        [
            (escape(failure.status), ""),
            (str(failure.count), "number"),
            (escape(failure.op), ""),
            (escape(str(failure.target)), ""),
            (escape(_shortened(failure.message)), "words"),
            (_breaking(failure.example), "mono"),
        ]
        for failure in report.failures[:_MOST_ROWS]
    ]
    heads = [("kind", ""), ("configs", "number"), ("op", ""), ("target", ""), ("message", ""), ("for example", "")]
    return _section("Failures", heads, rows, len(report.failures), "No config failed.")


def _history(report: Report) -> str:
    rows = [
        [
            (escape(former.replaced_at), ""),
            (escape(str(winner.target)), ""),
            (_breaking(winner.problem), "mono"),
            (str(winner.tokens), "number"),
            (_us(winner.time_us), "number"),
            (f"{winner.gain:.2f}× [{winner.gain_low:.2f}, {winner.gain_high:.2f}]", "number"),
            (_breaking(winner.config), "mono"),
        ]
        for former in report.history[:_MOST_ROWS]
        for winner in (former.winner,)
    ]
    heads = [("replaced", ""), ("target", ""), ("problem", ""), ("T", "number"), ("µs", "number")]
    heads += [("gain [95 %]", "number"), ("config", "")]
    return _section("Winners of before", heads, rows, len(report.history), "No winner was ever replaced.")


def _section(title: str, heads: Sequence[Cell], rows: Sequence[Sequence[Cell]], count: int, none: str) -> str:
    body = _table(heads, rows) if rows else f"<p>{none}</p>\n"
    more = f'<p class="soft">{count - len(rows)} more are not shown.</p>\n' if count > len(rows) else ""
    return f"<section>\n<h2>{title}</h2>\n{body}{more}</section>\n"


def _table(heads: Sequence[Cell], rows: Iterable[Sequence[Cell]], kind: str = "") -> str:
    def cells(tag: str, row: Sequence[Cell]) -> str:
        return "".join(
            f"<{tag}{f' class={chr(34)}{kind}{chr(34)}' if kind else ''}>{html}</{tag}>" for html, kind in row
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>\n" for row in rows)
    opening = f'<table class="{kind}">' if kind else "<table>"
    return f"{opening}\n<thead><tr>{cells('th', heads)}</tr></thead>\n<tbody>{body}</tbody>\n</table>\n"


def _breaking(value: object) -> str:
    """A problem or config, which may be broken into lines after each of its parts."""
    return escape(str(value)).replace(",", ",<wbr>")


def _us(time_us: float | None) -> str:
    if time_us is None:
        return "–"
    return f"{time_us:.2f}" if time_us < 10 else f"{time_us:.1f}" if time_us < 100 else f"{time_us:.0f}"


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e12:.3g} TB/s" if bytes_per_s >= 1e12 else f"{bytes_per_s / 1e9:.3g} GB/s"


def _shortened(text: str) -> str:
    return text if len(text) <= _MESSAGE else f"{text[:_MESSAGE]}…"
