"""Pictures of a report.html in a real browser: light, dark, and on a phone.

    deepseek-trt export cli/demo_model OUT --dtype float16
    deepseek-trt validate OUT --backend exported --backend torch --bisect --report REPORT
    python benchmarks/screenshots.py REPORT/report.html docs

writes accuracy-report.png, accuracy-report-dark.png and accuracy-report-phone.png into the folder.
"""

from __future__ import annotations

import sys
from pathlib import Path

from browser import Browser, View, browser, find_chromium

NAME = "accuracy-report"
HEIGHT = 2040  # what is shown of the page, in its pixels
SCALE = 0.8  # so that a picture stays under 250 KiB


def write_pictures(page: Path, folder: Path) -> list[Path]:
    """Three PNGs; RuntimeError where there is no browser."""
    executable = find_chromium()
    if executable is None:
        raise RuntimeError("no Chromium on PATH: apt-get install chromium")
    with browser(executable) as running:
        return [
            _picture(running, page, folder / f"{NAME}.png", View()),
            _picture(running, page, folder / f"{NAME}-dark.png", View(dark=True)),
            _picture(running, page, folder / f"{NAME}-phone.png", View(width=390), scale=1.0),
        ]


def _picture(running: Browser, page: Path, path: Path, view: View, scale: float = SCALE) -> Path:
    running.page(page.resolve().as_uri(), view).picture(path, HEIGHT, scale)
    return path


if __name__ == "__main__":
    for made in write_pictures(Path(sys.argv[1]), Path(sys.argv[2])):
        print(f"{made}: {made.stat().st_size / 1024:.0f} KiB")
