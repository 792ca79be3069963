"""A real tritonserver over two models: the demo model, and one that recites texts known beforehand."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from deepseek_trt.cli.main import main


def _load(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


harness = _load("harness")
reciter = _load("reciter")


def _cli(*arguments):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="session")
def run_cli():
    """Runs deepseek-trt with these arguments; it must succeed."""
    return _cli


@pytest.fixture(scope="session")
def joined():
    """The text of a stream's events."""
    return harness.joined


@pytest.fixture(scope="session")
def recited():
    """What the reciter answers to a prompt of a text's name in angle brackets."""
    return reciter.TEXTS


@pytest.fixture(scope="session")
def run_script():
    """Runs a file with the server's Python, away from the sources."""

    def run(file, *arguments):
        command = [str(harness.PYTHON), str(file), *map(str, arguments)]
        return subprocess.run(command, cwd=file.parent, env={}, capture_output=True, text=True, timeout=120)

    return run


@pytest.fixture(scope="session")
def server_of():
    """The harness's Server, for repositories of a test's own."""
    return harness.Server


@pytest.fixture(scope="session")
def server_environment():
    if not harness.PYTHON.is_file():
        pytest.skip(f"there is no {harness.VENV.name}: make it with scripts/server-env")


@pytest.fixture(scope="session")
def demo_bundle(bundle_of, demo_checkpoint):
    return bundle_of(demo_checkpoint)


@pytest.fixture(scope="session")
def repository(server_environment, demo_bundle, small_v2, bundle_of, tmp_path_factory):
    """Both models in one repository."""
    folder = tmp_path_factory.mktemp("served")
    recited = bundle_of(reciter.write(folder / "reciter", small_v2.checkpoint), dtype="float32", allow_zeros=True)
    _cli("model-repository", demo_bundle.path, folder / "repository", "--threads", 1)
    _cli("model-repository", recited.path, folder / "repository", "--name", "reciter", "--threads", 1)
    return folder / "repository"


@pytest.fixture(scope="session")
def server(repository, tmp_path_factory):
    """For tests that leave it as it was."""
    running = harness.Server(repository, tmp_path_factory.mktemp("server"), models=(harness.MODEL, "reciter")).start()
    yield running
    running.kill()


@pytest.fixture(scope="session")
def demo_repository(server_environment, demo_bundle, tmp_path_factory):
    """The demo model alone, with room for few requests."""
    folder = tmp_path_factory.mktemp("demo") / "repository"
    _cli("model-repository", demo_bundle.path, folder, "--threads", 1, "--max-inflight", 4)
    return folder


@pytest.fixture
def own_repository(demo_repository, tmp_path):
    """A copy to spoil."""
    return Path(shutil.copytree(demo_repository, tmp_path / "repository"))


@pytest.fixture
def serve(tmp_path):
    """Starts servers that end with the test: serve(repository, *flags)."""
    started = []

    def start(repository, *flags, **options):
        started.append(harness.Server(repository, tmp_path / f"server{len(started)}", flags, **options))
        return started[-1].start()

    yield start
    for each in started:
        each.kill()


@pytest.fixture
def grpc_call(server):
    """Asks over gRPC: grpc_call([{input: value}], model=..., cancel_after=...) gives each request's responses."""

    def call(requests, model=harness.MODEL, on=server, **options):
        job = {"url": f"127.0.0.1:{on.grpc}", "model": model, "requests": requests, **options}
        return harness.run_grpc(job)

    return call
