"""Cross-entropy of next tokens, by transformers' rules: labels shifted by one, -100 left out, mean over the rest.

In float64 over float32 logits; transformers upcasts to float32 (transformers.loss.loss_utils.ForCausalLMLoss).
"""

from __future__ import annotations

import numpy as np

from deepseek_trt.export.arrays import Int64s
from deepseek_trt.validate.numbers.metrics import Array, negative_log_likelihood

IGNORED = -100  # a label that is not scored


def shifted_labels(labels: Int64s) -> Int64s:
    """Of labels [B, S]: the one that the logits at each position are scored against; IGNORED at the last position."""
    return np.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED)


def token_losses(logits: Array, targets: Int64s) -> Array:
    """Of each line of logits [N, V] with a target [N]: its loss in nats, [scored]; IGNORED lines are left out."""
    scored = targets != IGNORED
    return negative_log_likelihood(logits[scored], targets[scored])


def causal_loss(logits: Array, labels: Int64s) -> float:
    """Mean loss of logits [B, S, V] with labels [B, S], which are the input ids or IGNORED; nan where none counts."""
    losses = token_losses(logits.reshape(-1, logits.shape[-1]), shifted_labels(labels).reshape(-1))
    return float(losses.mean()) if losses.size else float("nan")
