"""The two views of a result: every figure is in them, whatever is missing, and the page asks for nothing."""

import copy
import json
import re
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from sparingly.report import charts, html, result, terminal

SAMPLE = json.loads(Path(__file__).with_name("sample.json").read_text(encoding="utf-8"))
PARTS = [*SAMPLE["workloads"]["spell"], "machine", "versions", "commit"]


def screen(raw: dict, width: int = 80) -> str:
    out = StringIO()
    terminal.show(result.parse(raw), Console(file=out, width=width, color_system=None))
    return out.getvalue()


def page(raw: dict) -> str:
    return html.page(result.parse(raw))


class Outline(HTMLParser):
    """Open tags with their attributes; fails on a tag closed out of order."""

    VOID = frozenset({"meta", "br", "img", "input", "link", "hr"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def outline(text: str) -> Outline:
    parser = Outline()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    return parser


@pytest.mark.parametrize("width", [80, 120])
def test_the_screen_fits_and_shows_every_saving_with_its_interval(width):
    shown = screen(SAMPLE, width)
    assert max(map(len, shown.splitlines())) <= width
    for words in ("141× [131, 152]", "212× [197, 229]", "64× [60, 69]", "31× [29, 34]", "7.2× [6.7, 7.8]"):
        assert words in shown
    for words in ("84.1 % [83.8, 84.4]", "99.4 % [99.3, 99.5]", "512×", "318×", "no powercap counter", "includes 1"):
        assert words in shown
    assert "…" not in shown
    assert len(shown.splitlines()) <= 45


def test_a_loss_is_on_the_screen_and_on_the_page():
    raw = copy.deepcopy(SAMPLE)
    raw["workloads"]["spell"]["inference"]["batch_1"]["saving"]["cpu_s"] = {"value": 0.5, "lo": 0.4, "hi": 0.6}
    assert "loss  one input at a time, fp32 both" in screen(raw)
    assert 'class="big loss">0.50×' in page(raw)
    assert "<li>one input at a time, fp32 both: processor time 0.50×" in page(raw)


@pytest.mark.parametrize("part", PARTS)
def test_any_part_may_be_missing(part):
    raw = copy.deepcopy(SAMPLE)
    for holder in (raw, raw["workloads"]["spell"]):
        holder.pop(part, None)
    assert "Spelling correction" in screen(raw) or part == "title"
    outline(page(raw))


def test_an_empty_workload_is_shown_as_unmeasured():
    raw = {"schema": 1, "workloads": {"spell": {}}}
    assert "No saving was measured." in screen(raw)
    assert "no saving was measured in training" in page(raw)


def test_the_page_asks_for_nothing_and_runs_nothing():
    text = page(SAMPLE)
    assert "default-src 'none'" in text
    assert not re.search(
        r"https?:|//|url\(|@import|<script|<link|<iframe|\bon\w+=", text.replace("<!doctype html>", "")
    )
    tags = outline(text).seen
    assert not [attributes for _, attributes in tags if {"src", "href", "srcset", "data"} & attributes.keys()]


def test_the_page_has_every_chart_and_each_says_what_it_shows():
    tags = outline(page(SAMPLE)).seen
    names = [attributes["aria-label"] for tag, attributes in tags if tag == "svg"]
    assert names[:4] == [
        "P@1 against processor time per answer",
        "Processor time per answer against the number of classes",
        "P@1 during training",
        "P@1 against training time at 20,000 classes, both trained at length",
    ]
    assert names[4:] == [f"Classes scored for {w}" for w in ("recieve", "acomodate", "definately", "seperate")]


def test_energy_is_drawn_where_the_result_has_joules():
    raw = copy.deepcopy(SAMPLE)
    raw["workloads"]["spell"]["inference"]["batch_1"].update(
        selective_energy_j={"value": 2e-5, "lo": 1e-5, "hi": 1e-4},
        dense_energy_j={"value": 1e-2, "lo": 1e-3, "hi": 1e-1},
    )
    assert "P@1 against energy per answer" in page(raw)
    assert "P@1 against energy per answer" not in page(SAMPLE)


def test_words_from_the_result_cannot_become_markup():
    raw = copy.deepcopy(SAMPLE)
    entry = raw["workloads"]["spell"]
    bad = '<img src=x onerror="a">&'
    entry["title"] = raw["commit"] = raw["note"] = bad
    entry["examples"][0].update(typed=bad, answers=[[bad, 0.5]])
    entry["quality"]["incumbents"][bad] = {"value": 0.1, "lo": 0.0, "hi": 0.2, "cpu_s": 1e-3}
    tags = outline(page(raw)).seen
    assert "img" not in [tag for tag, _ in tags]


def test_the_fixture_says_on_the_page_that_it_is_none():
    assert "Not a result." in page(SAMPLE)


def test_lit_units_stand_where_their_ids_are():
    drawn = charts.units([0, 7, 499], 500, title="t", description="d")
    root = ElementTree.fromstring(drawn)
    assert root.attrib["viewBox"] == "0 0 600 120"
    lit = root.find("path")
    assert lit is not None
    # 50 columns of 12 pixels, 10 rows: id 499 is the last of the last row.
    assert re.findall(r"M([\d.]+) ([\d.]+)", lit.attrib["d"]) == [("6.0", "6.0"), ("90.0", "6.0"), ("594.0", "114.0")]


def test_a_log_axis_gives_equal_ratios_equal_lengths():
    axis = charts.log_axis([1e-4, 3e-2], 0.0, 300.0, str)
    assert axis(1e-3) - axis(1e-4) == pytest.approx(axis(1e-2) - axis(1e-3))
    assert 0 <= axis(1e-4) < axis(3e-2) <= 300
    assert axis.ticks() == pytest.approx([1e-4, 1e-3, 1e-2])


def test_labels_do_not_lie_on_each_other():
    marks = [charts.Mark(f"method {i}", "dense", 1.0 + i / 100, 0.5 + i / 100) for i in range(4)]
    drawn = charts.scatter(marks, title="t", description="d", x_label="x", y_label="y", x_words=str, y_words=str)
    labels = [e for e in ElementTree.fromstring(drawn).iter("text") if e.attrib["class"].startswith("label")]
    levels = sorted((float(e.attrib["y"]), e.attrib["text-anchor"]) for e in labels)
    assert len(set(levels)) == 4
