"""Patterns of graph values: what a value was computed from, with names for the parts that a pass needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

Attribute = float | int | str | tuple[int, ...]
Found = dict[str, ir.Value]


@dataclass(frozen=True)
class Op:
    """A node of `type` whose inputs match `inputs`, and whose attributes are `attributes` where they are named there.

    A str in `inputs` names a value, the same one wherever it stands; None matches anything. `optional` names one more
    input that a node may have. Where `name` is given, the node's output is found under it.
    """

    type: str
    inputs: tuple[str | Op | OneOf | None, ...]
    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    optional: str | None = None
    name: str | None = None


@dataclass(frozen=True)
class OneOf:
    """The first of several patterns that matches."""

    patterns: tuple[Op | OneOf, ...]


def match(pattern: str | Op | OneOf | None, value: ir.Value | None) -> Found | None:
    """The named values where `value` matches, else None. Casts are looked through."""
    found: Found = {}
    return found if _match(pattern, value, found) else None


def uncast(value: ir.Value) -> ir.Value:
    """What `value` was before any Cast."""
    while (node := value.producer()) is not None and node.op_type == "Cast" and node.inputs[0] is not None:
        value = node.inputs[0]
    return value


def _match(pattern: str | Op | OneOf | None, value: ir.Value | None, found: Found) -> bool:
    if pattern is None:
        return True
    if value is None:
        return False
    value = uncast(value)
    if isinstance(pattern, str):
        return found.setdefault(pattern, value) is value
    if isinstance(pattern, OneOf):
        return any(_try(option, value, found) for option in pattern.patterns)
    node = value.producer()
    if node is None or node.op_type != pattern.type or not _same_attributes(pattern, node):
        return False
    if pattern.name is not None:
        found[pattern.name] = value
    return _match_inputs(pattern, node, found)


def _try(pattern: Op | OneOf, value: ir.Value, found: Found) -> bool:
    attempt = dict(found)
    if not _match(pattern, value, attempt):
        return False
    found.update(attempt)
    return True


def _match_inputs(pattern: Op, node: ir.Node, found: Found) -> bool:
    given = [value for value in node.inputs if value is not None]
    extra = given[len(pattern.inputs) :] if pattern.optional else []
    if pattern.optional and (len(given) < len(pattern.inputs) or len(extra) > 1):
        return False
    if extra and not _match(pattern.optional, extra[0], found):
        return False
    return all(_match(p, v, found) for p, v in zip(pattern.inputs, node.inputs, strict=False))


def _same_attributes(pattern: Op, node: ir.Node) -> bool:
    return all(name in node.attributes and node.attributes[name].value == v for name, v in pattern.attributes.items())
