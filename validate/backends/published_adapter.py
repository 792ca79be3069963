"""PublishedAdapter: a LoRA adapter of peft merged in torch, with nothing of the export's own merging."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from deepseek_trt.validate.backends.published_files import published_name

_FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?")

_EXPERT = re.compile(r"(.+\.experts)\.(?:(\d+)\.)?(gate_proj|up_proj|down_proj|gate_up_proj)(?:\.weight)?")


@dataclass(frozen=True)
class PublishedAdapter:
    """`factors` are the names of A and B in `file` by the weight's published name, `whole` those of whole weights."""

    file: Path
    settings: dict[str, Any]
    factors: dict[str, dict[str, str]]
    whole: dict[str, str]
    experts: int

    @classmethod
    def open(cls, root: Path, experts: int) -> PublishedAdapter:
        """Read the names of the adapter's tensors; `experts` is the number of them in a layer."""
        file, whole = root / "adapter_model.safetensors", {}
        factors: dict[str, dict[str, str]] = {}
        with safe_open(str(file), framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                if match := _FACTOR.fullmatch(name):
                    factors.setdefault(published_name(f"{match[1]}.weight"), {})[match[2]] = name
                else:
                    whole[published_name(name.replace(".base_layer.", "."))] = name
        settings = json.loads((root / "adapter_config.json").read_text(encoding="utf-8"))
        return cls(file, settings, factors, whole, experts)

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """W + scale * B A in double precision, as float32."""
        expert = _EXPERT.fullmatch(name)
        added = None
        if name in self.factors:
            added = self._product(name)
        elif expert is not None:
            added = self._product_of_experts(expert[1], expert[2], expert[3], weight)
        return weight if added is None else (weight.double() + added).float()

    def _product(self, name: str) -> Tensor:
        names = self.factors[name]
        a, b = (self.tensor(names[half]).double() for half in "AB")
        module = _module(names["A"])
        product = b @ a * self._scale((module, f"{module}.weight"), a.shape[0])
        return product.T if "lora_embedding" in names["A"] else product

    def _product_of_experts(self, at: str, expert: str | None, projection: str, weight: Tensor) -> Tensor | None:
        """That of one expert's projection, or of all experts where they are stacked; None where there is none."""
        rows, columns = weight.shape[-2:]
        out = 2 * rows if projection in ("gate_proj", "up_proj") else rows
        for names in (self.factors.get(f"{at}{ending}") for ending in (".weight", ".base_layer.weight")):
            if names is None:
                continue
            a, b = (self.tensor(names[half]).double() for half in "AB")
            if (a.shape[1], b.shape[0]) != (columns, out):  # the layer's other pair
                continue
            a, b = a.view(self.experts, -1, columns), b.view(out, -1, self.experts)
            parameter = "down_proj" if projection == "down_proj" else "gate_up_proj"
            scale = self._scale((f"{_module(names['A']).removesuffix('.base_layer')}.{parameter}",), a.shape[1])
            if expert is None:
                return torch.einsum("ore,eri->eoi", b, a) * scale
            product = b[:, :, int(expert)] @ a[int(expert)] * scale
            return {"gate_proj": product[:rows], "up_proj": product[-rows:]}.get(projection, product)
        return None

    def tensor(self, name: str) -> Tensor:
        """A tensor by its name in the file."""
        with safe_open(str(self.file), framework="pt") as opened:
            found: Tensor = opened.get_tensor(name)
            return found.clone()

    def _scale(self, keys: tuple[str, ...], rank: int) -> float:
        alpha = self.settings.get("lora_alpha", 8)
        for pattern, number in (self.settings.get("alpha_pattern") or {}).items():
            if any(re.match(rf"(.*\.)?({pattern})$", key) for key in keys):
                alpha = number
                break
        return float(alpha / (rank**0.5 if self.settings.get("use_rslora") else rank))


def _module(name: str) -> str:
    match = _FACTOR.fullmatch(name)
    assert match is not None
    return match[1]
