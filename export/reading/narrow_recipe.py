"""What --quantize names: a preset, or a JSON file with a list of rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deepseek_trt.export.bundle.narrow import FORMATS, KEEP, KEPT, NONE, PRESETS, Quantization, Rule
from deepseek_trt.export.errors import ConfigError
from deepseek_trt.export.files import read_file
from deepseek_trt.export.json_file import value_of
from deepseek_trt.export.text.wording import shown
from deepseek_trt.export.trust.typed import typed

_MOST = 2**20  # bytes of a file
_MEND = "a rule is an object of pattern, format, group and method (docs/narrow.md)"
_NAMED = {**PRESETS, KEEP: KEPT, NONE: None}


def read_quantization(wanted: str) -> Quantization | None:
    """What goes by that name, or what the file there says. ConfigError, naming file and key, where it is neither."""
    if wanted in _NAMED:
        return _NAMED[wanted]
    path, choices = Path(wanted), ", ".join(_NAMED)
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
        kind, where = FORMATS[rule.format], f"{shown(wanted)}: [{index}]"
        if rule.group != kind.group:
            raise ConfigError(f"{where}.group is {rule.group}: groups are of {kind.group} numbers in {kind.name}")
        if rule.method not in kind.methods:
            methods = " or ".join(kind.methods)
            raise ConfigError(f"{where}.method is {rule.method!r}: scales of {kind.name} are found by {methods}")
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
    name = rule.get("format")
    kind = FORMATS.get(name if isinstance(name, str) else "", FORMATS["int8"])
    return {"group": kind.group, "method": kind.methods[0], **rule}
