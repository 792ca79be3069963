"""Rope settings as they are written: each gives transformers' logits, or follows a rule that is named beside it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from deepseek_trt.engines.sessions.ort import OrtSession
from deepseek_trt.export.bundle.assemble import assemble
from deepseek_trt.export.bundle.recipes import Piece, Recipe
from deepseek_trt.export.config.model_config import ModelConfig, config_notes, unsupported_features
from deepseek_trt.export.config.rope import RopeConfig
from deepseek_trt.export.exporter import ExportRequest, export_bundle
from deepseek_trt.export.model import DeepseekV2
from deepseek_trt.export.reading.checkpoint import Checkpoint
from deepseek_trt.export.reading.source import read_source
from deepseek_trt.validate.backends.published_weights import published_weights

# float32 keeps 2**-24 = 6e-8 a rounding. Two right implementations differ by the rounding errors of some 20 sums of at
# most 160 products, which add up like sqrt(terms): 6e-8 * 20 * sqrt(160) = 1.5e-5 of the largest logit.
RELATIVE = 2e-5
YARN = {"type": "yarn", "factor": 8, "original_max_position_embeddings": 32, "mscale": 0.707, "mscale_all_dim": 0.5}
LINEAR = {"type": "linear", "factor": 4}
DENSE = {"num_hidden_layers": 1, "first_k_dense_replace": 1}  # rope is the same in all layers
HALVES = {**DENSE, "rope_interleave": False}


def transformers_logits(folder, ids) -> np.ndarray:
    """[tokens, vocab] in float32, by transformers' own reading of the folder."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        return model(torch.tensor(ids)[None]).logits[0].numpy()


def exported_logits(bundle, ids, prefilled: int) -> np.ndarray:
    """[tokens - prefilled + 1, vocab]: after the prefill, and after each decode step, by ONNX Runtime."""
    session, table = OrtSession(bundle, pages=12, threads=1), np.arange(1, 9, dtype=np.int32)[None]
    lengths = np.array([prefilled], np.int32)
    found = [session.prefill(ids[None, :prefilled], lengths, np.zeros(1, np.int32), table)[0]]
    for at in range(prefilled, len(ids)):
        one = np.ones(1, np.int32)
        found.append(session.decode(ids[None, at : at + 1], one, np.array([at], np.int32), table)[0, 0])
    return np.stack(found)


@torch.inference_mode()
def eager_logits(folder, ids, prefilled: int) -> np.ndarray:
    """The same by the torch model that is traced, with the weights as an export would read them."""
    source, ids = read_source(folder), torch.tensor(ids)[None]
    model, stored = DeepseekV2(source.config).eval(), source.checkpoint.tensors
    weights = {r.name: torch.from_numpy(assemble(r, stored, "float32")) for r in source.plan.recipes}
    model.load_state_dict(weights, strict=True)
    table = torch.arange(1, 9, dtype=torch.int32)[None]
    pools = [torch.zeros(12, 8, source.config.latent_dim) for _ in range(source.config.num_hidden_layers)]
    length = torch.tensor([prefilled], dtype=torch.int32)
    logits, pools = model.prefill(ids[:, :prefilled], length, torch.zeros_like(length), table, pools)
    found = [logits[0]]
    for at in range(prefilled, ids.shape[1]):
        past = torch.tensor([at], dtype=torch.int32)
        logits, pools = model.decode(ids[:, at : at + 1], torch.ones_like(past), past, table, pools)
        found.append(logits[0, 0])
    return torch.stack(found).numpy()


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def error_of(folder, logits_of=eager_logits) -> float:
    """Of a prefill of 17 tokens and three decode steps, against transformers."""
    ids = np.random.default_rng(3).integers(0, 48, 20)
    return relative(logits_of(folder, ids, 17), transformers_logits(folder, ids)[16:])


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None, "attention_bias": True}], ids=["q_b", "q and biases"])
@pytest.mark.parametrize("interleave", [True, False])
def test_halves_and_pairs_equal_transformers(made, interleave, changes):
    """DeepseekV3Config.rope_interleave: false rotates x_i with x_(i + R/2), true x_2i with x_(2i + 1)."""
    checkpoint = made("v3", **DENSE, rope_interleave=interleave, **changes)
    assert error_of(checkpoint.path) < RELATIVE


def test_the_two_rotations_differ_by_more_than_the_tolerance(made):
    ids = np.arange(20)
    pairs = transformers_logits(made("v3", **DENSE).path, ids)
    assert relative(transformers_logits(made("v3", name="halves", **HALVES).path, ids)[1:], pairs[1:]) > 100 * RELATIVE


def test_a_manifest_grows_by_no_piece(made):
    plain, halves = (read_source(made("v3", name=str(k), rope_interleave=k).path).plan.recipes for k in (True, False))
    assert [len(recipe.pieces) for recipe in plain] == [len(recipe.pieces) for recipe in halves]


def test_halves_by_reference(made, tmp_path):
    """And the weights of the proof, which are reordered by code of their own."""
    folder, out = made("v3", attention_bias=True, **HALVES).path, tmp_path / "bundle"
    bundle = export_bundle(ExportRequest(folder, out, page_size=8, by_reference=True)).bundle
    assert error_of(folder, lambda _, *ids: exported_logits(bundle, *ids)) < RELATIVE
    published, stored = published_weights(bundle, None), Checkpoint.open(folder).tensors
    for weight in bundle.manifest.weights:
        ours = assemble(weight.recipe, stored, "float32")
        assert np.array_equal(ours, published(weight.recipe.name).numpy()), weight.recipe.name


def test_halves_of_fp8(tmp_path):
    """Two heads of 150 rows, 100 of which are rotated: blocks of 128 rows end inside a half."""
    from safetensors.torch import save_file

    codes, scales = (torch.randn(300, 140) * 50).to(torch.float8_e4m3fn), torch.rand(3, 2) + 0.5
    save_file({"w": codes, "w_scale_inv": scales}, tmp_path / "model.safetensors")
    values = codes.float() * scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[:300, :140]
    order = [
        150 * head + row for head in range(2) for row in [*range(50), *(50 + i // 2 + 50 * (i % 2) for i in range(100))]
    ]
    recipe = Recipe("w", (300, 140), (Piece("w", 0, 150, 150, 2, "w_scale_inv", halves=100),))
    ours = assemble(recipe, Checkpoint.open(tmp_path).tensors, "float32")
    assert np.array_equal(ours, values[order].numpy())


@pytest.mark.parametrize("value", [False, None, 0, "false"])
def test_halves_are_no_word_of_v2(made, verdict, value):
    """transformers' V2 ignores the key; whoever wrote false meant other weights."""
    judged = verdict(made("v2", rope_interleave=value).path)
    assert not judged.accepted
    assert "rope_interleave" in judged.check


@pytest.mark.parametrize("value", [None, 0, "false"])
def test_rope_interleave_is_true_or_false(made, verdict, value):
    """transformers reads null as false, whereas an absent key is true."""
    judged = verdict(made("v3", rope_interleave=value).path)
    assert not judged.accepted
    assert "rope_interleave is" in judged.export


# Where the settings lie


def test_rope_scaling_counts_beside_rope_parameters(made):
    """convert_rope_params_to_dict of transformers 5: rope_scaling, or else rope_parameters; what loses is named."""
    both = {"rope_scaling": YARN, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}}
    assert error_of(made("v3", **DENSE, **both).path) < RELATIVE


SAME = {"rope_type": "yarn", "rope_theta": 10000, **{k: v for k, v in YARN.items() if k != "type"}, "beta_fast": 32}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_scaling": YARN, "rope_parameters": SAME}, None),
        ({"rope_scaling": {}, "rope_parameters": SAME}, None),
        ({"rope_scaling": None, "rope_parameters": SAME}, None),
        ({"rope_scaling": YARN, "rope_parameters": {**SAME, "mscale": 1}}, "rope_scaling counts"),
        ({"rope_scaling": {**YARN, "rope_theta": 500.0}}, "rope_scaling.rope_theta 500.0 counts"),
        ({"rope_scaling": {**YARN, "wavelength": 3}}, "rope_scaling.'wavelength' is not known here: its value 3"),
        ({"rope_scaling": {**YARN, "low_freq_factor": 1}}, "low_freq_factor 1 is not read: rope type yarn"),
        ({"rope_scaling": {**LINEAR, "beta_fast": 1}}, "beta_fast 1 is not read: rope type linear"),
        ({"rope_scaling": {**LINEAR, "mscale_all_dim": 1}}, None),
        ({"rope_scaling": {"rope_type": "default", "mscale_all_dim": 1}}, "rope type default does not use it"),
        ({"rope_scaling": {"type": "yarn", "factor": 8}}, "it is 4096, as in DeepSeek's own code; transformers takes"),
        ({"rope_scaling": {**YARN, "mscale_all_dim": None}}, "as in DeepSeek's own code; transformers takes 1.20794"),
    ],
)
def test_notes(made, changes, words):
    raw = made("v3", **changes).raw
    assert unsupported_features(raw) == ()
    notes = config_notes(raw)
    assert len(notes) == (words is not None)
    assert words is None or words in notes[0]


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        # 4.57 of transformers lets type win, 5.24 rope_type: nobody can know
        ({"type": "yarn", "rope_type": "linear", "factor": 2}, "rope_type 'linear' and type 'yarn'"),
        ({"type": "llama3", "factor": 2, "low_freq_factor": 1}, "rope scaling 'llama3'"),
        ({"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}, "rope scaling 'longrope'"),
        ({"type": "yarn"}, "'yarn' needs a 'factor'"),
        ({"type": "linear", "factor": None}, "'linear' needs a 'factor'"),
        ({**YARN, "attn_factor": 0.9}, "attn_factor 0.9"),  # vLLM multiplies by it, transformers ignores it
        ({**YARN, "extrapolation_factor": 2}, "extrapolation_factor 2"),
        ({**YARN, "partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({**YARN, "factor": "8"}, "rope_scaling.factor is '8', where a number above 0 is needed"),
        ({**YARN, "factor": 0}, "rope_scaling.factor is 0"),
        ({**YARN, "factor": -4}, "rope_scaling.factor is -4"),
        ({**YARN, "factor": float("inf")}, "rope_scaling.factor is inf"),
        ({**YARN, "factor": [8]}, r"rope_scaling.factor is [8]"),
        ({**YARN, "factor": True}, "rope_scaling.factor is true"),
        ({**YARN, "beta_fast": 0}, "rope_scaling.beta_fast is 0"),
        ({**YARN, "mscale_all_dim": -30}, "rope_scaling.mscale_all_dim is -30"),
        ({**YARN, "mscale": float("nan")}, "rope_scaling.mscale is nan"),
        ({**YARN, "original_max_position_embeddings": 0}, "original_max_position_embeddings is 0"),
        ({**YARN, "rope_theta": 1}, "rope_scaling.rope_theta is 1"),
        ({**YARN, "truncate": None}, "rope_scaling.truncate is null"),  # which transformers reads as false
        ({**YARN, "type": ["yarn"]}, "rope_scaling.type is ['yarn']"),
        ({"full_attention": YARN}, "each type of layer"),
        ("yarn", "rope_scaling is 'yarn', where an object is needed"),
        ([8], "rope_scaling is [8], where an object is needed"),
    ],
)
def test_refused(made, scaling, words):
    found = unsupported_features(made("v3", rope_scaling=scaling).raw)
    assert any(words in sentence for sentence in found), found


def test_refusals_reach_the_commands(made, verdict):
    judged = verdict(made("v3", rope_scaling={**YARN, "attn_factor": 0.9}).path)
    assert not judged.accepted
    assert "attn_factor 0.9" in judged.check
    assert "attn_factor 0.9" in judged.export


def test_two_originals(made):
    """transformers lets the one beside the settings win, DeepSeek's code the one inside."""
    changes = {"rope_scaling": YARN, "original_max_position_embeddings": 64}
    assert "is 64, but 32 in the rope settings" in unsupported_features(made("v3", **changes).raw)[0]
    assert unsupported_features({**made("v3", name="b").raw, **changes, "original_max_position_embeddings": 32}) == ()


# What they mean, beside transformers' rotary embedding and scale

SETTINGS = [
    {"rope_scaling": None},
    {"rope_theta": 500},
    {"rope_scaling": YARN},
    {"rope_scaling": {**YARN, "attention_factor": 1.3}},
    {"rope_scaling": {**YARN, "truncate": False}},
    {"rope_scaling": {**YARN, "factor": 0.5}},
    {"rope_scaling": {**YARN, "beta_fast": 2, "beta_slow": 2}},
    {"rope_scaling": {**YARN, "beta_fast": 1, "beta_slow": 4, "truncate": False}},
    {"rope_scaling": {**YARN, "original_max_position_embeddings": 64.0, "rope_theta": 300}},
    {"rope_scaling": LINEAR},
    {"rope_scaling": {**LINEAR, "mscale_all_dim": 0.7, "mscale": 2}},
    {"rope_scaling": {**LINEAR, "factor": 0.5, "mscale_all_dim": 0.7}},
    {"rope_scaling": {"type": "dynamic", "factor": 3.0, "mscale_all_dim": 1}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 70.0, "mscale_all_dim": 1}},
]


@pytest.mark.parametrize("base", ["v2", "v3"])
@pytest.mark.parametrize("changes", SETTINGS, ids=lambda changes: json.dumps(changes)[:60])
def test_settings_mean_what_they_mean_in_transformers(base, changes, request):
    raw = {**request.getfixturevalue("bases")[base], **changes}
    assert unsupported_features(raw) == ()
    assert_same_rotation(RopeConfig.from_hf(raw), ModelConfig.from_hf(raw).softmax_scale, raw)


def assert_same_rotation(rope: RopeConfig, scale: float, raw) -> None:
    from transformers import AutoConfig
    from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3

    theirs = AutoConfig.for_model(**json.loads(json.dumps(raw)))  # which changes what it is given
    room, name = (v2, "DeepseekV2") if raw["model_type"] == "deepseek_v2" else (v3, "DeepseekV3")
    rotary = getattr(room, f"{name}RotaryEmbedding")(theirs)
    speeds = rope.inverse_frequencies(raw["qk_rope_head_dim"])
    np.testing.assert_allclose(speeds, rotary.inv_freq.numpy(), rtol=1e-5)
    assert rope.rotation_amplitude == pytest.approx(rotary.attention_scaling, rel=1e-6)
    width = raw["qk_nope_head_dim"] + raw["qk_rope_head_dim"]
    assert scale == pytest.approx(room.yarn_apply_mscale(theirs.rope_parameters, width**-0.5), rel=1e-6)


@pytest.mark.parametrize(
    "scaling", [{**LINEAR, "mscale_all_dim": 0.7}, {**YARN, "attention_factor": 1.3, "truncate": False}]
)
def test_logits_with_them_equal_transformers(made, scaling):
    assert error_of(made("v3", **DENSE, rope_scaling=scaling).path) < RELATIVE
