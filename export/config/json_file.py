"""config.json as a JSON object, or one sentence on why it is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deepseek_trt.export.config.values import shown
from deepseek_trt.export.errors import ConfigError

_MAX_BYTES = 16 * 2**20  # the published ones have 2,000
_MAX_DEPTH = 32


def read_config(path: Path) -> dict[str, Any]:
    """config.json as it is; ConfigError when there is none, or when it is not a JSON object of sane size and depth."""
    text = _text(path)
    try:
        raw = json.loads(text, object_pairs_hook=_object)
    except ValueError as error:  # JSON, and whole numbers of more digits than Python reads
        raise ConfigError(f"{path} is not JSON ({error}); download it again") from None
    except RecursionError:
        raise ConfigError(f"{path} is nested too deeply to be a config.json; download it again") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} does not hold an object; download it again")
    if _depth(raw) > _MAX_DEPTH:
        raise ConfigError(f"{path} is nested deeper than {_MAX_DEPTH} levels; download it again")
    return raw


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"{path} is larger than {_MAX_BYTES} bytes: this is no config.json; download it again")
        data = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing: give a folder with config.json and *.safetensors") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); give a folder with config.json") from None
    if data.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise ConfigError(f"{path} begins with a byte order mark: save it as UTF-8 without one")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not JSON in UTF-8 ({error}); save it as UTF-8, or download it again") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of two values for one key nobody knows which is meant."""
    made: dict[str, Any] = {}
    for key, value in pairs:
        if key in made:
            raise ConfigError(f"config.json has the key {shown(key)} twice in one object: remove one of them")
        made[key] = value
    return made


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level:
        depth += 1
        inner = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, (dict, list))]
        level = [item for items in inner for item in items]
    return depth
