"""The reference's own way of reading a checkpoint gives what the export wrote, and shares nothing with it."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from deepseek_trt.engines.sessions.torch import load_model
from deepseek_trt.export.errors import RequestError
from deepseek_trt.validate.backends.published_files import Place
from deepseek_trt.validate.backends.published_weights import PublishedWeights, published_weights


def state_of(bundle, weights):
    return {w.recipe.name: weights(w.recipe.name) for w in bundle.manifest.weights}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_equals_what_export_wrote(small, bundle_of, dtype):
    bundle = bundle_of(small.checkpoint, dtype=dtype, page_size=8)
    ours, theirs = state_of(bundle, published_weights(bundle, None)), load_model(bundle, "float32").state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_stacked_experts_and_fp8(tmp_path, small_v2, bundle_of):
    model = bundle_of(small_v2.checkpoint, dtype="float32", page_size=8).manifest.model
    both, down = torch.randn(16, 64, 64), torch.randn(16, 64, 32)
    codes = torch.randn(200, 300).to(torch.float8_e4m3fn)
    scales = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    tensors = {"e.experts.gate_up_proj": both, "e.experts.down_proj": down, "q.weight": codes}
    file = tmp_path / "model.safetensors"
    save_file(tensors | {"q.weight_scale_inv": scales}, file)
    places = {name: Place(file, name) for name in [*tensors, "q.weight_scale_inv"]}
    weights = PublishedWeights(tmp_path, places, model, "float32")
    assert torch.equal(weights("e.experts.gate_proj"), both[:, :32])
    assert torch.equal(weights("e.experts.up_proj"), both[:, 32:])
    assert torch.equal(weights("e.experts.down_proj"), down)
    assert weights("q.weight")[130, 260] == codes[130, 260].float() * 6.0


def test_another_model_is_refused(small_v2, bundle_of, tmp_path):
    bundle = bundle_of(small_v2.checkpoint, dtype="float32", page_size=8)
    other = shutil.copytree(small_v2.checkpoint, tmp_path / "other")
    (other / "config.json").write_text(json.dumps({**small_v2.raw, "routed_scaling_factor": 2.0}))
    with pytest.raises(RequestError, match=r"routed_scaling_factor: 2\.0, the bundle has 16\.0"):
        published_weights(bundle, other)


def test_a_missing_checkpoint_is_no_error(small_v2, bundle_of, tmp_path):
    bundle = bundle_of(small_v2.checkpoint, dtype="float32", page_size=8)
    gone = dataclasses.replace(bundle.manifest, checkpoint=str(tmp_path / "gone"))
    assert published_weights(dataclasses.replace(bundle, manifest=gone), None) is None
