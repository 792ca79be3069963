"""Every kind of export loads in plain ONNX Runtime, the oldest and the newest that is supported, and computes there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from deepseek_trt.engines.generation.llm import LLM
from deepseek_trt.engines.generation.params import SamplingParams
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.errors import BundleError
from deepseek_trt.export.exporter import ExportRequest, export_bundle

ROOT = Path(__file__).parents[2]
OLDEST = ROOT / ".venv-server" / "bin" / "python"  # scripts/server-env has the oldest ONNX Runtime
PYTHONS = (sys.executable, *((str(OLDEST),) if OLDEST.is_file() else ()))
EXAMPLES = {"native": "onnxruntime_paged.py", "transformers": "onnxruntime_generate.py"}
PROMPTS, STEPS = [[0, 17, 4, 9, 30], [5, 9]], 6
ENCODE = """
import sys, numpy as np, onnxruntime as ort
session = ort.InferenceSession(sys.argv[1] + "/model.onnx", providers=["CPUExecutionProvider"])
feeds = {"input_ids": np.array([[5, 9, 7]]), "sequence_lengths": np.array([3], dtype=np.int32),
         "attention_mask": np.ones((1, 3), dtype=np.int64)}
names = [i.name for i in session.get_inputs()]
(out,) = session.run(None, {name: feeds[name] for name in names})
assert out.dtype == np.float32 and np.isfinite(out).all()
"""


def plain(python: str, *arguments: str) -> str:
    run = subprocess.run([python, "-I", *arguments], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout


@pytest.mark.parametrize(
    ("base", "dtype", "io"),
    [
        ("v2", "float32", "native"),
        ("v2", "float16", "native"),
        ("v3", "bfloat16", "native"),
        ("v2", "float16", "transformers"),
        ("v2", "bfloat16", "transformers"),
    ],
)
def test_a_generator_generates(base, dtype, io, made, verdict):
    checkpoint = made(base, stored=lambda tensors: {name: t.bfloat16() for name, t in tensors.items()})
    bundle = verdict(checkpoint.path, "--dtype", dtype, "--io", io).bundle
    rows = [",".join(map(str, prompt)) for prompt in PROMPTS]
    found = [
        plain(python, str(ROOT / "examples" / EXAMPLES[io]), str(bundle), str(STEPS), *rows).split()
        for python in PYTHONS
    ]
    tokens = [[int(token) for token in row.split(",")] for row in found[0]]
    assert np.shape(tokens) == (len(PROMPTS), STEPS)
    if dtype != "float16":  # which rounds near ties in each release's own way
        assert found == [found[0]] * len(PYTHONS)
    if dtype != "float16" and io == "native":
        with LLM.open(bundle) as llm:
            expected = llm.generate(PROMPTS, SamplingParams(max_new_tokens=STEPS, ignore_eos=True))
        assert tokens == [list(result.token_ids) for result in expected]


@pytest.mark.parametrize(("dtype", "io"), [("bfloat16", "native"), ("float16", "transformers")])
def test_an_encoder_encodes(dtype, io, made, tmp_path):
    request = ExportRequest(
        made().path, tmp_path / "bundle", dtype=dtype, io=io, task="feature-extraction", no_cache=True
    )
    bundle = export_bundle(request).bundle
    for python in PYTHONS:
        plain(python, "-c", ENCODE, str(bundle.path))


@pytest.mark.parametrize("io", EXAMPLES)
def test_a_traced_graph_that_is_gone_is_named(io, made, tmp_path):
    bundle = export_bundle(ExportRequest(made().path, tmp_path / "bundle", dtype="bfloat16", io=io)).bundle
    traced = bundle.traced_path(bundle.manifest.graphs[0].name)
    traced.unlink()
    with pytest.raises(BundleError, match=f"{traced.name} is missing"):
        Bundle.open(bundle.path)
