"""TorchPart: one part of the model in plain torch, with its weights alone in memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek_trt.engines.sessions.torch import Weights
from deepseek_trt.export.arrays import Array, Arrays
from deepseek_trt.export.config.model_config import ModelConfig
from deepseek_trt.export.model import Layer, Pools, RmsNorm, Rope
from deepseek_trt.validate.backends.torch_watch import OpWatch, Route, array_of
from deepseek_trt.validate.steps import Part, Step

EMBEDDING = "model.embed_tokens.weight"


def own_choice(layer: int, router: object, logits: Tensor, own: Any) -> Any:
    """Leave the router's outputs as they are."""
    return own


class TorchPart:
    """Computes in `dtype`, which is that of the tensors `weights` gives.

    run() takes one step, the states [B * S, hidden] that enter the part (None for the embedding) and the layer's page
    pool; it gives values by probe name, "present" (the new pool) of a layer, "logits" of the head.
    """

    def __init__(self, config: ModelConfig, part: Part, weights: Weights, dtype: str, all_logits: bool) -> None:
        self.dtype = dtype
        self._config, self._part, self._all_logits = config, part, all_logits
        self._dtype = getattr(torch, dtype)
        if part.is_layer:
            with torch.device("meta"):
                self._layer = Layer(config, part.index)
            self._rope = Rope(config)
            _load(self._layer, f"model.layers.{part.index}.", weights)
        elif part.is_embedding:
            self._rows = weights(EMBEDDING)
        else:
            self._norm = RmsNorm(config.hidden_size, config.rms_norm_eps)
            _load(self._norm, "model.norm.", weights)
            self._rows = weights(EMBEDDING if config.tie_word_embeddings else "lm_head.weight")

    @torch.inference_mode()
    def run(self, step: Step, hidden: Array | None, pool: Array | None, route: Route = own_choice) -> Arrays:
        if hidden is None:
            values = {"hidden.0": F.embedding(torch.from_numpy(step.input_ids), self._rows).flatten(0, 1)}
        elif pool is None:
            values = {"logits": self._logits(step, torch.from_numpy(hidden).to(self._dtype))}
        else:
            x, past = (torch.from_numpy(array).to(self._dtype) for array in (hidden, pool))
            values = self._run_layer(step, x, past, route)
        return {name: array_of(value) for name, value in values.items()}

    def _run_layer(self, step: Step, x: Tensor, past: Tensor, route: Route) -> dict[str, Tensor]:
        layer, index = self._layer, self._part.index
        seen: dict[str, Tensor] = {}
        with OpWatch(seen.__setitem__, route, index):
            h, present = self._attend(step, layer.input_layernorm(x), past)
            assert isinstance(present, Tensor)
            seen[f"after_attention.{index}"] = x = x + h
            seen[f"hidden.{index + 1}"] = x + layer.mlp(layer.post_attention_layernorm(x))
        return {**seen, "present": present}

    def _attend(self, step: Step, x: Tensor, past: Tensor) -> tuple[Tensor, Pools]:
        table, past_lengths = torch.from_numpy(step.page_table), torch.from_numpy(step.past_lengths)
        lengths = torch.from_numpy(step.sequence_lengths)
        positions = past_lengths.unsqueeze(1) + torch.arange(step.input_ids.shape[1])  # [B, S]
        decodes, attention = step.graph == "decode", self._layer.self_attn
        cos, sin = self._rope(positions, positions + 1 if decodes else (past_lengths + lengths).unsqueeze(1))
        run = attention.decode if decodes else attention.prefill
        return run(x, cos, sin, past, table, past_lengths, lengths)

    def _logits(self, step: Step, x: Tensor) -> Tensor:
        """[B, vocab] of each row's last token, or [B, S, vocab]; in float32."""
        x = x.view(*step.input_ids.shape, -1)
        if not (self._all_logits or step.graph == "decode"):
            last = torch.from_numpy(step.sequence_lengths).long().sub(1).clamp(min=0)  # [B]
            x = x[torch.arange(len(x)), last]
        return F.linear(self._norm(x), self._rows).float()


def _load(module: nn.Module, prefix: str, weights: Weights) -> None:
    for name, _ in list(module.named_parameters()):
        module.load_state_dict({name: weights(prefix + name)}, strict=False, assign=True)
