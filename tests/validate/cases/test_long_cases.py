"""The whole text, one token after the other, and free generation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from deepseek_trt.engines.sessions.opening import SessionRequest
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.bundle.graph import CacheSpec
from deepseek_trt.validate.accuracy import validate_bundle
from deepseek_trt.validate.backends.backends import BACKENDS, make_reference
from deepseek_trt.validate.backends.sessions import run_step
from deepseek_trt.validate.cases.inputs import read_inputs
from deepseek_trt.validate.cases.long_cases import GREEDY, GREEDY_STEPS, PROMPTS, greedy_case, greedy_plan, window_cases
from deepseek_trt.validate.numbers.loss import IGNORED, token_losses
from deepseek_trt.validate.request import ValidateRequest

CACHE = CacheSpec(layers=2, page_size=8, latent_dim=4, dtype="float32")


@pytest.mark.parametrize("all_logits", [False, True])
@pytest.mark.parametrize(("tokens", "limit"), [(2, 64), (64, 64), (65, 64), (700, 64), (700, 4096)])
def test_every_token_but_the_first_is_scored_once(tokens, limit, all_logits):
    ids = list(range(1, tokens + 1))
    cases = window_cases(ids, CACHE, limit, 100, all_logits, seed=0)
    steps = [step for _, steps in cases for step in steps]
    scored = [step.targets[step.live & (step.targets != IGNORED)] for step in steps]
    assert sorted(np.concatenate(scored).tolist()) == ids[1:]
    assert max(int((s.past_lengths + s.sequence_lengths).max()) for s in steps) < min(limit, 128)
    assert {s.graph for s in steps} <= ({"prefill"} if all_logits else {"prefill", "decode"})


def test_a_long_text_is_cut():
    [(plan, steps)] = window_cases([1] * 5000, CACHE, 4096, 2**20, False, seed=0)  # 128 * 2^20 logits
    assert len(steps) == 127
    assert plan.tokens == [128]


@pytest.fixture(scope="module")
def demo(demo_checkpoint, bundle_of):
    return bundle_of(demo_checkpoint, dtype="float32")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A short one: 300 tokens are the least."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The boats leave with the tide, whatever the bells may say. " * 26, encoding="utf-8")
    return path


def test_greedy_steps_are_what_the_reference_generates(good):
    bundle = good("float32")
    inputs = read_inputs(bundle, None, 0)
    reference = make_reference(SessionRequest(bundle, inputs.pages, 1))
    plan = greedy_plan(bundle.manifest.model.max_position_embeddings)
    rng = np.random.default_rng(0)
    steps = greedy_case(reference, [rng.integers(2, 256, n) for n in PROMPTS], plan, seed=0)
    assert len(steps) == 1 + GREEDY_STEPS
    first = steps[0]
    logits = reference.prefill(first.input_ids, first.sequence_lengths, first.past_lengths, first.page_table)
    for step in steps[1:]:
        assert logits.argmax(-1).tolist() == step.input_ids[:, 0].tolist()
        logits = run_step(reference, step, step.feeds)[:, 0]
    last = steps[-1]
    assert np.isfinite(reference.pool(0)[last.slots.index]).all()


def free_run(session, steps):
    """What a session generates from the prompts of the first step, left alone: [B, tokens]."""
    first, *rest = steps
    given = first.input_ids, first.sequence_lengths, first.past_lengths, first.page_table
    choices = [session.prefill(*given).argmax(-1)]
    for step in rest:
        logits = run_step(session, step, {**step.feeds, "input_ids": choices[-1][:, None]})
        choices.append(logits[:, 0].argmax(-1))
    return np.stack(choices, axis=1)


def test_greedy_agreement_is_that_of_two_free_runs(edited):
    def twice_the_scale(model):
        body = next(f for f in model.functions if f.name == "MlaDecode")
        next(n for n in body.node if n.output[0] == "scale_f").attribute[0].f *= 2

    bundle = Bundle.open(edited(twice_the_scale, "decode"))
    report = validate_bundle(ValidateRequest(bundle.path, ("exported",), threads=1)).report
    inputs = read_inputs(bundle, None, 0)
    request = SessionRequest(bundle, inputs.pages, 1)
    script = inputs.with_long_cases(inputs.script(), make_reference(request))
    steps = [step for step in script.steps if step.case == GREEDY]
    ours, theirs = (free_run(make(request), steps) for make in (BACKENDS["exported"].make, make_reference))
    agreed = np.logical_and.accumulate(ours == theirs, axis=1).sum(1)
    assert [g.agreed for g in report.backends[0].greedy] == agreed.tolist()
    assert min(agreed) < ours.shape[1]
    parted = [g for g in report.backends[0].greedy if g.agreed < g.tokens]
    assert all(g.margin > 0 for g in parted)
    assert not all(g.near_tie for g in parted)


def test_the_loss_is_that_of_the_whole_text(demo, text):
    """The windows' loss, by decode steps, is transformers' rule over whole windows by torch with all logits."""
    backend = validate_bundle(ValidateRequest(demo.path, ("exported",), text=text, threads=1)).report.backends[0]
    ids = np.array(read_inputs(demo, text, 0).text)
    windows = [ids[start : start + 128] for start in range(0, len(ids) - 1, 127)]
    losses = [token_losses(all_logits(demo, window)[:-1], window[1:]).mean() for window in windows]
    counts = [len(window) - 1 for window in windows]
    expected = float(np.average(losses, weights=counts))
    score = backend.text
    assert score.scored == sum(counts) == len(ids) - 1
    assert score.reference_loss == pytest.approx(expected, rel=1e-5)
    assert score.loss == pytest.approx(expected, rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(score.loss))
    assert score.passed
    assert "s^2 / 2" in score.tolerance_reason


def all_logits(bundle, ids):
    """float32 [S, vocab] of one sequence, by the model's plain forward."""
    import torch

    from deepseek_trt.engines.sessions.torch import load_model

    model = load_model(bundle, "float32")
    model.all_logits = True
    cache = bundle.manifest.cache
    pages = cache.pages_for(len(ids)) + 1
    pools = [torch.zeros(pages, cache.page_size, cache.latent_dim) for _ in range(cache.layers)]
    given = torch.from_numpy(ids)[None], torch.tensor([len(ids)]), torch.tensor([0]), torch.arange(1, pages)[None].int()
    with torch.inference_mode():
        return model.prefill(*given, pools)[0][0].numpy()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_texts_tolerance_is_measured_in_narrow_dtypes(demo_checkpoint, bundle_of, text, dtype):
    bundle = bundle_of(demo_checkpoint, dtype=dtype)
    request = ValidateRequest(bundle.path, ("exported", "torch"), text=text, threads=1)
    exported, torch = validate_bundle(request).report.backends
    assert exported.text.passed
    assert torch.text.passed
    assert exported.text.tolerance < 0.02
    assert torch.text.tolerance < 0.1
    assert ("standard error" in exported.text.tolerance_reason) == (exported.computed_in != "float32")
