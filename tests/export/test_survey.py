"""The survey of published checkpoints: the numbers in their papers and model cards, from headers alone."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from deepseek_trt.export import free_memory
from deepseek_trt.export.config.model_config import ModelConfig
from deepseek_trt.export.errors import ConfigError
from deepseek_trt.export.survey import GIB, survey

# model: parameters, active in 1e9 (rounded as published), bytes stored, cache bytes a token, saving
PUBLISHED = {
    "v2-lite": (15_706_484_224, 2.4, 31_412_968_448, 27 * 576 * 2, 1 - 576 / (16 * 320)),
    "v2": (235_741_434_880, 21, 471_482_869_760, 60 * 576 * 2, 1 - 576 / (128 * 320)),
    "v3": (671_026_419_200, 37, None, 61 * 576 * 2, 1 - 576 / (128 * 320)),
    "moonlight": (15_960_110_208, 3, 2 * 15_960_110_208, 27 * 576 * 2, 1 - 576 / (16 * 320)),
}


@pytest.fixture(scope="module")
def published(tmp_path_factory, make_checkpoint):
    def make(name):
        folder = tmp_path_factory.mktemp(name)
        make_checkpoint.write_sparse(make_checkpoint.PUBLISHED[name], folder)
        return folder

    return make


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers(published, name):
    parameters, active, stored, cache, saving = PUBLISHED[name]
    facts = survey(published(name)).facts
    assert facts.parameters == parameters
    assert facts.active_parameters / 1e9 == pytest.approx(active, rel=0.15)  # embeddings are counted or not
    assert facts.cache_bytes_per_token == cache
    assert facts.cache_saving == pytest.approx(saving)
    # a published router's bias is float32, which the rounded size does not count
    assert stored is None or facts.stored_bytes == pytest.approx(stored, rel=1e-6)
    assert bool(facts.dropped) == (name == "v3")


WAYS = ("weights mapped", "weights copied", "by reference", "--backend torch")


def test_steps_that_will_be_refused_are_not_sized(published, monkeypatch):
    """Too little memory on this machine; engines of the V3 family are not refused, whose experts go in parts."""
    monkeypatch.setattr(free_memory, "available_memory", lambda: 2 * GIB)
    engines = {name: survey(published(name)).facts for name in ("v2-lite", "v3", "moonlight")}
    refused = {name: facts.needs[-1].refused for name, facts in engines.items()}
    assert refused["v2-lite"] == ""
    assert refused["v3"] == refused["moonlight"] == ""
    assert engines["v2-lite"].capacities
    assert engines["v3"].capacities
    needs = {need.step: need.refused for need in engines["v2-lite"].needs}
    assert needs["generate, by reference"].startswith("on this machine: it takes 28.90 GB of memory, where 2.15 GB")
    assert "62.83 GB" in needs["generate, --backend torch"]
    assert not needs["generate, weights mapped"]


def test_needs_and_capacity(published, monkeypatch):
    monkeypatch.setattr(free_memory, "available_memory", lambda: 100 * GIB)
    folder = published("v2-lite")
    facts = survey(folder, gpu_bytes=80 * GIB).facts
    needs = {need.step: need for need in facts.needs}
    assert needs["export"].disk > 31.4e9
    assert needs["export --by-reference"].disk < 50e6
    assert not any(need.refused for need in facts.needs)
    mapped, copied, referred, torch = (needs[f"generate, {way}"] for way in WAYS)
    assert mapped.memory < 4e9 < 31.4e9 < copied.memory < 36e9
    assert mapped.file_pages > 31.4e9 > copied.file_pages
    assert 28.7e9 < referred.memory < 34e9
    assert torch.memory > 4 * facts.parameters
    batches = {row.context: row.batch for row in facts.capacities}
    free = 0.9 * 80 * GIB - 2 * facts.parameters
    assert batches[4096] == int(free // (4096 * 31104))
    assert {row.batch for row in survey(folder, gpu_bytes=24 * GIB).facts.capacities} == {0}
    assert survey(folder, dtype="float32").facts.cache_bytes_per_token == 2 * 31104
    assert not any(row.limited for row in facts.capacities)
    huge = survey(folder, gpu_bytes=2000 * GIB).facts.capacities
    assert [(row.context, row.batch, row.limited) for row in huge] == [
        (4096, 910, True),
        (32768, 113, True),
        (131072, 28, True),
    ], "a page pool of TensorRT holds fewer than 2^31 numbers"


def test_unsupported_and_damaged(tmp_path, published, make_checkpoint):
    config = {**make_checkpoint.V2_LITE, "use_mla": False, "hidden_act": "tanh"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = survey(tmp_path)
    assert len(result.unsupported) == 2
    assert result.facts is None
    folder = published("v2-lite")
    (folder / "config.json").write_text(json.dumps({**make_checkpoint.V2_LITE, "hidden_size": 1024}))
    assert "model.embed_tokens.weight" in survey(folder).problem
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config\.json is missing"):
        survey(folder)


def test_no_torch_for_check(tmp_path):
    code = "import sys, deepseek_trt.cli.check; sys.exit('torch' in sys.modules or 'onnx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_defaults_of_the_v3_family(make_checkpoint):
    """As transformers writes V3: without topk_method and scoring_func."""
    raw = {k: v for k, v in make_checkpoint.V3.items() if k not in ("topk_method", "scoring_func", "norm_topk_prob")}
    config = ModelConfig.from_hf(raw)
    assert (config.topk_method, config.norm_topk_prob) == ("noaux_tc", True)


@pytest.mark.parametrize(
    ("tensors", "task"),
    [
        ({}, "text-generation"),
        ({"lm_head.weight": "score.weight"}, "text-classification"),
        (None, "feature-extraction"),
    ],
)
def test_the_task_is_seen_by_the_heads(tmp_path, weights_of, save, tensors, task):
    """With lm_head, with a score head in its place, and as the bare model is saved."""
    raw = {
        "model_type": "deepseek_v2",
        "architectures": ["DeepseekV2Model" if tensors is None else "DeepseekV2ForCausalLM"],
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "n_routed_experts": None,
        "kv_lora_rank": 8,
        "q_lora_rank": None,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    }
    weights = weights_of(raw)
    if tensors is None:
        weights.pop("lm_head.weight")
        stored = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    else:
        stored = {tensors.get(name, name): tensor for name, tensor in weights.items()}
    found = survey(save(tmp_path / "x", raw, {"model.safetensors": stored}, index=False))
    assert found.problem is None
    assert found.facts.task == task
