"""Plots as inline SVG: axes, lines, bars, dots and a heat map, coloured by the page's style sheet.

Classes: series-0 and series-1 (candidate, reference), limit (a tolerance), axis, grid, bad. Every mark has a <title>
with its numbers, which browsers show when it is pointed at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 480, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 10, 10, 42
CEILING = 1e3  # where a logarithmic axis ends, for infinite values


@dataclass(frozen=True)
class Series:
    """One line or one set of dots; `style` is its CSS class."""

    name: str
    style: str
    values: tuple[float, ...]


@dataclass(frozen=True)
class _Scale:
    """From values to pixels, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        at = math.log10(min(max(value, self.low), self.high)) if self.log else value
        return self.start + (at - low) / ((high - low) or 1.0) * (self.end - self.start)


def line_plot(series: Sequence[Series], names: Sequence[str], x_label: str, y_label: str) -> Markup:
    """Lines over the named places on a logarithmic axis; zeros lie at its foot, infinite values at its top."""
    shown = [min(v, CEILING) for s in series for v in s.values if v > 0] or [1.0]
    low, high = math.floor(math.log10(min(shown))), math.ceil(math.log10(max(shown)))
    low -= any(v == 0 for s in series for v in s.values)
    decades = (low, max(high, low + 1))
    y = _Scale(10.0 ** decades[0], 10.0 ** decades[1], HEIGHT - BOTTOM, TOP, log=True)
    count = max(len(s.values) for s in series)
    x = _Scale(0, max(count - 1, 1), LEFT + 8, WIDTH - RIGHT - 8)
    parts = [_log_grid(y, decades), _x_ticks(x, names), _labels(x_label, y_label)]
    for s in series:
        points = [(x(i), y(CEILING if math.isnan(v) else v), v) for i, v in enumerate(s.values)]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py, _ in points)
        parts.append(f'<polyline class="line {s.style}" points="{path}"/>')
        parts += [_dot(px, py, s.style, f"{s.name}, {names[i]}: {v:.3g}") for i, (px, py, v) in enumerate(points)]
    return _svg(parts, y_label)


def dot_plot(series: Sequence[Series], x_label: str, y_label: str) -> Markup:
    """Dots over 0, 1, 2, ... on a linear axis from zero."""
    top = max((v for s in series for v in s.values), default=1.0) or 1.0
    y = _Scale(0, top * 1.05, HEIGHT - BOTTOM, TOP)
    count = max(len(s.values) for s in series)
    x = _Scale(0, max(count - 1, 1), LEFT + 8, WIDTH - RIGHT - 8)
    parts = [_linear_grid(y, top), _x_ticks(x, [str(i) for i in range(count)]), _labels(x_label, y_label)]
    radius = 3.5 if count < 50 else 1.5
    for s in series:
        parts += [_dot(x(i), y(v), s.style, f"{s.name}, {i}: {v:.4g}", radius) for i, v in enumerate(s.values)]
    return _svg(parts, y_label)


def bar_plot(values: Sequence[float], names: Sequence[str], x_label: str, y_label: str, bad: Sequence[float]) -> Markup:
    """Draw bars of counts; the `bad` part of each stands in the colour of errors at its foot."""
    top = max(values, default=1.0) or 1.0
    y = _Scale(0, top * 1.05, HEIGHT - BOTTOM, TOP)
    step = (WIDTH - LEFT - RIGHT) / max(len(values), 1)
    parts = [_linear_grid(y, top, whole=True), _labels(x_label, y_label)]
    every = 1 << max(0, math.ceil(math.log2(len(values) / 8))) if values else 1
    for i, (value, name, wrong) in enumerate(zip(values, names, bad, strict=True)):
        left = LEFT + i * step + step * 0.12
        parts.append(_bar(left, step * 0.76, y, value, "series-0", f"{name}: {value:g}"))
        if wrong:
            parts.append(_bar(left, step * 0.76, y, wrong, "bad", f"{name}: {wrong:g} of them errors"))
        if i % every == 0:
            parts.append(_text(LEFT + (i + 0.5) * step, HEIGHT - BOTTOM + 15, name, "middle"))
    return _svg(parts, y_label)


def heat_map(rows: Sequence[Sequence[int]], names: Sequence[str], x_label: str) -> Markup:
    """One line a layer, one cell an expert; the fuller, the more tokens. Empty cells stand in the colour of errors."""
    columns = max(len(row) for row in rows)
    width = (WIDTH - LEFT - RIGHT) / columns
    size = max(min(width, 22.0), 6.0)
    height = TOP + size * len(rows) + BOTTOM
    top = max((n for row in rows for n in row), default=1) or 1
    parts = []
    for r, (row, name) in enumerate(zip(rows, names, strict=True)):
        at = TOP + r * size
        parts.append(_text(LEFT - 6, at + size * 0.7, name, "end"))
        for c, n in enumerate(row):
            style = "series-0" if n else "bad"
            depth = 0.08 + 0.92 * n / top if n else 1.0
            box = f'x="{LEFT + c * width:.1f}" y="{at:.1f}" width="{width * 0.94:.2f}" height="{size * 0.94:.2f}"'
            tip = f"<title>layer {escape(name)}, expert {c}: {n} tokens</title>"
            parts.append(f'<rect class="fill {style}" fill-opacity="{depth:.2f}" {box}>{tip}</rect>')
    parts += [_text(LEFT + (c + 0.5) * width, height - BOTTOM + 15, str(c), "middle") for c in _some(columns)]
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, height - 6, x_label, "middle"))
    return _svg(parts, "expert coverage", height)


def _svg(parts: Sequence[str], label: str, height: float = HEIGHT) -> Markup:
    body = "".join(parts)
    return Markup(  # every text in it is escaped where it is made
        f'<svg class="plot" role="img" aria-label="{escape(label)}" viewBox="0 0 {WIDTH} {height:.0f}">{body}</svg>'
    )


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _dot(x: float, y: float, style: str, tip: str, radius: float = 3.0) -> str:
    return f'<circle class="fill {style}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"><title>{escape(tip)}</title></circle>'


def _bar(left: float, width: float, y: _Scale, value: float, style: str, tip: str) -> str:
    box = f'x="{left:.1f}" y="{y(value):.1f}" width="{width:.1f}" height="{max(y(0) - y(value), 0):.1f}"'
    return f'<rect class="fill {style}" {box}><title>{escape(tip)}</title></rect>'


def _grid(y: float, name: str) -> str:
    line = f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return line + _text(LEFT - 6, y + 4, name, "end")


def _log_grid(y: _Scale, decades: tuple[int, int]) -> str:
    every = max(1, math.ceil((decades[1] - decades[0]) / 6))
    return "".join(_grid(y(10.0**d), f"1e{d}") for d in range(decades[0], decades[1] + 1, every))


def _linear_grid(y: _Scale, top: float, whole: bool = False) -> str:
    step = max(_round_step(top / 4), 1.0) if whole else _round_step(top / 4)
    return "".join(_grid(y(i * step), _brief(i * step)) for i in range(int(top / step) + 1))


def _round_step(rough: float) -> float:
    """The next of 1, 2, 5, 10, ... ; whole numbers from one on."""
    decade = 10.0 ** math.floor(math.log10(rough))
    return next(part * decade for part in (1, 2, 5, 10) if part * decade >= rough)


def _brief(value: float) -> str:
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _x_ticks(x: _Scale, names: Sequence[str]) -> str:
    return "".join(_text(x(i), HEIGHT - BOTTOM + 15, names[i], "middle") for i in _some(len(names)))


def _some(count: int) -> range:
    """At most a dozen of 0..count-1, in round steps."""
    return range(0, count, max(1, int(_round_step(count / 12))))


def _labels(x_label: str, y_label: str) -> str:
    across = _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_label, "middle")
    middle = (TOP + HEIGHT - BOTTOM) / 2
    return (
        across + f'<text transform="translate(13 {middle}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
    )
