"""What graph passes ask of a graph to find a pattern in it."""

from __future__ import annotations

import onnx_ir as ir


def made_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node of this standard operator that gives `value`, or None."""
    node = value.producer() if value is not None else None
    return node if node is not None and (node.domain, node.op_type) == ("", op_type) else None


def only_user(value: ir.Value) -> ir.Node | None:
    """The one node that takes `value`, which is no output of the graph; or None."""
    users = {node for node, _ in value.uses()}
    return users.pop() if len(users) == 1 and not value.is_graph_output() else None
