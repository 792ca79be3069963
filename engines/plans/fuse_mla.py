"""Graph passes: what makes decode's queries and latents becomes one MlaQuery, what makes its values one MlaValue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from deepseek_trt.engines.plans.matching import made_by, only_user
from deepseek_trt.export.bundle.graph import DOMAIN
from deepseek_trt.plugins.fused.mla_query import MLA_QUERY
from deepseek_trt.plugins.fused.mla_value import MLA_VALUE


class FuseMlaQuery(ir.passes.InPlacePass):
    """Puts a MlaQuery before every MlaDecode, of any cache, whose query and latent export.model.Attention makes."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        found = [(node, match) for node in _decodes(model) if (match := _match_query(node)) is not None]
        for node, match in found:
            _put(model.graph, node, MLA_QUERY.name, match.inputs, node.inputs[:2], [ir.AttrFloat32("eps", match.eps)])
        return ir.passes.PassResult(model, bool(found))


class FuseMlaValue(ir.passes.InPlacePass):
    """Puts a MlaValue after every MlaDecode, whatever its cache, whose output each head's W_UV is multiplied with."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        found = [(node, match) for node in _decodes(model) if (match := _match_value(node)) is not None]
        for node, (w_uv, transposed) in found:
            _put(model.graph, node, MLA_VALUE.name, (node.outputs[0], w_uv), [transposed], [], after=True)
        return ir.passes.PassResult(model, bool(found))


@dataclass(frozen=True)
class _Query:
    """MlaQuery's inputs, and the norm's epsilon."""

    inputs: tuple[ir.Value | None, ...]
    eps: float


def _decodes(model: ir.Model) -> list[ir.Node]:
    """Over a whole cache, or over one of any narrow format."""
    return [node for node in model.graph if node.domain == DOMAIN and node.op_type.startswith("MlaDecode")]


def _match_query(decode: ir.Node) -> _Query | None:
    queries = _two_parts(_reshaped(decode.inputs[0]))
    latents = _two_parts(decode.inputs[1])
    if queries is None or latents is None:
        return None
    absorbed, q_rope = queries
    product = made_by(_transposed(absorbed, (1, 0, 2)), "MatMul")
    norm, rotated_q, rotated_k = made_by(latents[0], "RMSNormalization"), _rotation(q_rope), _rotation(latents[1])
    if product is None or norm is None or rotated_q is None or rotated_k is None:
        return None
    nope, w_uk = _reshaped(_transposed(product.inputs[0], (1, 0, 2))), product.inputs[1]
    q = _whole(nope, _reshaped(rotated_q.x))
    kv = _whole(norm.inputs[0], rotated_k.x)
    angles = rotated_q.angles
    if q is None or kv is None or w_uk is None or norm.inputs[1] is None or angles != rotated_k.angles:
        return None
    if (rotated_q.heads, rotated_k.heads) != (_size(w_uk, 0), 1) or norm.attributes.get_int("axis", -1) != -1:
        return None
    return _Query((q, kv, *angles, norm.inputs[1], w_uk), norm.attributes.get_float("epsilon", 1e-5))


def _match_value(decode: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """W_UV, and the values [T, H, V] with heads behind tokens, which only a reshape takes."""
    value: ir.Value | None = decode.outputs[0]
    nodes = []
    for op_type in ("Reshape", "Transpose", "MatMul", "Transpose", "Reshape"):
        node = only_user(value) if value is not None else None
        if node is None or node.op_type != op_type or node.inputs[0] is not value:
            return None
        nodes.append(node)
        value = node.outputs[0]
    _, before, product, after, _ = nodes
    weight = product.inputs[1]
    w_uv = _transposed(weight, (0, 2, 1))
    heads_first = all(_permutation(node) == (1, 0, 2) for node in (before, after))
    return (w_uv, after.outputs[0]) if w_uv is not None and heads_first else None


@dataclass(frozen=True)
class _Rotation:
    """A rotary embedding of adjacent pairs in float32: what it takes, cos and sin, and its heads."""

    x: ir.Value | None
    angles: tuple[ir.Value | None, ...]
    heads: int


def _rotation(value: ir.Value | None) -> _Rotation | None:
    node = made_by(_uncast(_reshaped(value)), "RotaryEmbedding")
    if node is None or len(node.inputs) != 3:
        return None
    if (node.attributes.get_int("interleaved", 0), node.attributes.get_int("rotary_embedding_dim", 0)) != (1, 0):
        return None
    return _Rotation(_uncast(node.inputs[0]), tuple(node.inputs[1:]), node.attributes.get_int("num_heads", 0))


def _two_parts(value: ir.Value | None) -> tuple[ir.Value | None, ir.Value | None] | None:
    """What was put side by side."""
    node = made_by(value, "Concat")
    along_the_last = node is not None and node.attributes.get_int("axis", 0) == -1 and len(node.inputs) == 2
    return (node.inputs[0], node.inputs[1]) if node is not None and along_the_last else None


def _whole(first: ir.Value | None, second: ir.Value | None) -> ir.Value | None:
    """What was cut in two along its last dimension, before it got that shape."""
    one, two = made_by(first, "Slice"), made_by(second, "Slice")
    if one is None or two is None or one.inputs[0] is not two.inputs[0] or one.inputs[2] is not two.inputs[1]:
        return None
    # the second begins where the first ends
    if one.inputs[3] is not two.inputs[3] or one.inputs[4] is not two.inputs[4]:
        return None
    whole = one.inputs[0]
    full = whole is not None and _size(whole, -1) == _size(one.outputs[0], -1) + _size(two.outputs[0], -1)
    return _reshaped(whole) if full else None


def _reshaped(value: ir.Value | None) -> ir.Value | None:
    """What `value` was before any reshapes."""
    while (node := made_by(value, "Reshape")) is not None:
        value = node.inputs[0]
    return value


def _uncast(value: ir.Value | None) -> ir.Value | None:
    node = made_by(value, "Cast")
    return value if node is None else node.inputs[0]


def _transposed(value: ir.Value | None, permutation: tuple[int, ...]) -> ir.Value | None:
    """What `value` is the transpose of."""
    node = made_by(value, "Transpose")
    return node.inputs[0] if node is not None and _permutation(node) == permutation else None


def _permutation(node: ir.Node) -> tuple[int, ...]:
    return tuple(node.attributes.get_ints("perm", ()))


def _size(value: ir.Value, axis: int) -> int:
    """The dimension where it is a number, else -1."""
    dim = value.shape[axis] if value.shape is not None else -1
    return dim if isinstance(dim, int) else -1


def _put(
    graph: ir.Graph,
    decode: ir.Node,
    op: str,
    inputs: tuple[ir.Value | None, ...],
    replaced: Sequence[ir.Value | None],
    attributes: list[ir.Attr],
    after: bool = False,
) -> None:
    """Put a node of `op` beside MlaDecode, whose outputs take the place of `replaced`."""
    name = op + decode.name[len(decode.op_type) :] if decode.name else op
    node = ir.Node(DOMAIN, op, inputs, attributes, num_outputs=len(replaced), name=name)
    for old, new in zip(replaced, node.outputs, strict=True):
        assert old is not None
        new.name, new.type = old.name, old.type
        old.name = f"{old.name}.unfused"
        old.replace_all_uses_with(new)
    (graph.insert_after if after else graph.insert_before)(decode, node)
