"""Runs that are killed, or stopped by Ctrl-C or SIGTERM, at any moment: nothing half done, nothing left for good."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from deepseek_trt.export.bundle.folder import WEIGHTS_FILE

FEW, MANY = 3, 50
several = pytest.mark.parametrize("times", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


@dataclass(frozen=True)
class Job:
    """A command, the folder in which it makes something, and what must not be compared."""

    arguments: tuple[object, ...]
    folder: Path
    made: str
    varies: Callable[[str], bool] = lambda name: False


@pytest.fixture(scope="module")
def bundle(demo_checkpoint, bundle_of, tmp_path_factory) -> Path:
    return Path(shutil.copytree(bundle_of(demo_checkpoint).path, tmp_path_factory.mktemp("signals") / "bundle"))


def job(name: str, work: Path, checkpoint: Path, bundle: Path) -> Job:
    """The command of that name, in the empty folder `work`."""
    if name == "export":
        return Job(("export", checkpoint, work / "out"), work, "out")
    if name == "export by reference":
        return Job(("export", checkpoint, work / "out", "--by-reference"), work, "out")
    if name == "model-repository":
        return Job(("model-repository", bundle, work / "out", "--backend", "ort"), work, "out")
    own = Path(shutil.copytree(bundle, work / "bundle"))
    if name == "plugins":
        return Job(("plugins", own, "--sm", "86", "--no-fallback"), own, "plugins")
    if name == "build":
        sizes = ("--max-batch-size", "2", "--max-input-len", "32", "--max-seq-len", "64")
        return Job(("build", own, "--sm", "86", *sizes), own, ".", lambda name: ".plan" in name)  # never twice the same
    assert name == "validate"
    options = ("--backend", "ort", "--no-independent")
    return Job(("validate", own, "--report", work / "report", *options), work, "report", lambda name: "report" in name)


def kept(contents, job: Job) -> dict[str, object]:
    """What is made, its bytes where they are always the same; of a bundle's manifest what it says of such files."""
    found = contents(job.folder).items()
    return {
        name: None if job.varies(name) else manifest(data, job) if name == "manifest.json" else data
        for name, data in found
    }


def manifest(data: bytes, job: Job) -> dict[str, object]:
    raw = json.loads(data)
    changed = {name: None if job.varies(name) else digest for name, digest in raw["added"].items()}
    return {**raw, "added": changed, "sha256": None if changed != raw["added"] else raw["sha256"]}


ALL = ("model-repository", "export", "export by reference", "plugins", "build", "validate")


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_a_kill_at_any_moment(program, tmp_path, contents, demo_checkpoint, bundle, name):
    """One after the other, each on what the one before left; then a run that ends makes the same as ever."""
    (tmp_path / "usual").mkdir()
    (tmp_path / "killed").mkdir()
    usual = job(name, tmp_path / "usual", demo_checkpoint, bundle)
    moments = program.events(usual.folder, *usual.arguments)
    wanted = kept(contents, usual)
    killed = job(name, tmp_path / "killed", demo_checkpoint, bundle)
    generator = random.Random(name)
    for _ in range(MANY):
        at = generator.randint(1, moments)
        done = program.run_until(at, signal.SIGKILL, killed.folder, *killed.arguments)
        assert done.returncode in (-signal.SIGKILL, 0), done.stderr
        if killed.made == "out" and (killed.folder / "out" / "manifest.json").exists():
            assert kept(contents, killed).keys() >= wanted.keys()  # whole, beside what is hidden
            shutil.rmtree(killed.folder / "out")
    done = program.run(*killed.arguments)
    assert done.returncode == 0, done.stderr
    assert kept(contents, killed) == wanted


@several
def test_an_old_model_stays_whole_under_kills(program, tmp_path, contents, bundle, times):
    """It is replaced by one of other inputs, or it stays as it was."""
    args = (bundle, tmp_path / "out", "--backend", "ort", "--max-running")
    assert program.run("model-repository", *args, "3").returncode == 0
    model = tmp_path / "out" / "deepseek_v2"
    old = contents(model)
    moments = program.events(tmp_path, "model-repository", *args, "4")
    new = contents(model)
    states = {str(sorted(old.items())): "3", str(sorted(new.items())): "4"}
    assert len(states) == 2
    generator = random.Random(times)
    for _ in range(times):
        now = states[str(sorted(contents(model).items()))]
        other = "4" if now == "3" else "3"
        done = program.run_until(
            generator.randint(1, moments), signal.SIGKILL, tmp_path, "model-repository", *args, other
        )
        assert done.returncode in (-signal.SIGKILL, 0)
        assert str(sorted(contents(model).items())) in states
    assert program.run("model-repository", *args, "3").returncode == 0
    assert contents(model) == old
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


# Ctrl-C and SIGTERM


@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize("share", [0.2, 0.5, 0.98])
def test_a_signal_while_modules_are_imported(program, demo_checkpoint, number, share):
    moments = program.events("import", "check", demo_checkpoint)
    done = program.run_until(max(1, int(moments * share)), number, "import", "check", demo_checkpoint)
    check_stopped(done, number)


def check_stopped(done, number: signal.Signals) -> None:
    assert done.returncode == CODES[number], done.stderr
    assert done.stderr.splitlines()[-1:] == [f"stopped by {number.name}"], done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert "error:" not in done.stderr


def signal_cases() -> list[object]:
    few = [pytest.param("model-repository", number, 1) for number in CODES]
    return few + [pytest.param(name, number, 12, marks=pytest.mark.slow) for name in ALL for number in CODES]


@pytest.mark.parametrize(("name", "number", "times"), signal_cases())
def test_a_signal_at_any_moment(program, tmp_path, contents, demo_checkpoint, bundle, name, number, times):
    """One line, its exit code, and the folder as it was."""
    (tmp_path / "usual").mkdir()
    (tmp_path / "stopped").mkdir()
    usual = job(name, tmp_path / "usual", demo_checkpoint, bundle)
    moments = program.events(usual.folder, *usual.arguments)
    stopped = job(name, tmp_path / "stopped", demo_checkpoint, bundle)
    generator = random.Random(f"{name} {number}")
    for _ in range(times):
        at = generator.randint(1, moments)
        done = program.run_until(at, number, stopped.folder, *stopped.arguments)
        if program.reached(at):
            check_stopped(done, number)
        else:
            assert done.returncode == 0, done.stderr
        assert not [path for path in stopped.folder.rglob(".*") if path.name.endswith(".partial")]
        if stopped.made == "out":
            shutil.rmtree(stopped.folder / "out", ignore_errors=True)
    assert program.run(*stopped.arguments).returncode == 0
    assert kept(contents, stopped) == kept(contents, usual)


@pytest.mark.slow
@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize("name", ["plugins", "build", "validate"])
def test_a_signal_at_any_time_ends_children_too(program, tmp_path, demo_checkpoint, bundle, name, number):
    """By the clock, so that compilers and TensorRT are at work."""
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    one = job(name, tmp_path, demo_checkpoint, bundle)
    generator = random.Random(f"{name} {number}")
    for _ in range(8):
        process = program.start(*one.arguments, environment={"TMPDIR": str(scratch)})
        time.sleep(generator.uniform(0.3, 20))
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        if process.returncode == 0:  # it was done before
            continue
        assert process.returncode in (CODES[number], -number), err  # by Python itself, as a process begins or ends
        assert b"Traceback" not in err
        assert not list(scratch.glob("deepseek-trt-*"))
        assert not children_of(process.pid)


def children_of(pid: int) -> list[str]:
    """Processes that this one started, or that nobody waits for any more and compile kernels."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            environment = (folder / "environ").read_bytes()
        except OSError:
            continue
        if parent == pid or (parent == 1 and b"TRITON_DUMP_PTXAS_LOG=" in environment):
            found.append((folder / "cmdline").read_text())
    return found


@pytest.mark.parametrize("number", CODES)
def test_a_second_signal_wedges_nothing(program, demo_checkpoint, number, tmp_path):
    """Signals as fast as they go: the program ends, and with the first one's code."""
    process = program.start("export", demo_checkpoint, tmp_path / "out", "--by-reference")
    assert process.stderr is not None
    process.stderr.readline()  # it has begun
    while process.poll() is None:
        process.send_signal(number)
        time.sleep(0.001)
    assert process.returncode in (CODES[number], -number)
    assert process.stderr.read().count(b"Traceback") == 0
    process.communicate()
    assert not (tmp_path / "out").exists()


def test_nohup_is_kept(program, demo_checkpoint):
    """A signal that the caller ignores is ignored."""

    def ignore() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    settings = {"WORK": "import", "AT": "20", "SIGNAL": str(int(signal.SIGINT))}
    done = program.run("check", demo_checkpoint, environment=settings, preexec_fn=ignore)
    assert done.returncode == 0, done.stderr


def test_a_resumed_export_has_the_same_bytes(program, tmp_path, contents, demo_checkpoint):
    """Killed when half of the weights are written."""
    moments = program.events(tmp_path / "usual", "export", demo_checkpoint, tmp_path / "usual" / "out")
    folder = tmp_path / "killed"
    done = program.run_until(moments // 3, signal.SIGKILL, folder, "export", demo_checkpoint, folder / "out")
    assert done.returncode == -signal.SIGKILL
    assert list(folder.glob(".out.partial/new/*"))
    assert not (folder / "out").exists()
    assert program.run("export", demo_checkpoint, folder / "out").returncode == 0
    assert contents(folder) == contents(tmp_path / "usual")
    assert (folder / "out" / WEIGHTS_FILE).stat().st_size > 10**6
    assert os.listdir(folder) == ["out"]
