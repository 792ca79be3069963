"""Two reports of one model, an old and a new one: what moved, and whether it got worse."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deepseek_trt.export.errors import RequestError
from deepseek_trt.validate.report.report import SCHEMA_VERSION, AccuracyReport, Change, Moved

GROWTH = 2.0  # chance moves a largest error by less
NOTHING = 0.01  # errors below this part of their tolerance are noise
LOST = 0.01  # part of the predictions that may change by ties
_ALIKE = ("dtype", "interface", "model", "cases")  # what two reports must share for their numbers to be of one thing


def read_report(path: Path) -> dict[str, Any]:
    """An earlier report.json; RequestError when it is not one, or of another schema."""
    try:
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = raw["schema_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RequestError(f"{path} is not a report.json ({error!r}): give one that validate --report wrote") from None
    if version != SCHEMA_VERSION:
        raise RequestError(f"{path} has schema {version}, this is {SCHEMA_VERSION}: validate the old bundle again")
    return raw


def compare_reports(path: Path, old: dict[str, Any], new: AccuracyReport) -> Moved:
    """Every number that moved, of the backends that both reports hold; RequestError where `old` lacks fields."""
    plain = json.loads(new.to_json())
    try:
        before, now = ({b["backend"]: b for b in report["backends"]} for report in (old, plain))
        changes = [c for name in now if name in before for c in _changes(name, before[name], now[name])]
        return Moved(str(path), tuple(c for c in changes if c.old != c.new), tuple(_unmatched(old, plain)))
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise RequestError(f"{path} is damaged ({error!r}): validate the old bundle again") from None


def _unmatched(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    for field in _ALIKE:
        if old[field] != new[field]:
            yield f"another {field} than in the earlier report: its numbers are of something else"
    if old["provenance"]["seed"] != new["provenance"]["seed"]:
        yield "another seed than in the earlier report"
    before, now = ({b["backend"]: {o["output"] for o in b["outputs"]} for b in r["backends"]} for r in (old, new))
    for where, these, those in (("earlier", before, now), ("new", now, before)):
        for backend, outputs in these.items():
            missing = sorted(outputs - those.get(backend, set()))
            if backend not in those:
                yield f"{backend}: in the {where} report only"
            elif missing:
                yield f"{backend}, {', '.join(missing)}: in the {where} report only"


def _changes(backend: str, old: dict[str, Any], new: dict[str, Any]) -> Iterator[Change]:
    yield Change(backend, "passed", old["passed"], new["passed"], old["passed"] and not new["passed"])
    outputs = {o["output"]: o for o in old["outputs"]}
    for output in new["outputs"]:
        if output["output"] in outputs:
            before, now = float(outputs[output["output"]]["max_relative"]), float(output["max_relative"])
            worse = now > GROWTH * before and now > NOTHING * output["tolerance"]
            yield Change(backend, f"{output['output']}: max relative", before, now, worse)
    for name in ("top1", "top5") if old["tokens"] and new["tokens"] else ():
        before, now = old["tokens"][name], new["tokens"][name]
        yield Change(backend, name, before, now, now < before - LOST)
    wrong = [float(sum(f["margin"] == "inf" or f["margin"] > f["allowed"] for f in x["flips"])) for x in (old, new)]
    yield Change(backend, "wrong router choices", wrong[0], wrong[1], wrong[1] > wrong[0])
    yield from _generation_changes(backend, old, new)


def _generation_changes(backend: str, old: dict[str, Any], new: dict[str, Any]) -> Iterator[Change]:
    if old["text"] and new["text"]:
        before, now = (float(x["text"]["perplexity"]) for x in (old, new))
        yield Change(backend, "perplexity", before, now, now > before * (1 + LOST))
        before, now = (abs(float(x["text"]["loss"]) - float(x["text"]["reference_loss"])) for x in (old, new))
        worse = now > GROWTH * before and now > new["text"]["tolerance"]
        yield Change(backend, "loss: difference from the reference", before, now, worse)
    if old["greedy"] and new["greedy"]:
        before, now = (_share_agreed(x["greedy"]) for x in (old, new))
        yield Change(backend, "greedy tokens that agree", before, now, now < before - LOST)


def _share_agreed(prompts: list[dict[str, Any]]) -> float:
    agreed: float = sum(p["agreed"] for p in prompts) / sum(p["tokens"] for p in prompts)
    return agreed
