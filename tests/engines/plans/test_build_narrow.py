"""Plans of bundles with narrow weights: real TensorRT-RTX builds, in which plugins alone touch codes and scales."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from deepseek_trt.engines.plans import request
from deepseek_trt.engines.plans.check import has_narrow, read_plans
from deepseek_trt.engines.plans.flavour import open_flavour
from deepseek_trt.engines.plans.parse import parse_graph
from deepseek_trt.engines.plans.plan import BuildSpec
from deepseek_trt.engines.plans.request import BuildRequest, build_plans
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.plugins.tensorrt.loading import load_library
from deepseek_trt.plugins.tensorrt.manifest import read_manifest

SPEC = BuildSpec(sms=(86,), max_batch_size=4, max_input_len=128, max_seq_len=512)
PLUGINS = {  # a preset's plugins beside attention and routers
    "int8": {"LinearNarrowInt8": 36, "MoeExpertsNarrowInt8": 4},
    "int4": {"LinearNarrowInt8": 36, "MoeExpertsNarrowInt4": 4},
    "fp8": {"LinearNarrowFp8": 35, "MoeExpertsNarrowFp8": 4},  # the head stays whole
}


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=() if name == "int4" else pytest.mark.slow) for name in PLUGINS]
)
def built(request, demo_checkpoint, bundle_of, tmp_path_factory):
    """A preset's name, a copy of its bundle with plans in it, and the plans."""
    exported = bundle_of(demo_checkpoint, quantize=request.param)
    folder = Path(shutil.copytree(exported.path, tmp_path_factory.mktemp("plans") / request.param))
    return request.param, Bundle.open(folder), build_plans(BuildRequest(folder, SPEC))


def codes_of(bundle):
    return {w.recipe.name: w for w in bundle.manifest.weights if w.recipe.narrow and not w.recipe.is_scales}


@pytest.mark.tensorrt
def test_every_narrow_node_is_a_plugin(built):
    preset, bundle, plans = built
    around = {"MlaPrefill": 5}, {"MlaDecode": 5, "MlaQuery": 5, "MlaValue": 5}
    for plan, attention in zip(plans, around, strict=True):
        assert plan.record.plugins == {**attention, "MoeRouter": 4, **PLUGINS[preset]}
        assert "MoeExperts" not in plan.record.plugins
    assert [plan.record for plan in plans] == [plan.record for plan in read_plans(bundle.listed_anew()).values()]


@pytest.mark.tensorrt
def test_large_codes_are_inputs_in_their_own_bytes(built):
    """Both plans take the same; what is small lies in the plans, as of whole weights."""
    _, bundle, plans = built
    codes = codes_of(bundle)
    shared = [{t.name: t for t in plan.record.inputs if t.name in codes} for plan in plans]
    assert shared[0] == shared[1]
    assert "model.layers.1.mlp.experts.gate_proj" in shared[0]
    for name, tensor in shared[0].items():
        assert (tensor.dtype, tensor.dims) == ("int8", codes[name].recipe.shape)


@pytest.mark.tensorrt
@pytest.mark.parametrize("weights", ["shared", "embedded"])
def test_no_layer_widens_a_weight(built, weights):
    """What reads codes or scales is a plugin, and nothing makes a tensor of a weight's size."""
    preset, bundle, plans = built
    flavour = open_flavour("rtx")
    load_library(bundle.path / plans[0].record.plugin_library, flavour.trt)
    shapes = {weight.recipe.whole_shape for weight in codes_of(bundle).values()}
    shapes |= {(*shape[:-2], shape[-1], shape[-2]) for shape in shapes}
    for graph in bundle.manifest.graphs:
        spec = dataclasses.replace(SPEC, weights=weights)
        parsed = parse_graph(bundle.listed_anew(), graph, spec, flavour)  # it keeps the network alive
        network = parsed.network
        layers = [network.get_layer(i) for i in range(network.num_layers)]
        int8, read, given = flavour.trt.DataType.INT8, 0, {network.get_input(i).name for i in range(network.num_inputs)}
        for layer in layers:
            outputs = [layer.get_output(i) for i in range(layer.num_outputs)]
            inputs = [layer.get_input(i) for i in range(layer.num_inputs)]
            codes = [tensor for tensor in inputs if tensor is not None and tensor.dtype == int8]
            assert not codes or layer.type.name == "PLUGIN_V3"
            read += len(codes)
            if layer.type.name == "CONSTANT":
                given |= {tensor.name for tensor in outputs if tensor.dtype == int8}
            else:
                assert not {tuple(tensor.shape) for tensor in outputs} & shapes
            assert {tensor.name for tensor in codes} <= given, "codes come from memory as they are"
        linear, experts = (
            sum(n for name, n in PLUGINS[preset].items() if name.startswith(kind)) for kind in ("L", "M")
        )
        assert read == linear + 3 * experts


@pytest.mark.tensorrt
def test_a_library_of_other_formats_is_made_anew(built, monkeypatch, demo_checkpoint, bundle_of, tmp_path):
    preset, bundle, plans = built
    manifest = read_manifest(bundle.path / plans[0].record.plugin_library)
    assert has_narrow(manifest, bundle)
    assert not has_narrow(manifest, bundle_of(demo_checkpoint))
    assert not has_narrow(manifest, bundle_of(demo_checkpoint, quantize="fp8" if preset != "fp8" else "int8"))
    monkeypatch.setattr(request, "build_in_locked", lambda *_: pytest.fail("kernels were compiled again"))
    assert not any(plan.fresh for plan in build_plans(BuildRequest(bundle.path, SPEC)))
