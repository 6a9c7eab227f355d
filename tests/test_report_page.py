"""The database as one HTML page: whole, readable without scripts, and safe whatever the database holds."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from autofuse.cache_db import Baseline, Trial, TunedDatabase, Winner
from autofuse.cli.app import run
from autofuse.ops import Config, get_op
from autofuse.report_page import Bucket, Curve, gather, html_page, load_peers
from autofuse.report_page.plot import times_plot
from autofuse.report_page.worth import worths
from autofuse.targets import Target

H200 = Target("cuda", "sm_90a", "NVIDIA H200")
UNKNOWN = Target("cuda", "sm_90a", "NVIDIA Nobody <b>knows</b>")
OP = get_op("mla_dual_rms_norm")
PROBLEM = OP.make_problem(dtype="bf16", q_lora_rank=1536, kv_lora_rank=512, cast_before_weight=True)
HERE = OP.source_hash("cuda")
CONFIG = OP.default_config("cuda", PROBLEM, 64)
WINNER = Winner(H200, PROBLEM, 64, CONFIG, HERE, 1.03, 0.02, "compile", 2.15, 2.09, 2.01, 2.16)
VOID = {"meta", "line", "circle", "polyline", "wbr"}


class Page(HTMLParser):
    """Checks that every element ends, and collects the text and the tags."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with TunedDatabase(tmp_path / "tuned.db") as database:
        for target in (H200, UNKNOWN):
            for tokens, gain in ((1, 0.97), (64, 2.09), (1024, 1.5)):
                gains = {"gain": gain, "gain_low": gain - 0.05, "gain_high": gain + 0.05}
                database.record_winner(replace(WINNER, target=target, tokens=tokens, time_us=9.0))
                database.record_winner(replace(WINNER, target=target, tokens=tokens, **gains))
                database.record_baseline(Baseline(target, PROBLEM, tokens, "eager", 9.9, 0.1))
                database.record_baseline(Baseline(target, PROBLEM, tokens, "compile", 2.15, 0.1))
        database.record_winner(replace(WINNER, tokens=8192, source_hash="0ld"))
        failed = Trial(H200, PROBLEM, 64, CONFIG, HERE, "compile_error", "<script>alert(1)</script>")
        database.record_trial(failed)
    return tmp_path / "tuned.db"


@pytest.fixture
def html(path: Path) -> str:
    with TunedDatabase(path, read_only=True) as database:
        state_of = lambda winner: "stale: the kernel changed" if winner.source_hash != HERE else ""  # noqa: E731
        return html_page(gather(database, state_of))


def test_the_page_is_whole_and_needs_nothing_else(html: str) -> None:
    page = Page(html)
    assert html.startswith("<!doctype html>")
    assert {"table", "svg", "polyline"} <= {*page.tags}
    assert not {"script", "link", "img", "iframe"} & {*page.tags}
    assert not [name for name, _ in page.attributes if name.startswith("on") or name == "src"]
    links = {value for name, value in page.attributes if name == "href"}
    assert links == {f"#{value}" for name, value in page.attributes if name == "id"}
    assert not re.search(r"https?://|@import|url\(", html)


def test_what_the_database_holds_is_text_and_never_markup(html: str) -> None:
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "NVIDIA Nobody <b>knows</b>" in Page(html).text


def test_coverage_has_a_row_for_each_problem_and_a_column_for_each_t(html: str) -> None:
    coverage = html.partition(f"<h2>Coverage: {H200}</h2>")[2].partition("</section>")[0]
    assert [t for t in (1, 64, 1024, 8192) if f">T={t}<" in coverage] == [1, 64, 1024, 8192]
    cells = re.findall(r'<td class="(\w+)">([\d.]+)×</td>', coverage)
    assert cells == [("plain", "0.97"), ("good", "2.09"), ("good", "1.50"), ("todo", "2.09")]


def test_gains_come_with_their_interval_and_times_with_their_limit(html: str) -> None:
    assert "2.09× [2.04, 2.14]" in html
    moved = OP.bytes_moved(PROBLEM, 1024)
    assert f"{moved / 4.8e12 / 1.03e-6:.0%}" in html
    assert "4.8 TB/s (by its data sheet)" in html
    assert f"{moved / 1.03e-6 / 1e12:.3g} TB/s (the most that a winner here reached)" in html
    assert "stale: the kernel changed" in html


def test_a_slow_memory_is_told_in_smaller_units(tmp_path: Path) -> None:
    with TunedDatabase(tmp_path / "slow.db") as database:
        database.record_winner(replace(WINNER, target=UNKNOWN, time_us=1e3))
        html = html_page(gather(database, lambda winner: ""))
    assert f"{OP.bytes_moved(PROBLEM, 64) / 1e-3 / 1e9:.3g} GB/s (the most that a winner here reached)" in html


def test_failures_and_winners_of_before_are_listed(html: str) -> None:
    text = Page(html).text
    assert "compile_error" in text
    assert text.partition("Winners of before")[2].count("9.00") == 6


def test_a_plot_has_a_line_for_each_thing_that_was_timed(html: str) -> None:
    plot = html.partition('<svg class="plot"')[2].partition("</svg>")[0]
    assert sorted(re.findall(r'<polyline class="line (\w+)"', plot)) == ["compile", "eager", "fused", "limit"]
    points = " ".join(re.findall(r'points="([^"]+)"', plot))
    coordinates = [float(number) for number in re.split("[ ,]", points)]
    assert len(coordinates) == 2 * (4 + 3 + 4 + 4)  # the stale bucket has no eager time
    assert all(0 <= number <= 640 for number in coordinates)


def test_of_crowded_t_the_first_and_the_last_are_named_below_the_plot() -> None:
    tokens = [1, 4, 16, 64, 256, 1024, 4096, 8192]
    buckets = tuple(Bucket(replace(WINNER, tokens=t, time_us=1.0 + t), {}, None, "") for t in tokens)
    plot = times_plot(Curve(H200, PROBLEM, buckets))
    named = [int(t) for t in re.findall(r'text-anchor="middle">(\d+)<', plot)]
    assert named == [t for t in tokens if t != 4096]


def recorded(tmp_path: Path, content: object) -> Path:
    (tmp_path / "peers.json").write_text(json.dumps(content), encoding="utf-8")
    return tmp_path / "peers.json"


def test_peers_of_the_same_device_and_problem_are_shown_beside(path: Path, tmp_path: Path) -> None:
    times = {"lib <x>": {"1": 3.25, "64": 4.5, "99999": 7.75}, "only far away": {"4096000": 1.0}}
    known = {"device": "NVIDIA H200", "tables": {"a": {"problem": str(PROBLEM), "peers": times}}}
    out = str(tmp_path / "out.html")
    assert run(["report", out, "--database", str(path), "--peers", str(recorded(tmp_path, known))]) == 0
    html = Path(out).read_text(encoding="utf-8")
    mine, _, other = html.partition(f"<h2>{UNKNOWN.kind}:{UNKNOWN.arch}:NVIDIA Nobody &lt;b&gt;")
    assert "lib &lt;x&gt; µs" in mine
    assert [us in mine for us in ("3.25", "4.50", "7.75")] == [True, True, False]
    assert "lib" not in other
    plot = mine.partition('<svg class="plot"')[2].partition("</svg>")[0]
    (points,) = re.findall(r'<polyline class="line peer0" points="([^"]+)"', plot)
    assert len(points.split()) == 2
    assert ">lib &lt;x&gt;</text>" in plot
    assert "only far away</text>" not in plot


def test_the_peers_of_the_benchmarks_can_be_read() -> None:
    known = load_peers(Path(__file__).parents[1] / "benchmarks" / "h200" / "peers.json")
    assert known.device == "NVIDIA H200"
    assert known.times[PROBLEM]["vLLM Triton"][64] == 1.03


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([], "is no file of peers"),
        ({"tables": {}}, "it lacks device"),
        ({"device": "a", "tables": {"t": {"problem": "all"}}}, "problem 'all'"),
        ({"device": "a", "tables": {"t": {"problem": "op(a=1)", "peers": {"x": {"1": -1}}}}}, "-1.0 µs at T=1 is no"),
        ({"device": "a", "tables": {"t": {"problem": "op(a=1)", "peers": {"x" * 99: {}}}}}, "is no name"),
    ],
)
def test_a_file_that_holds_no_peers_is_refused_by_name(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: object, reason: str
) -> None:
    peers = recorded(tmp_path, content)
    out = tmp_path / "out.html"
    assert run(["report", str(out), "--database", str(path), "--peers", str(peers)]) == 2
    told = capsys.readouterr().err
    assert str(peers) in told
    assert reason in told
    assert run(["report", str(out), "--database", str(path), "--peers", str(tmp_path / "none.json")]) == 2
    assert not out.exists()


def trials(times: Callable[[Config], float], tokens: int = 64) -> list[Trial]:
    configs = [Config.of(ROWS=rows, UNROLL=unroll, PDL=1) for rows in (1, 2, 4, 8, 16) for unroll in (1, 2, 4, 8)]
    return [Trial(H200, PROBLEM, tokens, c, HERE, "ok", time_us=times(c), error=0.1) for c in configs]


def test_what_a_tunable_is_worth_is_how_much_it_decides() -> None:
    rows_matter = [*trials(lambda c: 10.0 * c["ROWS"]), *trials(lambda c: 900.0 * c["ROWS"], tokens=1024)]
    first, second = worths(rows_matter)
    assert (first.tunable, second.tunable) == ("ROWS", "UNROLL")
    assert first.share > 0.9
    assert first.share + second.share == pytest.approx(1.0)
    assert first.best == pytest.approx({1: 1.0, 2: 2.0, 4: 4.0, 8: 8.0, 16: 16.0})
    assert second.best == pytest.approx({1: 1.0, 2: 1.0, 4: 1.0, 8: 1.0})
    assert worths(trials(lambda c: float(c["UNROLL"])))[0].tunable == "UNROLL"


def test_too_few_trials_and_failed_ones_tell_nothing_of_a_tunable() -> None:
    made = trials(lambda c: float(c["ROWS"]))
    assert worths(made[:-1]) == worths([]) == ()
    failed = replace(made[0], tokens=1, status="wrong", time_us=None)
    assert worths([*made, failed]) == worths(made) != ()


def test_the_page_tells_what_each_tunable_is_worth_by_the_trials_of_the_present_kernel(path: Path) -> None:
    with TunedDatabase(path) as database:
        for trial in trials(lambda c: float(c["ROWS"])):
            database.record_trial(trial)
            database.record_trial(replace(trial, source_hash="0ld", time_us=99.0 / trial.config["ROWS"]))
        html = html_page(gather(database, lambda winner: ""))
    worth = Page(html.partition("What each tunable is worth</h4>\n")[2].partition("</div>")[0]).text
    assert html.count("What each tunable is worth") == 1
    assert worth.index("ROWS") < worth.index("UNROLL")
    assert "1: 1.00×, 2: 2.00×, 4: 4.00×, 8: 8.00×, 16: 16.00×" in worth


def test_the_command_writes_the_page(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["report", str(tmp_path / "out.html"), "--database", str(path)]) == 0
    assert "7 buckets of 2 problems" in capsys.readouterr().out
    assert "What autofuse measured" in Page((tmp_path / "out.html").read_text(encoding="utf-8")).text
    assert run(["report", str(tmp_path / "no" / "out.html"), "--database", str(path)]) == 2


def test_an_empty_database_says_so(tmp_path: Path) -> None:
    with TunedDatabase(tmp_path / "empty.db") as database:
        assert "Nothing was measured yet" in Page(html_page(gather(database, lambda winner: ""))).text
