"""Survey: what a checkpoint is and what each step will need, from config.json and the shards' headers alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek_trt.export.bundle.assemble import one_run
from deepseek_trt.export.bundle.graph import CacheSpec
from deepseek_trt.export.bundle.interface import CLASSIFICATION, GENERATION, Interface
from deepseek_trt.export.bundle.recipes import Dropped, too_large_for_tensorrt
from deepseek_trt.export.config.limits import without_kernel
from deepseek_trt.export.config.model_config import ModelConfig, read_config, unsupported_features
from deepseek_trt.export.dtypes import dtype_bytes
from deepseek_trt.export.errors import CheckpointError, ConfigError
from deepseek_trt.export.free_memory import too_much
from deepseek_trt.export.memory import (
    Footprint,
    generate_by_reference,
    generate_copied,
    generate_mapped,
    generate_torch,
)
from deepseek_trt.export.reading.hub import checkpoint_folder
from deepseek_trt.export.reading.source import Source, export_dtype, read_source
from deepseek_trt.export.reading.weight_files import CONFIG_FILE
from deepseek_trt.export.writing.weight_plan import WeightPlan

GIB = 2**30
CONTEXTS = (4096, 32768, 131072)
# Measured peaks (docs/scale.md): torch, the traced graph and a few chunks, whatever the model's size.
_EXPORT_MEMORY = 700 * 2**20
_GRAPH_DISK = 16 * 2**20
_GPU_SHARE = 0.9  # of a GPU's memory for weights and cache; the rest is for activations and the driver


@dataclass(frozen=True)
class Need:
    """Bytes that one step takes: new on disk, and in the process's (or the GPU's) memory.

    `memory` must exist. `file_pages` are mapped from files as well: they are faster kept, and dropped where memory is
    short. `refused` says why the step would not be done, and is empty where it would.
    """

    step: str
    disk: int
    memory: int
    file_pages: int = 0
    refused: str = ""


@dataclass(frozen=True)
class Capacity:
    """How many sequences of `context` tokens fit on the GPU at once; none are given where engines are refused.

    `limited`: more would fit into its memory, but not into a page pool that TensorRT takes.
    """

    context: int
    batch: int
    limited: bool = False


@dataclass(frozen=True)
class Facts:
    """A supported model in numbers. Bytes a token are of all layers together, in the dtype of the export; `cache` is
    what latents are held as. context_tokens are those whose cache the GPU's memory holds beside the weights, by
    arithmetic alone.
    """

    config: ModelConfig
    task: str
    dtype: str
    stored_bytes: int
    shards: int
    tensors: int
    parameters: int
    active_parameters: int
    cache: str
    cache_bytes_per_token: int
    expanded_bytes_per_token: int
    needs: tuple[Need, ...]
    capacities: tuple[Capacity, ...]
    context_tokens: int
    dropped: tuple[Dropped, ...]
    notes: tuple[str, ...]

    @property
    def cache_saving(self) -> float:
        """The share of an expanded key-value cache that latents save."""
        return 1.0 - self.cache_bytes_per_token / self.expanded_bytes_per_token


@dataclass(frozen=True)
class Survey:
    """`facts`, or None where `unsupported` or `problem` says why the checkpoint cannot be exported."""

    checkpoint: str
    unsupported: tuple[str, ...]
    problem: str | None
    facts: Facts | None

    def to_dict(self) -> dict[str, Any]:
        """Give what JSON can hold."""
        raw = dataclasses.asdict(self)
        if self.facts is not None:
            raw["facts"]["cache_saving"] = self.facts.cache_saving
        return raw


def survey(
    checkpoint: Path,
    dtype: str | None = None,
    gpu_bytes: int = 80 * GIB,
    task: str | None = None,
    adapter: Path | None = None,
    quantize: str | None = None,
    cache_dtype: str | None = None,
) -> Survey:
    """Look at a checkpoint: a folder, or a name that Hugging Face's cache holds.

    `dtype`, `task`, `quantize` and `cache_dtype` are the export's, None for the checkpoint's own, and a whole cache.
    Raises CheckpointError or ConfigError only where there is no config.json or no checkpoint to look at.
    """
    checkpoint = checkpoint_folder(checkpoint)
    interface = Interface(task, cache=task != CLASSIFICATION) if task else None
    try:
        source = read_source(checkpoint, interface, adapter=adapter, quantize=quantize)
        source = dataclasses.replace(
            source, interface=dataclasses.replace(source.interface, cache_dtype=cache_dtype or "")
        )
        source.interface.check()
    except (ConfigError, CheckpointError) as error:
        if not (checkpoint / CONFIG_FILE).is_file():
            raise
        return _refused(checkpoint, str(error))
    return Survey(str(checkpoint), (), None, _facts(source, export_dtype(source, dtype, False), gpu_bytes))


def _refused(checkpoint: Path, problem: str) -> Survey:
    """Everything in config.json that is not supported, and the problem where it is another."""
    try:
        unsupported = unsupported_features(read_config(checkpoint / CONFIG_FILE))
    except ConfigError:
        unsupported = ()
    return Survey(str(checkpoint), unsupported, None if problem in unsupported else problem, None)


def _facts(source: Source, dtype: str, gpu_bytes: int) -> Facts:
    config, plan, files = source.config, source.plan, source.checkpoint
    cache = CacheSpec.of(config, dtype, cache_dtype=source.interface.cache_dtype)
    weights = sum(recipe.nbytes(dtype) for recipe in plan.recipes)
    parameters = sum(recipe.numbers for recipe in plan.recipes)
    return Facts(
        config=config,
        task=source.interface.task,
        dtype=dtype,
        stored_bytes=sum(t.nbytes for t in files.tensors.values()),
        shards=len(files.files),
        tensors=len(files.tensors),
        parameters=parameters,
        active_parameters=_active(config, plan, parameters),
        cache=cache.format,
        cache_bytes_per_token=cache.bytes_per_token,
        expanded_bytes_per_token=_expanded(config, dtype),
        needs=_needs(source, weights, dtype),
        context_tokens=_pages_beside(cache, weights, gpu_bytes) * cache.page_size,
        capacities=() if _no_engines(source) else _capacities(cache, config, weights, gpu_bytes),
        dropped=plan.dropped,
        notes=source.notes,
    )


def _active(config: ModelConfig, plan: WeightPlan, parameters: int) -> int:
    """Parameters that one token meets: without the experts that it is not routed to, and without the embedding."""
    experts = sum(r.numbers for r in plan.recipes if ".mlp.experts." in r.name)
    idle = experts - experts * config.num_experts_per_tok // config.n_routed_experts if experts else 0
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    return parameters - idle - embedding


def _expanded(config: ModelConfig, dtype: str) -> int:
    """Bytes a token of a cache that holds every head's key and value."""
    per_layer = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    return config.num_hidden_layers * per_layer * dtype_bytes(dtype)


def _needs(source: Source, weights: int, dtype: str) -> tuple[Need, ...]:
    owns = source.quantization is not None or source.adapter is not None or source.checkpoint.is_packed
    refers = not owns and dtype == source.plan.dtype
    generates = source.interface.task == GENERATION
    return (
        Need("export", weights + _GRAPH_DISK, _EXPORT_MEMORY),
        *([Need("export --by-reference", _GRAPH_DISK, _EXPORT_MEMORY)] if refers else []),
        *(_generating(source, dtype, refers) if generates else ()),
        Need("engines on a GPU, without cache", 0, weights, refused=_no_engines(source)),
    )


def _generating(source: Source, dtype: str, refers: bool) -> Iterator[Need]:
    """The ways to generate on a CPU."""
    config, recipes, cache = source.config, source.plan.recipes, source.interface.cache_dtype

    def need(way: str, footprint: Footprint, must_fit: int = 0) -> Need:
        refusal = too_much(must_fit)
        here = f"on this machine: it takes {refusal}" if refusal else ""
        return Need(f"generate, {way}", 0, footprint.anonymous, footprint.file, here)

    yield need("weights mapped", generate_mapped(config, dtype, recipes, cache))
    yield need("weights copied", generate_copied(config, dtype, recipes, cache))
    if refers:
        tensors = source.checkpoint.tensors
        made = [recipe for recipe in recipes if one_run(recipe, tensors, recipe.dtype(dtype)) is None]
        assembled = sum(recipe.nbytes(dtype) for recipe in made)
        yield need("by reference", generate_by_reference(config, dtype, recipes, made, cache), assembled)
    yield need("--backend torch", generate_torch(config, dtype, recipes, cache), 4 * sum(r.numbers for r in recipes))


def _no_engines(source: Source) -> str:
    """Why no TensorRT engine can be made of it, or nothing."""
    large = too_large_for_tensorrt(source.plan.recipes)
    held = f"{large[0].name} holds {large[0].size:,} numbers, TensorRT takes less than 2^31" if large else ""
    return "; ".join(filter(None, (without_kernel(source.config), held)))


def _pages_beside(cache: CacheSpec, weights: int, gpu_bytes: int) -> int:
    """Pages that a GPU's memory holds beside the weights."""
    return max(int(gpu_bytes * _GPU_SHARE) - weights, 0) // (cache.page_size * cache.bytes_per_token)


def _capacities(cache: CacheSpec, config: ModelConfig, weights: int, gpu_bytes: int) -> tuple[Capacity, ...]:
    pages = _pages_beside(cache, weights, gpu_bytes)
    contexts = [c for c in CONTEXTS if c <= config.max_position_embeddings] or [config.max_position_embeddings]
    counts = ((context, cache.pages_for(context)) for context in contexts)
    most = cache.most_pages - 1
    return tuple(Capacity(c, min(pages, most) // n, pages // n > most // n) for c, n in counts)
