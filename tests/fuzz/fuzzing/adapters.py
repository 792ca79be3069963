"""adapter_config.json and adapter_model.safetensors, judged by peft and the safetensors library."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from random import Random
from typing import Any

from fuzzing import good
from fuzzing.mutate import mutated_bytes, mutated_json
from fuzzing.runner import DisagreementError
from fuzzing.weights import damaged_safetensors, library_reads, strict

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PATTERNS = (
    r"(a+)+$",
    r".*\.(q_b_proj|o_proj)",
    r"(.*)*(.*)*(.*)*x",
    "(?i)o_proj",
    r"(?P<a>o)_proj",
    "a{99999999999}",
    "(" * 500,
)
# What peft alone refuses, and why it is right here.
REFUSED_BY_PEFT_ALONE = {"Invalid task type": "a name of what it was trained for; nothing of it is merged"}


class Adapters:
    """An adapter over a good checkpoint, of which one file is changed."""

    name, patience = "adapter", 90.0

    def prepare(self, folder: Path) -> None:
        import peft  # noqa: F401

        self.good = good.adapter_files()
        self.base = {"config.json": good.dumped(good.CONFIG), **good.one_file(good.tensors_of(good.CONFIG))}
        (folder / "base").mkdir()
        (folder / "adapter").mkdir()
        good.write(folder / "base", self.base)

    def change(self, rng: Random, folder: Path) -> None:
        name = rng.choice((CONFIG, CONFIG, WEIGHTS))
        data = self.good[name]
        if name == WEIGHTS:
            data = damaged_safetensors(rng, data)
        elif rng.random() < 0.1:
            key = rng.choice((b'"norm"', b'"q_b_proj"', b'"layers.1.self_attn.o_proj"'))
            pattern = rng.choice(PATTERNS).replace("\\", "\\\\").encode()
            data = data.replace(key, b'"' + pattern + b'"', 1)
        else:
            data = mutated_json(rng, data) if rng.random() < 0.9 else mutated_bytes(rng, data)
        good.write(folder / "adapter", {**self.good, name: data})

    def read(self, folder: Path) -> Any:
        from deepseek_trt.export.reading.source import read_source

        return read_source(folder / "base", adapter=folder / "adapter")

    def judge(self, folder: Path, found: Any) -> None:
        from peft import LoraConfig
        from peft.utils.other import get_pattern_key

        strict((folder / "adapter" / CONFIG).read_bytes())
        tensors = library_reads((folder / "adapter" / WEIGHTS).read_bytes())
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                config = LoraConfig.from_pretrained(folder / "adapter")
        except Exception as error:
            words = " ".join(str(error).split())
            if any(known in words for known in REFUSED_BY_PEFT_ALONE):
                return
            raise DisagreementError(f"peft refuses it: {words[:300]}") from None
        used = set()
        for tensor in found.checkpoint.tensors.values():
            used |= {part.tensor.name for one in tensor.updates for part in (one.left, one.right)}
            used |= {tensor.name} if tensor.file.parent.name == "adapter" else set()
            for update in tensor.updates:
                module = update.left.tensor.name.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
                rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), module), config.r)
                alpha = config.alpha_pattern.get(
                    get_pattern_key(config.alpha_pattern.keys(), module), config.lora_alpha
                )
                scale = alpha / (math.sqrt(rank) if config.use_rslora else rank)
                if not math.isclose(update.scale, scale, rel_tol=1e-12):
                    raise DisagreementError(f"{module} is scaled by {update.scale}, peft by {scale}")
        if used != set(tensors):
            raise DisagreementError(f"tensors {sorted(set(tensors) - used)} were left out")
