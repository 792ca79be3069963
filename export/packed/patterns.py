"""Which modules the settings of packed weights name, by names, parts of names, regular expressions and classes."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

from deepseek_trt.export.errors import ConfigError
from deepseek_trt.export.text.wording import shown
from deepseek_trt.export.trials.trial import PATTERNS, trial

REGEX = "re:"  # how compressed-tensors writes a regular expression, which a name must begin with
_LINEAR = re.compile(r"lm_head|model\.layers\.\d+\..*_proj(_with_mqa)?")  # the modules of that class, by their names
_REPEATS = re.compile(r"[*+{].*[*+{]")  # two of them may look back for ever
_SECONDS = 3  # of a processor, for all names and patterns


@dataclass(frozen=True)
class Pattern:
    """A name or a part of one, an ending of it, a regular expression that it begins with, or all linear modules."""

    kind: Literal["name", "part", "ending", "regex", "linear", "linear in layers"]
    text: str = ""

    @classmethod
    def of(cls, text: str) -> Pattern:
        """As compressed-tensors writes it. Classes but Linear have no weights that are packed: they match no name."""
        if text.startswith(REGEX):
            return cls("regex", text.removeprefix(REGEX))
        return cls("linear") if text == "Linear" else cls("name", text)

    @property
    def rank(self) -> int:
        """Of several that match a module, the lowest holds: names before expressions, these before classes."""
        return {"name": 0, "regex": 1}.get(self.kind, 2)

    def matches(self, module: str) -> bool:
        if self.kind == "regex":
            return re.match(self.text, module) is not None
        if self.kind == "part":
            return self.text in module
        if self.kind == "name":
            return module == self.text
        if self.kind == "ending":
            return module.endswith(f".{self.text}")
        is_linear = _LINEAR.fullmatch(module) is not None
        return is_linear and (self.kind == "linear" or module.startswith("model.layers."))


def try_patterns(patterns: Iterable[Pattern], modules: Collection[str]) -> None:
    """Match those that may look back for ever in a process with a limit of time; ConfigError where one does."""
    slow = [p.text for p in patterns if p.kind == "regex" and _REPEATS.search(p.text)]
    if not slow:
        return
    reason = trial(PATTERNS, json.dumps({"patterns": slow, "names": list(modules)}).encode(), _SECONDS)
    if reason:
        raise ConfigError(
            f"quantization_config: patterns such as {shown(slow[0])} cannot be used: {reason}; name modules instead"
        )
