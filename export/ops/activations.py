"""Gate activations, by their name in config.json's hidden_act: in torch, and as ONNX statements."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def activate(name: str, x: Tensor) -> Tensor:
    """The activation `name` of x, element by element."""
    if name == "silu":
        return F.silu(x)
    if name == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if name == "gelu_pytorch_tanh" else "none")


# From gate to activated.
ACTIVATION_BODIES = {
    "silu": """gate_sigmoid = Sigmoid (gate)
        activated = Mul (gate, gate_sigmoid)""",
    "relu": "activated = Relu (gate)",
    "gelu": "activated = Gelu (gate)",
    "gelu_pytorch_tanh": 'activated = Gelu <approximate = "tanh"> (gate)',
}
