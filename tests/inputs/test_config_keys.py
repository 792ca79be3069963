"""Every key of config.json is used, checked, harmless, refused, or named in a note; none passes unseen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepseek_trt.export.config.keys import ALIASES, KEYS, SECTIONS
from deepseek_trt.export.config.keys_page import keys_part, with_part
from deepseek_trt.export.config.model_config import ModelConfig, config_notes, unsupported_features
from deepseek_trt.export.config.quantization import FORMATS
from deepseek_trt.export.text.wording import shown

PAGE = Path(__file__).parents[2] / "docs" / "checkpoints.md"


def of(use: str) -> list[str]:
    return [name for name, key in KEYS.items() if key.use == use]


def refusals(raw) -> str:
    return "\n".join(unsupported_features(raw))


def test_page_is_up_to_date():
    page = PAGE.read_text(encoding="utf-8")
    assert with_part(page) == page, "run: python -m deepseek_trt.export.config.keys_page docs/checkpoints.md"
    assert keys_part() in page


def test_no_key_is_in_two_sections():
    assert len(KEYS) == sum(len(keys) for keys in SECTIONS.values())


@pytest.mark.parametrize("name", ["DeepseekV2Config", "DeepseekV3Config", "Glm4MoeLiteConfig"])
def test_whatever_transformers_writes_is_known(name):
    import transformers

    written = getattr(transformers, name)().to_dict()
    assert set(written) <= set(KEYS), set(written) - set(KEYS)


# As published, beside the keys of the base; every value is theirs.
PUBLISHED = {
    "v2": {
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"},
        "attention_dropout": 0.0,
        "aux_loss_alpha": 0.001,
        "ep_size": 1,
        "initializer_range": 0.02,
        "pretraining_tp": 1,
        "scoring_func": "softmax",
        "seq_aux": True,
        "transformers_version": "4.33.1",
        "use_cache": True,
    },
    "v3": {
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
        "num_nextn_predict_layers": 1,
        "num_key_value_heads": 2,
        "ep_size": 1,
        "use_cache": True,
    },
    "glm": {
        "architectures": ["Glm4MoeLiteForCausalLM"],
        "head_dim": 8,
        "partial_rotary_factor": 1.0,
        "use_qk_norm": False,
        "attention_dropout": 0.0,
        "num_nextn_predict_layers": 1,
        "qk_head_dim": 20,
        "mlp_layer_types": ["dense", "sparse"],
        "rope_interleave": True,
        "rope_scaling": None,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_keys_need_no_note(bases, name):
    raw = {**bases["v2" if name == "v2" else "v3"], **PUBLISHED[name]}
    assert unsupported_features(raw) == ()
    assert config_notes(raw) == ()


@pytest.mark.parametrize("name", of("refused"))
def test_refused_keys(bases, name):
    for value in (0.5, 7, "on", [1], {"a": 1}, True):
        assert f"{name} {shown(value)} is not supported" in refusals({**bases["v3"], name: value}), value
    for value in KEYS[name].neutral:
        raw = {**bases["v3"], name: value}
        assert (unsupported_features(raw), config_notes(raw)) == ((), ())


@pytest.mark.parametrize("name", of("harmless"))
def test_harmless_keys(bases, name):
    plain = ModelConfig.from_hf(bases["v3"])
    for value in (None, True, 0, 0.1, "text", [1], {"a": [None]}):
        raw = {**bases["v3"], name: value}
        assert config_notes(raw) == ()
        assert ModelConfig.from_hf(raw) == plain


@pytest.mark.parametrize("value", [1, 0.5, "on", True, [0], {"a": None}])
def test_unknown_keys_are_noted(bases, value):
    (note,) = config_notes({**bases["v2"], "gate_temperature": value})
    assert note == f"config.json's key 'gate_temperature' is not known here: its value {shown(value)} is not read"


@pytest.mark.parametrize("value", [None, False, 0, 0.0, "", [], {}])
def test_unknown_keys_that_say_nothing(bases, value):
    assert config_notes({**bases["v2"], "gate_temperature": value}) == ()


ODD = {"gate_temperature": 0.5, "num_key_value_heads": 1, "\ud800\n": [1] * 1000}


def test_both_commands_note_it(made, verdict):
    judged = verdict(made("v2", num_hidden_layers=1, **ODD).path)
    assert judged.accepted
    for output in (judged.check, judged.export):
        assert "'gate_temperature' is not known here: its value 0.5 is not read" in output
        assert "num_key_value_heads 1 is not read" in output
        assert r"'\ud800\n' is not known here" in output


def test_both_commands_refuse_it(made, verdict):
    judged = verdict(made("v3", use_qk_norm=True).path)
    assert not judged.accepted
    assert "use_qk_norm true is not supported" in judged.check
    assert "use_qk_norm true is not supported" in judged.export


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"head_dim": 9}, "head_dim is 9"),
        ({"head_dim": 20}, None),
        ({"qk_head_dim": 19}, "qk_head_dim is 19"),
        ({"qk_head_dim": 20}, None),
        ({"sliding_window": 4096}, "sliding_window 4096"),
        ({"sliding_window": 4096, "use_sliding_window": False}, None),
        ({"use_sliding_window": True}, "use_sliding_window true"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"layer_types": ["full_attention"] * 2}, None),
        ({"mlp_layer_types": ["sparse", "sparse"]}, "mlp_layer_types"),
        ({"num_local_experts": 4}, None),
        ({"num_local_experts": 8}, "num_local_experts is 8 and n_routed_experts is 4"),
        ({"num_experts": 8}, "num_experts is 8 and n_routed_experts is 4"),
        ({"use_mla": False}, "use_mla is false"),
        ({"topk_method": "greedy", "scoring_func": "softmax"}, "topk_method 'greedy' is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"partial_rotary_factor": True}, "partial_rotary_factor true"),
    ],
)
def test_keys_that_must_agree(bases, changes, words):
    found = refusals({**bases["v3"], **changes})
    assert found == "" if words is None else words in found


@pytest.mark.parametrize("alias", ALIASES)
def test_other_names_are_read(bases, alias):
    """attribute_map of transformers' config classes."""
    raw = {k: v for k, v in bases["v3"].items() if k != "n_routed_experts"}
    assert ModelConfig.from_hf({**raw, alias: 6}).n_routed_experts == 6


def test_the_class_says_it_where_model_type_is_absent(bases):
    """A V3 checkpoint without its model_type would else be routed by softmax."""
    raw = {k: v for k, v in bases["v3"].items() if k not in ("model_type", "topk_method", "scoring_func")}
    assert ModelConfig.from_hf(raw).topk_method == "noaux_tc"
    assert config_notes(raw) == ("config.json lacks model_type: it is read as deepseek_v3",)
    (note,) = config_notes({**bases["v3"], "architectures": ["DeepseekV2ForCausalLM"]})
    assert "model_type counts" in note


def test_dtype_counts_beside_torch_dtype(bases):
    """As in transformers' PreTrainedConfig."""
    assert ModelConfig.from_hf({**bases["v2"], "dtype": "bfloat16", "torch_dtype": "float16"}).dtype == "bfloat16"


def test_an_end_that_no_token_is(bases):
    (note,) = config_notes({**bases["v2"], "eos_token_id": [1, 48]})
    assert note == "eos_token_id 48 is outside the vocabulary of 48"


# Quantisation


@pytest.mark.parametrize("method", [*FORMATS, "brand_new", 4])
def test_formats_are_refused_by_name(bases, method):
    found = unsupported_features({**bases["v3"], "quantization_config": {"quant_method": method, "bits": 4}})
    assert f"{FORMATS.get(method, repr(method))} (quant_method {method!r}), which is not supported" in found[0]
    assert "bfloat16 checkpoint" in found[0]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}, "bitsandbytes"),
        ({"quantization_config": {"quant_algo": "NVFP4", "producer": {"name": "modelopt"}}}, "NVIDIA ModelOpt 'NVFP4'"),
        ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}, "NVIDIA ModelOpt 'FP8'"),
        ({"quantization_config": {"config_groups": {}, "format": "pack-quantized"}}, "compressed-tensors"),
        ({"compression_config": {"config_groups": {}}}, "a former name of quantization_config"),
        ({"quantization_config": {"group_size": 64, "bits": 4}}, "MLX"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "MLX"),
        ({"quantization_config": {"bits": 4, "group_size": 128, "desc_act": False}}, "GPTQ"),
        ({"quantization_config": {"w_bit": 4, "q_group_size": 128, "zero_point": True}}, "AWQ"),
        ({"quantization_config": {"anything": 1}}, "'unknown'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "weight_block_size null"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, True]}}, "weight_block_size"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e5m2"}}, "e5m2"),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "x"}},
            "scale_fmt",
        ),
    ],
)
def test_formats_are_known_by_their_keys(bases, changes, name):
    assert name in unsupported_features({**bases["v3"], **changes})[0]


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


@pytest.mark.parametrize(
    "changes", [{}, {"scale_fmt": "ue8m0"}, {"modules_to_not_convert": ["lm_head"]}, {"fmt": None}]
)
def test_fp8_in_blocks_is_read(bases, changes):
    raw = {**bases["v3"], "quantization_config": {**FP8, **changes}}
    assert (unsupported_features(raw), config_notes(raw)) == ((), ())


def test_an_unknown_key_of_fp8_is_noted(bases):
    (note,) = config_notes({**bases["v3"], "quantization_config": {**FP8, "rounding": "up"}})
    assert note == "config.json's key quantization_config.'rounding' is not known here: its value 'up' is not read"


def test_the_format_comes_before_shapes_and_types(made, verdict):
    """The tensors of such checkpoints have other names and shapes: what is said first is what they are."""
    judged = verdict(made("v3", quantization_config={"quant_method": "awq"}, stored=lambda tensors: {}).path)
    assert "says AWQ" in judged.export.split("error: ")[1]
    assert "says AWQ" in judged.check.split("error: ")[1]


# Random configs: what is accepted is read as transformers' config class reads it

SAME_NAMES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act"),
    *(
        "max_position_embeddings",
        "rms_norm_eps",
        "tie_word_embeddings",
        "attention_bias",
        "q_lora_rank",
        "kv_lora_rank",
    ),
    *("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "n_routed_experts", "n_shared_experts"),
    *("num_experts_per_tok", "moe_intermediate_size", "first_k_dense_replace", "routed_scaling_factor"),
    *("bos_token_id", "pad_token_id"),
)
NUMBERS = {
    "vocab_size": st.integers(10, 60),
    "hidden_size": st.sampled_from([16, 32]),
    "num_hidden_layers": st.integers(1, 4),
    "num_attention_heads": st.sampled_from([1, 2, 4]),
    "q_lora_rank": st.none() | st.integers(4, 24),
    "kv_lora_rank": st.integers(4, 24),
    "qk_rope_head_dim": st.sampled_from([4, 6, 8, 64]),
    "v_head_dim": st.integers(2, 16),
    "n_shared_experts": st.integers(1, 2),
    "first_k_dense_replace": st.integers(0, 3),
    "norm_topk_prob": st.none() | st.booleans(),
    "routed_scaling_factor": st.sampled_from([1.0, 2.5]),
    "attention_bias": st.booleans(),
    "tie_word_embeddings": st.booleans(),
    "rms_norm_eps": st.sampled_from([1e-6, 1e-5]),
    "rope_theta": st.sampled_from([500, 10000.0]),
    "rope_interleave": st.booleans(),
    "max_position_embeddings": st.sampled_from([8, 2048]),
    "bos_token_id": st.none() | st.integers(0, 9),
    "eos_token_id": st.none() | st.integers(0, 9) | st.lists(st.integers(0, 9), max_size=3),
    "pad_token_id": st.none() | st.integers(0, 9),
    "num_local_experts": st.just(4),
    "unheard_of": st.integers(0, 1),
}
ROPE = st.fixed_dictionaries(
    {
        "factor": st.sampled_from([0.5, 2, 40.0]),
        "original_max_position_embeddings": st.sampled_from([16, 300, 4096]),
    },
    optional={
        "type": st.sampled_from(["yarn", "linear", "dynamic", "default"]),
        "rope_type": st.sampled_from(["yarn", "linear", "dynamic", "default"]),
        "rope_theta": st.sampled_from([70, 10000.0]),
        "beta_fast": st.sampled_from([4, 32.0]),
        "beta_slow": st.sampled_from([0.5, 1]),
        "attention_factor": st.sampled_from([0.8, 1.0]),
        "truncate": st.booleans(),
        "mscale": st.sampled_from([0.707, 1]),
        "mscale_all_dim": st.sampled_from([0.707, 1]),
    },
)
ROPES = {"rope_scaling": st.none() | ROPE, "rope_parameters": st.none() | ROPE}


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(base=st.sampled_from(["v2", "v3"]), changes=st.fixed_dictionaries({}, optional={**NUMBERS, **ROPES}))
def test_random_configs(bases, base, changes):
    from transformers import AutoConfig, logging

    logging.set_verbosity_error()
    raw = {**bases[base], **changes}
    if unsupported_features(raw):
        return
    ours, theirs = ModelConfig.from_hf(raw), AutoConfig.for_model(**json.loads(json.dumps(raw)))
    assert {name: getattr(ours, name) for name in SAME_NAMES} == {name: getattr(theirs, name) for name in SAME_NAMES}
    ends = theirs.eos_token_id
    assert list(ours.eos_token_ids) == (ends if isinstance(ends, list) else [] if ends is None else [ends])
    assert ours.norm_topk_prob == bool(theirs.norm_topk_prob)
    if base == "v3":
        assert ours.rope_interleave == theirs.rope_interleave
    both_or_none = {"mscale", "mscale_all_dim"}.intersection(theirs.rope_parameters)
    if len(both_or_none) != 1:  # where one is absent DeepSeek's own code counts, and a note says so
        assert_same_rotation(ours, theirs, base)


def assert_same_rotation(ours, theirs, base) -> None:
    from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3

    rotary = (v2.DeepseekV2RotaryEmbedding if base == "v2" else v3.DeepseekV3RotaryEmbedding)(theirs)
    assert ours.rope.inverse_frequencies(ours.qk_rope_head_dim) == pytest.approx(rotary.inv_freq.tolist(), rel=1e-5)
    assert ours.rope.rotation_amplitude == pytest.approx(rotary.attention_scaling, rel=1e-6)
    scale = (v2 if base == "v2" else v3).yarn_apply_mscale(theirs.rope_parameters, theirs.qk_head_dim**-0.5)
    assert ours.softmax_scale == pytest.approx(scale, rel=1e-6)
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    assert ours.rope.kind == theirs.rope_parameters["rope_type"]
