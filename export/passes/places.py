"""Places in a traced graph that passes look for, known by the weights that stand there."""

from __future__ import annotations

import onnx_ir as ir


def normed_by(weight: ir.Value) -> ir.Value:
    """The value that the norm with this weight is applied to."""
    (norm,) = weight.consumers()
    value = norm.inputs[0]
    assert norm.op_type == "RMSNormalization", norm
    assert value is not None, norm
    return value


def input_norm(layer: int) -> str:
    """The name of the weight that norms what enters a layer."""
    return f"model.layers.{layer}.input_layernorm.weight"
