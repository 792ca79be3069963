"""Real TensorRT-RTX builds of the other classes' graphs with no GPU: plugins, profiles, outputs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from deepseek_trt.engines.plans.build import build_with_library
from deepseek_trt.engines.plans.plan import BuildSpec
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.plugins.aot.compile import compile_all
from deepseek_trt.plugins.tensorrt.library import build_library

SPEC = BuildSpec(sms=(86,), max_batch_size=2, max_input_len=16, max_seq_len=32)
MOE = {"MoeRouter": 1, "MoeExperts": 1}
PREFILL = {"MlaPrefill": 2, **MOE}
DECODE = {"MlaQuery": 2, "MlaDecode": 2, "MlaValue": 2, "MoeLayer": 1}
HIDDEN = ["last_hidden_state", "hidden_states.0", "hidden_states.1", "hidden_states.2"]
# Export: its class, its options, and of each graph the plugins and first outputs.
EXPORTS: dict[str, tuple[str, dict[str, Any], dict[str, tuple[dict[str, int], list[str]]]]] = {
    "features": (
        "DeepseekV2Model",
        {"task": "feature-extraction", "hidden_states": True},
        {"prefill": (PREFILL, HIDDEN), "decode": (DECODE, HIDDEN)},
    ),
    "whole": (
        "DeepseekV2Model",
        {"task": "feature-extraction", "no_cache": True},
        {"model": (PREFILL, ["last_hidden_state"])},
    ),
    "classes": (
        "DeepseekV2ForSequenceClassification",
        {"task": "text-classification"},
        {"model": (PREFILL, ["logits"])},
    ),
    "embeds": (
        "DeepseekV2ForCausalLM",
        {"inputs_embeds": True, "logits_to_keep": 3},
        {"prefill": (PREFILL, ["logits"]), "decode": (DECODE, ["logits"])},
    ),
    "transformers": ("DeepseekV2ForCausalLM", {"io": "transformers"}, {"model": (MOE, ["logits"])}),
    "transformers whole": (
        "DeepseekV2ForSequenceClassification",
        {"task": "text-classification", "io": "transformers"},
        {"model": (MOE, ["logits"])},
    ),
}
SLOW = ("whole", "embeds", "transformers whole")  # like the others, and for the night


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory):
    """A dense and a MoE layer, about as small as the kernels take, in float16."""
    import torch
    import transformers

    config = transformers.DeepseekV2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_shared_experts=1,
        n_routed_experts=4,
        num_experts_per_tok=2,
        kv_lora_rank=32,
        q_lora_rank=None,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
        first_k_dense_replace=1,
        num_labels=3,
    )
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            torch.manual_seed(0)
            getattr(transformers, kind)(config).half().save_pretrained(made[kind])
        return made[kind]

    return make


@pytest.fixture(scope="module")
def library(checkpoint_of, bundle_of, tmp_path_factory):
    manifest = bundle_of(checkpoint_of("DeepseekV2Model"), task="feature-extraction", no_cache=True).manifest
    binaries = compile_all(manifest.model, manifest.dtype, [86], jobs=2, fallback=False)
    return build_library(binaries, manifest.model, manifest.dtype, tmp_path_factory.mktemp("library"))


@pytest.mark.tensorrt
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in EXPORTS])
def test_plans_of_every_interface(checkpoint_of, bundle_of, library, tmp_path, name):
    kind, options, graphs = EXPORTS[name]
    exported = bundle_of(checkpoint_of(kind), **options)
    bundle = Bundle.open(Path(shutil.copytree(exported.path, tmp_path / "bundle", symlinks=True)))
    plans = build_with_library(bundle, SPEC, library.path)
    assert [plan.path.name for plan in plans] == [f"{graph}.plan" for graph in graphs]
    for plan, (graph, (plugins, outputs)) in zip(plans, graphs.items(), strict=True):
        record = plan.record
        assert record.plugins == plugins
        assert [t.name for t in record.outputs][: len(outputs)] == outputs
        assert {t.name for t in record.inputs} - set(record.weights) == {t.name for t in bundle.graph(graph).inputs}
    if name == "embeds":
        assert plans[0].record.profile.shapes["inputs_embeds"] == ((1, 1, 32), (1, 16, 32), (2, 16, 32))
    if name == "transformers":
        shapes = plans[0].record.profile.shapes
        assert shapes["past_key_values.1.value"] == ((1, 1, 0, 16), (2, 1, 31, 16), (2, 1, 32, 16))
