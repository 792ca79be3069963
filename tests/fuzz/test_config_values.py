"""Any JSON value under any key of config.json and generation_config.json, drawn by hypothesis."""

from __future__ import annotations

import json

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepseek_trt.export.config.keys import KEYS
from deepseek_trt.export.config.model_config import ModelConfig, config_notes, read_config
from deepseek_trt.export.errors import ConfigError
from deepseek_trt.export.text.generation_config import GenerationConfig

NUMBERS = st.sampled_from([0, -1, 1, 2**31 - 1, 2**31, 2**63, 10**400, 0.5, 1e308, 1e-320, float("nan"), float("inf")])
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, st.integers(-9, 300), st.floats(), st.text(max_size=4))
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)
SHARED = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@SHARED
@given(st.dictionaries(st.sampled_from(sorted(KEYS)) | st.text(max_size=6), VALUES, min_size=1, max_size=3))
def test_config(tmp_path, values):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deepseek_v2", **values}))
    try:
        raw = read_config(tmp_path / "config.json")
        config, notes = ModelConfig.from_hf(raw), config_notes(raw)
    except ConfigError as error:
        config, notes = None, (str(error),)
    assert all(note.isprintable() for note in notes), notes
    if config is None:
        return
    json.dumps(raw, allow_nan=False)
    for key, value in values.items():
        if hasattr(ModelConfig, key) and value is not None and key not in ("hidden_act", "dtype"):
            assert getattr(config, key) == value
            assert isinstance(getattr(config, key), bool) == isinstance(value, bool)


@SHARED
@given(st.dictionaries(st.sampled_from(["temperature", "top_k", "top_p", "eos_token_id", "do_sample", "x\n"]), VALUES))
def test_generation_config(tmp_path, values):
    (tmp_path / "generation_config.json").write_text(json.dumps(values))
    try:
        read = GenerationConfig.read(tmp_path)
        said = read.not_honoured
    except ConfigError as error:
        read, said = None, (str(error),)
    assert all(what.isprintable() for what in said), said
    if read is None:
        return
    assert {name: value for name, value in values.items() if name in dict(read.sampling)} == dict(read.sampling)
