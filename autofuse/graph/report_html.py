"""Reports as one HTML page: nothing is loaded from elsewhere, and nothing needs JavaScript."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape

from autofuse.graph.report import VERDICTS, GraphReport, Measured, NearMissReport, SiteReport

__all__ = ["html_page"]

_TONE = {"fused": "good", "untuned": "todo", "stale": "todo"} | dict.fromkeys(
    ("slower", "off", "overlap", "cycle"), "plain"
)
"""The colour of a verdict; what is not named here is a ``bad`` one: something keeps the fusion from being used."""

_WIDTH, _HEIGHT = 132, 18  # of a drawn gain, in CSS pixels
_LEAST, _MOST = 0.5, 8.0  # the gains at its ends; the axis is logarithmic

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5b6675; --line: #dde2e9; --page: #f6f7f9; --card: #fff;
  --good: #11703d; --good-bg: #ddf3e5; --todo: #8a5a00; --todo-bg: #fdf0d2; --bad: #a3262b; --bad-bg: #fbe1e1;
  --plain: #465061; --plain-bg: #e8ebf0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --soft: #9aa5b4; --line: #2f3742; --page: #14181e;
  --card: #1b2028; --good: #7fd8a4; --good-bg: #17392a; --todo: #f0c674; --todo-bg: #40331a; --bad: #f2a1a3;
  --bad-bg: #452225; --plain: #b9c2cf; --plain-bg: #2a313b; } }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.1rem; margin: 0 0 .25rem; }
h3 { font-size: .95rem; margin: 1.25rem 0 .4rem; }
p { margin: .25rem 0; } .soft { color: var(--soft); } code, .mono { font: 13px/1.45 ui-monospace, monospace; }
.tiles { display: flex; flex-wrap: wrap; gap: .6rem; margin: 1rem 0 1.5rem; padding: 0; list-style: none; }
.tiles li { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .5rem .9rem; }
.tiles b { display: block; font-size: 1.35rem; line-height: 1.2; }
section { background: var(--card); border: 1px solid var(--line); border-radius: .8rem; padding: 1rem 1.25rem;
  margin: 0 0 1.25rem; }
details { border-top: 1px solid var(--line); } details:last-of-type { border-bottom: 1px solid var(--line); }
summary { display: grid; grid-template-columns: 15rem 1fr 14rem 5rem 12rem; gap: .75rem; align-items: center;
  padding: .5rem .25rem; cursor: pointer; } summary:hover { background: var(--page); }
summary > * { overflow-wrap: anywhere; }
.badge { display: inline-block; border-radius: 1rem; padding: .05rem .65rem; font-size: 13px; font-weight: 600; }
.good { color: var(--good); background: var(--good-bg); } .todo { color: var(--todo); background: var(--todo-bg); }
.bad { color: var(--bad); background: var(--bad-bg); } .plain { color: var(--plain); background: var(--plain-bg); }
dl { display: grid; grid-template-columns: 8rem 1fr; gap: .2rem .75rem; margin: .25rem .25rem 1rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; font-size: 14px; } th { text-align: left; color: var(--soft); }
th, td { padding: .3rem .6rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: anywhere; } td.number, th.number { text-align: right; white-space: nowrap; }
svg { vertical-align: middle; margin-right: .4rem; } .axis { stroke: var(--line); } .one { stroke: var(--soft); }
.span { stroke: currentColor; stroke-width: 5; stroke-linecap: round; opacity: .45; } .dot { fill: currentColor; }
@media (max-width: 60rem) { summary { grid-template-columns: 1fr; gap: .1rem; } }
"""


def html_page(graphs: Sequence[GraphReport], title: str = "What autofuse did") -> str:
    """A whole page, UTF-8: the counts, then each graph with its sites, near misses, and what matched nothing."""
    counts = Counter(site.verdict for graph in graphs for site in graph.sites)
    counted = [(counts[verdict], words) for verdict, words in VERDICTS.items() if counts[verdict]]
    misses = sum(len(graph.near_misses) for graph in graphs)
    if misses:
        counted.append((misses, "near misses" if misses > 1 else "near miss"))
    tiles = "".join(f"<li><b>{count}</b>{escape(words)}</li>" for count, words in [(len(graphs), "graphs"), *counted])
    body = "".join(map(_graph, graphs)) or "<section><p>No graph was compiled.</p></section>"
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{escape(title)}</h1>\n"
        '<p class="soft">A gain is the fastest unfused time ÷ the fused time, with its 95 % interval. '
        "Each line opens.</p>\n"
        f'<ul class="tiles">{tiles}</ul>\n{body}</main>\n</body>\n</html>\n'
    )


def _graph(graph: GraphReport) -> str:
    cached = ", taken from Inductor's cache" if graph.from_cache else ""
    seconds = f"{graph.pass_seconds * 1e3:.1f} ms in the pass, {graph.kernel_seconds:.1f} s for kernels"
    parts = [
        f"<section>\n<h2>Graph <code>{escape(graph.key[:10])}</code></h2>\n<p>{escape(graph.summary)}</p>\n",
        f'<p class="soft">{escape(graph.settings)}; {seconds}{cached}</p>\n',
    ]
    if graph.note:
        parts.append(f'<p class="bad">{escape(graph.note)}</p>\n')
    if graph.sites:
        parts += ["<h3>Sites</h3>\n", *map(_site, graph.sites)]
    if graph.near_misses:
        parts.append(f"<h3>Near misses</h3>\n{_near_misses(graph.near_misses)}")
    parts.append(f'<p class="soft">{escape(graph.recognised)}</p>\n</section>\n')
    return "".join(parts)


def _site(site: SiteReport) -> str:
    tone = _TONE.get(site.verdict, "bad")
    head = (
        f'<span><span class="badge {tone}">{escape(VERDICTS.get(site.verdict, site.verdict))}</span></span>'
        f'<span class="mono">{escape(site.place)}</span><span>{escape(site.op)}</span>'
        f"<span>T={escape(site.tokens)}</span><span>{_drawn_gain(site)}</span>"
    )
    facts = [
        ("why", f"{site.rule}: {site.reason}"),
        ("source", site.source),
        ("node", site.node),
        ("written as", site.dialect),
        ("problem", site.problem),
        ("device", site.device),
        ("fusion", site.fusion),
        ("plan", f"{site.plan}: {site.plan_text}" if site.plan else ""),
        ("looked up", site.looked_up),
        ("nearest", site.nearest),
    ]
    listed = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in facts if value)
    return f"<details><summary>{head}</summary>\n<dl>{listed}</dl>\n{_measured(site.measured)}</details>\n"


def _measured(rows: Iterable[Measured]) -> str:
    cells = [
        [
            (str(row.tokens), True),
            (f"{row.time_us:.2f} ± {row.spread_us / 2:.2f}", True),
            (f"{row.baseline_us:.2f}", True),
            (row.baseline, False),
            (f"{row.gain:.2f}× [{row.gain_low:.2f}, {row.gain_high:.2f}]", True),
            (row.config, False),
        ]
        for row in rows
    ]
    if not cells:
        return ""
    heads = [("T", True), ("fused µs", True), ("unfused µs", True), ("by", False), ("gain [95 %]", True)]
    return _table([*heads, ("config", False)], cells)


def _near_misses(misses: Iterable[NearMissReport]) -> str:
    cells = [[(each, False) for each in (m.block, m.place, m.source, m.node, m.reason)] for m in misses]
    return _table([(name, False) for name in ("looked like", "where", "source", "node", "but")], cells)


def _table(heads: Sequence[tuple[str, bool]], rows: Iterable[Sequence[tuple[str, bool]]]) -> str:
    """A table of (text, whether it is a number)."""

    def cells(tag: str, row: Sequence[tuple[str, bool]]) -> str:
        return "".join(f"<{tag}{' class=number' if number else ''}>{escape(text)}</{tag}>" for text, number in row)

    body = "".join(f"<tr>{cells('td', row)}</tr>\n" for row in rows)
    return f"<table>\n<thead><tr>{cells('th', heads)}</tr></thead>\n<tbody>{body}</tbody>\n</table>\n"


def _drawn_gain(site: SiteReport) -> str:
    """The gain as a number, and its interval on a logarithmic axis with a mark at 1."""
    if site.gain is None or site.gain_low is None or site.gain_high is None:
        return '<span class="soft">not measured</span>'
    low, middle, high, one = (_x(each) for each in (site.gain_low, site.gain, site.gain_high, 1.0))
    y, label = _HEIGHT / 2, f"{site.gain:.2f}×, 95 % between {site.gain_low:.2f}× and {site.gain_high:.2f}×"
    return (
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" role="img" aria-label="{escape(label)}">'
        f"<title>{escape(label)}</title>"
        f'<line class="axis" x1="0" x2="{_WIDTH}" y1="{y}" y2="{y}"/>'
        f'<line class="one" x1="{one:.1f}" x2="{one:.1f}" y1="2" y2="{_HEIGHT - 2}"/>'
        f'<line class="span" x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}"/>'
        f'<circle class="dot" cx="{middle:.1f}" cy="{y}" r="3.5"/></svg>{site.gain:.2f}×'
    )


def _x(gain: float) -> float:
    """Where on the axis a gain lies; beyond its ends, at them."""
    share = math.log(min(max(gain, _LEAST), _MOST) / _LEAST) / math.log(_MOST / _LEAST)
    return 4 + share * (_WIDTH - 8)
