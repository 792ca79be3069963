"""Keys of JSON objects."""

from __future__ import annotations

import json

import pytest

from deepseek_trt.export.json_file import unique_object


def test_keys_stay_in_their_order():
    assert list(json.loads('{"b": 1, "a": {"b": 2}}', object_pairs_hook=unique_object)) == ["b", "a"]


@pytest.mark.parametrize("text", ['{"a": 1, "a": 1}', '{"b": [{"c": 1, "a": 2, "a": 3}]}'])
def test_a_key_twice_is_named(text):
    with pytest.raises(KeyError, match="'a'"):
        json.loads(text, object_pairs_hook=unique_object)


def test_a_million_keys_take_no_longer_than_each():
    """A search of all earlier keys at each one would take days."""
    pairs = [(str(number), 0) for number in range(1_000_000)]
    with pytest.raises(KeyError, match="'999999'"):
        unique_object([*pairs, pairs[-1]])
