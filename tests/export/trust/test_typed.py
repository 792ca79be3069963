"""Dataclasses of JSON: what fits is made, what does not is named by its key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from deepseek_trt.export.errors import BundleError
from deepseek_trt.export.trust.typed import typed


@dataclass(frozen=True)
class Inner:
    size: int
    ratio: float


@dataclass(frozen=True)
class Outer:
    name: str
    kind: Literal["one", "two"]
    inner: Inner
    many: tuple[Inner, ...]
    pair: tuple[int, str]
    dims: tuple[int | str, ...]
    maybe: Inner | None
    texts: dict[str, str]
    counts: Sequence[int]
    anything: Mapping[str, Any]
    flag: bool = False


RIGHT: dict[str, Any] = {
    "name": "a",
    "kind": "one",
    "inner": {"size": 1, "ratio": 1},
    "many": [{"size": 2, "ratio": 3}],
    "pair": [4, "b"],
    "dims": [-1, "batch"],
    "maybe": None,
    "texts": {"c": "d"},
    "counts": [5],
    "anything": {"e": [None]},
    "flag": True,
}


def read(**changes: Any) -> Outer:
    raw = {key: value for key, value in {**RIGHT, **changes}.items() if value is not ...}
    return typed(Outer, raw, "file.json", BundleError, "make it again")


def test_what_fits_is_made():
    made = read()
    assert made == Outer(
        "a", "one", Inner(1, 1.0), (Inner(2, 3.0),), (4, "b"), (-1, "batch"), None, {"c": "d"}, [5], {"e": [None]}, True
    )
    assert type(made.many[0].ratio) is float
    assert read(maybe={"size": 6, "ratio": 1}).maybe == Inner(6, 1.0)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a number for text": ({"name": 1}, r"name is 1, where text is needed"),
    "another word": ({"kind": "three"}, r"kind is 'three', where one of one, two is needed"),
    "a list for a word": ({"kind": []}, r"kind is \[\]"),
    "true for a number": ({"inner": {"size": True, "ratio": 1}}, r"inner\.size is True, where a whole number"),
    "a fraction": ({"inner": {"size": 1.0, "ratio": 1}}, r"inner\.size is 1\.0"),
    "below": ({"inner": {"size": -2, "ratio": 1}}, r"inner\.size is -2"),
    "beyond": ({"inner": {"size": 2**63, "ratio": 1}}, r"inner\.size is 9223372036854775808"),
    "infinite": ({"inner": {"size": 1, "ratio": float("inf")}}, r"inner\.ratio is inf, where a number"),
    "no number": ({"inner": {"size": 1, "ratio": float("nan")}}, r"inner\.ratio is nan"),
    "huge": ({"inner": {"size": 1, "ratio": 10**400}}, r"inner\.ratio is 1000"),
    "an unknown key": ({"inner": {"size": 1, "more": 1}}, r"inner\.more is a key that nothing here knows"),
    "a missing key": ({"inner": {"ratio": 1}}, r"inner\.size is missing"),
    "a missing key that has a default": ({"flag": ...}, r"flag is missing"),
    "a missing part": ({"pair": ...}, r"pair is missing"),
    "no object": ({"inner": [1]}, r"inner is \[1\], where an object"),
    "in a list": ({"many": [{"size": 1, "ratio": 1}, {"size": "x", "ratio": 1}]}, r"many\[1\]\.size is 'x'"),
    "no list": ({"many": {}}, r"many is \{\}, where a list"),
    "a short pair": ({"pair": [1]}, r"pair is \[1\], where a list of 2"),
    "a pair turned round": ({"pair": ["b", 4]}, r"pair is 'b'|pair.*whole number"),
    "null in dims": ({"dims": [None]}, r"dims\[0\] is None"),
    "in a mapping": ({"texts": {"a": 1}}, r"texts\.a is 1, where text"),
    "an optional part": ({"maybe": {"size": "x", "ratio": 1}}, r"maybe\.size is 'x'"),
    "one for a flag": ({"flag": 1}, r"flag is 1, where true or false"),
    "a key of another terminal": ({"texts": {"\x1b[31m": 1}}, r"texts\.'\\x1b\[31m'"),
    "a long value": ({"name": ["x" * 999]}, r"name is \['x{58}\.\.\., where"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_is_named(what):
    changes, words = WRONG[what]
    with pytest.raises(BundleError, match=words) as told:
        read(**changes)
    assert str(told.value).startswith("file.json: ")
    assert str(told.value).endswith(": make it again")
