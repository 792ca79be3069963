"""--io transformers: a mask, positions and a growing cache, as existing ONNX Runtime code and transformers run them."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file
from transformers import DynamicCache

from deepseek_trt.engines.sessions.graphs import GRAPH_BACKENDS
from deepseek_trt.engines.sessions.ort import OrtSession

# Two float32 computations of the same sums: see RELATIVE in test_cache_semantics.
RELATIVE = 1e-5
LENGTHS = np.array([20, 11])
EXAMPLE = Path(__file__).parents[2] / "examples" / "onnxruntime_generate.py"
BLOCK_TORCH = "raise ImportError('torch is not for this process')"


@pytest.fixture(scope="module")
def bundle(small_v2, bundle_of):
    return bundle_of(small_v2.checkpoint, dtype="float32", io="transformers")


def close(ours: np.ndarray, theirs) -> bool:
    theirs = np.asarray(theirs)
    assert ours.shape == theirs.shape
    return bool(np.abs(ours - theirs).max() <= RELATIVE * np.abs(theirs).max())


def empty_cache(bundle, rows: int) -> dict[str, np.ndarray]:
    past = [t for t in bundle.graph("model").inputs if t.name.startswith("past_key_values.")]
    return {t.name: np.zeros((rows, 1, 0, t.dims[3]), dtype=np.float32) for t in past}


def positions_of(mask: np.ndarray) -> np.ndarray:
    return np.maximum(mask.cumsum(1) - 1, 0)


def batch(side: str) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask [2, 20], the second row padded on this side."""
    ids = np.random.default_rng(3).integers(2, 256, (2, 20))
    real = np.arange(20) < LENGTHS[:, None]
    mask = real if side == "right" else real[:, ::-1]
    return np.where(mask, ids, 0), mask.astype(np.int64)


@pytest.mark.parametrize("backend", ["ort", "torch"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_prompt_and_steps_equal_transformers(small_v2, bundle, backend, side):
    """Cache included: transformers' own holds the same latents. A padded prompt, 3 tokens, single ones."""
    session = GRAPH_BACKENDS[backend](bundle)
    ids, mask = batch(side)
    more = np.random.default_rng(4).integers(2, 256, (2, 6))
    past, theirs = empty_cache(bundle, 2), DynamicCache()
    # Its older name, which transformers 5.20 has: Python 3.10 gets no newer one.
    cache = "cache" if "cache" in inspect.signature(small_v2.hf.forward).parameters else "past_key_values"
    for new in (ids, more[:, :3], more[:, 3:4], more[:, 4:5], more[:, 5:]):
        if new is not ids:
            mask = np.concatenate([mask, np.ones_like(new)], axis=1)
        positions = positions_of(mask)[:, -new.shape[1] :]
        out = session.run("model", {"input_ids": new, "attention_mask": mask, "position_ids": positions, **past})
        past = {name: out[name.replace("past_key_values", "present")] for name in past}
        with torch.no_grad():
            expected = small_v2.hf(
                torch.from_numpy(new),
                attention_mask=torch.from_numpy(mask),
                position_ids=torch.from_numpy(positions),
                use_cache=True,
                **{cache: theirs},
            ).logits
        real = mask[:, -new.shape[1] :] != 0
        assert close(out["logits"][real], expected.numpy()[real])
    for layer, held in enumerate(theirs.layers):
        for name, tensor in (("key", held.keys), ("value", held.values)):
            ours = past[f"past_key_values.{layer}.{name}"]
            assert close(ours.transpose(0, 2, 1, 3)[mask != 0], tensor.numpy().transpose(0, 2, 1, 3)[mask != 0])


def test_a_padded_prompt_equals_the_numpy_model(small_v2, bundle, reference, float64_of):
    tensors = {name: t for file in small_v2.checkpoint.glob("*.safetensors") for name, t in load_file(file).items()}
    ids, mask = batch("left")
    feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions_of(mask), **empty_cache(bundle, 2)}
    logits = GRAPH_BACKENDS["ort"](bundle).run("model", feeds)["logits"]
    for row, real in enumerate(mask != 0):
        assert close(logits[row, real], reference.logits(small_v2.raw, float64_of(tensors), ids[row, real]))


def test_padding_stays_finite(bundle):
    """A row of padding alone, too."""
    mask = np.zeros((2, 5), dtype=np.int64)
    feeds = {"input_ids": np.zeros_like(mask), "attention_mask": mask, "position_ids": mask, **empty_cache(bundle, 2)}
    out = GRAPH_BACKENDS["ort"](bundle).run("model", feeds)
    assert all(np.isfinite(array).all() for array in out.values())


def test_logits_to_keep_slices_as_transformers_does(small_v2, bundle_of):
    bundle = bundle_of(small_v2.checkpoint, dtype="float32", io="transformers", logits_to_keep=2)
    ids, mask = batch("left")
    for width in (20, 1):  # a lone token has fewer logits than are kept
        given, live = ids[:1, :width], mask[:1, :width]
        out = GRAPH_BACKENDS["ort"](bundle).run(
            "model",
            {"input_ids": given, "attention_mask": live, "position_ids": positions_of(live), **empty_cache(bundle, 1)},
        )
        with torch.no_grad():
            expected = small_v2.hf(torch.from_numpy(given), logits_to_keep=2).logits
        assert close(out["logits"], expected)


@pytest.fixture(scope="module")
def answers(small_v2, bundle_of) -> tuple[list[list[int]], list[list[int]]]:
    """Two prompts, and the 12 greedy tokens that follow each in the bundle with the paged cache."""
    session = OrtSession(bundle_of(small_v2.checkpoint, dtype="float32", page_size=8), 20)
    prompts = [[5, 17, 200, 31, 8], [44, 9]]
    table = np.arange(1, 9, dtype=np.int32)[None]
    made = []
    for prompt in prompts:
        logits = session.prefill(np.array([prompt]), np.array([len(prompt)], np.int32), np.zeros(1, np.int32), table)
        tokens = [int(logits.argmax())]
        for length in range(len(prompt), len(prompt) + 11):
            one = np.ones(1, np.int32)
            logits = session.decode(np.array([tokens[-1:]]), one, np.array([length], np.int32), table)
            tokens.append(int(logits.argmax()))
        made.append(tokens)
    return prompts, made


def test_onnxruntime_and_numpy_alone_generate_the_same_tokens(bundle, answers, tmp_path):
    """In a process where importing torch, onnx or this package fails."""
    for name in ("torch", "onnx", "deepseek_trt"):
        (tmp_path / f"{name}.py").write_text(BLOCK_TORCH)
    prompts, expected = answers
    rows = [",".join(map(str, prompt)) for prompt in prompts]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, EXAMPLE, bundle.path, "12", *rows], env=environment, capture_output=True, text=True, check=True
    )
    assert [[int(token) for token in line.split(",")] for line in done.stdout.split()] == expected


def test_transformers_own_runner_takes_the_folder(bundle, answers):
    exporters = pytest.importorskip("transformers.exporters")
    if not hasattr(exporters, "ExportedModel"):
        pytest.skip("this transformers does not run exported models: 5.24 does")
    model = exporters.ExportedModel.from_pretrained(bundle.path)
    assert model.config.model_type == "deepseek_v2"
    prompts, expected = answers
    for prompt, tokens in zip(prompts, expected, strict=True):
        ids, made = torch.tensor([prompt]), []
        pairs = [("key", 32), ("value", 16)]
        past = [{name: torch.zeros(1, 1, 0, width) for name, width in pairs} for _ in range(3)]
        for length in range(len(prompt), len(prompt) + 12):
            positions = torch.arange(length - ids.shape[1], length)[None]
            mask = torch.ones(1, length, dtype=torch.int64)
            out = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=past)
            past, ids = out["past_key_values"], out["logits"][:, -1:].argmax(-1)
            made.append(int(ids))
        assert made == tokens


def test_the_graph_names_its_dims_and_holds_no_attention_plugin(bundle):
    path, spec = bundle.graph_path("model"), bundle.graph("model")
    onnx.checker.check_model(str(path))
    graph = onnx.load(path, load_external_data=False).graph
    shapes = {value.name: value.type.tensor_type.shape.dim for value in graph.input}
    names = {name: [d.dim_param or d.dim_value for d in dims] for name, dims in shapes.items()}
    assert names["attention_mask"] == ["batch_size", "total_sequence_length"]
    assert names["past_key_values.2.value"] == ["batch_size", 1, "past_sequence_length", 16]
    assert list(names) == [t.name for t in spec.inputs]
    assert {node.op_type for node in graph.node if node.domain == "deepseek_trt"} == {"MoeRouter", "MoeExperts"}
    assert "transformers" in bundle.manifest.generation_refusal
