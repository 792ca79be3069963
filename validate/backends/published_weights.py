"""The checkpoint's tensors under the torch model's names, read with the safetensors library.

Nothing of the export's own reading is used: not its recipes, nor its reader, nor what it found in the folder, nor what
it wrote. A tensor that the export took from the wrong file or place, stacked in the wrong order or cut in the wrong row
differs from the one given here.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.bundle.recipes import CORRECTION_BIAS, SCALE_SUFFIX
from deepseek_trt.export.bundle.weights import unchanged_checkpoint
from deepseek_trt.export.config.model_config import FP8_BLOCK, ModelConfig, read_config
from deepseek_trt.export.errors import BundleError, CheckpointError, RequestError
from deepseek_trt.export.reading.checkpoint import Checkpoint
from deepseek_trt.export.reading.infer import config_of_tensors
from deepseek_trt.export.writing.weight_plan import plan_weights

_HALVES = ("w_uk", "w_uv")  # of each head's rows in kv_b_proj
_EXPERTS = ("experts.gate_proj", "experts.up_proj", "experts.down_proj")


@dataclass(frozen=True)
class PublishedWeights:
    """Call it with a parameter's name; it holds no tensor itself.

    `files` says where each tensor lies, `renamed` what it is called there if otherwise. Tensors are float32, rounded to
    `dtype` (the bundle's) first, as every export rounds them; the correction bias is kept as it is.
    """

    root: Path
    files: dict[str, Path]
    config: ModelConfig
    dtype: str
    renamed: dict[str, str] = field(default_factory=dict)

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
        return self._rounded(name)

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
        if name not in self.files:
            raise CheckpointError(f"{self.root} holds no {name} where transformers looks: the bundle is of other files")
        with safe_open(str(self.files[name]), framework="pt") as file:
            tensor: Tensor = file.get_tensor(self.renamed.get(name, name))
            return tensor.clone()


def published_weights(bundle: Bundle, checkpoint: Path | None) -> PublishedWeights | None:
    """Those of the folder `checkpoint`, or of the one that the bundle was exported from; None where that one is gone.

    Raises RequestError where `checkpoint` holds another model than the bundle, CheckpointError where it is incomplete.
    """
    root = checkpoint or _recorded(bundle)
    if root is None:
        return None
    if checkpoint is not None:
        _check_same_model(bundle, Checkpoint.open(root))
    found = _files(root)
    names = _full_names(found)
    files = {name: found[stored] for name, stored in names.items()}
    return PublishedWeights(root, files, bundle.manifest.model, bundle.manifest.dtype, names)


def _files(root: Path) -> dict[str, Path]:
    """The file of each tensor, by transformers' rule: one file of the usual name comes before an index."""
    index, single = root / "model.safetensors.index.json", root / "model.safetensors"
    if index.is_file() and not single.is_file():
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: root / file for name, file in weight_map.items()}
    one = single if single.is_file() else next(iter(sorted(root.glob("*.safetensors"))), None)
    if one is None:
        raise CheckpointError(f"{root} holds no safetensors files: download them")
    with safe_open(str(one), framework="pt") as file:
        return dict.fromkeys(file.keys(), one)


def _full_names(files: dict[str, Path]) -> dict[str, str]:
    """What each tensor is called in its file; models saved without their head lack the "model." of the full names."""
    is_bare = any(name.startswith("layers.") for name in files)
    bare = ("layers.", "embed_tokens.", "norm.")
    return {f"model.{name}" if is_bare and name.startswith(bare) else name: name for name in files}


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
