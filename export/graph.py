"""GraphSpec: the names, dtypes and dims of a graph's inputs and outputs, and the only place that knows them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from deepseek_trt.export.config import ModelConfig

GraphName = Literal["prefill", "decode"]
Dim = int | str
DEFAULT_PAGE_SIZE = 64
DOMAIN = "deepseek_trt"  # of the custom ops, in torch and ONNX alike

# Symbolic dims, and their names in ONNX.
BATCH, SEQUENCE, PAGES, TABLE = "batch_size", "sequence_length", "pages", "pages_per_sequence"


@dataclass(frozen=True)
class TensorSpec:
    """One input or output: numpy-like dtype name and dims, symbolic ones by name."""

    name: str
    dtype: str
    dims: tuple[Dim, ...]


@dataclass(frozen=True)
class CacheSpec:
    """The paged latent cache: one pool [pages, page_size, latent_dim] a layer, page 0 scratch."""

    layers: int
    page_size: int
    latent_dim: int
    dtype: str

    @classmethod
    def of(cls, config: ModelConfig, dtype: str, page_size: int = DEFAULT_PAGE_SIZE) -> CacheSpec:
        return cls(config.num_hidden_layers, page_size, config.latent_dim, dtype)

    def pages_for(self, tokens: int) -> int:
        """Pages that hold `tokens` tokens of one sequence."""
        return -(-tokens // self.page_size)

    @property
    def bytes_per_token(self) -> int:
        """Of all layers together."""
        return self.layers * self.latent_dim * dtype_bytes(self.dtype)


@dataclass(frozen=True)
class GraphSpec:
    """A graph's IO, in order."""

    name: GraphName
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def file(self) -> str:
        return f"{self.name}.onnx"


def past_name(layer: int) -> str:
    return f"past_key_values.{layer}.latent"


def present_name(layer: int) -> str:
    return f"present.{layer}.latent"


def text_generation_graphs(
    config: ModelConfig, cache: CacheSpec, all_logits: bool = False
) -> tuple[GraphSpec, GraphSpec]:
    """Prefill and decode of the causal language model."""
    pool = (PAGES, cache.page_size, cache.latent_dim)
    past = tuple(TensorSpec(past_name(i), cache.dtype, pool) for i in range(cache.layers))
    present = tuple(TensorSpec(present_name(i), cache.dtype, pool) for i in range(cache.layers))
    lengths = TensorSpec("past_lengths", "int32", (BATCH,))
    table = TensorSpec("page_table", "int32", (BATCH, TABLE))
    prefill_logits = (BATCH, SEQUENCE, config.vocab_size) if all_logits else (BATCH, config.vocab_size)
    prefill = GraphSpec(
        "prefill",
        (
            TensorSpec("input_ids", "int64", (BATCH, SEQUENCE)),
            TensorSpec("sequence_lengths", "int32", (BATCH,)),
            lengths,
            table,
            *past,
        ),
        (TensorSpec("logits", "float32", prefill_logits), *present),
    )
    decode = GraphSpec(
        "decode",
        (TensorSpec("input_ids", "int64", (BATCH, 1)), lengths, table, *past),
        (TensorSpec("logits", "float32", (BATCH, config.vocab_size)), *present),
    )
    return prefill, decode


def dtype_bytes(dtype: str) -> int:
    """Bytes of one number."""
    return {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4}[dtype]
