"""How many tokens of a prompt engines are built for where nobody says: by chip, memory and batch."""

from __future__ import annotations

import dataclasses
import types

import pytest

from deepseek_trt.engines.plans import build
from deepseek_trt.engines.plans.flavour import Flavour
from deepseek_trt.engines.plans.input_len import BUSY, MEMORY, token_bytes, with_input_len
from deepseek_trt.engines.plans.plan import BuildSpec
from deepseek_trt.export.config.model_config import ModelConfig
from deepseek_trt.plugins.kernels.chips import SHARED_LIMITS, chip_class

V2_LITE = ModelConfig(
    hidden_size=2048,
    intermediate_size=10944,
    num_attention_heads=16,
    n_routed_experts=64,
    num_experts_per_tok=6,
    moe_intermediate_size=1408,
)


def bundle_of(model=V2_LITE, dtype="bfloat16", all_logits=False):
    return types.SimpleNamespace(manifest=types.SimpleNamespace(model=model, dtype=dtype, all_logits=all_logits))


def test_every_chip_has_a_row():
    assert MEMORY.keys() == SHARED_LIMITS.keys()
    assert {chip_class(sm) for sm in SHARED_LIMITS} == BUSY.keys()


@pytest.mark.parametrize(
    ("chips", "changes", "memory", "length"),
    [
        ((90,), {}, None, 4096),
        ((100,), {}, None, 4096),
        ((80,), {}, None, 2048),
        ((86,), {}, None, 2048),
        ((90, 86), {}, None, 2048),
        ((90,), {"max_batch_size": 32}, None, 2048),  # 16 GB would be an eighth of more than an H100 has
        ((90,), {"max_batch_size": 32}, 141 * 10**9, 4096),  # an H200
        ((86,), {}, 8 * 10**9, 512),
        ((86,), {"max_batch_size": 1024}, None, 512),
        ((90,), {"max_seq_len": 300}, None, 300),
        ((90,), {"max_input_len": 64}, None, 64),
        ((86,), {"max_input_len": 4096, "max_batch_size": 1024}, None, 4096),
    ],
)
def test_lengths(chips, changes, memory, length):
    sized = with_input_len(BuildSpec(sms=chips, **changes), bundle_of(), chips, memory)
    assert sized == dataclasses.replace(BuildSpec(sms=chips, **changes), max_input_len=length)


def test_logits_of_every_token_are_many():
    assert with_input_len(BuildSpec(), bundle_of(all_logits=True), (90,)).max_input_len == 1024


def test_bytes_of_a_token_by_hand():
    numbers = 4 * 2048 + 2 * 16 * (128 + 64 + 128) + 6 * (1408 + 2048) + 2 * 10944
    assert token_bytes(V2_LITE, "bfloat16") == 2 * numbers
    assert token_bytes(V2_LITE, "float32") == 4 * numbers


@pytest.mark.parametrize(("named", "length"), [((90,), 4096), ((), 2048)])
def test_a_flavour_without_targets_goes_by_this_machines_gpu(named, length, monkeypatch):
    rtx = Flavour("rtx", types.SimpleNamespace(ComputeCapability=None), None)
    full = Flavour("tensorrt", types.SimpleNamespace(), None)
    monkeypatch.setattr("deepseek_trt.engines.plans.chips.visible_sm", lambda: 90)
    monkeypatch.setattr("deepseek_trt.engines.plans.chips.visible_memory", lambda: 48 * 10**9)
    spec = BuildSpec(sms=named, max_batch_size=12)
    assert build.sized(bundle_of(), spec, rtx if named else full).max_input_len == length
