"""Adapter: a LoRA folder of peft, and the checkpoint as it is with the adapter merged.

A weight becomes W + scale * B A. The product is summed in double precision, the sum rounded to float32 and then, as
every weight, to the dtype of the export.
"""

from __future__ import annotations

import dataclasses
import filecmp
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from deepseek_trt.export.bundle.recipes import SCALE_SUFFIX
from deepseek_trt.export.dtypes import WEIGHT_DTYPES
from deepseek_trt.export.errors import CheckpointError
from deepseek_trt.export.reading.adapter_config import LoraConfig
from deepseek_trt.export.reading.adapter_experts import updates_of_experts
from deepseek_trt.export.reading.checkpoint import Checkpoint
from deepseek_trt.export.reading.classifier import SCORE
from deepseek_trt.export.reading.formats import ADAPTER_CONFIG
from deepseek_trt.export.reading.header import read_header
from deepseek_trt.export.reading.tensors import Factor, LowRank, StoredTensor
from deepseek_trt.export.text.wording import shown, some
from deepseek_trt.export.trials.trial import PATTERNS, trial

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."  # of every name that peft writes
_EMBEDDINGS = ("embed_tokens", "lm_head")  # that peft may save whole beside their LoRA, and where they were resized
# The two factors of an update: how the names of the left one and the right one end, and whether they are transposed.
_FACTORS = (
    (".lora_B.weight", ".lora_A.weight", False),
    (".lora_embedding_A", ".lora_embedding_B", True),
)
_TEXT = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_SECONDS = 3  # of a processor, for all names and patterns
_REPEATS = re.compile(r"[*+{].*[*+{]")  # two of them may look back for ever
_STACKED = (".experts", ".experts.base_layer")  # modules whose parameters are all experts' weights


@dataclass(frozen=True)
class Adapter:
    """`pairs` are the factors by the module's name in the file, `replaced` the weights that take another's place."""

    root: Path
    config: LoraConfig
    pairs: Mapping[str, tuple[Factor, Factor]]
    replaced: Mapping[str, StoredTensor]

    @property
    def files(self) -> tuple[Path, ...]:
        return self.root / ADAPTER_CONFIG, self.root / ADAPTER_WEIGHTS

    @property
    def touched(self) -> set[str]:
        """Published names of the weights that it changes, those of routed experts left out."""
        return {_published(f"{module}.weight") for module in self.pairs} | set(self.replaced)

    def notes(self, base: Path) -> tuple[str, ...]:
        """What is merged into the checkpoint in `base`, and what of the adapter's folder is not used."""
        whole = f"; {len(self.replaced)} weights are replaced" if self.replaced else ""
        merged = (
            f"the adapter in {self.root} is merged: LoRA of rank {self.config.r} in {len(self.pairs)} modules{whole}"
        )
        other = [name for name in _TEXT if _differs(self.root / name, base / name)]
        unused = f"the checkpoint's text files are used; the adapter's differ: {', '.join(other)}"
        return (merged, unused) if other else (merged,)

    @classmethod
    def open(cls, root: Path) -> Adapter:
        """Read adapter_config.json and the header of adapter_model.safetensors.

        Raises ConfigError or CheckpointError, naming the key or tensor that is wrong, or that cannot be merged.
        """
        if not root.is_dir():
            raise CheckpointError(f"--adapter {root} is not a folder: give the one of {ADAPTER_CONFIG}")
        config = LoraConfig.read(root / ADAPTER_CONFIG)
        file = root / ADAPTER_WEIGHTS
        if not file.exists():
            raise CheckpointError(f"--adapter {root} lacks {ADAPTER_WEIGHTS}: save it with peft, in safetensors")
        rest = {_in_model(t): t for t in read_header(file)}
        pairs = _take_pairs(rest)
        _check_patterns(config, [name.rpartition(".")[0] for name in (*pairs, *rest)] + [*pairs])
        replaced = {_published(name): _replacement(name, tensor, config) for name, tensor in rest.items()}
        if not pairs and not replaced:
            raise CheckpointError(f"{file} holds no tensors; save the adapter again")
        return cls(root, config, pairs, replaced)

    def merged_into(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint with updated and replaced tensors; CheckpointError naming one that it has no place for."""
        tensors = dict(checkpoint.tensors)
        for name, tensor in self.replaced.items():
            if name != SCORE:  # a classifier that was trained on a language model brings its own head
                _check_place(tensor, tensor.shape, name, tensors)
            tensors[name] = tensor
            tensors.pop(f"{name}{SCALE_SUFFIX}", None)  # of the weight that was replaced
        for module, (left, right) in self.pairs.items():
            if module.endswith(_STACKED):
                at = _published(module.removesuffix(".base_layer"))
                updates = updates_of_experts(at, left.tensor, right.tensor, tensors, self.config)
            else:
                updates = {_published(f"{module}.weight"): (_update(module, left, right, self.config),)}
            for name, parts in updates.items():
                if len(parts) == 1:
                    _check_place(left.tensor, parts[0].shape, name, tensors)
                tensors[name] = dataclasses.replace(tensors[name], updates=parts)
        return dataclasses.replace(checkpoint, tensors=tensors)


def _check_patterns(config: LoraConfig, names: Sequence[str]) -> None:
    """Try patterns that may look back for ever in a process with a limit of time; CheckpointError where one does."""
    patterns = [pattern for pattern in config.patterns if _REPEATS.search(pattern.removeprefix(r"(.*\.)?"))]
    if not patterns:
        return
    given = json.dumps({"patterns": patterns, "names": names}).encode()
    reason = trial(PATTERNS, given, _SECONDS)
    if reason:
        raise CheckpointError(
            f"{ADAPTER_CONFIG}: patterns such as {shown(patterns[0])} cannot be used: {reason}; name modules instead"
        )


def _differs(file: Path, other: Path) -> bool:
    """Whether there is a file, and the other is not the same."""
    return file.is_file() and not (other.is_file() and filecmp.cmp(file, other, shallow=False))


def _in_model(tensor: StoredTensor) -> str:
    """The tensor's name in the model that was trained; CheckpointError where it is not of an adapter, or packed."""
    if not tensor.name.startswith(_PREFIX):
        raise CheckpointError(f"adapter tensor {shown(tensor.name)} does not begin with {_PREFIX}, as peft writes it")
    if tensor.dtype not in WEIGHT_DTYPES.values():
        raise CheckpointError(f"adapter tensor {shown(tensor.name)} is {tensor.dtype}: save the adapter in float32")
    return tensor.name.removeprefix(_PREFIX)


def _take_pairs(rest: dict[str, StoredTensor]) -> dict[str, tuple[Factor, Factor]]:
    """Take pairs of factors out of `rest`."""
    pairs = {}
    for ending, other, transposed in _FACTORS:
        for name in [name for name in rest if name.endswith(ending)]:
            module = name.removesuffix(ending)
            if module + other not in rest:
                raise CheckpointError(f"adapter tensor {shown(rest[name].name)} lacks its other half, {other[1:]}")
            tensors = rest.pop(name), rest.pop(module + other)
            if any(len(tensor.shape) != 2 for tensor in tensors):
                raise CheckpointError(f"adapter tensor {shown(tensors[0].name)} or its other half is no matrix")
            left, right = (Factor(tensor, transposed=transposed) for tensor in tensors)
            pairs[module] = (left, right)
    return pairs


def _update(module: str, left: Factor, right: Factor, config: LoraConfig) -> LowRank:
    name, parameter = shown(left.tensor.name), f"{module}.weight"
    if not config.has(module) and not config.has_parameter(parameter):
        raise CheckpointError(
            f"adapter tensor {name}: {ADAPTER_CONFIG} does not target {some([module])}; save both again"
        )
    key = module if config.has(module) else parameter
    rank = config.rank_of(key)
    if (left.shape[1], right.shape[0]) != (rank, rank):
        raise CheckpointError(
            f"adapter tensor {name}: {ADAPTER_CONFIG} says rank {rank}, its factors are {list(left.shape)} and "
            f"{list(right.shape)}; save both again"
        )
    return LowRank(left, right, config.scale_of(key))


def _replacement(name: str, tensor: StoredTensor, config: LoraConfig) -> StoredTensor:
    """A weight that was trained whole; CheckpointError for any other tensor."""
    module = name.rpartition(".")[0].removesuffix(".base_layer")
    if ".lora_" in name or not (config.replaces(module) or module.endswith(_EMBEDDINGS)):
        raise CheckpointError(
            f"adapter tensor {shown(tensor.name)} is neither a factor of LoRA nor one of modules_to_save: "
            "merge the adapter with peft (merge_and_unload), and export what that gives"
        )
    return tensor


def _published(name: str) -> str:
    """The weight's published name; the model that was trained may have been one without a head."""
    name = name.replace(".base_layer.", ".")
    return f"model.{name}" if name.startswith(("layers.", "embed_tokens.", "norm.")) else name


def _check_place(tensor: StoredTensor, shape: tuple[int, ...], name: str, tensors: Mapping[str, StoredTensor]) -> None:
    weight = tensors.get(name)
    if weight is None:
        raise CheckpointError(
            f"adapter tensor {shown(tensor.name)} is for {some([name])}, which the checkpoint does not hold: "
            "give the checkpoint that the adapter was trained on"
        )
    if weight.shape != shape:
        raise CheckpointError(
            f"adapter tensor {shown(tensor.name)} is for a weight of {list(shape)}, {some([name])} is "
            f"{list(weight.shape)}: give the checkpoint that the adapter was trained on"
        )
