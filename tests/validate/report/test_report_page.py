"""report.html in a real browser: no errors, no network, every plot drawn, light and dark, and readable on a phone."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from deepseek_trt.validate.accuracy import validate_bundle
from deepseek_trt.validate.report.files import write_report
from deepseek_trt.validate.request import ValidateRequest

BROWSER = Path(__file__).parents[3] / "benchmarks" / "browser.py"


def _browser_module():
    spec = importlib.util.spec_from_file_location("report_browser", BROWSER)
    module = sys.modules["report_browser"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tools = _browser_module()
CHROMIUM = tools.find_chromium()
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to look at the page with")
LIGHT, DARK, PHONE = tools.View(), tools.View(dark=True), tools.View(width=390)
VIEWS = {"light": LIGHT, "dark": DARK, "phone": PHONE, "dark phone": tools.View(width=390, dark=True)}

# Of each plot: its title, how many marks it has, whether all of it lies within the page, and a number that is none.
PLOTS = """[...document.querySelectorAll("svg.plot")].map(svg => {
  const box = svg.getBoundingClientRect();
  const marks = [...svg.querySelectorAll("circle, rect, polyline")].filter(m => m.getBoundingClientRect().width > 0);
  return {
    title: svg.closest("section").querySelector("h3").textContent,
    marks: marks.length,
    inside: box.width > 200 && box.height > 60 && box.right <= document.documentElement.clientWidth,
    broken: /NaN|Infinity|undefined/.test(svg.outerHTML),
  };
})"""
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
SMALLEST_TEXT = """Math.min(...[...document.querySelectorAll("svg.plot text")].map(
  t => t.getBoundingClientRect().height || 99))"""
BACKGROUND = "getComputedStyle(document.body).backgroundColor"
TITLES = ("Drift by layer", "Errors of the logits", "Router agreement", "Expert coverage")
TIMES = ("Time of each prefill step", "Time of each decode step")


@pytest.fixture(scope="module")
def report(good, tmp_path_factory):
    """A report with everything in it: two backends, one of them in a narrow dtype that routes otherwise."""
    folder = tmp_path_factory.mktemp("report")
    done = validate_bundle(ValidateRequest(good("float16").path, ("exported", "torch"), threads=1, command="validate"))
    write_report(done.report, done.comparisons, folder)
    return (folder / "report.html").as_uri()


@pytest.fixture(scope="module")
def browser():
    with tools.browser(CHROMIUM) as running:
        yield running


@pytest.fixture(params=VIEWS.values(), ids=VIEWS)
def page(request, browser, report):
    return browser.page(report, request.param)


def test_the_page_is_whole(page, report):
    assert page.problems == []
    assert page.requests == [report]
    plots = page.ask(PLOTS)
    assert [p["title"] for p in plots] == 2 * [*TITLES, *TIMES]
    assert all(p["inside"] and p["marks"] and not p["broken"] for p in plots), plots
    assert page.ask(OVERFLOW) == 0
    assert page.ask(SMALLEST_TEXT) > 8


def test_dark_is_dark(browser, report):
    light, dark = (browser.page(report, view).ask(BACKGROUND) for view in (LIGHT, DARK))
    assert light != dark


def test_a_picture_can_be_made(browser, report, tmp_path):
    browser.page(report, PHONE).picture(tmp_path / "page.png", height=600)
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "page.png").stat().st_size > 5_000
