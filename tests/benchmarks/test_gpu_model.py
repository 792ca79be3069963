"""benchmarks/gpu_model.py: no figure beats its chip, and sizes are those of the published models."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_model  # noqa: E402  benchmarks are scripts, not a package
from gpu_model import BYTES, CHIPS, V2, V2_LITE  # noqa: E402


@pytest.mark.parametrize(("model", "parameters"), [(V2_LITE, 15.7e9), (V2, 235.7e9)], ids=lambda v: str(v)[:12])
def test_weights_are_the_published_ones(model, parameters):
    assert model.weights / BYTES == pytest.approx(parameters, rel=0.01)


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
@pytest.mark.parametrize("heads", [16, 128])
def test_decode_is_slower_than_its_bytes_and_flops(chip, heads):
    before = 0.0
    for context, batch in ((1024, 1), (1024, 32), (8192, 32), (32768, 32), (32768, 128)):
        seconds = gpu_model.decode(chip, heads, context, batch)
        assert seconds > batch * context * V2.width * BYTES / chip.bandwidth
        assert seconds > 2 * batch * context * heads * (V2.width + V2.rank) / chip.flops
        assert seconds > before
        before = seconds


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
@pytest.mark.parametrize("model", [V2_LITE, V2], ids=lambda model: model.name)
def test_steps_are_slower_than_the_weights_that_they_read(chip, model):
    for tokens in (1, 8, 32, 512, 4096):
        nbytes = model.hit(tokens) * model.expert * BYTES
        assert gpu_model.experts(chip, model, tokens) > nbytes / chip.bandwidth
        layer = nbytes + model.attention_weights * BYTES
        assert gpu_model.decode_layer(chip, model, 1024, tokens) > layer / chip.bandwidth
        assert gpu_model.prefill_layer(chip, model, tokens) > layer / chip.bandwidth


@pytest.mark.parametrize(
    ("name", "chip"),
    [("NVIDIA H200", "H200"), ("NVIDIA A100-SXM4-80GB", "A100"), ("NVIDIA GeForce RTX 4090", "RTX 4090"), ("T4", None)],
)
def test_chips_by_the_names_of_devices(name, chip):
    found = gpu_model.chip_of(name)
    assert (found.name if found else None) == chip


def test_hit_experts_are_a_mean():
    assert V2_LITE.hit(1) == pytest.approx(V2_LITE.top_k)
    assert V2_LITE.hit(4096) == pytest.approx(V2_LITE.experts)


def test_a_bfloat16_v2_has_no_room(capsys):
    gpu_model.main()
    printed = capsys.readouterr().out
    assert "V2 in bfloat16 (471 GB) has room on none of them" in printed
    assert not any(gpu_model.fits(chip, V2) for chip in CHIPS)
    tables = [line for line in printed.splitlines() if line.startswith("| ") and "---" not in line]
    assert sum("not measured" in line for line in tables) == len(tables) - 4  # headings
