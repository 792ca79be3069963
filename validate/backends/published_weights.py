"""The checkpoint's tensors under the torch model's names, read with the safetensors library.

Nothing of the export's own reading is used: not its recipes, nor its reader, nor what it wrote. A tensor that the
export took from the wrong place, stacked in the wrong order or cut in the wrong row differs from the one given here.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.bundle.recipes import CORRECTION_BIAS, SCALE_SUFFIX
from deepseek_trt.export.bundle.weights import unchanged_checkpoint
from deepseek_trt.export.config.model_config import FP8_BLOCK, ModelConfig, read_config
from deepseek_trt.export.errors import BundleError, RequestError
from deepseek_trt.export.reading.checkpoint import Checkpoint
from deepseek_trt.export.reading.infer import config_of_tensors
from deepseek_trt.export.writing.weight_plan import plan_weights

_HALVES = ("w_uk", "w_uv")  # of each head's rows in kv_b_proj
_ROTATED = {"q_proj", "q_b_proj", "kv_a_proj_with_mqa"}
_EXPERTS = ("experts.gate_proj", "experts.up_proj", "experts.down_proj")


@dataclass(frozen=True)
class PublishedWeights:
    """Call it with a parameter's name; it holds no tensor itself.

    Tensors are float32, rounded to `dtype` (the bundle's) first, as every export rounds them; the correction bias is
    kept as it is. `interleaved` is config.json's rope_interleave: the torch model rotates adjacent pairs always.
    """

    root: Path
    files: dict[str, Path]
    config: ModelConfig
    dtype: str
    interleaved: bool = True

    @property
    def note(self) -> str:
        """What they are, for a report."""
        return f"the weights of {self.root}, rounded to {self.dtype} as export rounds them"

    def __call__(self, name: str) -> Tensor:
        base, _, last = name.rpartition(".")
        if last in _HALVES:
            return self._half(f"{base}.kv_b_proj.weight", last)
        if name.endswith(_EXPERTS):
            return self._experts(base, last)
        tensor = self._rounded(name)
        return tensor if self.interleaved or not _ROTATED & set(name.split(".")) else self._in_pairs(name, tensor)

    def _in_pairs(self, name: str, tensor: Tensor) -> Tensor:
        """Let rows i and i + R/2 of each head's rotated part lie side by side; the keys have one head."""
        rope, heads = self.config.qk_rope_head_dim, self.config.num_attention_heads
        heads = 1 if "kv_a_proj_with_mqa" in name else heads
        rows = tensor.view(heads, len(tensor) // heads, -1).clone()  # [heads, rows, columns]
        first, second = rows[:, -rope:].clone().chunk(2, dim=1)
        rows[:, -rope:] = torch.stack([first, second], dim=2).flatten(1, 2)
        return rows.view(tensor.shape)

    def _half(self, source: str, half: str) -> Tensor:
        """[H, N, L] or [H, V, L] of kv_b_proj [H * (N + V), L]."""
        c = self.config
        both = self._rounded(source).view(c.num_attention_heads, -1, c.kv_lora_rank)
        rows = slice(c.qk_nope_head_dim) if half == "w_uk" else slice(c.qk_nope_head_dim, None)
        return both[:, rows].contiguous()

    def _experts(self, base: str, name: str) -> Tensor:
        """Stacked [E, rows, columns], one expert in memory beside them."""
        c = self.config
        if f"{base}.gate_up_proj" in self.files:
            stored = self._rounded(f"{base}.{name if name == 'down_proj' else 'gate_up_proj'}")
            parts = {"down_proj": stored, **dict(zip(("gate_proj", "up_proj"), stored.chunk(2, dim=1), strict=True))}
            return parts[name].contiguous()
        inner, hidden = c.moe_intermediate_size, c.hidden_size
        shape = (hidden, inner) if name == "down_proj" else (inner, hidden)
        stacked = torch.empty(c.n_routed_experts, *shape)
        for expert in range(c.n_routed_experts):
            stacked[expert] = self._rounded(f"{base}.{expert}.{name}.weight")
        return stacked

    def _rounded(self, name: str) -> Tensor:
        stored = self._stored(name)
        if name.endswith(CORRECTION_BIAS):
            return stored.float()
        if f"{name}{SCALE_SUFFIX}" in self.files:
            rows, columns = stored.shape
            scales = self._stored(f"{name}{SCALE_SUFFIX}").float().repeat_interleave(FP8_BLOCK, 0)[:rows]
            stored = stored.float() * scales.repeat_interleave(FP8_BLOCK, 1)[:, :columns]
        return stored.to(getattr(torch, self.dtype)).float()

    def _stored(self, name: str) -> Tensor:
        """A copy: a file that stays mapped counts as memory."""
        with safe_open(str(self.files[name]), framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor.clone()


def published_weights(bundle: Bundle, checkpoint: Path | None) -> PublishedWeights | None:
    """Those of the folder `checkpoint`, or of the one that the bundle was exported from; None where that one is gone.

    Raises RequestError where `checkpoint` holds another model than the bundle, CheckpointError where it is incomplete.
    """
    root = checkpoint or _recorded(bundle)
    if root is None:
        return None
    found = Checkpoint.open(root)
    if checkpoint is not None:
        _check_same_model(bundle, found)
    files = {name: tensor.file for name, tensor in found.tensors.items()}
    raw = json.loads((root / "config.json").read_text(encoding="utf-8"))  # its own reading
    interleaved = raw.get("rope_interleave", True)
    return PublishedWeights(root, files, bundle.manifest.model, bundle.manifest.dtype, interleaved)


def _recorded(bundle: Bundle) -> Path | None:
    try:
        return unchanged_checkpoint(bundle)
    except BundleError:
        return None


def _check_same_model(bundle: Bundle, checkpoint: Checkpoint) -> None:
    """Config and shapes; whether the numbers are the same is what validation finds out."""
    raw = read_config(checkpoint.root / "config.json")
    declared, _ = config_of_tensors(ModelConfig.from_hf(raw), checkpoint, raw.keys())
    config = dataclasses.replace(declared, num_hidden_layers=bundle.manifest.model.num_hidden_layers)
    if config != bundle.manifest.model:
        fields = [f.name for f in dataclasses.fields(config)]
        name = next(n for n in fields if getattr(config, n) != getattr(bundle.manifest.model, n))
        raise RequestError(
            f"--checkpoint {checkpoint.root} holds another model than the bundle ({name}: {getattr(config, name)!r}, "
            f"the bundle has {getattr(bundle.manifest.model, name)!r}): give the one that was exported"
        )
    plan_weights(config, checkpoint, declared.num_hidden_layers)
