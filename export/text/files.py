"""The files beside the weights that make text of token ids, by name, and how their JSON is read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deepseek_trt.export import json_file
from deepseek_trt.export.errors import ConfigError

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
GENERATION_CONFIG = "generation_config.json"
# A bundle and a served model hold those that the checkpoint has, as they came.
CARRIED = (
    TOKENIZER,
    TOKENIZER_CONFIG,
    SPECIAL_TOKENS_MAP,
    ADDED_TOKENS,
    "chat_template.jinja",
    "chat_template.json",
    GENERATION_CONFIG,
)
TEMPLATES_FOLDER = "additional_chat_templates"  # one *.jinja a template


def text_files(folder: Path) -> Iterator[Path]:
    """Yield what `folder` has under the names of text files, whatever it is."""
    yield from (folder / name for name in CARRIED if os.path.lexists(folder / name))
    yield from sorted((folder / TEMPLATES_FOLDER).glob("*.jinja"))


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in the file, {} where there is no file; ConfigError for anything else."""
    try:
        return json_file.read_object(path)
    except FileNotFoundError:
        return {}


def wrong_value(path: Path, key: str, value: object, mend: str) -> ConfigError:
    """The error for a value of the wrong type, a long one cut."""
    shown = repr(value)
    return ConfigError(f"{path}: {key} {shown if len(shown) <= 80 else shown[:77] + '...'}: {mend}")
