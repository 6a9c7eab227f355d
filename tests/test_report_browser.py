"""The report in a real browser: drawn, and readable where scripts are switched off."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from autofuse.cache_db import Baseline, Trial, TunedDatabase, Winner
from autofuse.ops import get_op
from autofuse.report_page import Peers, gather, html_page
from autofuse.targets import Target

BROWSERS = ("chromium-headless-shell", "chrome-headless-shell", "chromium", "chromium-browser", "google-chrome")
BROWSER = os.environ.get("AUTOFUSE_BROWSER") or next(filter(None, map(shutil.which, BROWSERS)), None)
WIDTH, HEIGHT = 1100, 1400  # pixels
FUSED, GREEN, PEER = (0x11, 0x70, 0x3D), (0xDD, 0xF3, 0xE5), (0x1B, 0x62, 0xB5)  # of the page's light style

pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs a browser: apt-get install chromium-headless-shell")

H200 = Target("cuda", "sm_90a", "NVIDIA H200")
OP = get_op("mla_dual_rms_norm")
PROBLEM = OP.make_problem(dtype="bf16", q_lora_rank=1536, kv_lora_rank=512, cast_before_weight=True)
HERE = OP.source_hash("cuda")
CONFIG = OP.default_config("cuda", PROBLEM, 64)


def open_page(page: Path, tmp_path: Path, *options: str) -> str:
    """What the browser prints of a page, with scripts off. It draws the page in ``WIDTH`` × ``HEIGHT``."""
    assert BROWSER is not None
    without = tmp_path / "without_scripts.html"
    html, head = page.read_text(encoding="utf-8"), "<head>"
    assert head in html
    policy = """<meta http-equiv="Content-Security-Policy" content="script-src 'none'">"""
    without.write_text(html.replace(head, f"{head}{policy}", 1), encoding="utf-8")
    command = [BROWSER, "--headless=new", "--disable-gpu", "--hide-scrollbars"]
    command.append(f"--user-data-dir={tmp_path / 'profile'}")
    command += [f"--window-size={WIDTH},{HEIGHT}", "--disable-background-networking", "--no-first-run", *options]
    command += ["--no-sandbox"] * (os.geteuid() == 0)  # which it has not for root
    done = subprocess.run([*command, without.as_uri()], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def pixels(png: bytes) -> tuple[int, int, Counter[tuple[int, ...]]]:
    """Width, height and how often each colour occurs, of a PNG with 8 bits a channel and no interlacing."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height, depth, kind = struct.unpack(">IIBB", png[16:26])
    assert (depth, kind) in {(8, 2), (8, 6)}
    channels = 3 if kind == 2 else 4
    data, at = b"", 8
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        if png[at + 4 : at + 8] == b"IDAT":
            data += png[at + 8 : at + 8 + length]
        at += 12 + length
    raw, stride = zlib.decompress(data), width * channels
    colours: Counter[tuple[int, ...]] = Counter()
    above = bytearray(stride)
    for y in range(height):
        begin = y * (stride + 1)
        row = unfiltered(raw[begin], bytearray(raw[begin + 1 : begin + 1 + stride]), above, channels)
        colours.update(zip(*(row[channel::channels] for channel in range(3)), strict=True))
        above = row
    return width, height, colours


def unfiltered(kind: int, row: bytearray, above: bytearray, step: int) -> bytearray:
    """A row of a PNG without its filter (ISO/IEC 15948, 9.2)."""
    for i in range(len(row)) if kind else ():
        left, up = (row[i - step] if i >= step else 0), above[i]
        corner = above[i - step] if i >= step else 0
        if kind == 4:
            guess = left + up - corner
            near = min((abs(guess - left), 0, left), (abs(guess - up), 1, up), (abs(guess - corner), 2, corner))
            row[i] = (row[i] + near[2]) & 255
        else:
            row[i] = (row[i] + (0, left, up, (left + up) // 2)[kind]) & 255
    return row


@pytest.fixture
def page(tmp_path: Path) -> Path:
    with TunedDatabase(tmp_path / "tuned.db") as database:
        for tokens, gain in ((1, 0.97), (64, 2.09), (1024, 1.5)):
            gains = (gain, gain - 0.05, gain + 0.05)
            made = Winner(H200, PROBLEM, tokens, CONFIG, HERE, 1.03 * tokens**0.3, 0.02, "compile", 2.15, *gains)
            database.record_winner(made)
            database.record_baseline(Baseline(H200, PROBLEM, tokens, "compile", 2.15 * tokens**0.3, 0.1))
        for number, config in zip(range(40), OP.kernel_source("cuda").space.configs(PROBLEM, 64), strict=False):
            trial = Trial(H200, PROBLEM, 64, config, HERE, "ok", time_us=1.0 + number % 8, error=0.1)
            database.record_trial(trial)
        database.record_trial(replace(trial, config=CONFIG, status="wrong", message="<b>off</b> by 2", time_us=None))
        peers = Peers("NVIDIA H200", {PROBLEM: {"another library": {1: 3.0, 64: 4.0, 1024: 9.0}}})
        html = html_page(gather(database, lambda winner: "", [peers]))
    (tmp_path / "report.html").write_text(html, encoding="utf-8")
    return tmp_path / "report.html"


def test_scripts_are_off_in_these_tests(page: Path, tmp_path: Path) -> None:
    script = "document.getElementById('x').textContent = 'ran'"
    page.write_text(f"<head></head><p id='x'>still</p><script>{script}</script>", encoding="utf-8")
    assert "still</p>" in open_page(page, tmp_path, "--dump-dom")


def test_without_scripts_everything_is_there_to_read(page: Path, tmp_path: Path) -> None:
    read = open_page(page, tmp_path, "--dump-dom")
    for part in (
        "Coverage: cuda:sm_90a:NVIDIA H200",
        "2.09×",
        "another library",
        "What each tunable is worth",
        "T=1024",
    ):
        assert part in read
    assert "&lt;b&gt;off&lt;/b&gt; by 2" in read
    assert read.count("<polyline") == 4


def test_a_screenshot_shows_the_table_the_plot_and_the_peer(page: Path, tmp_path: Path) -> None:
    open_page(page, tmp_path, f"--screenshot={tmp_path / 'report.png'}")
    width, height, colours = pixels((tmp_path / "report.png").read_bytes())
    assert (width, height) == (WIDTH, HEIGHT)
    assert colours[GREEN] > 1000, "two cells are green"
    assert colours[FUSED] > 300, "a line, and the text of two cells"
    assert colours[PEER] > 300, "a dashed line, and bars"
