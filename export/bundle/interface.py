"""Interface: which of the model's classes a bundle is, and what its graphs take and give."""

from __future__ import annotations

from dataclasses import dataclass

from deepseek_trt.export.bundle.narrow_cache import CACHE_DTYPES
from deepseek_trt.export.errors import ConfigError

GENERATION, FEATURES, CLASSIFICATION = TASKS = ("text-generation", "feature-extraction", "text-classification")
NATIVE, TRANSFORMERS = IOS = ("native", "transformers")


@dataclass(frozen=True)
class Interface:
    """The options of an export that decide its graphs' inputs and outputs.

    io "native" has the paged cache and rows by length; "transformers" has a contiguous cache, an attention_mask and
    the names of transformers and optimum. logits_to_keep: None gives each row's last real token, 0 all tokens, K the
    last K. cache says whether there is one: a classifier has none. mtp has prefill and decode give hidden states, and
    adds the graph of the layer that drafts with them. cache_dtype is the format of the codes that latents are cached
    as, empty where the cache is whole.
    """

    task: str = GENERATION
    io: str = NATIVE
    cache: bool = True
    inputs_embeds: bool = False
    hidden_states: bool = False
    logits_to_keep: int | None = None
    mtp: bool = False
    cache_dtype: str = ""

    @property
    def all_logits(self) -> bool:
        """Whether there are logits of every token."""
        return self.logits_to_keep == 0

    def check(self) -> None:
        """Raise ConfigError, naming the option, where one contradicts another."""
        if self.task not in TASKS:
            raise ConfigError(f"--task {self.task!r}: must be one of {', '.join(TASKS)}")
        if self.io not in IOS:
            raise ConfigError(f"--io {self.io!r}: must be one of {', '.join(IOS)}")
        if self.logits_to_keep is not None and self.task != GENERATION:
            raise ConfigError(f"--logits-to-keep and --all-logits are for {GENERATION}: {self.task} has no vocabulary")
        if self.logits_to_keep is not None and self.logits_to_keep < 0:
            raise ConfigError(f"--logits-to-keep {self.logits_to_keep}: must be 0 (all) or more")
        if self.hidden_states and self.task != FEATURES:
            raise ConfigError(f"--hidden-states is for --task {FEATURES}, not {self.task}")
        if not self.cache and self.task == GENERATION:
            raise ConfigError(f"--no-cache is for --task {FEATURES}: {GENERATION} decodes from a cache")
        if self.cache and self.task == CLASSIFICATION:
            raise ConfigError(f"{CLASSIFICATION} has no cache: a row is classified in one pass")
        if self.cache_dtype and self.cache_dtype not in CACHE_DTYPES:
            raise ConfigError(f"--cache-dtype {self.cache_dtype!r}: must be one of {', '.join(CACHE_DTYPES)}")
        if self.cache_dtype and self.why_no_generation:
            raise ConfigError(
                "--cache-dtype is for runs of this package that generate text, from token ids: leave it out, or "
                "--task, --io, --inputs-embeds and --logits-to-keep"
            )
        if self.cache_dtype and self.mtp:
            raise ConfigError("--mtp drafts over a whole cache: leave out --cache-dtype or --mtp")
        if self.mtp and self.why_no_generation:
            raise ConfigError(
                "--mtp drafts for runs of this package that generate text, from token ids: leave it out, or --task, "
                "--io, --inputs-embeds and --logits-to-keep"
            )

    @property
    def why_no_generation(self) -> str:
        """Why a bundle of this interface cannot generate text, or nothing where it can."""
        if self.task != GENERATION:
            return f"it was exported for {self.task}: export the checkpoint with --task {GENERATION}"
        if self.io != NATIVE:
            return f"it was exported with --io {self.io}, for other runtimes: export the checkpoint without --io"
        if self.inputs_embeds:
            return "its graphs take inputs_embeds, not token ids: export the checkpoint without --inputs-embeds"
        if self.logits_to_keep:
            return f"it was exported with --logits-to-keep {self.logits_to_keep}: export the checkpoint without it"
        return ""


DEFAULT = Interface()
