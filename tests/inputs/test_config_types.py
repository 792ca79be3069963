"""config.json as a file, and its values' types: whatever is wrong is one sentence with key and value.

The rule is that of transformers' config classes, which are strict: no number in quotes, no true for 1, no 128.0 where
128 is meant. Ours is laxer in one point (a whole number may stand for any number: published configs write factor 40)
and stricter in others: sizes have ranges, and null is only for keys of which it says something.
"""

from __future__ import annotations

import json

import pytest

from deepseek_trt.export.config.keys import KEYS
from deepseek_trt.export.config.model_config import ModelConfig, read_config, unsupported_features
from deepseek_trt.export.config.values import Anything, Flag, Integer, ListOf, Number, Object, Text
from deepseek_trt.export.errors import ConfigError
from deepseek_trt.export.text.wording import shown

NAN, INF = float("nan"), float("inf")
TYPED = {
    name: key for name, key in KEYS.items() if key.use in ("used", "checked") and not isinstance(key.kind, Anything)
}
WRONG = {
    Integer: ["128", 128.0, 128.5, True, [128], {"a": 1}, -5, NAN, INF, 10**400, 2**31, "", []],
    Number: ["1e-6", True, [1e-6], {"a": 1}, -1, NAN, INF, -INF, 10**400, ""],
    Flag: [0, 1, "true", "false", [], [True], {}, NAN],
    Text: [1, 1.5, True, ["silu"], {"a": 1}, NAN, "\ud800"],
    ListOf: ["a", 1.5, True, {"a": 1}, [None], [[1]], [True], NAN],
    Object: ["yarn", 1, True, ["yarn"], NAN],
}


@pytest.mark.parametrize("name", TYPED)
@pytest.mark.parametrize("base", ["v2", "v3"])
def test_wrong_types_name_key_and_value(bases, base, name):
    for value in WRONG[type(TYPED[name].kind)]:
        if name == "eos_token_id" and value == []:
            continue
        with pytest.raises(ConfigError) as error:
            ModelConfig.from_hf({**bases[base], name: value})
        assert name in str(error.value), f"{name} {value!r}: {error.value}"
        assert shown(value)[:40] in str(error.value), f"{name} {value!r}: {error.value}"
        assert len(str(error.value)) < 400


@pytest.mark.parametrize("name", [name for name, key in TYPED.items() if not key.null])
def test_null_where_it_says_nothing(bases, name):
    found = unsupported_features({**bases["v2"], name: None})
    assert any(f"{name} is null" in sentence for sentence in found), found


@pytest.mark.parametrize("name", [name for name, key in TYPED.items() if key.null])
def test_null_where_it_says_something(bases, name):
    assert unsupported_features({**bases["v2"], name: None}) == ()


def test_what_null_means_is_what_transformers_makes_of_it(bases):
    """norm_topk_prob: null is no absent key: `if self.norm_topk_prob` is false, where V3's default is true."""
    raw = {k: v for k, v in bases["v3"].items() if k not in ("norm_topk_prob", "topk_method")}
    assert ModelConfig.from_hf(raw).norm_topk_prob is True
    read = ModelConfig.from_hf(
        {**raw, "norm_topk_prob": None, "topk_method": None, "n_group": None, "topk_group": None}
    )
    assert (read.norm_topk_prob, read.topk_method, read.n_group, read.topk_group) == (False, "noaux_tc", 1, 1)
    assert ModelConfig.from_hf({**raw, "q_lora_rank": None}).q_lora_rank is None


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 10**30},
        {"n_routed_experts": 2**30, "num_experts_per_tok": 1},
        {"num_attention_heads": 2**16, "qk_nope_head_dim": 2**16},
        {"n_shared_experts": 2**16, "moe_intermediate_size": 2**16},
        {"kv_lora_rank": 2**31 - 1},
        {"hidden_size": 0},
        {"vocab_size": -1},
        {"max_position_embeddings": 2**40},
        {"first_k_dense_replace": -1},
        {"moe_layer_freq": 0},
        {"num_experts_per_tok": 5},
        {"n_group": 3, "topk_method": "group_limited_greedy"},
        {"qk_rope_head_dim": 7},
        {"eos_token_id": [1, -1]},
        {"rope_theta": 0},
        {"rms_norm_eps": -1e-6},
        {"routed_scaling_factor": 0},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_absurd_sizes(made, changes):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        ModelConfig.from_hf({**made("v2").raw, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "32"},
        {"num_hidden_layers": 10**9},
        {"rms_norm_eps": NAN},
        {"rope_scaling": [1]},
        {"architectures": "DeepseekV2ForCausalLM"},
        {"architectures": [1]},
        {"quantization_config": "fp8"},
        {"eos_token_id": {"a": 1}},
        {"tie_word_embeddings": "no"},
        {"id2label": ["a"]},
        {"torch_dtype": 16},
        {"model_type": ["deepseek_v2"]},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_both_commands_say_it(made, verdict, changes):
    folder = made("v2").path
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **changes}))
    judged = verdict(folder)
    assert not judged.accepted
    for output in (judged.check, judged.export):
        assert next(iter(changes)) in output


# The file


def deep(levels: int) -> bytes:
    return b'{"a": ' * levels + b"1" + b"}" * levels


FILES = {
    "empty": (b"", "is not JSON"),
    "half": (b'{"model_type": "deepseek_v2"', "is not JSON"),
    "list": (b"[]", "does not hold an object"),
    "null": (b"null", "does not hold an object"),
    "byte order mark": (b"\xef\xbb\xbf{}", "byte order mark"),
    "utf-16": ('{"model_type": "deepseek_v2"}'.encode("utf-16"), "byte order mark"),
    "utf-16 without mark": ('{"model_type": "deepseek_v2"}'.encode("utf-16-le"), "is not JSON"),
    "latin-1": ('{"_name_or_path": "é"}'.encode("latin-1"), "not JSON in UTF-8"),
    "deep": (deep(100), "nested deeper than"),
    "deepest": (deep(200_000), "nested too deeply"),
    "a key twice": (b'{"hidden_size": 32, "hidden_size": 64}', "'hidden_size' twice"),
    "an inner key twice": (b'{"rope_scaling": {"factor": 2, "factor": 4}}', "'factor' twice"),
    "a number of 5000 digits": (b'{"hidden_size": ' + b"9" * 5000 + b"}", "is not JSON"),
    "huge": (b'{"a": "' + b" " * (16 * 2**20) + b'"}', "larger than"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_none(tmp_path, name):
    data, words = FILES[name]
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(ConfigError, match=words):
        read_config(tmp_path / "config.json")


@pytest.mark.parametrize("name", ["deepest", "byte order mark", "a key twice", "list"])
def test_both_commands_say_it_of_files(made, verdict, name):
    folder = made("v2").path
    (folder / "config.json").write_bytes(FILES[name][0])
    judged = verdict(folder)
    assert not judged.accepted
    assert FILES[name][1] in judged.check
    assert FILES[name][1] in judged.export


def test_a_folder_of_that_name(made, verdict):
    folder = made("v2").path
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    assert "is no regular file" in verdict(folder).check


def test_numbers_that_json_lacks_are_named_with_their_key(tmp_path, bases):
    """Python's json reads NaN and Infinity: the key is named, not only the file."""
    text = json.dumps({**bases["v2"], "rope_theta": NAN, "rms_norm_eps": INF, "router_z_loss_coef": NAN})
    (tmp_path / "config.json").write_text(text)
    found = unsupported_features(read_config(tmp_path / "config.json"))
    assert {sentence.split(" ")[0] for sentence in found} == {"rms_norm_eps", "rope_theta", "router_z_loss_coef"}
