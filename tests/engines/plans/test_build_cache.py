"""Plans of bundles with a narrow cache: real TensorRT-RTX builds, in which plugins alone touch the pools."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from deepseek_trt.engines.plans.check import has_narrow
from deepseek_trt.engines.plans.plan import BuildSpec
from deepseek_trt.engines.plans.request import BuildRequest, build_plans
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.plugins.tensorrt.manifest import read_manifest

SPEC = BuildSpec(sms=(86,), max_batch_size=4, max_input_len=128, max_seq_len=512)


@pytest.mark.tensorrt
@pytest.mark.parametrize(
    ("cache_dtype", "quantize"), [("int8", ""), pytest.param("fp8", "int4", marks=pytest.mark.slow)]
)
def test_the_cache_is_plugins_alone(demo_checkpoint, bundle_of, tmp_path, cache_dtype, quantize):
    """Codes go in and come out in the same memory; queries and values stay fused with decode's attention."""
    more = {"quantize": quantize} if quantize else {}
    exported = bundle_of(demo_checkpoint, cache_dtype=cache_dtype, **more)
    bundle = Bundle.open(Path(shutil.copytree(exported.path, tmp_path / "bundle")))
    plans = {plan.record.graph: plan.record for plan in build_plans(BuildRequest(bundle.path, SPEC))}
    format = cache_dtype.capitalize()
    layers = bundle.manifest.model.num_hidden_layers
    attention = {f"MlaDecodeNarrow{format}", "MlaQuery", "MlaValue"}
    found = {op: count for op, count in plans["decode"].plugins.items() if op.startswith("Mla")}
    assert found == dict.fromkeys(attention, layers)
    assert plans["prefill"].plugins[f"MlaPrefillNarrow{format}"] == layers
    for record in plans.values():
        pools = [t for t in (*record.inputs, *record.outputs) if t.name.endswith((".latent", ".rope"))]
        assert len(pools) == 4 * layers
        assert {t.dtype for t in pools} == {"int8", bundle.manifest.dtype}
    manifest = read_manifest(bundle.path / plans["decode"].plugin_library)
    assert has_narrow(manifest, bundle)
    assert not has_narrow(manifest, bundle_of(demo_checkpoint, **more))
