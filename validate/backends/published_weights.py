"""The checkpoint's tensors under the torch model's names, read with the safetensors library.

Nothing of the export's own reading is used: not its recipes, nor its reader, nor what it found in the folder, nor what
it wrote. A tensor that the export took from the wrong file or place, stacked in the wrong order or cut in the wrong row
differs from the one given here.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from deepseek_trt.export.bundle.folder import AdapterRecord, Bundle
from deepseek_trt.export.bundle.recipes import CORRECTION_BIAS, SCALE_SUFFIX
from deepseek_trt.export.bundle.weights import unchanged_checkpoint
from deepseek_trt.export.config.model_config import FP8_BLOCK, ModelConfig, read_config
from deepseek_trt.export.errors import BundleError, CheckpointError, RequestError
from deepseek_trt.export.files import file_sha256
from deepseek_trt.export.packed.methods import packed_settings
from deepseek_trt.export.packed.opening import open_checkpoint
from deepseek_trt.export.reading.infer import config_of_tensors
from deepseek_trt.export.writing.weight_plan import plan_weights
from deepseek_trt.validate.backends.published_adapter import PublishedAdapter
from deepseek_trt.validate.backends.published_files import Place, published_files
from deepseek_trt.validate.backends.published_packed import PublishedPacked

_HALVES = ("w_uk", "w_uv")  # of each head's rows in kv_b_proj
_ROTATED = {"q_proj", "q_b_proj", "kv_a_proj_with_mqa"}
_EXPERTS = ("experts.gate_proj", "experts.up_proj", "experts.down_proj")


@dataclass(frozen=True)
class PublishedWeights:
    """Call it with a parameter's name; it holds no tensor itself.

    Tensors are float32, rounded to `dtype` (the bundle's) first, as every export rounds them; the correction bias is
    kept as it is, and parameters that are `exact`: what the bundle takes as codes of a packed checkpoint.
    `interleaved` is config.json's rope_interleave: the torch model rotates adjacent pairs always.
    """

    root: Path
    places: dict[str, Place]
    config: ModelConfig
    dtype: str
    interleaved: bool = True
    adapter: PublishedAdapter | None = None
    packed: PublishedPacked | None = None
    exact: frozenset[str] = frozenset()

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the tensors."""
        return tuple(sorted({place.file for place in self.places.values()}))

    @property
    def note(self) -> str:
        """What they are, for a report."""
        merged = f" with the adapter in {self.adapter.file.parent} merged" if self.adapter else ""
        return f"the weights of {self.root}{merged}, rounded to {self.dtype} as export rounds them"

    def unrounded(self, name: str) -> Tensor:
        """The parameter in float32, as it is published: what narrow weights are made of."""
        return dataclasses.replace(self, dtype="float32", exact=frozenset())(name)

    def __call__(self, name: str) -> Tensor:
        if name in self.exact:
            return self.unrounded(name)
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
        if f"{base}.gate_up_proj" in self.places:
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
        if self.adapter is not None:
            stored = self.adapter.merged(name, stored)
        return stored.to(getattr(torch, self.dtype)).float()

    def _stored(self, name: str) -> Tensor:
        """As it is published, or as the adapter holds it whole; fp8 multiplied by its block scales."""
        if self.adapter is not None and name in self.adapter.whole:
            return self.adapter.tensor(self.adapter.whole[name])
        if self.packed is not None and self.packed.has(name):
            return self.packed.numbers(name, self._read)
        stored = self._read(name)
        if f"{name}{SCALE_SUFFIX}" not in self.places:
            return stored
        rows, columns = stored.shape
        scales = self._read(f"{name}{SCALE_SUFFIX}").float().repeat_interleave(FP8_BLOCK, 0)[:rows]
        return stored.float() * scales.repeat_interleave(FP8_BLOCK, 1)[:, :columns]

    def _read(self, name: str) -> Tensor:
        """A copy: a file that stays mapped counts as memory."""
        place = self.places.get(name)
        if place is None:
            raise CheckpointError(f"{self.root} holds no {name} where transformers looks: the bundle is of other files")
        with safe_open(str(place.file), framework="pt") as file:
            tensor: Tensor = file.get_tensor(place.name)
            return tensor.clone()


def published_weights(bundle: Bundle, checkpoint: Path | None) -> PublishedWeights | None:
    """Those of the folder `checkpoint`, or of the one that the bundle was exported from; None where that one is gone.

    Raises RequestError where `checkpoint` holds another model than the bundle, CheckpointError where it is incomplete.
    """
    root = checkpoint or _recorded(bundle)
    if root is None:
        return None
    if checkpoint is not None:
        _check_same_model(bundle, checkpoint)
    merged = bundle.manifest.adapter
    if merged is not None and not _is_unchanged(merged):
        if checkpoint is None:
            return None
        raise RequestError(f"--checkpoint {checkpoint}: the merged adapter {merged.path} is gone or has changed")
    adapter = PublishedAdapter.open(Path(merged.path), bundle.manifest.model.n_routed_experts) if merged else None
    raw = json.loads((root / "config.json").read_text(encoding="utf-8"))  # its own reading
    interleaved = raw.get("rope_interleave", True)
    manifest, places = bundle.manifest, published_files(root)
    packed = PublishedPacked.of(root, places)
    taken = manifest.weights if manifest.quantization and manifest.quantization.is_packed else ()
    exact = frozenset(weight.recipe.name for weight in taken if weight.recipe.narrow is not None)
    return PublishedWeights(root, places, manifest.model, manifest.dtype, interleaved, adapter, packed, exact)


def _recorded(bundle: Bundle) -> Path | None:
    try:
        return unchanged_checkpoint(bundle)
    except BundleError:
        return None


def _is_unchanged(adapter: AdapterRecord) -> bool:
    files = {name: Path(adapter.path) / name for name in adapter.files}
    return all(file.is_file() and file_sha256(file) == adapter.files[name] for name, file in files.items())


def _check_same_model(bundle: Bundle, root: Path) -> None:
    """Config and shapes; whether the numbers are the same is what validation finds out."""
    raw = read_config(root / "config.json")
    written = ModelConfig.from_hf(raw)
    checkpoint = open_checkpoint(root, packed_settings(raw))
    declared, _ = config_of_tensors(written, checkpoint, raw.keys())
    config = dataclasses.replace(declared, num_hidden_layers=bundle.manifest.model.num_hidden_layers)
    if config != bundle.manifest.model:
        fields = [f.name for f in dataclasses.fields(config)]
        name = next(n for n in fields if getattr(config, n) != getattr(bundle.manifest.model, n))
        raise RequestError(
            f"--checkpoint {checkpoint.root} holds another model than the bundle ({name}: {getattr(config, name)!r}, "
            f"the bundle has {getattr(bundle.manifest.model, name)!r}): give the one that was exported"
        )
    plan_weights(config, checkpoint, declared.num_hidden_layers)
