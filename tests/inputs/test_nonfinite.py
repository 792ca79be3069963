"""Numbers that are none: in the weights export refuses them, in the logits everything that answers does, and validate
never passes them.

The rules are ours: a trained model holds no NaN, no infinity, and no matrix or norm of zeros alone (what a cut download
leaves); a bias may be zero. transformers loads and answers all of them without a word.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from deepseek_trt.cli.main import main
from deepseek_trt.cli.printing.output import print_json
from deepseek_trt.engines.bench.bench import BenchRequest, bench
from deepseek_trt.engines.generation.batching.limits import SchedulerLimits
from deepseek_trt.engines.generation.llm import LLM
from deepseek_trt.engines.generation.params import SamplingParams
from deepseek_trt.engines.generation.scheduler import Scheduler
from deepseek_trt.engines.tasks.classify import scores_of
from deepseek_trt.export.errors import BackendError, CheckpointError, ConfigError
from deepseek_trt.export.exporter import ExportRequest, Reporter, export_bundle
from deepseek_trt.export.writing.weight_file import JOURNAL_FILE
from deepseek_trt.validate.accuracy import validate_bundle
from deepseek_trt.validate.cases import long_cases
from deepseek_trt.validate.report.html import render_html
from deepseek_trt.validate.request import ValidateRequest

_FAKE = Path(__file__).parents[1] / "engines" / "fake_session.py"
_SPEC = importlib.util.spec_from_file_location("fake_session", _FAKE)
fake = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(fake)

O_PROJ, EXPERT = "model.layers.0.self_attn.o_proj.weight", "model.layers.1.mlp.experts.3.down_proj.weight"
NORM, HEAD = "model.layers.1.input_layernorm.weight", "lm_head.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def put(name, *values):
    """The tensors with the first numbers of one of them changed."""

    def change(tensors):
        tensors[name].view(-1)[: len(values)] = torch.tensor(values)
        return tensors

    return change


def zeroed(*names):
    return lambda tensors: {name: t * 0 if name in names or not names else t for name, t in tensors.items()}


def both(first, second):
    return lambda tensors: second(first(tensors))


def export(checkpoint, tmp_path, **options):
    return export_bundle(ExportRequest(checkpoint, tmp_path / "out", page_size=8, **options)).bundle


# Weights


@pytest.mark.parametrize("name", [O_PROJ, EXPERT, NORM, "model.embed_tokens.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_by_name(made, tmp_path, name, value):
    checkpoint = made("v3", stored=both(put(name, value, value), put(HEAD, value))).path
    with pytest.raises(CheckpointError) as refused:
        export(checkpoint, tmp_path)
    assert "3 weights are NaN or infinite, in 2 tensors of model.safetensors: " in str(refused.value)
    assert f"{name} (2)" in str(refused.value)
    assert f"{HEAD} (1)" in str(refused.value)
    assert "--allow-nonfinite" in str(refused.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_they_are_found_in_every_dtype(made, tmp_path, dtype):
    def stored(tensors):
        narrow = {name: t.to(getattr(torch, dtype)) for name, t in tensors.items()}
        return put(EXPERT, float("-inf"), float("nan"))(narrow)

    with pytest.raises(CheckpointError, match=r"2 weights are NaN or infinite, in 1 tensors .*experts\.3\.down_proj"):
        export(made("v2", stored=stored, torch_dtype=dtype).path, tmp_path)


def test_allowed_they_are_noted(made, tmp_path):
    checkpoint = made("v2", stored=put(O_PROJ, float("nan"))).path
    options = ["--allow-nonfinite"]
    done = CliRunner().invoke(main, ["export", str(checkpoint), str(tmp_path / "out"), *options])
    assert done.exit_code == 0, done.output
    sentence = f"--allow-nonfinite: 1 weights are NaN or infinite, in 1 tensors of model.safetensors: {O_PROJ} (1)"
    assert f"note: {sentence}" in done.output
    assert sentence in json.loads((tmp_path / "out" / "manifest.json").read_text())["notes"]


@pytest.mark.parametrize("name", [O_PROJ, EXPERT, NORM])
def test_tensors_of_zeros_alone_are_refused_by_name(made, tmp_path, name):
    checkpoint = made("v3", stored=zeroed(name)).path
    with pytest.raises(CheckpointError, match=r"1 tensors of model\.safetensors hold zeros alone: ") as refused:
        export(checkpoint, tmp_path)
    assert name in str(refused.value)
    bundle = export(checkpoint, tmp_path, allow_zeros=True)
    assert any(note.startswith("--allow-zeros: ") and name in note for note in bundle.manifest.notes)


def test_a_whole_model_of_zeros_is_refused(made, tmp_path):
    """What an aborted download leaves of preallocated files; negative zeros are zeros."""
    checkpoint = made("v2", stored=lambda tensors: {name: -0.0 * t.abs() for name, t in tensors.items()}).path
    with pytest.raises(CheckpointError, match=r"\d+ tensors of model.safetensors hold zeros alone: .* and \d+ more"):
        export(checkpoint, tmp_path)


def test_a_bias_may_be_zero(made, tmp_path):
    bundle = export(made("v3", stored=zeroed(BIAS)).path, tmp_path)
    assert not any("zeros" in note for note in bundle.manifest.notes)


def test_long_runs_of_zeros_are_noted(made, tmp_path, monkeypatch):
    """Chunks of a larger tensor: a shard that was cut, or the rows of tokens that nobody uses."""

    def stored(tensors):
        tensors["model.embed_tokens.weight"][24:] = 0
        return tensors

    monkeypatch.setattr("deepseek_trt.export.bundle.assemble.CHUNK", 1024)
    bundle = export(made("v2", stored=stored).path, tmp_path)
    assert "long runs of zeros in 1 tensors: model.embed_tokens.weight (50%)" in bundle.manifest.notes


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}


@pytest.mark.parametrize(
    ("code", "scale", "words"),
    [
        (0x7F, 1.0, "1 weights are NaN or infinite"),
        (0xFF, 1.0, "1 weights are NaN or infinite"),
        (0x38, float("nan"), "1024 weights are NaN or infinite"),
        (0x38, float("inf"), "weights are NaN or infinite"),
        (0x38, 0.0, "1 tensors of model.safetensors hold zeros alone"),
    ],
)
def test_fp8_codes_and_scales(made, tmp_path, code, scale, words):
    name = "model.layers.0.self_attn.o_proj.weight"

    def stored(tensors):
        codes = tensors[name].to(torch.float8_e4m3fn)
        codes.view(torch.uint8).view(-1)[0] = code
        return {**tensors, name: codes, f"{name}_scale_inv": torch.full((1, 1), scale)}

    checkpoint = made("v3", stored=stored, quantization_config=FP8, v_head_dim=16).path
    with pytest.raises(CheckpointError, match=words) as refused:
        export(checkpoint, tmp_path)
    assert name in str(refused.value)


def test_every_tensor_that_overflows_is_named(made, tmp_path):
    checkpoint = made("v2", stored=both(put(O_PROJ, 1e5, -7e4), put(NORM, 3e38))).path
    with pytest.raises(CheckpointError) as refused:
        export(checkpoint, tmp_path, dtype="float16")
    said = str(refused.value)
    assert said.startswith("3 weights overflow float16: ")
    assert f"{O_PROJ} (2)" in said
    assert f"{NORM} (1)" in said
    assert said.endswith("; use --dtype bfloat16")


class KilledError(Exception):
    pass


def test_a_killed_run_that_is_continued_knows_what_it_saw(made, tmp_path, monkeypatch):
    checkpoint = made("v2", stored=put("model.embed_tokens.weight", float("nan"))).path
    journal = tmp_path / ".out.partial" / "new" / JOURNAL_FILE
    seen = []

    def die(done):
        if journal.is_file() and journal.read_text().count("\n") >= 2:
            seen.append(journal.read_text())
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr("deepseek_trt.export.writing.working.shutil.rmtree", lambda *args, **kwargs: None)
        with pytest.raises(KilledError):
            export_bundle(ExportRequest(checkpoint, tmp_path / "out"), Reporter(advance=die))
    assert '"nonfinite": 1' in seen[0]
    with pytest.raises(CheckpointError, match="1 weights are NaN or infinite"):
        export_bundle(ExportRequest(checkpoint, tmp_path / "out"))


def test_an_export_by_reference_says_that_it_has_read_no_numbers(made, tmp_path):
    checkpoint = made("v2", stored=put(O_PROJ, float("nan"))).path
    bundle = export(checkpoint, tmp_path, by_reference=True)
    assert any("numbers were not read: validate looks for NaN" in note for note in bundle.manifest.notes)
    with pytest.raises(ConfigError, match="leave out --allow-nonfinite"):
        export(checkpoint, tmp_path / "other", by_reference=True, allow_nonfinite=True)


# Answers


class Broken(fake.FakeSession):
    """Sequences that begin with token 9 get logits that are no numbers once they are longer than `after` tokens."""

    after = 0

    def _row(self, ids, past, table):
        rows = super()._row(ids, past, table)
        if self._values(1, table)[0] != fake.value_after(0, 9, 0):
            return rows
        return [row * np.nan if past + at > self.after else row for at, row in enumerate(rows, 1)]


PARAMS = SamplingParams(6, ignore_eos=True)


@pytest.mark.parametrize("speculate", ["off", "lookup"])
@pytest.mark.parametrize(("after", "number"), [(0, 1), (3, 1), (4, 2), (6, 4)])
def test_a_row_without_numbers_is_an_error_and_the_others_go_on(after, number, speculate):
    session = Broken(30)
    session.after = after
    scheduler = Scheduler(session, fake.Config, SchedulerLimits(3, 16, 8, speculate=speculate))
    ids = [scheduler.add(prompt, PARAMS) for prompt in ((3, 4, 5), (9, 2, 2, 7), (2, 2, 9))]
    made = {request: [] for request in ids}
    while scheduler.busy:
        for event in scheduler.step():
            made[event.request].append(event)
        fake.check_pages(scheduler)
    errors = [e.error for e in made[ids[1]] if e.error]
    assert len(errors) == 1
    assert isinstance(errors[0], BackendError)
    assert f"not finite at token {number} of the answer" in str(errors[0])
    assert len(made[ids[1]]) == number
    for request, prompt in ((ids[0], (3, 4, 5)), (ids[2], (2, 2, 9))):
        tokens = list(prompt)
        for event in made[request]:
            assert event.token == int(fake.logits_after(tokens).argmax())
            tokens.append(event.token)
        assert len(tokens) == 3 + 6
    assert scheduler.pool.free == session.pages - 1


def test_what_it_cached_is_not_used_again():
    session = Broken(30)
    scheduler = Scheduler(session, fake.Config, SchedulerLimits(3, 16, 16))
    scheduler.add((9, *range(2, 12)), PARAMS)
    while scheduler.busy:
        scheduler.step()
    scheduler.add((9, *range(2, 12)), PARAMS)
    scheduler.step()
    assert scheduler.counters.reused == 0


def test_it_is_this_requests_error_in_an_llm():
    with LLM(Broken(30), fake.Config, None, SchedulerLimits(3, 16, 8)) as llm:
        events: list = []
        ticket = llm.submit((9, 2), PARAMS, events.append)
        (result,) = llm.generate([(3, 4, 5)], PARAMS)
        assert len(result.token_ids) == 6
        while not ticket.ended:
            llm._loop.step()
        assert isinstance(events[-1], BackendError)
        with pytest.raises(BackendError, match="not finite at token 1"):
            list(llm.stream((9, 2), PARAMS))
        assert len(llm.generate([(3, 4, 5)], PARAMS)[0].token_ids) == 6


@pytest.fixture
def without_numbers(made, tmp_path):
    return export(made("v2", stored=put(HEAD, float("nan"))).path, tmp_path, allow_nonfinite=True)


def test_answers_and_bench_end_with_a_sentence(without_numbers):
    path = str(without_numbers.path)
    done = CliRunner().invoke(main, ["generate", path, "--token-ids", "3,4", "--threads", "1", "--backend", "ort"])
    assert done.exit_code == 1
    assert "not finite at token 1" in done.output + str(done.exception)
    with LLM.open(path, threads=1, backend="ort") as llm, pytest.raises(BackendError, match="not finite at token 1"):
        llm.generate([(3, 4)], PARAMS)
    with pytest.raises(BackendError, match="not finite at token 1"):
        bench(BenchRequest(without_numbers.path, "ort", context=4, new_tokens=3, threads=1))


def test_scores_of_logits_that_are_no_numbers_are_refused():
    with pytest.raises(BackendError, match="logits of text 1 are not finite"):
        scores_of(np.array([[1.0, 2.0], [np.nan, 1.0]], dtype=np.float32), "softmax")


def test_json_is_json(capsys):
    print_json({"a": float("nan"), "b": [float("inf"), -float("inf"), 1.5]})
    shown = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert shown == {"a": "nan", "b": ["inf", "-inf", 1.5]}


# The proof


@pytest.fixture
def little(monkeypatch):
    monkeypatch.setattr(long_cases, "GREEDY_STEPS", 1)


def judged(bundle):
    request = ValidateRequest(bundle.path, ("exported", "torch"), threads=1, independent=False)
    report = validate_bundle(request).report
    json.loads(report.to_json(), parse_constant=pytest.fail)
    return report, render_html(report)


@pytest.mark.usefixtures("little")
def test_validate_shows_what_is_not_finite_and_fails(without_numbers):
    """Reference and candidate are NaN at the same places: 0.00 was the error, and it passed."""
    report, page = judged(without_numbers)
    assert not report.passed
    for backend in report.backends:
        logits = next(o for o in backend.outputs if o.output == "logits")
        assert not logits.passed
        assert logits.error.startswith("not finite: ")
        assert logits.nonfinite == logits.reference_nonfinite > 0
        assert logits.max_relative == float("inf")
        assert not logits.masks_differ
        assert backend.tokens.top1 == 0
    assert logits.error in page
    assert [odd.sentence for odd in report.odd_weights] == [f"weight {HEAD} holds 1 numbers that are NaN or infinite"]
    done = CliRunner().invoke(
        main, ["validate", str(without_numbers.path), "--backend", "exported", "--threads", "1", "--no-independent"]
    )
    assert done.exit_code == 3
    assert "not finite: " in " ".join(done.stdout.split())
    assert "0.00e+00" not in next(line for line in done.stdout.splitlines() if line.startswith("  logits"))


@pytest.mark.usefixtures("little")
def test_outputs_of_one_number_prove_nothing(made, tmp_path):
    report, page = judged(export(made("v2", stored=zeroed(HEAD)).path, tmp_path, allow_zeros=True))
    assert not report.passed
    logits = next(o for o in report.backends[0].outputs if o.output == "logits")
    assert (logits.passed, logits.error) == (False, "the reference is one number throughout")
    assert logits.error in page
    assert [odd.sentence for odd in report.odd_weights] == [f"weight {HEAD} holds zeros alone"]


@pytest.mark.usefixtures("little")
def test_the_numbers_of_a_checkpoint_by_reference_are_looked_at(made, tmp_path):
    bundle = export(made("v2", stored=both(put(NORM, 0.0), zeroed(EXPERT))).path, tmp_path, by_reference=True)
    report, _ = judged(bundle)
    assert not report.passed
    assert [odd.sentence for odd in report.odd_weights] == [f"weight {EXPERT} holds zeros alone"]
