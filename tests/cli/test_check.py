"""deepseek-trt check"""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from deepseek_trt.cli.main import main


@pytest.fixture
def run(small_v2):
    def call(*options, checkpoint=small_v2.checkpoint):
        return CliRunner().invoke(main, ["check", str(checkpoint), *options])

    return call


def test_tables(run):
    result = run()
    assert result.exit_code == 0
    for words in ("parameters", "group_limited_greedy", "saved by latents", "export --by-reference", "on 80 GiB"):
        assert words in result.stdout


def test_json(run):
    result = run("--json", "--gpu-memory", "24", "--dtype", "float32")
    facts = json.loads(result.stdout)["facts"]
    assert facts["dtype"] == "float32"
    assert facts["cache_bytes_per_token"] == 3 * (32 + 16) * 4
    assert 0 < facts["cache_saving"] < 1


def test_refusals_are_named(run, tmp_path, small_v2):
    config = {**small_v2.raw, "use_mla": False, "topk_method": "hash"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = run(checkpoint=tmp_path)
    assert result.exit_code == 1
    assert "use_mla" in result.stderr
    assert "topk_method 'hash'" in result.stderr
    assert len(json.loads(run("--json", checkpoint=tmp_path).stdout)["unsupported"]) == 2


def test_no_checkpoint(run, tmp_path):
    result = run(checkpoint=tmp_path / "none")
    assert result.exit_code == 1
    assert "config.json is missing" in result.stderr


def test_refused_steps_are_named_in_place_of_their_sizes(run, tmp_path, small_v2):
    config = {**small_v2.raw, "hidden_act": "gelu"}
    for file in small_v2.checkpoint.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    printed = run(checkpoint=tmp_path).stdout
    assert "refused: engines on a GPU, without cache: hidden_act is 'gelu'" in printed
    assert "sequences at once" not in printed
    needs = json.loads(run("--json", checkpoint=tmp_path).stdout)["facts"]["needs"]
    assert [need["step"] for need in needs if need["refused"]] == ["engines on a GPU, without cache"]
