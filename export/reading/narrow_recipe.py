"""What --quantize names: a preset, or a JSON file with a list of rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deepseek_trt.export.bundle.narrow import ABSMAX, GROUP, LEAST_SQUARES, PRESETS, PUBLISHED, Quantization, Rule
from deepseek_trt.export.errors import ConfigError
from deepseek_trt.export.files import read_file
from deepseek_trt.export.json_file import value_of
from deepseek_trt.export.text.wording import shown
from deepseek_trt.export.trust.typed import typed

_MOST = 2**20  # bytes of a file
_MEND = "a rule is an object of pattern, format, group and method (docs/narrow.md)"
_METHODS = {"int8": ABSMAX, "int4": LEAST_SQUARES}  # where a rule names none


def read_quantization(wanted: str) -> Quantization:
    """The preset of that name, or what the file there says. ConfigError, naming file and key, where it is none."""
    if wanted in PRESETS:
        return PRESETS[wanted]
    path, choices = Path(wanted), ", ".join(PRESETS)
    try:
        raw = _value(path)
    except FileNotFoundError:
        raise ConfigError(f"--quantize {shown(wanted)}: must be one of {choices}, or a JSON file of rules") from None
    except (OSError, ValueError) as wrong:  # ValueError: a name that no file can have
        why = getattr(wrong, "strerror", None) or str(wrong)
        raise ConfigError(f"--quantize {shown(wanted)} cannot be read: {why}") from None
    if not isinstance(raw, list) or not raw:
        raise ConfigError(f"{shown(wanted)} does not hold a list of rules: {_MEND}")
    rules = typed(tuple[Rule, ...], [_completed(rule) for rule in raw], shown(wanted), ConfigError, _MEND)
    for index, rule in enumerate(rules):
        if rule.group != GROUP:
            raise ConfigError(f"{shown(wanted)}: [{index}].group is {rule.group}: groups are of {GROUP} numbers")
        if rule.method == PUBLISHED:
            raise ConfigError(f"{shown(wanted)}: [{index}].method is {PUBLISHED!r}, which finds no scales: {_MEND}")
    return Quantization(path.name, rules, is_preset=False)


def _value(path: Path) -> Any:
    try:
        return value_of(read_file(path, _MOST), path)
    except ConfigError as wrong:
        raise ConfigError(str(wrong).replace("download it again", _MEND)) from None


def _completed(rule: Any) -> Any:
    """With the group and the method that a rule need not name."""
    if not isinstance(rule, dict):
        return rule
    kind = rule.get("format")
    method = _METHODS.get(kind, ABSMAX) if isinstance(kind, str) else ABSMAX
    return {"group": GROUP, "method": method, **rule}
