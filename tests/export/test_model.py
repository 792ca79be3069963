"""The plain torch model equals transformers', which from 5.15 on equals the original on these configurations."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from deepseek_trt.engines.sessions.torch import TorchSession, load_model
from deepseek_trt.export.config.model_config import ModelConfig
from deepseek_trt.export.config.rope import RopeConfig
from deepseek_trt.export.model import DeepseekV2
from deepseek_trt.export.reading.checkpoint import Checkpoint
from deepseek_trt.export.writing.weight_plan import plan_weights

# float32 keeps 2**-24 = 6e-8 a rounding; some hundred roundings in a row over three layers stay below 1e-5 of the
# largest logit, which is what two right implementations may differ by.
RELATIVE = 1e-5


def relative(ours: np.ndarray, theirs: torch.Tensor) -> float:
    reference = theirs.numpy()
    return float(np.abs(ours - reference).max() / np.abs(reference).max())


@pytest.fixture(scope="module")
def session(small, bundle_of):
    return TorchSession(bundle_of(small.checkpoint, dtype="float32", page_size=8), pages=16)


def test_prefill_then_decode_equals_transformers(small, session):
    ids = torch.randint(2, 256, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = small.hf(ids).logits  # [2, 40, vocab]
    lengths = np.array([33, 27], dtype=np.int32)
    table = np.array([[1, 4, 7, 10, 13], [2, 5, 8, 11, 14]], dtype=np.int32)
    padded = np.where(np.arange(33) < lengths[:, None], ids[:, :33].numpy(), 0)
    logits = session.prefill(padded, lengths, np.zeros(2, np.int32), table)
    assert relative(logits, expected[[0, 1], lengths - 1]) < RELATIVE
    for step in range(7):
        at = lengths + step
        one = np.ones(2, np.int32)
        logits = session.decode(ids[[0, 1], at][:, None].numpy(), one, at.astype(np.int32), table)[:, 0]
        assert relative(logits, expected[[0, 1], at]) < RELATIVE, f"decode step {step}"


def test_yarn_amplitude_is_in_the_softmax_scale(small):
    config = ModelConfig.from_hf(small.raw)
    assert config.softmax_scale == pytest.approx(small.hf.model.layers[0].self_attn.scaling, rel=1e-7)
    published = RopeConfig(kind="yarn", factor=40, mscale=0.707, mscale_all_dim=0.707)
    assert published.softmax_amplitude == pytest.approx(1.589626, rel=1e-6)
    assert published.rotation_amplitude == 1.0
    assert dataclasses.replace(published, mscale=1.0, mscale_all_dim=1.0).softmax_amplitude == pytest.approx(1.873854)


def test_rope_frequencies_equal_transformers(small):
    config = ModelConfig.from_hf(small.raw)
    ours = config.rope.inverse_frequencies(config.qk_rope_head_dim)
    np.testing.assert_allclose(ours, small.hf.model.rotary_emb.inv_freq.numpy(), rtol=1e-6)


def test_recipes_are_the_models_parameters(small):
    config = ModelConfig.from_hf(small.raw)
    plan = plan_weights(config, Checkpoint.open(small.checkpoint), config.num_hidden_layers)
    with torch.device("meta"):
        parameters = DeepseekV2(config).state_dict()
    assert {r.name: r.shape for r in plan.recipes} == {n: tuple(p.shape) for n, p in parameters.items()}


def test_weights_arrive_unchanged(small, bundle_of):
    model = load_model(bundle_of(small.checkpoint, dtype="float32", page_size=8), "float32")
    theirs = small.hf.state_dict()
    attention = model.model.layers[1].self_attn
    kv_b = torch.cat([attention.w_uk, attention.w_uv], dim=1).flatten(0, 1)
    assert torch.equal(kv_b, theirs["model.layers.1.self_attn.kv_b_proj.weight"])
    experts = model.model.layers[2].mlp.experts
    gate_up = torch.cat([experts.gate_proj, experts.up_proj], dim=1)
    assert torch.equal(gate_up, theirs["model.layers.2.mlp.experts.gate_up_proj"])
    assert torch.equal(experts.down_proj, theirs["model.layers.2.mlp.experts.down_proj"])
