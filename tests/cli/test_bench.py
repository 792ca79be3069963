"""deepseek-trt bench: a table for people, an object for machines."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from deepseek_trt.cli.main import main

SMALL = ("--context", "8", "--new-tokens", "3", "--threads", "1", "--backend", "ort")


@pytest.fixture(scope="module")
def demo(demo_checkpoint, bundle_of):
    return str(bundle_of(demo_checkpoint).path)


def test_table(demo):
    result = CliRunner().invoke(
        main, ["bench", demo, *SMALL, "--batch-size", "1", "--batch-size", "2", "--speculate", "lookup"]
    )
    assert result.exit_code == 0, result.output
    assert "batch 1" in result.stdout
    assert "batch 2" in result.stdout
    for row in (
        "tokens/s",
        "time to first token",
        "p99",
        "MB a step, experts",
        "experts hit a layer",
        "tokens a step",
        "proposed tokens that were picked",
        "of memory bandwidth",
    ):
        assert row in result.stdout
    assert result.stderr.startswith("backend: ort")


def test_json(demo):
    result = CliRunner().invoke(main, ["bench", demo, *SMALL, "--json"])
    report = json.loads(result.stdout)
    assert report["points"][0]["batch_size"] == 1
    assert report["points"][0]["experts"] in ("measured", "expected")
    assert set(report["points"][0]["time_per_token"]) == {"p50", "p95", "p99"}


def test_mistakes_are_named(demo):
    result = CliRunner().invoke(main, ["bench", demo, "--context", "5000"])
    assert (result.exit_code, "the model takes 2048" in result.stderr) == (1, True)
