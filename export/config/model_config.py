"""ModelConfig: what config.json says, translated once into one spelling.

keys.py lists the keys. Their meaning, and their defaults when config.json lacks them, are the original DeepSeek
model's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek_trt.export.config.family import DTYPES as DTYPES
from deepseek_trt.export.config.family import shape_of
from deepseek_trt.export.config.findings import config_notes as config_notes
from deepseek_trt.export.config.findings import unsupported_features as unsupported_features
from deepseek_trt.export.config.quantization import FP8_BLOCK as FP8_BLOCK
from deepseek_trt.export.config.shape import ModelShape
from deepseek_trt.export.errors import ConfigError
from deepseek_trt.export.json_file import read_object


def read_config(path: Path) -> dict[str, Any]:
    """config.json as it is; ConfigError when there is none, or when it is not a JSON object of sane size and depth."""
    try:
        return read_object(path, nan=True)
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing: give a folder with config.json and *.safetensors") from None


@dataclass(frozen=True)
class ModelConfig(ModelShape):
    """A DeepSeek model's sizes and switches. Defaults are those of an absent key."""

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> ModelConfig:
        """Translate a config.json of transformers or of the original model code, whatever its spelling.

        Raises ConfigError naming the key, its value and what is supported.
        """
        refusals = unsupported_features(raw)
        if refusals:
            raise ConfigError(refusals[0])
        config = cls(**shape_of(raw))
        config.check()
        return config
