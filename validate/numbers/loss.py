"""Cross-entropy of next tokens, by transformers' rules: labels are the tokens that follow, and -100 is left out.

In float64 over float32 logits; transformers upcasts to float32 (transformers.loss.loss_utils.ForCausalLMLoss).
"""

from __future__ import annotations

from deepseek_trt.export.arrays import Array, Int64s
from deepseek_trt.validate.numbers.metrics import negative_log_likelihood

IGNORED = -100  # a label that is not scored


def token_losses(logits: Array, targets: Int64s) -> Array:
    """The loss in nats of each line of logits [N, V] with its target [N]; IGNORED lines are left out: [scored]."""
    scored = targets != IGNORED
    return negative_log_likelihood(logits[scored], targets[scored])
