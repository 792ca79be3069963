"""What all commands have: ranges of their numbers, help, --json, --quiet and --verbose."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from deepseek_trt.cli.main import COMMANDS, main
from deepseek_trt.cli.printing.watch import Watch
from deepseek_trt.engines.bench.bench import BenchRequest
from deepseek_trt.engines.sessions.opening import SessionRequest
from deepseek_trt.engines.sessions.threads import MOST_THREADS
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.errors import RequestError
from deepseek_trt.plugins.tensorrt.for_bundle import PluginRequest
from deepseek_trt.validate.request import ValidateRequest

NUMBERS = (click.types.IntParamType, click.types.FloatParamType)


def options_of(command: str) -> list[click.Option]:
    found = main.get_command(click.Context(main), command)
    return [parameter for parameter in found.params if isinstance(parameter, click.Option)]


def run(*arguments: object):
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def demo(demo_checkpoint, bundle_of) -> Path:
    return bundle_of(demo_checkpoint).path


@pytest.mark.parametrize("command", COMMANDS)
def test_every_number_has_a_range(command):
    for option in options_of(command):
        if isinstance(option.type, NUMBERS):
            assert option.type.min is not None, option.name


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_help_and_the_common_ones(command):
    found = {name: option for option in options_of(command) for name in option.opts}
    assert {"--json", "--quiet", "--verbose"} <= found.keys()
    assert not [name for name, option in found.items() if not option.help]


VALUES = ("-3", "0", "nan", "inf", "-inf", "1e400", "99999999999999999999", "x", "")


def lies_in(value: str, kind: click.ParamType) -> bool:
    if isinstance(kind, click.types.IntParamType):
        number = int(value) if value.lstrip("-").isdigit() else math.nan
    else:
        number = float(value) if value.strip("x") else math.nan
    most, above = kind.max if kind.max is not None else math.inf, number > kind.min if kind.min_open else True
    return kind.min <= number <= most and above


@pytest.mark.parametrize("command", COMMANDS)
def test_numbers_out_of_range_are_one_sentence(command):
    """Each option with each value that is not in its range, by click's own account of it; with --json, too."""
    arguments = [p.name for p in main.get_command(click.Context(main), command).params if isinstance(p, click.Argument)]
    for option in options_of(command):
        values = (v for v in VALUES if not lies_in(v, option.type)) if isinstance(option.type, NUMBERS) else ()
        for value in values:
            given = [command, *arguments, option.opts[0], value, "--json"]
            result = run(*given)
            assert result.exit_code == 2, given
            assert len(re.findall("^Error: ", result.stderr, re.MULTILINE)) == 1
            assert json.loads(result.stdout)["kind"] == "BadParameter", given


@pytest.mark.parametrize("threads", [-1, MOST_THREADS + 1, 1.5, True, "2"])
def test_the_library_refuses_threads(demo, threads):
    bundle = Bundle.open(demo)
    for request in (
        lambda: SessionRequest(bundle, 2, threads),
        lambda: BenchRequest(demo, threads=threads),
        lambda: ValidateRequest(demo, threads=threads),
    ):
        with pytest.raises(RequestError, match=f"threads {threads!r}: must lie between 0"):
            request()


def test_the_library_refuses_other_numbers(demo):
    with pytest.raises(RequestError, match="seed -1"):
        ValidateRequest(demo, seed=-1)
    with pytest.raises(RequestError, match="jobs 0"):
        PluginRequest(demo, jobs=0)


@pytest.mark.parametrize(
    ("arguments", "code", "kind"),
    [
        (["check", "/nowhere"], 1, "CheckpointError"),
        (["export", "/nowhere", "OUT"], 1, "CheckpointError"),
        (["validate", "/nowhere"], 1, "BundleError"),
        (["plugins", "/nowhere"], 1, "BundleError"),
        (["build", "/nowhere", "--sm", "86"], 1, "BundleError"),
        (["generate", "/nowhere", "--prompt", "x"], 1, "BundleError"),
        (["bench", "/nowhere"], 1, "BundleError"),
        (["model-repository", "/nowhere", "OUT"], 1, "BundleError"),
        (["classify", "/nowhere", "--text", "x"], 1, "BundleError"),
        (["generate", "BUNDLE"], 2, "UsageError"),
        (["check"], 2, "MissingParameter"),
        (["check", "/nowhere", "--unheard-of"], 2, "NoSuchOption"),
        (["unheard-of"], 2, None),
        (["validate", "BUNDLE", "--report", "/dev/null/report"], 1, "OutputError"),
        (["validate", "BUNDLE", "--text", "/nowhere"], 1, None),
        (["validate", "BUNDLE", "--backend", "ort", "--backend", "tensorrt"], 1, "BundleError"),
    ],
)
def test_errors_as_json(demo, tmp_path, arguments, code, kind):
    places = {"BUNDLE": demo, "OUT": tmp_path / "out"}
    result = run(*(places.get(a, a) for a in arguments), "--json")
    assert result.exit_code == code, result.output
    found = json.loads(result.stdout)
    assert found["error"] in result.stderr
    assert found["kind"] == kind or kind is None
    assert not run(*(places.get(a, a) for a in arguments)).stdout


def test_what_the_system_refuses_is_a_sentence(demo, tmp_path):
    (tmp_path / "file").write_text("")
    result = run("demo", tmp_path / "file" / "demo")
    assert (result.exit_code, "Not a directory" in result.stderr) == (1, True)


def test_quiet_leaves_the_answer(demo):
    options = ("--prompt", "The number of", "--max-new-tokens", 4)
    loud, quiet = run("generate", demo, *options), run("generate", demo, *options, "--quiet")
    assert quiet.exit_code == 0, quiet.output
    assert (quiet.stdout, quiet.stderr) == (loud.stdout, "")
    assert run("--quiet", "generate", demo, *options).stderr == ""
    assert run("generate", "/nowhere", *options, "--quiet").stderr.startswith("error: ")


def test_verbose_times_each_step(demo):
    result = run("generate", demo, "--prompt", "The number of", "--max-new-tokens", 4, "--verbose")
    times = [line for line in result.stderr.splitlines() if re.match(r"\d+\.\d\d s", line)]
    assert [line.partition(" ")[2] for line in times[1:-2]] == [
        "s: opening the bundle and its text files",
        "s: loading the weights",
    ]
    assert times[-1].endswith("in all")
    assert "in all" in run("--verbose", "check", demo).stderr
    assert "in all" not in run("check", demo).stderr
    assert run("check", demo, "--quiet", "--verbose").exit_code == 2
    assert run("--quiet", "check", demo, "--verbose").exit_code == 2


def test_a_watch_counts_each_step_once():
    seconds, lines = iter([0.0, 1.0, 3.5, 7.0, 7.0]), []
    watch = Watch(lines.append, lambda: next(seconds))
    watch.next("a")
    watch.next("b")
    watch.end()
    assert lines == ["1.00 s: start", "2.50 s: a", "3.50 s: b", "7.00 s in all"]


def test_export_makes_the_parents_of_its_folder_and_leaves_none_on_failure(small_v2, tmp_path, monkeypatch):
    from deepseek_trt.export import exporter

    inside = tmp_path / "a" / "b" / "bundle"
    monkeypatch.setattr(exporter, "_trace_to_file", None)
    with pytest.raises(TypeError):
        exporter.export_bundle(exporter.ExportRequest(small_v2.checkpoint, inside))
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    exporter.export_bundle(exporter.ExportRequest(small_v2.checkpoint, inside))
    assert [p.name for p in inside.parent.iterdir()] == ["bundle"]


def test_dropped_tensors_are_a_line_for_each_reason():
    from deepseek_trt.cli.printing.output import dropped_lines
    from deepseek_trt.export.bundle.recipes import Dropped

    found = dropped_lines(
        [Dropped("a", "multi-token prediction"), Dropped("b", "multi-token prediction"), Dropped("c", "x")]
    )
    assert found == ["dropped: 2 tensors: multi-token prediction", "dropped: 1 tensor: x"]


def test_a_bundle_is_no_checkpoint(demo, tmp_path):
    for arguments in (("check", demo), ("export", demo, tmp_path / "out")):
        result = run(*arguments)
        assert (result.exit_code, "is a bundle that deepseek-trt export wrote" in result.stderr) == (1, True)


def test_the_demo_hands_its_options_on(tmp_path, monkeypatch):
    from deepseek_trt.cli import demo as module

    monkeypatch.setattr(module, "demo_steps", lambda checkpoint, folder: (("check", str(checkpoint)),))
    result = run("demo", tmp_path / "demo", "--json", "--quiet")
    assert (result.exit_code, result.stderr) == (0, "")
    assert json.loads(result.stdout)["facts"]["task"] == "text-generation"
    shutil.rmtree(tmp_path / "demo")
