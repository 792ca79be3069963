"""GraphSpec: the names, dtypes and dims of a graph's inputs and outputs, and the only place that knows them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from deepseek_trt.export.bundle.interface import CLASSIFICATION, DEFAULT, FEATURES, TRANSFORMERS, Interface
from deepseek_trt.export.bundle.narrow_cache import NarrowCache
from deepseek_trt.export.config.limits import TENSORRT_MOST_NUMBERS
from deepseek_trt.export.config.model_config import ModelConfig
from deepseek_trt.export.dtypes import computed_in, dtype_bytes

GraphName = Literal["prefill", "decode", "model", "mtp"]
Dim = int | str
DEFAULT_PAGE_SIZE = 64
MOST_NEW_TOKENS = 8  # of a row, that decode takes at once
DOMAIN = "deepseek_trt"  # of the custom ops, in torch and ONNX alike
LAST_HIDDEN = "last_hidden_state"  # after the last norm, float32 in any model
PREVIOUS_HIDDEN = "previous_hidden_state"  # the same, where the graph "mtp" takes it

# Symbolic dims, and their names in ONNX.
BATCH, SEQUENCE, PAGES, TABLE = "batch_size", "sequence_length", "pages", "pages_per_sequence"
PAST, TOTAL, KEPT = "past_sequence_length", "total_sequence_length", "logits_kept"  # of contiguous caches


@dataclass(frozen=True)
class TensorSpec:
    """One input or output: numpy-like dtype name and dims, symbolic ones by name."""

    name: str
    dtype: str
    dims: tuple[Dim, ...]


@dataclass(frozen=True)
class CachePool:
    """One of a layer's pools [pages, page_size, width]: the last part of its name, and the dtype."""

    part: str
    width: int
    dtype: str


@dataclass(frozen=True)
class CacheSpec:
    """The paged latent cache: one pool [pages, page_size, latent_dim] a layer, page 0 scratch.

    A narrow one has two pools a layer, of codes, and of rope parts and scales.
    """

    layers: int
    page_size: int
    latent_dim: int
    dtype: str
    narrow: NarrowCache | None = None

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        dtype: str,
        page_size: int = DEFAULT_PAGE_SIZE,
        mtp: bool = False,
        cache_dtype: str = "",
    ) -> CacheSpec:
        """With `mtp`, the layer that drafts has the last pool. `cache_dtype` is Interface's."""
        narrow = NarrowCache.of(config, cache_dtype)
        return cls(config.num_hidden_layers + mtp, page_size, config.latent_dim, dtype, narrow)

    @property
    def pools(self) -> tuple[CachePool, ...]:
        """Those of each layer, in order."""
        if self.narrow is None:
            return (CachePool("latent", self.latent_dim, self.dtype),)
        rest = self.latent_dim - self.narrow.rank + self.narrow.groups
        return CachePool("latent", self.narrow.rank, "int8"), CachePool("rope", rest, self.dtype)

    @property
    def pool_names(self) -> tuple[str, ...]:
        """The inputs of all layers' pools, in order, the layer that drafts included."""
        return tuple(past_name(layer, pool.part) for layer in range(self.layers) for pool in self.pools)

    @property
    def format(self) -> str:
        """What latents are held as: a format of codes, or the dtype."""
        return self.narrow.format if self.narrow else self.dtype

    def pages_for(self, tokens: int) -> int:
        """Pages that hold `tokens` tokens of one sequence."""
        return -(-tokens // self.page_size)

    @property
    def most_pages(self) -> int:
        """Pages of the largest pool that TensorRT takes as one tensor, page 0 included."""
        return TENSORRT_MOST_NUMBERS // (self.page_size * max(pool.width for pool in self.pools))

    def longest(self, rows: int) -> int:
        """The most tokens that each of `rows` sequences may have in the largest pool that TensorRT takes; maybe 0."""
        return (self.most_pages - 1) // rows * self.page_size

    @property
    def bytes_per_token(self) -> int:
        """Cache bytes that one token takes in all layers together."""
        return self.layers * sum(pool.width * dtype_bytes(pool.dtype) for pool in self.pools)


@dataclass(frozen=True)
class GraphSpec:
    """A graph's IO, in order."""

    name: GraphName
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def file(self) -> str:
        """Any ONNX Runtime loads it: where `computed_in` says another dtype, floats are of that one in it."""
        return f"{self.name}.onnx"

    def as_computed(self) -> GraphSpec:
        """The graph's IO as ONNX Runtime's CPU provider computes it: bfloat16 is float32."""

        def computed(tensors: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
            return tuple(dataclasses.replace(t, dtype=computed_in(t.dtype)) for t in tensors)

        return GraphSpec(self.name, computed(self.inputs), computed(self.outputs))


def past_name(layer: int, part: str = "latent") -> str:
    return f"past_key_values.{layer}.{part}"


def present_name(layer: int, part: str = "latent") -> str:
    return f"present.{layer}.{part}"


def hidden_name(index: int) -> str:
    """0 is the embeddings, i the output of layer i - 1; the last one is after the final norm, as in transformers."""
    return f"hidden_states.{index}"


def graphs_of(
    config: ModelConfig, cache: CacheSpec, interface: Interface = DEFAULT, num_labels: int = 0
) -> tuple[GraphSpec, ...]:
    """Prefill and decode over the paged cache; or one graph "model", where there is no cache or a contiguous one.

    With the layer of multi-token prediction its graph "mtp" is the third.
    """
    if interface.io == TRANSFORMERS:
        return (_masked(config, cache, interface, num_labels),)
    lengths = TensorSpec("sequence_lengths", "int32", (BATCH,))
    layers = range(config.num_hidden_layers if interface.cache else 0)

    def pools(name: Callable[[int, str], str]) -> list[TensorSpec]:
        each = [(p.part, p.dtype, (PAGES, cache.page_size, p.width)) for p in cache.pools]
        return [TensorSpec(name(i, part), dtype, dims) for i in layers for part, dtype, dims in each]

    past, present = pools(past_name), pools(present_name)

    def graph(name: GraphName, *places: TensorSpec) -> GraphSpec:
        inputs = (_tokens(config, cache, interface), *places, *past)
        return GraphSpec(name, inputs, (*_outputs(name, config, interface, num_labels), *present))

    if not interface.cache:
        return (graph("model", lengths),)
    cached = (TensorSpec("past_lengths", "int32", (BATCH,)), TensorSpec("page_table", "int32", (BATCH, TABLE)))
    graphs = graph("prefill", lengths, *cached), graph("decode", lengths, *cached)
    return (*graphs, _mtp(config, cache, (lengths, *cached))) if interface.mtp else graphs


def _mtp(config: ModelConfig, cache: CacheSpec, places: tuple[TensorSpec, ...]) -> GraphSpec:
    """One layer, whose pool is the last: from each token's hidden state and the token after it to the one after that.

    Outputs are those of each row's last real token.
    """
    ids = TensorSpec("input_ids", "int64", (BATCH, SEQUENCE))
    states = TensorSpec(PREVIOUS_HIDDEN, "float32", (BATCH, SEQUENCE, config.hidden_size))
    pool, layer = (PAGES, cache.page_size, cache.latent_dim), cache.layers - 1
    past, present = (TensorSpec(name(layer), cache.dtype, pool) for name in (past_name, present_name))
    logits = TensorSpec("logits", "float32", (BATCH, config.vocab_size))
    hidden = TensorSpec(LAST_HIDDEN, "float32", (BATCH, config.hidden_size))
    return GraphSpec("mtp", (ids, states, *places, past), (logits, hidden, present))


def _masked(config: ModelConfig, cache: CacheSpec, interface: Interface, num_labels: int) -> GraphSpec:
    """The one graph of --io transformers, for prompts and single tokens alike."""
    tokens = _tokens(config, cache, interface)
    outputs = _outputs("model", config, interface, num_labels)
    if not interface.cache:
        return GraphSpec("model", (tokens, TensorSpec("attention_mask", "int64", (BATCH, SEQUENCE))), outputs)
    parts = {"key": config.kv_lora_rank, "value": config.qk_rope_head_dim}  # the latents, the rotated rope parts

    def pools(prefix: str, length: str) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(f"{prefix}.{layer}.{part}", cache.dtype, (BATCH, 1, length, width))
            for layer in range(cache.layers)
            for part, width in parts.items()
        )

    mask = TensorSpec("attention_mask", "int64", (BATCH, TOTAL))
    positions = TensorSpec("position_ids", "int64", (BATCH, SEQUENCE))
    past = pools("past_key_values", PAST)
    return GraphSpec("model", (tokens, mask, positions, *past), (*outputs, *pools("present", TOTAL)))


def _tokens(config: ModelConfig, cache: CacheSpec, interface: Interface) -> TensorSpec:
    if interface.inputs_embeds:
        return TensorSpec("inputs_embeds", cache.dtype, (BATCH, SEQUENCE, config.hidden_size))
    return TensorSpec("input_ids", "int64", (BATCH, SEQUENCE))


def _outputs(name: GraphName, config: ModelConfig, interface: Interface, num_labels: int) -> tuple[TensorSpec, ...]:
    """The head's outputs; they are float32 in any model, as numpy has no bfloat16."""
    if interface.task == CLASSIFICATION:
        return (TensorSpec("logits", "float32", (BATCH, num_labels)),)
    if interface.task == FEATURES:
        dims = (BATCH, SEQUENCE, config.hidden_size)
        count = config.num_hidden_layers + 1 if interface.hidden_states else 0
        hidden = tuple(TensorSpec(hidden_name(i), "float32", dims) for i in range(count))
        return (TensorSpec(LAST_HIDDEN, "float32", dims), *hidden)
    logits = TensorSpec("logits", "float32", (BATCH, *_kept(name, interface), config.vocab_size))
    states = TensorSpec(LAST_HIDDEN, "float32", (BATCH, SEQUENCE, config.hidden_size))
    return (logits, states) if interface.mtp else (logits,)


def _kept(name: GraphName, interface: Interface) -> tuple[Dim, ...]:
    """The tokens of a row that get logits, as dims: all that decode takes."""
    keep = interface.logits_to_keep
    if interface.io == TRANSFORMERS:
        return (KEPT,) if keep else (SEQUENCE,)
    if name == "decode":
        return (SEQUENCE,)
    return () if keep is None else (keep or SEQUENCE,)
