"""Infer: where config.json lacks a key, a tensor's shape decides before the key's default does.

A value that config.json does write is never changed here: where a shape contradicts it, plan_weights refuses it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import Any

from deepseek_trt.export.bundle.interface import CLASSIFICATION, FEATURES, GENERATION
from deepseek_trt.export.bundle.recipes import LM_HEAD
from deepseek_trt.export.config.keys import ALIASES
from deepseek_trt.export.config.model_config import ModelConfig
from deepseek_trt.export.errors import ConfigError
from deepseek_trt.export.reading.checkpoint import Checkpoint
from deepseek_trt.export.reading.classifier import SCORE

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


def config_of_tensors(
    config: ModelConfig, checkpoint: Checkpoint, written: Collection[str] = ()
) -> tuple[ModelConfig, tuple[str, ...]]:
    """The config as the tensors show it, and one sentence for each value that was changed.

    `written` are config.json's keys. Raises ConfigError when there are experts and config.json does not say how many of
    them a token takes.
    """
    tensors = _Tensors(checkpoint)
    found = {name: value for name, value in tensors.facts(config, written).items() if name not in written}
    # q_proj or q_a and q_b: the tensors decide whatever is written
    if "model.layers.0.self_attn.q_proj.weight" in tensors.shapes:
        found["q_lora_rank"] = None
    changes = {name: value for name, value in found.items() if value != getattr(config, name)}
    notes = tuple(_note(name, getattr(config, name), value, written) for name, value in changes.items())
    config = dataclasses.replace(config, **changes)
    if tensors.moe_layers and not config.num_experts_per_tok and "num_experts_per_tok" not in written:
        raise ConfigError("config.json lacks num_experts_per_tok, and the checkpoint holds experts: add the number")
    return config, notes


def task_of(raw: Mapping[str, Any], checkpoint: Checkpoint) -> str:
    """The task that a checkpoint is of: by its heads, and by its class where it has none and ties nothing."""
    if LM_HEAD in checkpoint.tensors or raw.get("tie_word_embeddings"):
        return GENERATION
    if SCORE in checkpoint.tensors:
        return CLASSIFICATION
    classes = raw.get("architectures") or ()
    return FEATURES if classes and not any(name.endswith("ForCausalLM") for name in classes) else GENERATION


def written_keys(raw: Mapping[str, Any], task: str) -> set[str]:
    """config.json's keys, and those that the tensors of this task say nothing of."""
    keys = {*raw, *(ALIASES[name] for name in raw if name in ALIASES)}
    return keys if task == GENERATION else {*keys, "tie_word_embeddings"}


def _note(name: str, old: Any, new: Any, written: Collection[str]) -> str:
    if name == "q_lora_rank" and new is None:
        return f"q_lora_rank {old} is ignored: the checkpoint holds q_proj, not q_a_proj and q_b_proj"
    assert name not in written
    return f"{name} is {new}, as the tensors show; config.json does not say it, and its default is {old}"


class _Tensors:
    """Sizes read off the shapes of the published names."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.shapes: Mapping[str, tuple[int, ...]] = {name: t.shape for name, t in checkpoint.tensors.items()}
        self.by_layer: dict[int, set[str]] = {}
        for name in self.shapes:
            match = _LAYER.match(name)
            if match:
                self.by_layer.setdefault(int(match[1]), set()).add(match[2])
        # multi-token prediction hides behind the last layer
        self.layers = sorted(i for i, names in self.by_layer.items() if "eh_proj.weight" not in names)
        self.moe_layers = [i for i in self.layers if "mlp.gate.weight" in self.by_layer[i]]

    def facts(self, config: ModelConfig, written: Collection[str]) -> dict[str, Any]:
        """Every value that the tensors fix, by the name of the config's field."""
        attention = "model.layers.0.self_attn"
        dense = next((i for i in self.layers if i not in self.moe_layers), None)
        found = {
            "vocab_size": self.size("model.embed_tokens.weight", 0),
            "hidden_size": self.size("model.embed_tokens.weight", 1),
            "num_hidden_layers": len(self.layers) or None,
            "q_lora_rank": self.size(f"{attention}.q_a_proj.weight", 0),
            "kv_lora_rank": self.size(f"{attention}.kv_a_layernorm.weight", 0),
            "intermediate_size": self.size(f"model.layers.{dense}.mlp.gate_proj.weight", 0),
            "attention_bias": f"{attention}.o_proj.bias" in self.shapes,
            "mlp_bias": any(name.endswith("_proj.bias") and ".mlp." in name for name in self.shapes),
            "tie_word_embeddings": config.tie_word_embeddings or LM_HEAD not in self.shapes,  # tied: may carry a copy
            **self.head_sizes(config, written),
            **(self.moe_sizes() if self.moe_layers else {}),
        }
        return {name: value for name, value in found.items() if value is not None}

    def head_sizes(self, config: ModelConfig, written: Collection[str]) -> dict[str, int]:
        """Heads and widths of a head; where too little is written, the written or default widths decide the heads."""
        at = "model.layers.0.self_attn"
        values, expanded = self.size(f"{at}.o_proj.weight", 1), self.size(f"{at}.kv_b_proj.weight", 0)
        latent, rank = self.size(f"{at}.kv_a_proj_with_mqa.weight", 0), self.size(f"{at}.kv_a_layernorm.weight", 0)
        if values is None or expanded is None or latent is None or rank is None:
            return {}
        heads, value = config.num_attention_heads, config.v_head_dim
        if "num_attention_heads" not in written:
            heads = max(values // value, 1)
        if "v_head_dim" not in written:
            value = values // heads
        return {
            "num_attention_heads": heads,
            "v_head_dim": value,
            "qk_nope_head_dim": expanded // heads - value,
            "qk_rope_head_dim": latent - rank,
        }

    def moe_sizes(self) -> dict[str, int | None]:
        first = self.moe_layers[0]
        at = f"model.layers.{first}.mlp"
        stacked = self.size(f"{at}.experts.down_proj", 2)
        inner = stacked or self.size(f"{at}.experts.0.gate_proj.weight", 0)
        shared = self.size(f"{at}.shared_experts.gate_proj.weight", 0)
        step = self.moe_layers[1] - first if len(self.moe_layers) > 1 else 1
        return {
            "n_routed_experts": self.size(f"{at}.gate.weight", 0),
            "moe_intermediate_size": inner,
            "n_shared_experts": (shared or 0) // inner if inner else None,
            "first_k_dense_replace": first,
            "moe_layer_freq": step,
        }

    def size(self, name: str, axis: int) -> int | None:
        shape = self.shapes.get(name)
        return shape[axis] if shape is not None and axis < len(shape) else None
