"""tritonclient.http, whose infer is unary: NAME_sync answers it, the decoupled model is known to it alone by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("http_calls.py")


@pytest.fixture
def http_call(server, run_script, tmp_path):
    """Asks through tritonclient.http: facts of the model, and an answer for each request."""
    if run_script(SCRIPT, "--help").returncode:
        pytest.skip("this .venv-server has no tritonclient.http: make it anew with scripts/server-env")
    script = shutil.copy(SCRIPT, tmp_path)

    def call(model, requests):
        job = {"url": f"127.0.0.1:{server.http}", "model": model, "requests": requests}
        (tmp_path / "job.json").write_text(json.dumps(job))
        result = run_script(Path(script), tmp_path / "job.json")
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    return call


def test_the_decoupled_model_is_ready_and_refuses_infer(http_call):
    facts, answer = http_call("deepseek_v2", [{"text_input": ["BYTES", "The number"]}])
    assert facts == {"ready": True, "name": "deepseek_v2"}
    assert "decoupled" in answer["error"]


def test_unary_infer_gives_the_whole_answer(http_call, server, repository):
    if not (repository / "deepseek_v2_sync").is_dir():
        pytest.skip("this repository has no NAME_sync")
    asked = {"text_input": ["BYTES", "The number"], "max_tokens": ["INT32", 12], "temperature": ["FP32", 0.0]}
    facts, answer, refused = http_call("deepseek_v2_sync", [asked, {**asked, "max_tokens": ["INT32", -1]}])
    want = server.generate(text_input="The number", max_tokens=12, temperature=0.0).json
    assert facts["ready"]
    assert [answer[name] for name in ("text_output", "finish_reason")] == [
        want[name] for name in ("text_output", "finish_reason")
    ]
    assert "max_tokens" in refused["error"]
