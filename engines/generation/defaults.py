"""SamplingDefaults: how a bundle's answers are sampled where a request does not say, by its generation_config.json."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek_trt.engines.generation.params import SamplingParams
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.errors import BundleError, RequestError
from deepseek_trt.export.text.files import GENERATION_CONFIG
from deepseek_trt.export.text.generation_config import GenerationConfig, Number

# What do_sample decides about.
_OF_SAMPLING = ("temperature", "top_k", "top_p", "min_p")


@dataclass(frozen=True)
class SamplingDefaults:
    """Values that requests take where they say nothing; without any, SamplingParams' own: greedy.

    vLLM's rule: temperature, top_k, top_p, min_p, repetition_penalty and max_new_tokens of generation_config.json are
    defaults. do_sample false is greedy, as in transformers: who wrote it wants no sampling, though vLLM passes it over.
    do_sample true without a temperature is temperature 1, the model's own distribution; transformers' top_k 50 is not
    taken. not_honoured: what else the file wants, and does not get.
    """

    values: tuple[tuple[str, Number], ...] = ()
    not_honoured: tuple[str, ...] = ()

    @classmethod
    def of_bundle(cls, bundle: Bundle) -> SamplingDefaults:
        """As `of` the files that the bundle lists."""
        with bundle.text_folder() as folder:
            return cls.of(folder)

    @classmethod
    def of(cls, folder: Path) -> SamplingDefaults:
        """Read a folder's file. ConfigError for a wrong type, BundleError for a value out of range, naming the key."""
        config = GenerationConfig.read(folder)
        values = dict(config.sampling)
        if config.do_sample is False:
            values = {name: value for name, value in values.items() if name not in _OF_SAMPLING}
        elif config.do_sample:
            values.setdefault("temperature", 1.0)
        defaults = cls(tuple(values.items()), config.not_honoured)
        try:
            defaults.params()
        except RequestError as error:
            raise BundleError(
                f"{folder / GENERATION_CONFIG}: {error}; mend the file, or leave it out: --no-generation-config"
            ) from None
        return defaults

    def params(self, **given: Any) -> SamplingParams:
        """What was given, and for the rest these defaults."""
        values = dict(self.values)
        if given.get("max_tokens") is not None:  # the other name of it
            values.pop("max_new_tokens", None)
        return SamplingParams(**{**values, **given})

    @property
    def lines(self) -> tuple[str, ...]:
        """What to say once, before the first answer."""
        taken = ", ".join(f"{name} {value:g}" for name, value in self.values)
        lines = [f"{taken} unless told otherwise, by {GENERATION_CONFIG}"] if taken else []
        return (*lines, *(f"{GENERATION_CONFIG}: {what} is not honoured" for what in self.not_honoured))
