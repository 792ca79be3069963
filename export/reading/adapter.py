"""Adapter: a LoRA folder of peft, and the checkpoint as it is with the adapter merged.

A weight becomes W + scale * B A. The product is summed in double precision, the sum rounded to float32 and then, as
every weight, to the dtype of the export.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from deepseek_trt.export.bundle.recipes import SCALE_SUFFIX
from deepseek_trt.export.dtypes import WEIGHT_DTYPES
from deepseek_trt.export.errors import CheckpointError
from deepseek_trt.export.reading.adapter_config import LoraConfig
from deepseek_trt.export.reading.checkpoint import Checkpoint
from deepseek_trt.export.reading.classifier import SCORE
from deepseek_trt.export.reading.formats import ADAPTER_CONFIG
from deepseek_trt.export.reading.header import read_header
from deepseek_trt.export.reading.tensors import LowRank, StoredTensor
from deepseek_trt.export.reading.wording import shown

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."  # of every name that peft writes
_EMBEDDINGS = ("embed_tokens", "lm_head")  # that peft may save whole beside their LoRA, and where they were resized
# The two factors of an update: how the names of the left one and the right one end, and whether they are transposed.
_FACTORS = (
    (".lora_B.weight", ".lora_A.weight", False),
    (".lora_embedding_A", ".lora_embedding_B", True),
)


@dataclass(frozen=True)
class Adapter:
    """`updates` are what is added to a weight, `replaced` the weights that take another's place; by published name."""

    root: Path
    config: LoraConfig
    updates: Mapping[str, LowRank]
    replaced: Mapping[str, StoredTensor]

    @property
    def files(self) -> tuple[Path, ...]:
        return self.root / ADAPTER_CONFIG, self.root / ADAPTER_WEIGHTS

    @property
    def note(self) -> str:
        """What is merged, for people."""
        whole = f", {len(self.replaced)} replaced" if self.replaced else ""
        return f"the adapter in {self.root} is merged into {len(self.updates)} weights (rank {self.config.r}{whole})"

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
        rest = {_module(t): t for t in read_header(file)}
        updates = _take_updates(rest, config)
        replaced = {_published(name): _replacement(name, tensor, config) for name, tensor in rest.items()}
        if not updates and not replaced:
            raise CheckpointError(f"{file} holds no tensors; save the adapter again")
        return cls(root, config, updates, replaced)

    def merged_into(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint with updated and replaced tensors; CheckpointError naming one that it has no place for."""
        tensors = dict(checkpoint.tensors)
        for name, tensor in self.replaced.items():
            if name != SCORE:  # a classifier that was trained on a language model brings its own head
                _check_place(tensor, tensor.shape, name, tensors)
            tensors[name] = tensor
            tensors.pop(f"{name}{SCALE_SUFFIX}", None)  # of the weight that was replaced
        for name, update in self.updates.items():
            left, right = update.shapes
            _check_place(update.left, (left[0], right[1]), name, tensors)
            tensors[name] = dataclasses.replace(tensors[name], update=update)
        return dataclasses.replace(checkpoint, tensors=tensors)


def _module(tensor: StoredTensor) -> str:
    """The tensor's name in the model that was trained; CheckpointError where it is not of an adapter, or packed."""
    if not tensor.name.startswith(_PREFIX):
        raise CheckpointError(f"adapter tensor {shown(tensor.name)} does not begin with {_PREFIX}, as peft writes it")
    if tensor.dtype not in WEIGHT_DTYPES.values():
        raise CheckpointError(f"adapter tensor {shown(tensor.name)} is {tensor.dtype}: save the adapter in float32")
    return tensor.name.removeprefix(_PREFIX)


def _take_updates(rest: dict[str, StoredTensor], config: LoraConfig) -> dict[str, LowRank]:
    """Take pairs of factors out of `rest`, and give the update of each weight."""
    updates = {}
    for ending, other, transposed in _FACTORS:
        for name in [name for name in rest if name.endswith(ending)]:
            module = name.removesuffix(ending)
            if module + other not in rest:
                raise CheckpointError(f"adapter tensor {shown(rest[name].name)} lacks its other half, {other[1:]}")
            update = LowRank(rest.pop(name), rest.pop(module + other), config.scale_of(module), transposed)
            _check_factors(update, module, config)
            updates[_published(f"{module}.weight")] = update
    return updates


def _check_factors(update: LowRank, module: str, config: LoraConfig) -> None:
    name, (left, right), rank = shown(update.left.name), update.shapes, config.rank_of(module)
    if not config.has(module):
        raise CheckpointError(f"adapter tensor {name}: {ADAPTER_CONFIG} does not target {module}; save both again")
    if len(left) != 2 or len(right) != 2 or (left[1], right[0]) != (rank, rank):
        raise CheckpointError(
            f"adapter tensor {name}: {ADAPTER_CONFIG} says rank {rank}, its factors are {list(left)} and "
            f"{list(right)}; save both again"
        )


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
            f"adapter tensor {shown(tensor.name)} is for {name}, which the checkpoint does not hold: "
            "give the checkpoint that the adapter was trained on"
        )
    if weight.shape != shape:
        raise CheckpointError(
            f"adapter tensor {shown(tensor.name)} is for a weight of {list(shape)}, {name} is {list(weight.shape)}: "
            "give the checkpoint that the adapter was trained on"
        )
