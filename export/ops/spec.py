"""OpSpec: one custom op's whole contract, from which torch, ONNX and the plugin library take their part."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from deepseek_trt.export.bundle.graph import DOMAIN

OPSET = 23  # of the standard operators in graphs and bodies


@dataclass(frozen=True)
class TensorArg:
    """One input or output. dtype "T" is the model's (float32, float16 or bfloat16), the same wherever it stands;
    "codes" are a narrow format's (int8 or uint8), "scales" too (float16 or float32).
    """

    name: str
    dtype: Literal["T", "float32", "float16", "int32", "int8", "codes", "scales"]
    dims: tuple[str, ...]
    doc: str


@dataclass(frozen=True)
class Attribute:
    """One constant of the op, fixed when the graph is traced."""

    name: str
    type: Literal["int", "float", "string"]
    doc: str


@dataclass(frozen=True)
class OpSpec:
    """A custom op: names, dtypes, shapes, attributes, the torch reference and the ONNX body.

    `reference` is plain torch and says what is right; its arguments are the inputs, then the attributes, in this
    order. `fake` takes the same arguments and gives the outputs' shapes. `body` gives the ONNX statements (onnx.parser
    text) that compute the outputs from the inputs, for given attribute values, where no plugin takes the node over.
    """

    name: str
    doc: str
    inputs: tuple[TensorArg, ...]
    outputs: tuple[TensorArg, ...]
    attributes: tuple[Attribute, ...]
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    body: Callable[[Mapping[str, Any]], str]
    limits: str = "none"

    @property
    def qualified_name(self) -> str:
        """The op's name in torch, e.g. deepseek_trt::MlaDecode."""
        return f"{DOMAIN}::{self.name}"
