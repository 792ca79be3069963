"""Nothing looks up or asks anything: export, validate and generate under a tracer, where the system has no network."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deepseek_trt.export.trust.cache import cache_folder

ENOUGH = 32  # seconds that sessions live: ONNX Runtime's own look-up comes after 25
CALL = re.compile(r"\b(connect|sendto|sendmsg|sendmmsg)\((.*)")
# What a process may reach: itself, by any family, and the kernel.
LOCAL = re.compile(r"AF_UNIX|AF_NETLINK|inet_addr\(\"127\.|inet_pton\(AF_INET6, \"::1\"")
NAMES = re.compile(r"htons\(53\)|htons\(5353\)|htons\(5355\)")  # DNS and its relatives, wherever they are asked
STEPS = """
import sys, time
from pathlib import Path
from deepseek_trt import ExportRequest, LLM, SamplingParams, ValidateRequest, export_bundle, validate_bundle

checkpoint, out = map(Path, sys.argv[1:3])
export_bundle(ExportRequest(checkpoint, out))
print("exported", flush=True)
with LLM.open(out, threads=1) as llm:
    print(llm.generate([[3, 4, 5]], SamplingParams(8))[0].token_ids, flush=True)
    {validate}
    begun = time.monotonic()
    while time.monotonic() - begun < {enough}:
        llm.generate([[3, 4, 5]], SamplingParams(8))
        time.sleep(0.2)
print("generated", flush=True)
"""
VALIDATE = 'validate_bundle(ValidateRequest(out, ("ort",))); print("validated", flush=True)'


def reached(trace):
    """Lines of the tracer's file that go beyond this machine's own processes."""
    calls = [line for line in trace.read_text(errors="replace").splitlines() if CALL.search(line)]
    addressed = [line for line in calls if "sa_family" in line and "AF_UNSPEC" not in line]
    return [line for line in addressed if NAMES.search(line) or not LOCAL.search(line)]


@pytest.fixture(scope="module")
def tracer(tmp_path_factory):
    """strace's command, over files' names, in a namespace without network where that is permitted."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("there is no strace")
    if subprocess.run([strace, "-f", "-e", "trace=network", "true"], capture_output=True, check=False).returncode:
        pytest.skip("strace may not trace here")
    apart = ["unshare", "-rn"]
    if not shutil.which("unshare") or subprocess.run([*apart, "true"], capture_output=True, check=False).returncode:
        apart = []
    return [*apart, strace, "-f", "-qq", "-e", "trace=network", "-o"]


@pytest.fixture
def fresh(tmp_path):
    """An environment with a home and a cache of its own; the compiled operators are there, so as not to build them."""
    home = tmp_path / "home"
    if (cache_folder() / "cpu").is_dir():
        shutil.copytree(cache_folder() / "cpu", home / ".cache" / "deepseek-trt" / "cpu")
    removed = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "ORT_DISABLE_TELEMETRY", "HF_HOME")
    kept = {name: value for name, value in os.environ.items() if name not in removed}
    return {**kept, "HOME": str(home), "XDG_CACHE_HOME": str(home / ".cache")}


def identities(environment):
    """Files that tell one user from another."""
    found = Path(environment["HOME"]).rglob("*")
    return [p for p in found if "deviceid" in p.name or "onnxruntime" in str(p) or "Microsoft" in p.parts]


@pytest.mark.parametrize(
    "validate", [pytest.param(VALIDATE, id="with validate", marks=pytest.mark.slow), pytest.param("", id="without")]
)
def test_no_step_asks_anybody(tracer, fresh, small_v2, tmp_path, validate):
    code = STEPS.replace("{validate}", validate).replace("{enough}", str(ENOUGH))
    trace = tmp_path / "trace"
    made = subprocess.run(
        [*tracer, str(trace), sys.executable, "-c", code, str(small_v2.checkpoint), str(tmp_path / "out")],
        env=fresh,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert made.returncode == 0, made.stderr[-3000:]
    assert "generated" in made.stdout
    assert reached(trace) == []
    assert identities(fresh) == []


def test_the_tracer_sees_a_lookup(tracer, tmp_path):
    """What would be found: names that the system is asked for, by Python and by native code."""
    trace, code = tmp_path / "trace", "import socket; socket.socket(2, 2).sendto(b'x', ('198.51.100.1', 53))"
    subprocess.run([*tracer, str(trace), sys.executable, "-c", code], capture_output=True, check=False)
    assert len(reached(trace)) == 1


@pytest.mark.parametrize("module", ["deepseek_trt", "deepseek_trt.export.errors", "deepseek_trt.cli.main"])
def test_telemetry_is_off_whatever_is_imported_first(module):
    code = f"import {module}, os, sys; print(os.environ['ORT_DISABLE_TELEMETRY'], 'onnxruntime' in sys.modules)"
    kept = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    made = subprocess.run([sys.executable, "-c", code], env=kept, capture_output=True, text=True, check=True)
    assert made.stdout.split() == ["1", "False"]


def test_a_users_own_choice_stays(monkeypatch):
    kept = {**os.environ, "ORT_DISABLE_TELEMETRY": "0"}
    code = "import deepseek_trt, os; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    made = subprocess.run([sys.executable, "-c", code], env=kept, capture_output=True, text=True, check=True)
    assert made.stdout.strip() == "0"


# A served request

HARNESS = Path(__file__).parents[1] / "server" / "harness.py"
WRAPPER = """#!/usr/bin/env bash
exec {strace} -D -f -qq -e trace=network -o {trace} {server} "$@"
"""


@pytest.mark.slow
def test_a_served_request_asks_nobody(tracer, fresh, demo_checkpoint, bundle_of, tmp_path):
    """The server traced while it lives for longer than ONNX Runtime waits; its ports are on loopback."""
    import time

    from click.testing import CliRunner

    from deepseek_trt.cli.main import main

    spec = importlib.util.spec_from_file_location("harness_of_network", HARNESS)
    harness = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = harness
    spec.loader.exec_module(harness)
    if not harness.PYTHON.is_file():
        pytest.skip(f"there is no {harness.VENV.name}: make it with scripts/server-env")
    repository, trace, wrapper = tmp_path / "repository", tmp_path / "trace", tmp_path / "tritonserver"
    made = CliRunner().invoke(
        main, ["model-repository", str(bundle_of(demo_checkpoint).path), str(repository), "--threads", "1"]
    )
    assert made.exit_code == 0, made.output
    server = harness.VENV / "bin" / "tritonserver"
    wrapper.write_text(WRAPPER.format(strace=shutil.which("strace"), trace=trace, server=server))
    wrapper.chmod(0o755)
    own = {name: fresh[name] for name in ("HOME", "XDG_CACHE_HOME")}
    running = harness.Server(repository, tmp_path / "server", (f"--tritonserver={wrapper}",), environment=own).start()
    try:
        end = time.monotonic() + ENOUGH
        while time.monotonic() < end:
            assert running.generate(text_input="The number", max_tokens=4).status == 200
            time.sleep(0.2)
        assert running.stop() == 0
    finally:
        running.kill()
    assert reached(trace) == []
    assert identities(fresh) == []
