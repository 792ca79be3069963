"""What the custom ops' GPU kernels do not compute: known here, so that it is said before anything is built."""

from __future__ import annotations

from deepseek_trt.export.config.model_config import ModelConfig

TENSORRT_MOST_NUMBERS = 2**31 - 1  # of one tensor: TensorRT counts them in 31 bits


def without_kernel(config: ModelConfig) -> str:
    """What of the model has no kernel, and so no engine; empty where all has."""
    if not (config.n_routed_experts and config.num_experts_per_tok):
        return ""
    if config.hidden_act != "silu":
        return f"hidden_act is {config.hidden_act!r}; MoeExperts' kernels know silu only"
    return ""
