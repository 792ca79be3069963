"""Generated tokens: the same through ONNX Runtime, torch and transformers, alone and batched."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deepseek_trt.engines.generation.batching.limits import SchedulerLimits
from deepseek_trt.engines.generation.llm import LLM
from deepseek_trt.engines.generation.pages import answer_lengths, pages_needed
from deepseek_trt.engines.generation.params import SamplingParams
from deepseek_trt.engines.generation.sampling import Sampler, sample_rows
from deepseek_trt.engines.sessions.ort import OrtSession
from deepseek_trt.engines.sessions.torch import TorchSession
from deepseek_trt.engines.text.text import Text
from deepseek_trt.export.errors import BundleError, RequestError

PROMPTS = (
    "Return",
    "The number of",
    "Create a new temporary directory",
    "If the file does not exist, then",
    "This class implements",
    "    Raise ValueError when the argument is not",
    "A list of the names of all the functions that are defined in the",
    "Test whether a path is absolute. On Unix, that means it begins with a slash,",
)
NEW = 64


def pick(sampler, logits):
    return sample_rows([sampler], logits[None])[0][0]


@pytest.fixture(scope="module")
def demo(demo_checkpoint, bundle_of):
    return bundle_of(demo_checkpoint)


@pytest.fixture(scope="module")
def prompts(demo):
    return [Text(demo).encode(prompt) for prompt in PROMPTS]


def results(session, config, prompts, params=SamplingParams(NEW), limits=None):  # noqa: B008
    with LLM(session, config, limits=limits or SchedulerLimits.for_batch(len(prompts))) as llm:
        return llm.generate(prompts, params)


def answers(*given, **options) -> list[list[int]]:
    return [list(result.token_ids) for result in results(*given, **options)]


@pytest.fixture(scope="module")
def endless(demo):
    """The model's config without a stop token, so that every answer has all 64 tokens."""
    import dataclasses

    return dataclasses.replace(demo.manifest.model, eos_token_ids=())


@pytest.fixture(scope="module")
def session(demo, endless, prompts):
    return OrtSession(demo, session_pages(demo, prompts))


@pytest.fixture(scope="module")
def batched(session, endless, prompts):
    return answers(session, endless, prompts)


def test_prompts_have_different_lengths(prompts):
    assert len({len(p) for p in prompts}) >= 6


def test_batched_equals_alone(session, endless, prompts, batched):
    for prompt, expected in zip(prompts, batched, strict=True):
        assert len(expected) == NEW
        assert answers(session, endless, [prompt]) == [expected]


def test_ort_equals_torch(demo, endless, prompts, batched):
    assert answers(TorchSession(demo, session_pages(demo, prompts)), endless, prompts) == batched


def session_pages(bundle, prompts) -> int:
    return pages_needed(bundle.manifest.cache, answer_lengths(bundle.manifest.model, prompts, NEW))


def test_ort_equals_transformers(demo_checkpoint, prompts, batched):
    """Given prompt and answer, transformers' best token at every position is the answer's next one: what greedy
    decoding with transformers gives, in one pass instead of 64."""
    from transformers import DeepseekV2ForCausalLM

    model = DeepseekV2ForCausalLM.from_pretrained(demo_checkpoint, dtype=torch.float32, attn_implementation="eager")
    for prompt, expected in zip(prompts, batched, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + expected])).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == expected


def test_prompt_longer_than_a_chunk(session, endless, prompts, batched):
    assert answers(session, endless, prompts, limits=SchedulerLimits(8, 40, 5, prefix_reuse=False)) == batched


def test_stop_token_ends_an_answer(session, demo, endless, prompts, batched):
    import dataclasses

    stop = batched[0][5]
    config = dataclasses.replace(demo.manifest.model, eos_token_ids=(stop,))
    result = results(session, config, prompts)[0]
    assert list(result.token_ids) == batched[0][: batched[0].index(stop) + 1]
    assert result.finish_reason == "stop"


def test_pages_are_given_back(session, endless, prompts):
    """The session has pages for one run only: a leak would fail the second."""
    for _ in range(3):
        answers(session, endless, prompts[:2], SamplingParams(3))


def test_streamed_pieces_join_to_the_text(demo):
    text = Text(demo)
    for content in ("hello world", "naïve – 中文字 🙂 done", "    return x\n\n\tif  y:"):
        ids = text.encode(content)
        stream = text.stream()
        parts = [part.text for part in map(stream.step, ids) if not part.hidden]
        assert "".join(parts) + stream.flush() == content == text.decode(ids)


def test_sampling_is_seeded_and_independent_of_the_batch(session, endless, prompts):
    params = SamplingParams(12, temperature=0.9, top_k=50, top_p=0.95, seed=11)
    first = answers(session, endless, prompts[:3], params)
    assert answers(session, endless, prompts[:3], params) == first
    assert answers(session, endless, prompts[:1], params) == first[:1]
    other = SamplingParams(12, temperature=0.9, top_k=50, top_p=0.95, seed=12)
    assert answers(session, endless, prompts[:3], other) != first


def test_sampling_keeps_to_top_k_and_top_p():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32))

    def seen(**options) -> set[int]:
        sampler = Sampler(SamplingParams(seed=1, temperature=1.0, **options))
        return {pick(sampler, logits) for _ in range(300)}

    assert seen() == {0, 1, 2, 3}
    assert seen(top_k=2) == {0, 1}
    assert seen(top_p=0.79) == {0, 1}
    assert seen(top_p=0.81) == {0, 1, 2}
    assert seen(top_k=1) == {0}


def test_sampling_frequencies():
    """20,000 draws: the share of each token lies within 5 standard deviations of its probability."""
    p = np.array([0.5, 0.3, 0.15, 0.05])
    sampler = Sampler(SamplingParams(temperature=1.0, seed=3))
    logits = np.log(p).astype(np.float32)
    share = np.bincount([pick(sampler, logits) for _ in range(20_000)], minlength=4) / 20_000
    assert (np.abs(share - p) < 5 * np.sqrt(p * (1 - p) / 20_000)).all()


@pytest.mark.parametrize(
    ("prompt", "words"),
    [([], "is empty"), ([5, 4096], "outside 0..4095"), ([-1], "outside"), ([7] * 2048, "takes at most 2047")],
)
def test_bad_prompts_are_refused(session, demo, prompt, words):
    with pytest.raises(RequestError, match=words):
        answers(session, demo.manifest.model, [prompt])


@pytest.mark.parametrize(
    "options", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"seed": -1}]
)
def test_bad_parameters_are_refused(options):
    with pytest.raises(RequestError, match=next(iter(options))):
        SamplingParams(**options)


def test_bundle_without_tokenizer(small_v2, bundle_of):
    with pytest.raises(BundleError, match="token ids"):
        Text(bundle_of(small_v2.checkpoint))


def test_chat_of_the_demo_model(demo):
    ids = Text(demo).encode_chat([{"role": "user", "content": "hi"}])
    assert ids[0] == demo.manifest.model.bos_token_id
    assert Text(demo).decode(ids) == "User: hi\n\nAssistant:"


def test_by_reference_runs_and_notices_a_changed_checkpoint(small_v2, bundle_of, tmp_path):
    import os
    import shutil

    checkpoint = shutil.copytree(small_v2.checkpoint, tmp_path / "checkpoint")
    reference = bundle_of(checkpoint, by_reference=True, page_size=8)
    assert not (reference.path / "weights.safetensors").exists()
    stored = bundle_of(small_v2.checkpoint, page_size=8)
    prompt = [[5, 6, 7]]
    config = stored.manifest.model
    assert answers(OrtSession(reference, 12), config, prompt) == answers(OrtSession(stored, 12), config, prompt)
    os.utime(checkpoint / "model-00001-of-000002.safetensors", ns=(1, 1))
    with pytest.raises(BundleError, match="has changed since export"):
        OrtSession(reference, 12)
