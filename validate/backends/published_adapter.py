"""PublishedAdapter: a LoRA adapter of peft merged in torch, with nothing of the export's own merging."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from deepseek_trt.validate.backends.published_files import published_name

_FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?")


@dataclass(frozen=True)
class PublishedAdapter:
    """`factors` are the names of A and B in `file` by the weight's published name, `whole` those of whole weights."""

    file: Path
    settings: dict[str, Any]
    factors: dict[str, dict[str, str]]
    whole: dict[str, str]

    @classmethod
    def open(cls, root: Path) -> PublishedAdapter:
        """Read the names of the adapter's tensors."""
        file, whole = root / "adapter_model.safetensors", {}
        factors: dict[str, dict[str, str]] = {}
        with safe_open(str(file), framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                if match := _FACTOR.fullmatch(name):
                    factors.setdefault(published_name(f"{match[1]}.weight"), {})[match[2]] = name
                else:
                    whole[published_name(name.replace(".base_layer.", "."))] = name
        return cls(file, json.loads((root / "adapter_config.json").read_text(encoding="utf-8")), factors, whole)

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """W + scale * B A in double precision, as float32."""
        if name not in self.factors:
            return weight
        a, b = (self.tensor(self.factors[name][half]).double() for half in "AB")
        product = b @ a * self._scale(self.factors[name]["A"], a.shape[0])
        if "lora_embedding" in self.factors[name]["A"]:
            product = product.T
        return (weight.double() + product).float()

    def tensor(self, name: str) -> Tensor:
        """A tensor by its name in the file."""
        with safe_open(str(self.file), framework="pt") as opened:
            found: Tensor = opened.get_tensor(name)
            return found.clone()

    def _scale(self, name: str, rank: int) -> float:
        match = _FACTOR.fullmatch(name)
        assert match is not None
        alpha = self.settings.get("lora_alpha", 8)
        for pattern, number in (self.settings.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", match[1]):
                alpha = number
                break
        return float(alpha / (rank**0.5 if self.settings.get("use_rslora") else rank))
