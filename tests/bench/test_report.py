"""The page: whole, honest, safe, and without a network."""

import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from rich.console import Console
from test_summary import DENSE, compared, failed, ok

from saccade.bench import console, report, units
from saccade.bench.draw import Drawing
from saccade.bench.records import Status, environment

VOID = {"meta", "link", "img", "br"}


KEPT = {"state_bytes": 1536, "state_tokens": 128, "baseline_state_bytes": 65536}


class Page(HTMLParser):
    """Checks that tags nest, and keeps what is in them."""

    def __init__(self, text):
        super().__init__()
        self.open, self.attributes, self.tags, self.text = [], [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def found():
    records = [
        replace(DENSE, seconds=1.0, baseline_bytes=8, peak_bytes=8),
        ok("sparse", 4, 0.1, density=0.25, peak_bytes=4, baseline_bytes=8, speedup_low=3.9, speedup_high=4.2, pairs=8),
        failed("sparse", Status.TIMEOUT, 2048, "too slow"),
        ok("odd", 0.5, 0.2, verdict="slower", first_seconds=30.0, **KEPT),
        failed("evil", Status.WRONG, 128, "<script>alert('&')</script> https://evil.example"),
        failed("fell", Status.FELL_BACK, 128),
        ok("layer", 3, None, layer=True),
        ok("dense", 1, None, layer=True),
    ]
    drawing = Drawing("sparse", "text", torch.eye(64))
    grid = Drawing("odd", "photo", torch.rand(64, 64), grid=(8, 8))
    made = replace(compared(*records), workloads={"text": "some text"}, seconds=12.0, budget=20.0)
    pictures = {"drawings": {"sparse": drawing, "odd": grid}, "references": {DENSE.place: drawing}}
    return replace(made, environment=environment() | {"load": 0.1, "threads": 2}, **pictures)


@pytest.fixture(scope="module")
def text(found):
    return report.page(found)


def test_nothing_comes_from_outside(text):
    page = Page(text)
    loading = ("src", "href", "xlink:href", "srcset", "data", "action")
    loads = [value for _, name, value in page.attributes if name in loading]
    assert loads
    assert all(value.startswith("data:") for value in loads)
    assert "script" not in page.tags
    styles = "".join(re.findall(r"<style>(.*?)</style>", text, re.S))
    assert "@import" not in text
    assert "url(" not in styles
    assert not [value for _, name, value in page.attributes if value and "://" in value and name != "alt"]


def test_messages_of_mechanisms_are_escaped(text):
    assert "<script>" not in text
    assert "&lt;script&gt;alert(" in text


def test_every_mechanism_stands_in_the_table_with_its_status(text):
    page = Page(text)
    for name in ("sparse", "odd", "evil", "fell", "layer"):
        assert name.upper() in page.text
    assert "TIMEOUT at 2048: too slow" in page.text
    assert "then TIMEOUT" in page.text
    assert "FELL_BACK" in page.text
    assert re.search(r"3\.9× to 4\.2×, faster", page.text)


def test_what_is_kept_stands_in_a_column_of_its_own(found, text):
    cells = re.findall(r'<td class="number([^"]*)" data-name="state">(.*?)</td>', text)
    assert sorted(cells) == [("", "<span>1.5 KiB<small>of 64 KiB at 128</small></span>")] + [(" empty", "")] * 4
    printed = Console(width=200, record=True, file=io.StringIO())
    console.tell(found, printed)
    assert "1.5 KiB at 128" in printed.export_text()
    printed = Console(width=120, record=True, file=io.StringIO())  # the twin: it is the first column to go
    console.tell(found, printed)
    assert "1.5 KiB at 128" not in printed.export_text()


def test_the_front_is_named(text):
    assert re.search(r"Pareto front at 1024 tokens .*:\s*<b>sparse</b>,\s*<b>dense</b>\.", text)


def test_every_chart_and_picture_is_told_in_words(text):
    page = Page(text)
    assert page.tags.count("svg") == text.count('role="img"') == 5  # three of attention, two of layers
    assert text.count("<desc") == 5
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    for _, name, value in page.attributes:
        if name == "aria-labelledby":
            assert set(value.split()) <= set(ids)
    alts = [value for tag, name, value in page.attributes if (tag, name) == ("img", "alt")]
    assert alts == ["dense: 64 tokens", "sparse: 64 tokens", "odd: one query on 8×8", "odd: 64 tokens"]


def test_numbers_of_charts_are_numbers(text):
    for tag in re.findall(r"<svg.*?</svg>", text, re.S):
        assert "nan" not in tag
        assert "inf" not in tag.replace("info", "")


def test_light_and_dark_and_narrow(text):
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    assert re.search(r"@media \(max-width:", text)
    root, dark = (dict(re.findall(r"--(\w+): (#\w+)", part)) for part in re.findall(r":root \{(.*?)\}", text, re.S))
    assert set(root) == set(dark)


def _luminance(colour):
    channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def _contrast(one, two):
    high, low = sorted((_luminance(one), _luminance(two)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_enough_to_read(text):
    for part in re.findall(r":root \{(.*?)\}", text, re.S):
        colours = dict(re.findall(r"--(\w+): (#\w+)", part))
        for name, least in {"ink": 7, "soft": 4.5, "good": 4.5, "bad": 4.5, "other": 4.5}.items():
            assert min(_contrast(colours[name], colours[ground]) for ground in ("page", "card")) >= least, name
        assert all(_contrast(colours[f"h{i}"], colours["card"]) >= 3 for i in range(8))
        assert _contrast(colours["ink"], colours["warn"]) >= 7


def test_a_busy_machine_is_said_to_be(found):
    assert report.busy(found) == ""
    loaded = replace(found, environment=found.environment | {"load": 5.0, "cores": 2, "threads": 2})
    assert "(load 5.0 as this began; 2 of 2 threads could be used)" in report.busy(loaded)
    slowed = replace(loaded.records[1], threads=1)
    later = replace(found, records=(found.records[0], slowed), environment=loaded.environment | {"load": 0.0})
    assert "(load 0.0 as this began; 1 of 2 threads could be used)" in report.page(later)


def test_three_files(found, tmp_path):
    paths = report.write(found, tmp_path / "out")
    assert [p.name for p in paths] == ["report.html", "results.csv", "results.jsonl"]
    assert len(paths[1].read_text().splitlines()) == len(found.records) + 1
    assert len([json.loads(line) for line in paths[2].read_text().splitlines()]) == len(found.records)


def long_named(count):
    made = [
        ok(f"mechanism_with_a_long_name_{i}", 0.1, 123.0, 8192, seconds=1.234e-3 * 10**i, first_seconds=12.3)
        for i in range(count)
    ]
    return compared(*(replace(r, speedup_low=0.0999, speedup_high=0.111, baseline_bytes=9) for r in made))


@pytest.mark.parametrize("width", [30, 40, 60, 70, 80, 100, 120, 140, 200])
def test_a_time_is_never_cut(width):
    found = long_named(3)
    printed = Console(width=width, record=True, file=io.StringIO())
    printed.print(console.table(found, printed))
    text = printed.export_text()
    for line in long_named(3).records:
        assert units.seconds(line.seconds) in text
    heads = text.splitlines()[1].split()
    assert "time" in heads
    assert width < 70 or "…" not in text
    assert ("backend" in text) == (width >= 140)
    assert max(len(line) for line in text.splitlines()) <= width


def test_what_is_unproven_has_a_time_and_says_that_it_proves_nothing():
    about = {"status": Status.UNPROVEN, "message": "off by 53%", "first_seconds": 3.0}
    found = replace(compared(DENSE, replace(ok("wild", 2, 0.1), **about)), environment=environment())
    page = Page(report.page(found))
    assert "off by 53%" in page.text
    assert units.seconds(0.5) in page.text
    assert "measured, not judged" in page.text
    printed = Console(width=160, record=True, file=io.StringIO())
    console.tell(found, printed)
    text = printed.export_text()
    assert "wild: UNPROVEN: off by 53%" in text
    assert units.seconds(0.5) in text


def test_nothing_measured_is_a_page_too():
    made = replace(compared(failed("a", Status.OOM, 1)), environment=environment())
    page = Page(report.page(made))
    assert "OOM" in page.text
    assert "svg" not in page.tags


@pytest.mark.parametrize("width", [64, 160])
def test_the_console_says_the_same(found, width):
    printed = Console(width=width, record=True, file=io.StringIO())
    console.tell(found, printed)
    text = printed.export_text()
    flat = re.sub(r"\s+", " ", text)
    assert "sparse: TIMEOUT at 2048: too slow" in flat
    assert "evil: WRONG: <script>" in flat
    assert "4 (3.9-4.2)" in flat
    assert "Pareto front: sparse (4×, error 0.1), dense." in flat
    assert "12 s of a budget of 20 s" in flat
    assert ("25 %" in text) == (width == 160)
    assert ("30 s" in text) == (width == 160)  # the first call
    assert max(len(line) for line in text.splitlines()) <= width
