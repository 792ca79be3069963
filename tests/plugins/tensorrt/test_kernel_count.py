"""How many kernels a decode step starts a layer of experts, in a real engine and its plugins' recorded launches."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from deepseek_trt.engines.plans import build, flavour
from deepseek_trt.engines.plans.build import build_with_library
from deepseek_trt.engines.plans.plan import BuildSpec
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.plugins.aot.records import Binary
from deepseek_trt.plugins.tensorrt.library import build_library

ROOT = Path(__file__).parents[3]
SPEC = BuildSpec(sms=(86, 120), max_batch_size=4, max_input_len=128, max_seq_len=512)
NO_KERNEL = ("shape_call", "NoOp", "signal", "wait")  # shapes are worked out on the host; streams wait for each other


@dataclass(frozen=True)
class EngineLayer:
    """One line of an engine's layer information: the name begins with its node's, kind is TensorRT's word."""

    name: str
    kind: str

    @property
    def op(self) -> str:
        """The custom op that it runs, else nothing."""
        found = re.match(r"(M(?:la|oe)[A-Za-z]+)_\d+", self.name)
        return found.group(1) if found else ""


@pytest.fixture
def decode_layers(monkeypatch: pytest.MonkeyPatch, uncompiled: Callable[..., list[Binary]]) -> Any:
    """Builds a bundle's plans and gives the layers of the decode engine, as TensorRT tells them once it is built."""
    told: list[str] = []
    monkeypatch.setattr(flavour.ErrorLog, "__call__", lambda self, severity, message: told.append(message))
    configure = build._Build._configure

    def detailed(self: Any, *given: Any) -> Any:
        config = configure(self, *given)
        config.profiling_verbosity = self.flavour.trt.ProfilingVerbosity.DETAILED
        return config

    monkeypatch.setattr(build._Build, "_configure", detailed)

    def of(bundle: Bundle) -> list[EngineLayer]:
        model, dtype = bundle.manifest.model, bundle.manifest.dtype
        library = build_library(uncompiled(model, dtype, sms=(86, 120)), model, dtype, bundle.path / "plugins")
        build_with_library(bundle, SPEC, library.path)
        of_decode = [message for message in told if message.startswith("Layers:\n")][-1]
        return [EngineLayer(*found) for found in re.findall(r"^Name: (.*?), LayerType: (\w+)", of_decode, re.MULTILINE)]

    return of


def one_layer(layers: Sequence[EngineLayer], index: int) -> list[EngineLayer]:
    """From after one layer's attention to the next one's: a layer of experts' second half, and a first half."""
    first, last = (
        next(i for i, layer in enumerate(layers) if layer.name.startswith(f"MlaDecode_{n}")) for n in (index, index + 1)
    )
    return [layer for layer in layers[first + 1 : last + 1] if layer.kind not in NO_KERNEL]


@pytest.fixture
def make_checkpoint(monkeypatch: pytest.MonkeyPatch) -> Any:
    """benchmarks/make_checkpoint.py: checkpoints of published shapes that hold no numbers."""
    file = ROOT / "benchmarks" / "make_checkpoint.py"
    spec = importlib.util.spec_from_file_location("make_checkpoint", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "make_checkpoint", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.tensorrt
@pytest.mark.parametrize(("model", "most"), [("V2_LITE", 14), pytest.param("V2", 16, marks=pytest.mark.slow)])
def test_a_layer_of_experts_starts_few_kernels(
    model, most, make_checkpoint, bundle_of, tmp_path, decode_layers, launches_a_step: dict[str, int]
):
    """A layer of TensorRT's own is one kernel, a plugin as many as it launches for one token a row.

    TensorRT's are the output projection with its sum, two norms, the latents' projection and the queries': one product,
    or in V2 two and a norm between them. A dense layer comes first, then two of experts.
    """
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    published = make_checkpoint.Published(getattr(make_checkpoint, model), 1)
    make_checkpoint.write_sparse(make_checkpoint.reduced(published, layers=3, experts=16), tmp_path / "checkpoint")
    exported = bundle_of(tmp_path / "checkpoint", by_reference=True)
    bundle = Bundle.open(Path(shutil.copytree(exported.path, tmp_path / "bundle")))
    layers = one_layer(decode_layers(bundle), 1)
    assert {layer.op for layer in layers if layer.op} == launches_a_step.keys()
    assert sum(launches_a_step.get(layer.op, 1) for layer in layers) <= most, layers
