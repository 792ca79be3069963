"""What `deepseek-trt env` says is true of this machine."""

from __future__ import annotations

import json

from click.testing import CliRunner

from deepseek_trt.cli.main import main
from deepseek_trt.engines.environment import read_environment


def test_it_names_versions_processor_and_caches():
    found = read_environment()
    assert found.versions["torch"].startswith("2.")
    assert (found.cores, found.memory > 2**30) > (0, True)
    assert found.cpu
    assert found.caches["compiled operators and checked weights"].endswith("deepseek-trt")


def test_the_command_prints_it_for_people_and_machines():
    text = CliRunner().invoke(main, ["env"])
    assert text.exit_code == 0
    assert "deepseek-trt" in text.output
    facts = json.loads(CliRunner().invoke(main, ["env", "--json"]).output)
    assert facts["python"] in text.output
    assert facts["versions"].keys() >= {"torch", "onnx", "numpy"}
