"""Which backend is chosen, and what is said about it."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from deepseek_trt.cli.options import BACKENDS as CLI_CHOICES
from deepseek_trt.engines.generation.llm import LLM
from deepseek_trt.engines.generation.params import SamplingParams
from deepseek_trt.engines.plans.plan import plan_files
from deepseek_trt.engines.sessions.opening import (
    CHOICES,
    SessionRequest,
    Surroundings,
    check_generates,
    choose_backend,
    open_session,
)
from deepseek_trt.engines.sessions.ort import CUDA, OrtCudaSession, OrtSession, Place
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.bundle.interface import Interface
from deepseek_trt.export.errors import BackendError, BundleError, RequestError

WITH_CUDA, WITHOUT = ["CUDAExecutionProvider", "CPUExecutionProvider"], ["CPUExecutionProvider"]


@pytest.fixture(scope="module")
def demo(demo_checkpoint, bundle_of):
    return bundle_of(demo_checkpoint)


def around(gpu, providers=WITH_CUDA):
    return Surroundings(lambda: gpu, lambda: providers)


@pytest.mark.parametrize(
    ("wanted", "plans", "gpu", "providers", "backend", "device", "why"),
    [
        ("auto", True, "A GPU", WITH_CUDA, "tensorrt", "cuda", "the bundle has plans and A GPU is visible"),
        ("auto", True, None, WITH_CUDA, "ort", "cpu", "no GPU is visible"),
        ("auto", False, "A GPU", WITH_CUDA, "ort-cuda", "cuda", "A GPU is visible and the bundle has no decode.plan"),
        ("auto", False, "A GPU", WITHOUT, "ort", "cpu", "this ONNX Runtime has no CUDAExecutionProvider and the"),
        ("ort", True, "A GPU", WITH_CUDA, "ort-cuda", "cuda", "A GPU is visible"),
        ("ort", True, None, WITH_CUDA, "ort", "cpu", "no GPU is visible"),
        ("torch", True, "A GPU", WITH_CUDA, "torch", "cpu", "it was asked for"),
        ("tensorrt", False, None, WITHOUT, "tensorrt", "cuda", "it was asked for"),
        ("ort-cuda", True, None, WITHOUT, "ort-cuda", "cuda", "it was asked for"),
    ],
)
def test_choice(demo, wanted, plans, gpu, providers, backend, device, why):
    names = [name for graph in ("prefill", "decode")[: 1 + plans] for name in plan_files(graph)]
    listed = dataclasses.replace(demo.manifest, added=dict.fromkeys(names, "0" * 64))
    choice = choose_backend(dataclasses.replace(demo, manifest=listed), wanted, around(gpu, providers))
    assert (choice.backend, choice.device) == (backend, device)
    assert choice.why.startswith(why)


def test_names_are_the_command_lines():
    assert set(CLI_CHOICES) == set(CHOICES)
    with pytest.raises(RequestError, match="backend 'magic': must be one of auto, ort"):
        choose_backend(None, "magic")


def test_the_line_names_backend_note_and_reason(demo):
    opened = open_session(SessionRequest(demo, 4, 1), "auto", around(None))
    assert opened.line.startswith("backend: ort (bfloat16 weights, computed in float32 (ONNX Runtime's CPU provider)")
    assert opened.line.endswith("), as no GPU is visible")


def test_a_cuda_provider_that_does_not_start_is_said_and_the_cpu_takes_over(demo):
    """Real ONNX Runtime, which lists CUDA in its GPU build and cannot start it without the libraries or a GPU."""
    with pytest.raises(BackendError, match="CUDAExecutionProvider"):
        OrtCudaSession(demo, 4, place=dataclasses.replace(CUDA, ordinal=99))
    opened = open_session(SessionRequest(demo, 4, 1), "ort", around("A GPU"))
    if opened.choice.device == "cpu":  # a machine without a GPU
        assert isinstance(opened.session, OrtSession)
        assert opened.choice.why.startswith("the GPU cannot be used: ")
        with pytest.raises(BackendError, match="CUDAExecutionProvider"):
            open_session(SessionRequest(demo, 4, 1), "ort-cuda")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_cuda_session_on_the_cpu_provider_gives_the_tokens_of_ort(demo_checkpoint, bundle_of, dtype):
    """Everything but the provider and the device of the pools is what runs on a GPU."""
    bundle = bundle_of(demo_checkpoint, dtype=dtype)
    sessions = OrtSession(bundle, 8, 1), OrtCudaSession(bundle, 8, 1, Place("CPUExecutionProvider", "cpu"))
    prompts = [[5, 6, 7, 8], [9, 10]]
    made = [LLM(session, bundle.manifest.model).generate(prompts, SamplingParams(6)) for session in sessions]
    assert made[0] == made[1]
    np.testing.assert_allclose(
        np.asarray(sessions[0].pool(0)[1:3], np.float32), sessions[1].pool(0)[1:3].astype(np.float32), atol=1e-2
    )


def test_llm_says_what_it_chose(demo):
    with LLM.open(demo.path, threads=1, cache_mib=8) as llm:
        assert llm.choice == choose_backend(demo)


def test_a_bundle_of_another_task_is_refused_by_name():
    refusal = Interface(task="feature-extraction").why_no_generation
    other = Bundle(Path("/there"), SimpleNamespace(generation_refusal=refusal))
    with pytest.raises(BundleError, match="/there cannot generate text: it was exported for feature-extraction"):
        check_generates(other)


@pytest.mark.parametrize(
    "modules",
    [
        ("generation.llm", "sessions.ort", "sessions.opening", "bench.bench"),
        ("sessions.tensorrt.session", "sessions.opening"),
    ],
    ids=["ort", "tensorrt"],
)
def test_imports_no_torch(modules):
    names = "\n".join(f"import deepseek_trt.engines.{name}" for name in modules)
    code = f"import sys\n{names}\nprint([m for m in sys.modules if m.split('.')[0] in ('torch', 'triton')])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_generating_through_ort_imports_no_torch(demo):
    code = (
        "import sys\nfrom deepseek_trt.engines.generation.llm import LLM\n"
        "from deepseek_trt.engines.generation.params import SamplingParams\n"
        f"with LLM.open({str(demo.path)!r}, threads=1, cache_mib=8) as llm:\n"
        "    llm.generate([[5, 6]], SamplingParams(2, temperature=1.0))\nprint('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
