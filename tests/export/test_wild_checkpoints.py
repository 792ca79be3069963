"""Checkpoints as they are found: odd names, stray and extra tensors, other layouts, and what is refused by name."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deepseek_trt.export.bundle.assemble import assemble
from deepseek_trt.export.bundle.recipes import (
    Piece,
    Recipe,
    split_rows,
    tensorrt_parts,
    too_large_for_tensorrt,
)
from deepseek_trt.export.config.model_config import ModelConfig, unsupported_features
from deepseek_trt.export.config.rope import RopeConfig
from deepseek_trt.export.errors import CheckpointError, ConfigError
from deepseek_trt.export.reading.checkpoint import Checkpoint
from deepseek_trt.export.reading.infer import config_of_tensors
from deepseek_trt.export.writing.weight_plan import WeightPlan, plan_weights

RAW: dict[str, Any] = {
    "model_type": "deepseek_v2",
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "n_shared_experts": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "torch_dtype": "float32",
}
ONE = "model.safetensors"


def plan(folder: Path) -> tuple[ModelConfig, WeightPlan, tuple[str, ...]]:
    raw = json.loads((folder / "config.json").read_text())
    checkpoint = Checkpoint.open(folder)
    config, notes = config_of_tensors(ModelConfig.from_hf(raw), checkpoint, raw.keys())
    return config, plan_weights(config, checkpoint, config.num_hidden_layers), notes


def contents(folder: Path) -> dict[str, np.ndarray]:
    checkpoint = Checkpoint.open(folder)
    return {recipe.name: assemble(recipe, checkpoint.tensors, "float32") for recipe in plan(folder)[1].recipes}


@pytest.fixture
def weights(weights_of):
    return weights_of(RAW)


@pytest.fixture
def plain(tmp_path, weights, save) -> Path:
    return save(tmp_path / "plain", RAW, {ONE: weights}, index=False)


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "names",
    [
        ("model-00001-of-000002.safetensors", "model-00002-of-000002.safetensors"),
        ("model-1-of-2.safetensors", "model-2-of-2.safetensors"),
        ("b.safetensors", "parts/a.safetensors"),
    ],
)
def test_shards_are_what_the_index_says(tmp_path, weights, save, plain, names):
    (tmp_path / "odd" / "parts").mkdir(parents=True)
    items = list(weights.items())
    folder = save(tmp_path / "odd", RAW, {names[0]: dict(items[::2]), names[1]: dict(items[1::2])})
    (folder / "unrelated.safetensors").write_bytes(b"not in the index, never opened")
    assert same(contents(folder), contents(plain))


def test_single_file_of_any_name(tmp_path, weights, save, plain):
    folder = save(tmp_path / "x", RAW, {"pytorch_model.safetensors": weights}, index=False)
    assert same(contents(folder), contents(plain))


def test_several_files_without_an_index_are_refused(tmp_path, weights, save):
    folder = save(tmp_path / "x", RAW, {"a.safetensors": weights, "b.safetensors": weights}, index=False)
    with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors\.index\.json nor"):
        Checkpoint.open(folder)


def test_stacked_experts_equal_separate_ones(tmp_path, weights, save, plain):
    stacked = {name: tensor for name, tensor in weights.items() if ".experts." not in name}
    at = "model.layers.1.mlp.experts"
    both = [torch.cat([weights[f"{at}.{e}.gate_proj.weight"], weights[f"{at}.{e}.up_proj.weight"]]) for e in range(4)]
    stacked[f"{at}.gate_up_proj"] = torch.stack(both)
    stacked[f"{at}.down_proj"] = torch.stack([weights[f"{at}.{e}.down_proj.weight"] for e in range(4)])
    folder = save(tmp_path / "stacked", RAW, {ONE: stacked}, index=False)
    assert same(contents(folder), contents(plain))


def test_stray_and_extra_tensors_are_dropped_and_reported(tmp_path, weights, save, plain):
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(32),  # not rope_dim / 2
        "model.layers.2.eh_proj.weight": torch.zeros(32, 64),
        "model.layers.2.self_attn.o_proj.weight": torch.zeros(1, 1),
        "model.layers.2.embed_tokens.weight": weights["model.embed_tokens.weight"].clone(),
    }
    folder = save(tmp_path / "extra", RAW, {ONE: {**weights, **extra}}, index=False)
    assert same(contents(folder), contents(plain))
    dropped = {d.name: d.reason for d in plan(folder)[1].dropped}
    assert dropped.keys() == extra.keys()
    assert "multi-token prediction" in dropped["model.layers.2.eh_proj.weight"]
    assert "config.json" in dropped["model.layers.0.self_attn.rotary_emb.inv_freq"]


def test_a_tensor_in_two_shards_is_read_from_the_one_that_the_index_names(tmp_path, weights, save, plain):
    wrong = {"model.norm.weight": torch.zeros(32)}
    folder = save(tmp_path / "twice", RAW, {"b.safetensors": wrong, "a.safetensors": weights})
    assert same(contents(folder), contents(plain))
    folder = save(tmp_path / "other", RAW, {"a.safetensors": wrong, "b.safetensors": weights})
    assert same(contents(folder), contents(plain))


def test_index_naming_a_missing_file(tmp_path, weights, save):
    folder = save(tmp_path / "x", RAW, {"a.safetensors": weights})
    (folder / "a.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"index\.json names a\.safetensors, which is missing in .*: *|download"):
        Checkpoint.open(folder)


def test_index_leaving_the_folder(tmp_path, weights, save):
    folder = save(tmp_path / "x", RAW, {"a.safetensors": weights})
    index = {"weight_map": dict.fromkeys(weights, "../a.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="leaves"):
        Checkpoint.open(folder)


def test_hub_cache_layout(tmp_path, weights, save, plain):
    """snapshots/REVISION holds symlinks into blobs, whose names are hashes."""
    source = save(tmp_path / "source", RAW, {"model-00001-of-000001.safetensors": weights})
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "0123abcd"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(source.iterdir())):
        file.rename(blobs / f"{number:064x}")
        (snapshot / file.name).symlink_to(os.path.relpath(blobs / f"{number:064x}", snapshot))
    assert same(contents(snapshot), contents(plain))


def test_auto_map_is_never_imported(tmp_path, weights, save, plain):
    raw = {**RAW, "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"}}
    folder = save(tmp_path / "auto", raw, {ONE: weights}, index=False)
    (folder / "configuration_deepseek.py").write_text("raise SystemExit('imported')")
    assert same(contents(folder), contents(plain))


# Shapes against config.json


@pytest.mark.parametrize(
    ("key", "value", "tensor", "expected", "found"),
    [
        ("vocab_size", 50, "model.embed_tokens.weight", "[50, 32]", "[48, 32]"),
        ("kv_lora_rank", 20, "model.layers.0.self_attn.kv_a_proj_with_mqa.weight", "[28, 32]", "[24, 32]"),
        ("moe_intermediate_size", 12, "model.layers.1.mlp.experts.0.gate_proj.weight", "[12, 32]", "[24, 32]"),
        ("num_attention_heads", 4, "model.layers.0.self_attn.q_b_proj.weight", "[80, 24]", "[40, 24]"),
    ],
)
def test_written_value_that_shapes_contradict(tmp_path, weights, save, key, value, tensor, expected, found):
    folder = save(tmp_path / "x", {**RAW, key: value}, {ONE: weights}, index=False)
    with pytest.raises(ConfigError) as error:
        plan(folder)
    for part in (tensor, expected, found):
        assert part in str(error.value)


INFERRED = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "n_routed_experts",
    "kv_lora_rank",
    "q_lora_rank",
    "qk_rope_head_dim",
    "qk_nope_head_dim",
    "v_head_dim",
    "num_attention_heads",
    "first_k_dense_replace",
]


@pytest.mark.parametrize("key", INFERRED)
def test_shape_beats_a_default_and_it_is_said(tmp_path, weights, save, key):
    raw = {name: value for name, value in RAW.items() if name != key}
    config, _, notes = plan(save(tmp_path / "x", raw, {ONE: weights}, index=False))
    assert getattr(config, key) == RAW[key]
    assert any(note.startswith(f"{key} is {RAW[key]}, as the tensors show") for note in notes)


@pytest.mark.parametrize("written", [True, False])
def test_q_proj_beats_q_lora_rank(tmp_path, weights_of, save, written):
    raw = {**RAW, "q_lora_rank": None}
    weights = weights_of(raw)
    given = {**raw, "q_lora_rank": 24} if written else {k: v for k, v in raw.items() if k != "q_lora_rank"}
    config, _, notes = plan(save(tmp_path / "x", given, {ONE: weights}, index=False))
    assert config.q_lora_rank is None
    assert "q_lora_rank" in notes[0]


def test_flags_that_are_absent_follow_the_tensors(tmp_path, weights_of, save):
    flags = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "moe_layer_freq": 2}
    raw = {**RAW, **flags, "num_hidden_layers": 5, "first_k_dense_replace": 0, "n_shared_experts": None}
    given = {k: v for k, v in raw.items() if k not in (*flags, "first_k_dense_replace", "n_shared_experts")}
    config, _, _ = plan(save(tmp_path / "x", given, {ONE: weights_of(raw)}, index=False))
    assert {key: getattr(config, key) for key in flags} == flags
    assert config.n_shared_experts == 0


def test_experts_without_their_number(tmp_path, weights, save):
    raw = {k: v for k, v in RAW.items() if k != "num_experts_per_tok"}
    with pytest.raises(ConfigError, match="lacks num_experts_per_tok"):
        plan(save(tmp_path / "x", raw, {ONE: weights}, index=False))


# Other models, and what is refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "deepseek_vl_v2", "language_config": {"model_type": "deepseek_v2"}}, "deepseek_vl_v2"),
        ({"language_config": {}, "vision_config": {}}, "vision-language"),
        ({"use_mla": False}, "use_mla"),
        ({"qk_nope_head_dim": 0, "kv_lora_rank": None}, "kv_lora_rank is null"),
        ({"scoring_func": "sigmoid"}, "scoring_func 'sigmoid'"),
        ({"topk_method": "noaux_tc", "scoring_func": "softmax"}, "scoring_func 'softmax'"),
        ({"topk_method": "hash"}, "topk_method 'hash'"),
        ({"hidden_act": "quick_gelu"}, "hidden_act 'quick_gelu'"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4}}, "rope scaling 'longrope'"),
        ({"quantization_config": {"quant_method": "awq"}}, "says AWQ"),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [1, 128]}},
            r"weight_block_size \[1, 128\]",
        ),
        ({"quantization_config": {"quant_method": "fp8", "fmt": "e5m2"}}, "e5m2"),
    ],
)
def test_refused_by_name(changes, words):
    with pytest.raises(ConfigError, match=words):
        ModelConfig.from_hf({**RAW, **changes})


def test_all_refusals_are_listed():
    wrong = {"use_mla": False, "hidden_act": "tanh", "hidden_size": "32"}
    assert len(unsupported_features({**RAW, **wrong})) == 3
    assert len(unsupported_features({**RAW, **wrong, "model_type": "llama"})) == 1  # of which nothing else is known


YARN = {"factor": 40, "mscale": 1}


@pytest.mark.parametrize(
    "raw",
    [
        {"rope_theta": 500, "rope_scaling": {"type": "yarn", **YARN}},
        {"rope_theta": 500, "rope_scaling": {"rope_type": "yarn", **YARN}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 500, **YARN}},
        {"rope_theta": 500, "rope_scaling": {"type": "yarn", "factor": 40.0, "mscale": None}},
    ],
)
def test_spellings_of_rope_settings(raw):
    assert RopeConfig.from_hf(raw) == RopeConfig(theta=500.0, kind="yarn", factor=40.0)


# fp8


def test_fp8_blocks_need_not_be_whole(tmp_path):
    from safetensors.torch import save_file

    codes = (torch.randn(300, 260) * 50).to(torch.float8_e4m3fn)
    scales = torch.rand(3, 3) + 0.5
    save_file({"w": codes, "w_scale_inv": scales}, tmp_path / ONE)
    tensors = Checkpoint.open(tmp_path).tensors
    expected = codes.float() * scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[:300, :260]
    whole = Recipe("w", (300, 260), (Piece("w", 0, 300, 300, 1, "w_scale_inv"),))
    assert np.array_equal(assemble(whole, tensors, "float32"), expected.numpy())
    strips = Recipe("w", (3, 60, 260), (Piece("w", 40, 60, 100, 3, "w_scale_inv"),))  # as W_UV lies in kv_b_proj
    assert np.array_equal(assemble(strips, tensors, "float32"), expected.view(3, 100, 260)[:, 40:].numpy())


def test_fp8_scales_of_another_shape(tmp_path, weights, save):
    raw = {**RAW, "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    name = "model.layers.0.self_attn.o_proj.weight"
    changed = {**weights, name: weights[name].to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(2, 1)}
    with pytest.raises(ConfigError, match=r"o_proj\.weight_scale_inv.*\[1, 1\].*\[2, 1\]"):
        plan(save(tmp_path / "x", raw, {ONE: changed}, index=False))
    del changed[f"{name}_scale_inv"]
    with pytest.raises(CheckpointError, match=r"o_proj\.weight is fp8 without"):
        plan(save(tmp_path / "y", raw, {ONE: changed}, index=False))


# Sizes


@pytest.mark.parametrize(
    ("model", "stack"),
    [("v2-lite", [64]), ("v2", [160]), ("v3", [128, 128]), ("moonlight", [64]), ("kimi-k2", [128, 128, 128])],
)
def test_stacks_of_experts_that_tensorrt_takes_in_parts(tmp_path, make_checkpoint, model, stack):
    """Four layers of each: of V3's the last one is MoE."""
    make_checkpoint.write_sparse(make_checkpoint.reduced(make_checkpoint.PUBLISHED[model], layers=4), tmp_path)
    _, weights, _ = plan(tmp_path)
    assert not too_large_for_tensorrt(weights.recipes)
    parts = {recipe.name: tensorrt_parts(recipe) for recipe in weights.recipes}
    for name, of in parts.items():
        rows = [part.shape[0] for part in of]
        assert rows == stack if ".mlp.experts." in name else len(rows) == 1, name
        assert [part.start for part in of] == [sum(rows[:i]) for i in range(len(rows))]
        assert len(of) == 1 or [part.name for part in of] == [f"{name}.part{i}" for i in range(len(of))]


@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ((256, 2048, 7168), (128, 128)),
        ((384, 2048, 7168), (128, 128, 128)),
        ((2, 2**30 - 64, 1), (2,)),
        ((2, 2**30, 1), (1, 1)),
        ((3, 2**30, 1), (1, 1, 1)),
        ((5, 2**29, 1), (3, 2)),
        ((2**16 + 1, 32771, 1), (32896, 32641)),  # of odd rows 128 go together
        ((4, 2**31, 1), ()),
        ((257, 2**25 + 1, 1), ()),  # 128 of these odd rows are too many
    ],
)
def test_parts_are_few_alike_and_aligned(shape, rows):
    assert split_rows(shape) == rows
    assert sum(rows) in (shape[0], 0)
    row = shape[1] * shape[2]
    assert all(count * row < 2**31 for count in rows)
    assert all(count * row % 128 == 0 for count in rows[:-1])


def test_what_is_no_stack_of_experts_is_not_split():
    embeddings = Recipe("model.embed_tokens.weight", (2**20, 4096), ())
    assert too_large_for_tensorrt([embeddings]) == (embeddings,)
