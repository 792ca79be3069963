"""What a port gives to whoever reaches it: inference, and nothing that runs code, writes files or maps memory."""

from __future__ import annotations

import base64
import json
import os
import signal
from pathlib import Path

import pytest

ATTACK = b"""
import pathlib
pathlib.Path({mark!r}).write_text("code ran")
class TritonPythonModel:
    def execute(self, requests):
        return []
"""
CONFIG = {"backend": "python", "max_batch_size": 0, "input": [], "output": []}


def attack(mark):
    """A request that loads a model of the sender's own code."""
    code = ATTACK.decode().format(mark=str(mark)).encode()
    files = {"file:1/model.py": base64.b64encode(code).decode()}
    return {"parameters": {"config": json.dumps({**CONFIG, "name": "evil"}), **files}}


def refused(reply):
    return reply.status == 403 and "restricted" in str(reply.json)


@pytest.mark.parametrize("headers", [{}, {"deepseek-trt-control": "x"}, {"deepseek-trt-control": ""}])
@pytest.mark.parametrize("name", ["evil", "deepseek_v2"])
def test_code_in_a_load_request_does_not_run(server, tmp_path, name, headers):
    mark = tmp_path / "mark"
    assert refused(server.post(f"/v2/repository/models/{name}/load", attack(mark), headers))
    assert not mark.exists()
    assert server.ready()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v2/repository/index", {}),
        ("/v2/repository/models/deepseek_v2/load", {}),
        ("/v2/repository/models/deepseek_v2/unload", {}),
        ("/v2//repository/index", {}),
        ("/v2/repository/index?x=1", {}),
        ("/v2/%72epository/index", {}),
        ("/v2/logging", {"log_file": "{mark}"}),
        ("/v2/logging", {"log_verbose_level": 9}),
        ("/v2/trace/setting", {"trace_file": "{mark}", "trace_level": ["TIMESTAMPS"], "trace_rate": "1"}),
        ("/v2/models/deepseek_v2/trace/setting", {"trace_file": "{mark}", "trace_level": ["TIMESTAMPS"]}),
        ("/v2/models/deepseek_v2/versions/1/trace/setting", {"trace_file": "{mark}"}),
        ("/v2/systemsharedmemory/region/a/register", {"key": "/{shared}", "offset": 0, "byte_size": 64}),
        ("/v2/systemsharedmemory/unregister", {}),
        ("/v2/cudasharedmemory/region/a/register", {"raw_handle": {"b64": "AA=="}, "device_id": 0, "byte_size": 64}),
        ("/v2/cudasharedmemory/unregister", {}),
    ],
)
def test_control_endpoints_are_refused(server, tmp_path, path, body):
    mark = tmp_path / "mark"
    filled = json.dumps(body).replace("{mark}", str(mark)).replace("{shared}", server.shared)
    reply = server.post(path, filled.encode())
    assert refused(reply) or reply.status in (400, 404, 405)
    assert refused(reply) or ("//" in path or "%" in path or "versions" in path)
    assert server.generate(text_input="The", max_tokens=4).status == 200
    assert not mark.exists()


@pytest.mark.parametrize(
    "path",
    ["/v2/logging", "/v2/trace/setting", "/v2/systemsharedmemory/status", "/v2/cudasharedmemory/status"],
)
def test_control_endpoints_are_not_read(server, path):
    assert refused(server.get(path))


def test_what_clients_need_is_open(server):
    for path in (
        "/v2",
        "/v2/health/live",
        "/v2/health/ready",
        "/v2/models/deepseek_v2",
        "/v2/models/deepseek_v2/config",
    ):
        assert server.get(path).status == 200
    assert server.metrics()


def test_over_grpc(server, run_script, tmp_path):
    """Every call of tritonclient that controls: refused without the key, answered with it."""
    mark, job = tmp_path / "mark", tmp_path / "job.json"
    job.write_text(json.dumps({"url": f"127.0.0.1:{server.grpc}", "mark": str(mark), **server.control()}))
    made = run_script(Path(__file__).with_name("grpc_control.py"), job)
    assert made.returncode == 0, made.stderr
    answers = json.loads(made.stdout)
    assert len(answers["refused"]) == 13
    assert all("restricted" in words for words in answers["refused"].values()), answers
    assert answers["with the key"] == ["deepseek_v2", "deepseek_v2_sync", "reciter", "reciter_sync"]
    assert not mark.exists()
    assert server.ready()


def test_the_key_is_in_no_command_line_and_no_log(server):
    (key,) = server.control().values()
    assert len(key) >= 32
    assert server.control_file.stat().st_mode & 0o077 == 0
    assert server.wait_for(lambda: key.encode() not in Path(f"/proc/{server.server_pid()}/cmdline").read_bytes())
    for pid in (server.process.pid, server.server_pid(), *server.stub_pids()):
        assert key.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
        assert key.encode() not in Path(f"/proc/{pid}/environ").read_bytes()
    assert key not in server.log()


def test_the_same_key_after_a_crash_and_the_supervisor_still_ends_in_order(serve, demo_repository):
    server = serve(demo_repository)
    os.kill(server.server_pid(), signal.SIGSEGV)
    assert server.wait_for(lambda: "starting it again" in server.log())
    assert server.wait_for(lambda: server.ready() and bool(server.stub_pids()))
    assert server.manage("load").status == 200
    assert server.stop() == 0
    assert "is not unloaded" not in server.log()
    assert server.left == []


def test_given_flags_stand_before_the_key(serve, demo_repository):
    """A group of the user's own keeps what it names; the supervisor unloads with it."""
    server = serve(demo_repository, "--http-restricted-api=model-repository:mine=open sesame")
    path = "/v2/repository/index"
    assert refused(server.post(path, {}, server.control()))
    assert server.post(path, {}, {"mine": "open sesame"}).status == 200
    assert refused(server.get("/v2/logging"))
    assert server.stop() == 0
    assert "is not unloaded" not in server.log()
