"""benchmarks/cpu_speculation.py on the model that ships: what it counts, and its tables; not how long it takes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import cpu_speculation  # noqa: E402  benchmarks are scripts, not a package
from cpu_speculation import Bench, Measured, measure, shares_table, speeds_table  # noqa: E402

KINDS = cpu_speculation.KINDS[:1] + cpu_speculation.KINDS[-1:]


@pytest.fixture(scope="module")
def bench(demo_checkpoint, bundle_of):
    return Bench(bundle_of(demo_checkpoint), 1, 2, 24)


def test_every_way_is_measured_as_often_and_counts_what_it_computed(bench):
    results = measure(bench, [1, 2], 2, KINDS)
    assert set(results) == {(kind, rows, way) for kind in KINDS for rows in (1, 2) for way in ("off", "lookup", "auto")}
    assert all(len(found) == 2 for found in results.values())
    for (_, rows, way), found in results.items():
        for one in found:
            assert one.tokens == rows * 23  # the first comes of prefill
            assert (one.proposed == 0) or way != "off"
            assert one.steps <= 23
            assert 0 < one.model + one.sampling < one.seconds
    repeated, sampled = (results[kind, 1, "lookup"][-1] for kind in KINDS)
    assert repeated.picked > 0
    assert repeated.steps == 23 - repeated.picked
    assert sampled.picked <= sampled.proposed
    assert len(speeds_table(results).splitlines()) == 2 + len(KINDS) * 2
    assert [line.split(" | ")[:2] for line in shares_table(results).splitlines()[2:]] == [
        [f"| {rows}", way] for rows in (1, 2) for way in ("off", "lookup", "auto")
    ]


def test_other_answers_end_it(bench, monkeypatch):
    whole = Bench.run

    def wrong(self, kind, rows, way):
        found, answers = whole(self, kind, rows, way)
        return found, answers if way != "lookup" else [[5, *answer[1:]] for answer in answers]

    monkeypatch.setattr(Bench, "run", wrong)
    with pytest.raises(SystemExit, match=r"1 rows: \['lookup'\] gave other answers than off"):
        measure(bench, [1], 1, KINDS[:1])


def test_tables_state_medians_of_ratios_within_a_round():
    (kind,) = KINDS[:1]
    results = {
        (kind, 1, "off"): [Measured(100, seconds, 0.5 * seconds, 0.1 * seconds, 100, 0, 0) for seconds in (1, 2, 10)],
        (kind, 1, "lookup"): [Measured(100, seconds, 0.25, 0.25, 50, 200, 50) for seconds in (0.5, 2, 4)],
        (kind, 1, "auto"): [Measured(100, seconds, 0.5, 0.1, 60, 100, 40) for seconds in (1, 1, 5)],
    }
    assert speeds_table(results).splitlines()[2] == f"| {kind.name} | 1 | 50 | 50 | 2.00 | 2.00 | 2.00 | 25% |"
    assert shares_table(results).splitlines()[2] == "| 1 | off | 20.00 | 50.0% | 10.0% | 40.0% |"
