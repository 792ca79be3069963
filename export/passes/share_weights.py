"""A graph pass: large initializers become inputs, so that two engines can bind one copy of the weights."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

SHARED_FROM_BYTES = 64 * 1024  # smaller tensors (norms, rope frequencies) stay in the plan


class ShareWeights(ir.passes.InPlacePass):
    """Moves every external initializer of at least SHARED_FROM_BYTES to the graph's inputs, after those it has.

    `only`: those of these names.
    """

    def __init__(self, only: Collection[str] | None = None) -> None:
        super().__init__()
        self.names: list[str] = []
        self._only = only

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        for name, value in list(graph.initializers.items()):
            tensor = value.const_value
            large = isinstance(tensor, ir.ExternalTensor) and tensor.nbytes >= SHARED_FROM_BYTES
            if large and (self._only is None or name in self._only):
                del graph.initializers[name]
                value.const_value = None
                graph.inputs.append(value)
                self.names.append(name)
        return ir.passes.PassResult(model, bool(self.names))
