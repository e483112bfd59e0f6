"""Charts as inline SVG: classes instead of colours (page.css has both schemes), a title and a description in each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 340
LEFT, RIGHT, TOP, BOTTOM = 62, 18, 32, 52

_Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Mark:
    """A labelled point: `x` > 0 with an optional (lo, hi), `y` with an optional (lo, hi); `kind` is its CSS class."""

    label: str
    kind: str
    x: float
    y: float
    y_range: tuple[float, float] | None = None
    x_range: tuple[float, float] | None = None


@dataclass(frozen=True)
class Series:
    """A labelled line through (x, y) points, by increasing x; `kind` is its CSS class."""

    label: str
    kind: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Axis:
    """A scale from data to pixels with the words for its ticks; `log` scales need a `low` above 0."""

    low: float
    high: float
    start: float
    end: float
    log: bool
    words: Callable[[float], str]

    def __call__(self, value: float) -> float:
        """Data value -> pixel, clipped to the axis."""
        low, high, at = (math.log(v) if self.log else v for v in (self.low, self.high, max(value, self.low)))
        return self.start + (min(at, high) - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Powers of ten on a log scale (every other one where there are many), else fifths."""
        if not self.log:
            return [self.low + (self.high - self.low) * i / 5 for i in range(6)]
        first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
        steps = (1,) if last - first > 1 else (1, 2, 5)
        every = [step * 10.0**power for power in range(first - 1, last + 1, 1 + (last - first) // 7) for step in steps]
        return [tick for tick in every if self.low * 0.999 <= tick <= self.high * 1.001]


def log_axis(values: Sequence[float], start: float, end: float, words: Callable[[float], str]) -> Axis:
    """An axis over half decades that hold every value, at least one decade wide."""
    low = 10 ** (math.floor(2 * math.log10(min(values))) / 2)
    high = 10 ** (math.ceil(2 * math.log10(max(values))) / 2)
    if high / low < 10:
        low, high = low / math.sqrt(10), high * math.sqrt(10)
    return Axis(low, high, start, end, True, words)


def share_axis(values: Sequence[float], words: Callable[[float], str]) -> Axis:
    """A vertical axis for shares: 0 to 1. Where all lie close together, or are no shares: the multiples of 0.05 around
    them."""
    low, high = math.floor(20 * min(values)) / 20, math.ceil(20 * max(values)) / 20
    if high - low > 0.25 and high <= 1:
        low, high = 0.0, 1.0
    return Axis(low, max(high, low + 0.05), HEIGHT - BOTTOM, TOP, False, words)


def scatter(
    marks: Sequence[Mark],
    *,
    title: str,
    description: str,
    x_label: str,
    y_label: str,
    x_words: Callable[[float], str],
    y_words: Callable[[float], str],
    link: tuple[Mark, Mark, str] | None = None,
) -> str:
    """`marks` over a log x axis and a `share_axis`; `link` joins two of them with a labelled dashed line."""
    xs = [x for mark in marks for x in (mark.x, *(mark.x_range or ()))]
    x_axis = log_axis(xs, LEFT, WIDTH - RIGHT, x_words)
    y_axis = share_axis([y for mark in marks for y in (mark.y, *(mark.y_range or ()))], y_words)
    parts = _frame(x_axis, y_axis, x_label, y_label)
    taken = [_box(x_axis(mark.x), y_axis(mark.y) + 4, 16, "middle") for mark in marks]
    if link is not None:
        a, b, words = link
        ax, ay, bx, by = x_axis(a.x), y_axis(a.y), x_axis(b.x), y_axis(b.y)
        parts.append(f'<line class="link" x1="{ax:.1f}" y1="{ay:.1f}" x2="{bx:.1f}" y2="{by:.1f}"/>')
        parts.append(_text((ax + bx) / 2, (ay + by) / 2 - 8, words, "note", "middle"))
        taken.append(_box((ax + bx) / 2, (ay + by) / 2 - 8, _extent(words), "middle"))
    parts += [_mark(mark, x_axis, y_axis) for mark in marks]
    parts += [_label(x_axis(mark.x), y_axis(mark.y), mark.label, mark.kind, taken) for mark in marks]
    return _svg(title, description, parts)


def lines(
    series: Sequence[Series],
    *,
    title: str,
    description: str,
    x_label: str,
    y_label: str,
    x_words: Callable[[float], str],
    y_words: Callable[[float], str],
    x_log: bool = True,
    y_log: bool,
) -> str:
    """`series` over an x axis that is logarithmic or begins at 0; y logarithmic or from 0 to 1. Labels stand at the end
    of each line."""
    xs = [x for line in series for x, _ in line.points]
    ys = [y for line in series for _, y in line.points]
    left, right = LEFT, WIDTH - RIGHT
    x_axis = log_axis(xs, left, right, x_words) if x_log else Axis(0.0, max(xs), left, right, False, x_words)
    bottom, top = HEIGHT - BOTTOM, TOP
    y_axis = log_axis(ys, bottom, top, y_words) if y_log else Axis(0.0, 1.0, bottom, top, False, y_words)
    parts = _frame(x_axis, y_axis, x_label, y_label)
    ends: list[tuple[float, float, str, str]] = []
    taken: list[_Box] = []
    for line in series:
        pixels = [(x_axis(x), y_axis(y)) for x, y in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in pixels)
        parts.append(f'<polyline class="line {line.kind}" points="{path}"/>')
        for (x, y), (at, value) in zip(pixels, line.points, strict=True):
            hint = escape(f"{line.label}: {x_words(at)}, {y_words(value)}")
            parts.append(_circle("dot", line.kind, x, y, 3.2, hint))
        ends.append((pixels[-1][0], pixels[-1][1], line.label, line.kind))
    return _svg(
        title, description, parts + [_label(x, y, words, kind, taken, above=True) for x, y, words, kind in ends]
    )


def units(ids: Sequence[int], num_units: int, *, title: str, description: str) -> str:
    """All units as one field, row by row in id order, those in `ids` lit (drawn larger than to scale)."""
    columns = max(1, math.ceil(math.sqrt(5 * num_units)))
    width, rows = 600.0, max(1, math.ceil(num_units / columns))
    cell = width / columns
    height = max(rows * cell, 8.0)
    dots = "".join(f"M{(i % columns + 0.5) * cell:.1f} {(i // columns + 0.5) * cell:.1f}h0" for i in ids)
    parts = [
        f'<rect class="field" width="{width:.0f}" height="{height:.1f}" rx="4"/>',
        f'<path class="lit" d="{dots}"/>' if dots else "",
    ]
    return _svg(title, description, parts, width, height)


def _frame(x_axis: Axis, y_axis: Axis, x_label: str, y_label: str) -> list[str]:
    parts = []
    for tick in x_axis.ticks():
        x = x_axis(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(_text(x, HEIGHT - BOTTOM + 18, x_axis.words(tick), "tick", "middle"))
    for tick in y_axis.ticks():
        y = y_axis(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
        parts.append(_text(LEFT - 8, y + 4, y_axis.words(tick), "tick", "end"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, x_label, "axis", "middle"))
    parts.append(_text(LEFT - 54, 12, y_label, "axis", "start"))
    return parts


def _mark(mark: Mark, x_axis: Axis, y_axis: Axis) -> str:
    x, y = x_axis(mark.x), y_axis(mark.y)
    hint = escape(f"{mark.label}: {x_axis.words(mark.x)}, {y_axis.words(mark.y)}")
    out = []
    if mark.y_range is not None:
        low, high = (y_axis(bound) for bound in mark.y_range)
        out.append(f'<line class="whisker {mark.kind}" x1="{x:.1f}" y1="{low:.1f}" x2="{x:.1f}" y2="{high:.1f}"/>')
    if mark.x_range is not None:
        low, high = (x_axis(bound) for bound in mark.x_range)
        out.append(f'<line class="whisker {mark.kind}" x1="{low:.1f}" y1="{y:.1f}" x2="{high:.1f}" y2="{y:.1f}"/>')
    return "".join([*out, _circle("mark", mark.kind, x, y, 7, hint)])


def _label(x: float, y: float, words: str, kind: str, taken: list[_Box], above: bool = False) -> str:
    """A label by the point (x, y), at the first place that touches none of the boxes `taken`, which it joins."""
    places = [] if above else [(x + 12, y + 4, "start"), (x - 12, y + 4, "end")]
    for step in (1, 2, 3):
        places += [(x, y + side * (17 * step - 3) + 4, anchor) for side in (-1, 1) for anchor in ("end", "start")]
    at, level, anchor = next((p for p in places if _fits(_box(p[0], p[1], _extent(words), p[2]), taken)), places[0])
    taken.append(_box(at, level, _extent(words), anchor))
    return _text(at, level, words, f"label {kind}", anchor)


def _fits(box: _Box, taken: Sequence[_Box]) -> bool:
    left, top, right, bottom = box
    inside = left >= LEFT and right <= WIDTH and top >= 0 and bottom <= HEIGHT - BOTTOM
    return inside and all(right < other[0] or other[2] < left or bottom < other[1] or other[3] < top for other in taken)


def _extent(words: str) -> float:
    """Width of a label in pixels; 7.4 a letter is the mean of the widest of the page's fonts (DejaVu Sans, bold)."""
    return 7.4 * len(words)


def _box(at: float, level: float, extent: float, anchor: str) -> _Box:
    """(left, top, right, bottom) of a line of text whose baseline is at `level`."""
    left = at - {"start": 0.0, "middle": 0.5, "end": 1.0}[anchor] * extent
    return (left, level - 12, left + extent, level + 3)


def _circle(role: str, kind: str, x: float, y: float, radius: float, hint: str) -> str:
    return f'<circle class="{role} {kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"><title>{hint}</title></circle>'


def _text(x: float, y: float, words: str, kind: str, anchor: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _svg(title: str, description: str, parts: Sequence[str], width: float = WIDTH, height: float = HEIGHT) -> str:
    head = f"<title>{escape(title)}</title><desc>{escape(description)}</desc>"
    box = f'viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(title)}"'
    return f"<svg {box}>{head}{''.join(parts)}</svg>"
