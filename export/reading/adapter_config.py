"""LoraConfig: what adapter_config.json says of a LoRA adapter of peft, or why the adapter cannot be merged."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deepseek_trt.export.errors import ConfigError
from deepseek_trt.export.json_file import read_object
from deepseek_trt.export.text.wording import shown

# Keys that say where an adapter is from, how it was trained or initialized, or how it is run unmerged.
_HARMLESS = {
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "lora_dropout",
    "fan_in_fan_out",  # peft turns it off for the linear layers that this family is made of
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "runtime_config",
    "megatron_core",
    "qalora_group_size",
}
# Keys that are read here.
_READ = (
    "peft_type",
    "bias",
    "init_lora_weights",
    "r",
    "lora_alpha",
    "use_rslora",
    "target_modules",
    "target_parameters",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
)
# Initializations that leave the base model as it is; others subtract from its weights what the adapter starts with.
_INITIALIZATIONS = (True, False, None, "gaussian", "eva")
_LAYER = re.compile(r".*?\.[^.]*\.(\d+)\.")


@dataclass(frozen=True)
class LoraConfig:
    """Ranks and scales by module, and which modules have them. Modules are named as in the model that was trained."""

    r: int
    alpha: float
    rank_stabilized: bool
    targets: tuple[str, ...] | str  # names that a module's name ends in, or one pattern for all of it
    excluded: tuple[str, ...] | str
    layers: tuple[int, ...]  # none: all
    layers_pattern: tuple[str, ...]
    saved: tuple[str, ...]  # modules that were trained whole
    parameters: tuple[str, ...] = ()  # names that a parameter's name ends in, of those that are in no linear layer
    ranks: Mapping[str, int] = field(default_factory=dict)  # by pattern
    alphas: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, file: Path) -> LoraConfig:
        """Read adapter_config.json; ConfigError names the key that is wrong, or that cannot be merged."""
        try:
            raw = read_object(file)
        except FileNotFoundError:
            raise ConfigError(f"{file} is missing: --adapter takes the folder of a LoRA adapter of peft") from None
        _refuse_others(raw)
        if raw.get("layers_pattern") and not raw.get("layers_to_transform"):
            raise _wrong("layers_pattern", raw["layers_pattern"], "beside layers_to_transform, as peft wants it")
        if not isinstance(raw.get("task_type"), (str, type(None))):
            raise _wrong("task_type", raw["task_type"], "a name")
        layers = raw.get("layers_to_transform")
        return cls(
            r=_number(raw, "r", 8, int),
            alpha=_number(raw, "lora_alpha", 8, float),
            rank_stabilized=_flag(raw, "use_rslora"),
            targets=_names(raw, "target_modules"),
            excluded=_names(raw, "exclude_modules"),
            layers=_layers([layers] if isinstance(layers, int) else [] if layers is None else layers),
            layers_pattern=_list(raw, "layers_pattern"),
            saved=_list(raw, "modules_to_save"),
            parameters=_list(raw, "target_parameters"),
            ranks=_pattern(raw, "rank_pattern", int),
            alphas=_pattern(raw, "alpha_pattern", float),
        )

    def rank_of(self, module: str) -> int:
        """Of a module, or of a parameter."""
        return int(_by_pattern(self.ranks, module, self.r))

    def scale_of(self, module: str) -> float:
        """The factor on B A."""
        rank = self.rank_of(module)
        alpha = float(_by_pattern(self.alphas, module, self.alpha))
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)

    def has(self, module: str) -> bool:
        """Whether peft would put LoRA on the module (peft's check_target_module_exists)."""
        if _named(self.excluded, module) or self.replaces(module):
            return False
        if isinstance(self.targets, str):
            return self.targets == "all-linear" or _named(self.targets, module)
        return _named(self.targets, module) and (not self.layers or self._layer(module) in self.layers)

    def has_parameter(self, name: str) -> bool:
        """Whether peft would put LoRA on a parameter itself, as on stacked experts."""
        return _named(self.parameters, name)

    def replaces(self, module: str) -> bool:
        """Whether the adapter holds the module whole, or one that it is part of."""
        return any(re.match(_whole(name), module) for name in self.saved)

    @property
    def patterns(self) -> tuple[str, ...]:
        """All that the names of modules are matched with."""
        names = (one for one in (self.targets, self.excluded) if isinstance(one, str) and one)
        made = (*map(_whole, self.saved), *map(_in_layers, self.layers_pattern))
        return (*names, *made, *map(_ending, (*self.ranks, *self.alphas)))

    def _layer(self, module: str) -> int | None:
        patterns = [*map(_in_layers, self.layers_pattern)] or [_LAYER.pattern]
        found = next((match for pattern in patterns if (match := re.match(pattern, module))), None)
        return int(found[1]) if found else None


def _refuse_others(raw: Mapping[str, Any]) -> None:
    """Refuse by its name what is more than B A beside a linear layer."""
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise ConfigError(f"adapter_config.json: peft_type {shown(kind)} is not supported; only LORA can be merged")
    if raw.get("bias", "none") not in ("none", None):
        raise ConfigError(f"adapter_config.json: bias {shown(raw['bias'])} is not supported; train with bias 'none'")
    start = raw.get("init_lora_weights")
    if start not in _INITIALIZATIONS:
        raise ConfigError(
            f"adapter_config.json: init_lora_weights {shown(start)} changes the base's weights: merge the adapter with "
            "peft, or convert it (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    known = {*_READ, *_HARMLESS}
    other = next((key for key, value in raw.items() if key not in known and value), None)
    if other:
        raise ConfigError(
            f"adapter_config.json: {shown(other)[1:-1]} {shown(raw[other])} is not supported; only plain LoRA can be "
            "merged: merge the adapter with peft (merge_and_unload), and export what that gives"
        )


def _wrong(key: str, value: object, wanted: str) -> ConfigError:
    return ConfigError(f"adapter_config.json: {key} is {shown(value)}: it must be {wanted}")


def _number(raw: Mapping[str, Any], key: str, default: int, kind: type[int] | type[float]) -> Any:
    value = raw.get(key, default)
    numbers = (int,) if kind is int else (int, float)
    if type(value) not in numbers or not 0 < value < math.inf:
        raise _wrong(key, value, "a number above zero")
    return value


def _flag(raw: Mapping[str, Any], key: str) -> bool:
    value = False if raw.get(key) is None else raw[key]
    if not isinstance(value, bool):
        raise _wrong(key, value, "true or false")
    return value


def _list(raw: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = [] if raw.get(key) in (None, "") else raw[key]
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _wrong(key, value, "a list of names")
    for name in names:
        _compiled(key, name)
    return tuple(names)


def _names(raw: Mapping[str, Any], key: str) -> tuple[str, ...] | str:
    value = raw.get(key)
    if not isinstance(value, str):
        return _list(raw, key)
    return _compiled(key, value)


def _layers(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(layer) is int for layer in value):
        raise _wrong("layers_to_transform", value, "a list of layers")
    return tuple(value)


def _pattern(raw: Mapping[str, Any], key: str, kind: type[int] | type[float]) -> dict[str, Any]:
    value = {} if raw.get(key) is None else raw[key]
    if not isinstance(value, dict):
        raise _wrong(key, value, "an object of numbers")
    return {_compiled(key, name): _number(value, name, 0, kind) for name in value}


def _compiled(key: str, pattern: str) -> str:
    try:
        for form in (pattern, _whole(pattern), _ending(pattern), _in_layers(pattern)):
            re.compile(form)
    except (re.error, OverflowError, RecursionError) as error:
        raise _wrong(key, pattern, f"a pattern ({error})") from None
    return pattern


def _whole(name: str) -> str:
    """The pattern of a module that is called so, and of all in it (peft's, of modules_to_save)."""
    return rf"(.*\.)?{name}(\..*)?$"


def _ending(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


def _in_layers(name: str) -> str:
    """The pattern of a module in a numbered layer of that list."""
    return rf"(?:^|.*?\.){name}\.(\d+)\."


def _named(names: tuple[str, ...] | str, module: str) -> bool:
    if isinstance(names, str):
        return bool(names) and re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _by_pattern(numbers: Mapping[str, Any], module: str, default: Any) -> Any:
    """The number of the first pattern that the module's name ends in (peft's get_pattern_key)."""
    return next((n for pattern, n in numbers.items() if re.match(_ending(pattern), module)), default)
