"""DeepSeek-V2 on ONNX Runtime and TensorRT, from the published checkpoint to text, with a proof of every step.

    from deepseek_trt import LLM, SamplingParams

    with LLM.open("./v2-lite") as llm:
        for piece in llm.stream("The number of", SamplingParams(64)):
            print(piece.text, end="", flush=True)

Steps, each a function of a frozen request that the command line fills alike:

    export_bundle(ExportRequest)      checkpoint -> bundle: ONNX graphs, weights, tokenizer
    validate_bundle(ValidateRequest)  bundle -> accuracy against PyTorch
    build_plugins(PluginRequest)      bundle -> plugin library, with no GPU
    build_plans(BuildRequest)         bundle -> TensorRT engines

What runs a bundle: LLM (text), Embedder (vectors), TextClassifier (labels). A mistake that a user can mend is a
DeepseekTrtError, whose message says how. Names are imported when they are first used; docs/python.md has examples.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepseek_trt.engines.generation.answer import Piece as Piece
    from deepseek_trt.engines.generation.answer import Result as Result
    from deepseek_trt.engines.generation.batching.limits import SchedulerLimits as SchedulerLimits
    from deepseek_trt.engines.generation.guide import Guide as Guide
    from deepseek_trt.engines.generation.llm import LLM as LLM
    from deepseek_trt.engines.generation.params import SamplingParams as SamplingParams
    from deepseek_trt.engines.plans.plan import BuildSpec as BuildSpec
    from deepseek_trt.engines.plans.request import BuildRequest as BuildRequest
    from deepseek_trt.engines.plans.request import build_plans as build_plans
    from deepseek_trt.engines.tasks.classify import TextClassifier as TextClassifier
    from deepseek_trt.engines.tasks.embed import Embedder as Embedder
    from deepseek_trt.export.bundle.folder import Bundle as Bundle
    from deepseek_trt.export.errors import DeepseekTrtError as DeepseekTrtError
    from deepseek_trt.export.exporter import ExportRequest as ExportRequest
    from deepseek_trt.export.exporter import export_bundle as export_bundle
    from deepseek_trt.plugins.tensorrt.for_bundle import PluginRequest as PluginRequest
    from deepseek_trt.plugins.tensorrt.for_bundle import build_plugins as build_plugins
    from deepseek_trt.validate.accuracy import validate_bundle as validate_bundle
    from deepseek_trt.validate.request import ValidateRequest as ValidateRequest

    __version__: str

# ONNX Runtime from 1.31 on looks up a host of its maker's and keeps a device id in the user's cache, unless this is set
# before its first import: here, as nothing of this package is imported earlier.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# Where each name lives.
_HOMES = {
    "LLM": "engines.generation.llm",
    "Guide": "engines.generation.guide",
    "Piece": "engines.generation.answer",
    "Result": "engines.generation.answer",
    "SamplingParams": "engines.generation.params",
    "SchedulerLimits": "engines.generation.batching.limits",
    "Embedder": "engines.tasks.embed",
    "TextClassifier": "engines.tasks.classify",
    "Bundle": "export.bundle.folder",
    "ExportRequest": "export.exporter",
    "export_bundle": "export.exporter",
    "ValidateRequest": "validate.request",
    "validate_bundle": "validate.accuracy",
    "PluginRequest": "plugins.tensorrt.for_bundle",
    "build_plugins": "plugins.tensorrt.for_bundle",
    "BuildSpec": "engines.plans.plan",
    "BuildRequest": "engines.plans.request",
    "build_plans": "engines.plans.request",
    "DeepseekTrtError": "export.errors",
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("deepseek-trt")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
