"""Small SVG charts for the report: no script, no external file, colours from the page's CSS.

A chart takes its colours from classes (`c-tuned`, `c-base`, `c-other`, `c-1` ...), so that it
follows the page into dark mode and onto paper. Every text in it is escaped.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 520, 220
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 22, 34
MOST_POINTS = 400
"""A longer line is drawn as means of neighbours: more would not show at 720 pixels."""
Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line or set of dots; `css` names its colour class."""

    name: str
    points: Sequence[Point]
    css: str
    dots: bool = False
    faint: bool = False


@dataclass(frozen=True)
class Range:
    """A value with its interval, for `interval_chart`; all in [0, 1]."""

    name: str
    value: float
    low: float
    high: float
    css: str


@dataclass(frozen=True)
class Part:
    """A share of a whole, for `stacked_bar`."""

    name: str
    share: float
    css: str


def line_chart(
    series: Sequence[Series], *, title: str, description: str, y: str, zero: bool = False
) -> Markup:
    """Lines over steps; `zero` makes the y axis start at 0. Empty markup without any point."""
    points = [p for s in series for p in s.points if math.isfinite(p[1])]
    if not points:
        return Markup()
    ys = ticks(0.0 if zero else min(p[1] for p in points), max(p[1] for p in points))
    xs = ticks(min(p[0] for p in points), max(p[0] for p in points), whole=True)
    x_of = _scale(min(p[0] for p in points), max(p[0] for p in points), LEFT, WIDTH - RIGHT)
    y_of = _scale(ys[0], ys[-1], HEIGHT - BOTTOM, TOP)
    body = Markup().join(
        [
            *(_grid_line(y_of(v), label(v, step=ys[1] - ys[0])) for v in ys),
            *(_x_tick(x_of(v), label(v)) for v in xs if LEFT <= x_of(v) <= WIDTH - RIGHT + 1),
            _text(WIDTH - RIGHT, HEIGHT - 4, "step", "end"),
            _text(LEFT, TOP - 3, y, "start"),
            *(_draw(s, x_of, y_of) for s in series),
        ]
    )
    return _svg(body, WIDTH, HEIGHT, title, description)


def interval_chart(ranges: Sequence[Range], *, title: str, description: str) -> Markup:
    """One row a value on a scale from 0 to 100 %: dot, interval, figures."""
    row, left, width = 46, 96, 480
    height = row * len(ranges) + 34
    x_of = _scale(0.0, 1.0, left, width - 20)
    pieces = []
    for percent in range(0, 101, 20):
        x = x_of(percent / 100)
        pieces.append(
            Markup('<line class="grid" x1="{0:.1f}" x2="{0:.1f}" y1="6" y2="{1}"/>').format(
                x, height - 28
            )
        )
        pieces.append(_text(x, height - 10, f"{percent} %", "middle"))
    for number, item in enumerate(ranges):
        y = 6 + row * number + row / 2
        pieces.append(_text(left - 14, y + 5, item.name, "end", css="name"))
        pieces.append(
            Markup(
                '<line class="{css} whisker" x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}"/>'
                '<circle class="{css} dot" cx="{value:.1f}" cy="{y}" r="7"/>'
            ).format(
                css=item.css, low=x_of(item.low), high=x_of(item.high), value=x_of(item.value), y=y
            )
        )
        beside = x_of(item.high) + 12
        anchor, at = ("start", beside) if beside < width - 70 else ("end", x_of(item.low) - 12)
        pieces.append(_text(at, y + 5, f"{100 * item.value:.1f} %", anchor, css="figure"))
    return _svg(Markup().join(pieces), width, height, title, description)


def stacked_bar(parts: Sequence[Part], *, title: str, description: str) -> Markup:
    """Shares that sum to one as one bar."""
    whole, height, at, pieces = 2 * WIDTH, 34, 0.0, []
    for part in parts:
        width = part.share * whole
        pieces.append(
            Markup(
                '<rect class="{} area" x="{:.2f}" y="0" width="{:.2f}" height="{}"><title>{}'
                "</title></rect>"
            ).format(
                part.css, at, max(0.0, width), height, f"{part.name}: {100 * part.share:.1f} %"
            )
        )
        at += width
    return _svg(Markup().join(pieces), whole, height, title, description)


def ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Four to seven round values whose first and last enclose [low, high]."""
    if high <= low:
        high = low + (abs(low) * 0.1 or 1.0)
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next(f for f in (1, 2, 2.5, 5, 10) if (high - low) / (step * f) <= 6)
    step = max(1.0, round(step)) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def label(value: float, *, step: float = 1.0) -> str:
    """A tick's text: thousands separated, decimals only where the step has them."""
    if value and (abs(value) >= 1e6 or (abs(value) < 1e-3 and step < 1e-3)):
        return f"{value:.2g}".replace("e-0", "e-").replace("e+0", "e")
    decimals = max(0, -math.floor(math.log10(step) + 1e-9)) if step < 1 else 0
    if step < 1 and round(step * 10**decimals, 6) % 1:
        decimals += 1
    return f"{value:,.{decimals}f}"


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most `most` points: means of equal runs of neighbours, non-finite ones left out."""
    finite = [p for p in points if math.isfinite(p[1])]
    size = math.ceil(len(finite) / most) if finite else 1
    runs = (finite[i : i + size] for i in range(0, len(finite), size))
    return [(sum(p[0] for p in r) / len(r), sum(p[1] for p in r) / len(r)) for r in runs]


def smoothed(points: Sequence[Point], *, window: int) -> list[Point]:
    """Running mean over the last `window` points."""
    found: list[Point] = []
    recent: list[float] = []
    for x, y in points:
        if math.isfinite(y):
            recent = [*recent[-(window - 1) :], y] if window > 1 else [y]
            found.append((x, sum(recent) / len(recent)))
    return found


class _Scale:
    """A linear map from values to pixels."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.span = low, (high - low) or 1.0
        self.start, self.length = start, end - start

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / self.span * self.length


def _scale(low: float, high: float, start: float, end: float) -> _Scale:
    return _Scale(low, high, start, end)


def _draw(series: Series, x_of: _Scale, y_of: _Scale) -> Markup:
    points = [(x_of(x), y_of(y)) for x, y in thinned(series.points)]
    css = f"{series.css}{' faint' if series.faint else ''}"
    dots = Markup().join(
        Markup('<circle class="{} dot" cx="{:.1f}" cy="{:.1f}" r="3.5"/>').format(css, x, y)
        for x, y in points
    )
    if len(points) == 1:
        return dots
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    line = Markup('<path class="{} line" d="{}"/>').format(css, path)
    return line + dots if series.dots else line


def _grid_line(y: float, text: str) -> Markup:
    line = Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(
        LEFT, WIDTH - RIGHT, y, y
    )
    return line + _text(LEFT - 8, y + 4, text, "end")


def _x_tick(x: float, text: str) -> Markup:
    anchor = "end" if x > WIDTH - RIGHT - 12 else "middle"
    return _text(x, HEIGHT - BOTTOM + 17, text, anchor)


def _text(x: float, y: float, text: str, anchor: str, css: str = "tick") -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(
        css, x, y, anchor, text
    )


def _svg(body: Markup, width: int, height: int, title: str, description: str) -> Markup:
    """The picture with its name and description for those who cannot see it."""
    return Markup('<svg role="img" viewBox="0 0 {} {}" aria-label="{}: {}">{}</svg>').format(
        width, height, escape(title), escape(description), body
    )
