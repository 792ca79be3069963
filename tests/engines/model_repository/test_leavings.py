"""What a killed supervisor leaves is removed by the next one, and nothing of one that lives, or of others."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

FILE = Path(str(files("deepseek_trt.engines.model_repository") / "files" / "leavings.py"))
HOLD = """
import importlib.util, sys, time
from pathlib import Path
spec = importlib.util.spec_from_file_location("leavings", sys.argv[1])
leavings = importlib.util.module_from_spec(spec)
spec.loader.exec_module(leavings)
leavings.MEMORY = Path(sys.argv[2])
memory = leavings.SharedMemory(leavings.new_prefix())
(leavings.MEMORY / f"{memory.prefix}region").touch()
print(memory.prefix, flush=True)
time.sleep(600)
"""
START = """
import importlib.util, subprocess, sys, time
spec = importlib.util.spec_from_file_location("leavings", sys.argv[1])
leavings = importlib.util.module_from_spec(spec)
spec.loader.exec_module(leavings)
print(subprocess.Popen(leavings.bound(["/bin/sleep", "600"])).pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def leavings(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("leavings_of_test", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "MEMORY", tmp_path)
    return module


@pytest.fixture
def run():
    """A script as a process, and the first line that it writes."""
    started = []

    def start(script, *arguments):
        command = [sys.executable, "-c", script, FILE, *arguments]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return started[-1], started[-1].stdout.readline().strip()

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_killed_ones_shared_memory_goes_and_a_living_ones_stays(leavings, run, tmp_path):
    process, prefix = run(HOLD, tmp_path)
    leavings.clear_leavings()
    leavings.SharedMemory(prefix).clear()
    leavings.SharedMemory(prefix).release()
    assert names(tmp_path) == [f"{prefix}lock", f"{prefix}region"]
    process.kill()
    process.wait()
    leavings.clear_leavings()
    assert names(tmp_path) == []


def test_a_prefix_that_was_given_is_cleared_too(leavings, tmp_path):
    (tmp_path / "mine_region").touch()
    memory = leavings.SharedMemory("mine_")
    memory.clear()
    assert names(tmp_path) == ["mine_lock"]
    memory.release()
    memory.release()
    assert names(tmp_path) == []


def test_no_link_is_followed_and_no_folder_removed(leavings, tmp_path):
    theirs = tmp_path / "theirs"
    theirs.write_text("theirs")
    (tmp_path / "deepseek_trt_1_x_lock").symlink_to(theirs)
    (tmp_path / "deepseek_trt_2_x_lock").touch()
    (tmp_path / "deepseek_trt_2_x_folder").mkdir()
    (tmp_path / "deepseek_trt_2_x_link").symlink_to(theirs)
    os.mkfifo(tmp_path / "deepseek_trt_3_x_lock")
    leavings.clear_leavings()
    assert theirs.read_text() == "theirs"
    assert {"deepseek_trt_1_x_lock", "deepseek_trt_2_x_folder", "deepseek_trt_2_x_link"} <= set(names(tmp_path))


def test_without_shared_memory_there_is_nothing_to_do(leavings, tmp_path, monkeypatch):
    monkeypatch.setattr(leavings, "MEMORY", tmp_path / "none")
    leavings.clear_leavings()
    memory = leavings.SharedMemory("mine_")
    memory.clear()
    memory.release()


def test_a_server_dies_with_its_supervisor(run):
    process, pid = run(START)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    while os.path.exists(f"/proc/{pid}"):
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            break


def test_a_server_whose_supervisor_has_gone_does_not_begin(leavings, tmp_path):
    command = leavings.bound(["/bin/touch", str(tmp_path / "begun")])
    command[command.index(str(os.getpid()))] = "1"  # not who starts it
    assert subprocess.run(command, check=False).returncode == 0
    assert names(tmp_path) == []
    assert subprocess.run(leavings.bound(["/bin/touch", str(tmp_path / "begun")]), check=False).returncode == 0
    assert names(tmp_path) == ["begun"]
