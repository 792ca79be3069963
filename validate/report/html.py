"""report.html: the report for people, one file that needs no network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
from markupsafe import Markup

from deepseek_trt.validate.findings.histogram import ErrorHistogram
from deepseek_trt.validate.findings.narrowing import Narrowing
from deepseek_trt.validate.report.digits import apart
from deepseek_trt.validate.report.plots import Series, bar_plot, dot_plot, heat_map, line_plot
from deepseek_trt.validate.report.report import AccuracyReport, BackendReport
from deepseek_trt.validate.report.summary import covered
from deepseek_trt.validate.report.words import WORDS

HTML_FILE = "report.html"
_TEMPLATE = Path(__file__).parent / "report.html.jinja"
_CANDIDATE, _REFERENCE, _LIMIT, _BAD = "k0", "k1", "kl", "kb"


@dataclass(frozen=True)
class Plot:
    """A drawn plot; `key` names its colours."""

    title: str
    svg: Markup
    caption: str
    key: tuple[tuple[str, str], ...] = ()


def render_html(report: AccuracyReport) -> str:
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters["short"] = lambda value: _whole(_short(value))
    environment.filters["signed"] = lambda value: _whole(f"{value:+.2e}")
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        report=report,
        covered=covered(report),
        words=WORDS,
        apart=lambda old, new: apart(float(old), float(new)),
        plots={b.backend: _plots(b, bool(report.parts)) for b in report.backends},
        cost_plot=_cost(report.narrowing) if report.narrowing else None,
    )


def _cost(n: Narrowing) -> Plot:
    series = (Series("mean error", "series-0", tuple(row.mean_relative for row in n.layers)),)
    svg = line_plot(series, [str(row.layer) for row in n.layers], "layer", "relative error")
    return Plot("", svg, "Hidden state as it leaves each layer, its mean error relative to its largest element.")


def _plots(b: BackendReport, is_local: bool) -> list[Plot]:
    drawn = [_drift(b, is_local)] if b.drift else []
    drawn += [_errors(b.histogram)] if b.histogram else []
    drawn += [_routers(b)] if b.routers else []
    drawn += [_coverage(b)] if b.coverage else []
    return drawn + [_latency(b, graph) for graph in b.milliseconds]


def _drift(b: BackendReport, is_local: bool) -> Plot:
    series = (
        Series("largest error", "series-0", tuple(d.max_relative for d in b.drift)),
        Series("mean error", "series-1", tuple(d.mean_relative for d in b.drift)),
        Series("tolerance", "limit", tuple(d.tolerance for d in b.drift)),
    )
    key = ((_CANDIDATE, "largest error"), (_REFERENCE, "mean error"), (_LIMIT, "tolerance"))
    caption = "Hidden state as it enters each layer (last: as it leaves), relative to its largest element."
    caption += " Each layer was fed the reference's states: the error is its own." if is_local else _entry(b)
    names = [str(d.layer) for d in b.drift]
    return Plot("Drift by layer", line_plot(series, names, "layer", "relative error"), caption, key)


def _entry(b: BackendReport) -> str:
    """Where the error enters and where it grows most."""
    first = next((d for d in b.drift if d.max_relative), None)
    if first is None:
        return " No error at all."
    grown = [(d.growth, d.layer - 1) for d in b.drift if d.growth is not None]
    where = f"layer {first.layer - 1}" if first.layer else "the embedding"
    growth = f", grows most in layer {max(grown)[1]}: {max(grown)[0]:.3g} times" if grown else ""
    return f" The error enters in {where}{growth}."


def _errors(h: ErrorHistogram) -> Plot:
    names = [f"1e{edge:g}" for edge in h.edges[:-1]]
    svg = bar_plot(h.counts, names, "relative error", "logits", [0] * len(names))
    caption = f"All logits, in half decades; {h.exact} are equal, {h.nonfinite} not finite."
    return Plot("Errors of the logits", svg, caption)


def _routers(b: BackendReport) -> Plot:
    flips = [float(r.flips) for r in b.routers]
    wrong = [float(r.flips - r.near_ties) for r in b.routers]
    svg = bar_plot(flips, [str(r.layer) for r in b.routers], "layer", "tokens with other experts", wrong)
    total, tokens = sum(flips), sum(r.tokens for r in b.routers)
    caption = f"The same experts for {1 - total / tokens:.3%} of {tokens} choices; near ties are followed, not errors."
    return Plot("Router agreement", svg, caption, ((_CANDIDATE, "near ties"), (_BAD, "errors")))


def _coverage(b: BackendReport) -> Plot:
    svg = heat_map([c.tokens for c in b.coverage], [str(c.layer) for c in b.coverage], "expert")
    missed = sum(len(c.missed) for c in b.coverage)
    found = "Every expert was reached" if not missed else f"{missed} experts were not reached by any input"
    return Plot("Expert coverage", svg, f"{found}; the stronger the colour, the more tokens.", ((_BAD, "not reached"),))


def _latency(b: BackendReport, graph: str) -> Plot:
    ours, theirs = b.milliseconds[graph], b.reference_milliseconds[graph]
    series = (Series(b.backend, "series-0", ours), Series("torch float32", "series-1", theirs))
    half, most = np.quantile(ours, [0.5, 0.9])
    times = f"median {_short(float(half))} ms, nine in ten below {_short(float(most))} ms"
    caption = f"{b.backend}: {times}; a check, not a benchmark."
    key = ((_CANDIDATE, b.backend), (_REFERENCE, "torch float32"))
    return Plot(f"Time of each {graph} step", dot_plot(series, f"{graph} step", "ms"), caption, key)


def _whole(number: str) -> Markup:
    """A number that is not broken at its sign."""
    return Markup('<span class="nb">{}</span>').format(number)


def _short(value: float) -> str:
    return f"{value:.2e}" if value and (abs(value) < 1e-2 or abs(value) >= 1e4) else f"{value:.4g}"
