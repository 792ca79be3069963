"""generate on a real terminal: a pseudo-terminal with the real command behind it, as someone types."""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

pty = pytest.importorskip("pty", reason="there are pseudo-terminals on POSIX systems alone")
START = "from deepseek_trt.cli.main import main; main(prog_name='deepseek-trt')"
TERMINAL = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)"  # what a shell does for its commands
WAIT = 60.0  # seconds before a test that waits gives up
SPEED = rb"\(\d+ tokens, [\d.]+ tokens/s, first after [\d.]+ s"
CTRL_C, CTRL_D = b"\x03", b"\x04"


class Terminal:
    """A child of ours on a terminal of its own; `read` waits for what it shows next."""

    def __init__(self, *arguments: object) -> None:
        self._seen, self._at = b"", 0
        self._fd, theirs = pty.openpty()
        start = f"{TERMINAL}; {START}"
        command = [sys.executable, "-c", start, "generate", *map(str, arguments), "--threads", "1"]
        # No fork of our own: between fork and exec this process's Python would run with its other threads gone,
        # and a lock that one of them held would never be free again.
        self._child = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, "TERM": "xterm", "LC_ALL": "C.UTF-8"},
            start_new_session=True,
        )
        os.close(theirs)

    def type(self, keys: bytes) -> None:
        os.write(self._fd, keys)

    def read(self, pattern: bytes, again: bytes = b"") -> bytes:
        """What is shown up to the next match of `pattern`; `again` is pressed while nothing comes."""
        end = time.monotonic() + WAIT
        while not (found := re.compile(pattern, re.DOTALL).search(self._seen, self._at)):
            assert time.monotonic() < end, f"no {pattern!r} in {self._seen[self._at :]!r}"
            before = len(self._seen)
            assert self._take(), f"ended without {pattern!r}: {self._seen[self._at :]!r}"
            if again and len(self._seen) == before:
                self.type(again)
        shown, self._at = self._seen[self._at : found.end()], found.end()
        return shown

    def ask(self, message: bytes) -> bytes:
        """Type a message at the prompt; what is shown up to the end of its answer."""
        self.read(b"> ")
        self.type(message + b"\n")
        return self.read(SPEED + rb"[^)]*\)")

    def code(self) -> int:
        """Wait for the end, and give the exit code."""
        while self._take():
            pass
        return self._child.wait()

    def _take(self) -> bool:
        if select.select([self._fd], [], [], 0.5)[0]:
            try:
                data = os.read(self._fd, 65536)
            except OSError:  # Linux says so where all is read and the child has ended
                return False
            self._seen += data
            return bool(data)
        return True

    def close(self) -> None:
        self._child.kill()
        self._child.wait()
        os.close(self._fd)


@pytest.fixture(scope="module")
def demo(demo_checkpoint, bundle_of) -> Path:
    return bundle_of(demo_checkpoint).path


@pytest.fixture
def terminal(demo):
    opened = []

    def start(*options: object, bundle: Path = demo) -> Terminal:
        opened.append(Terminal(bundle, *options))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


def test_a_conversation(terminal):
    """Everything that can be typed, in one start of the program."""
    shown = terminal("--max-new-tokens", 12, "--system", "Be brief.")
    assert b"backend: ort" in shown.read(b"Ctrl-D leaves")
    first = shown.ask(b"The number of")
    assert b"cut at --max-new-tokens 12" in first
    shown.ask(b"\x1b[200~a pasted\n/reset\nof lines\x1b[201~")  # as terminals mark what is pasted
    shown.ask(b"goes on \\\nhere")
    shown.read(b"> ")
    shown.type(b"half a line")
    shown.read(b"half a line")
    shown.type(CTRL_C)
    shown.read(b"> ", again=CTRL_C)  # CPython's readline misses a signal between its check and its wait for keys
    shown.type(b"\xff\xfe\n")
    assert b"not UTF-8" in shown.read(b"error: [^\n]*\n")
    shown.read(b"> ")
    shown.type(b"\n")
    shown.read(b"> ")
    shown.type(b"/unknown\n")
    shown.read(b"/unknown: no such command")
    shown.read(b"> ")
    shown.type(b"/help\n")
    shown.read(b"Ctrl-C stops an answer")
    shown.read(b"> ")
    shown.type(b"/reset\n")
    shown.read(b"is forgotten")
    again = shown.ask(b"The number of")
    assert answer(again) == answer(first)  # nothing of what was said before is left
    shown.read(b"> ")
    shown.type(CTRL_D)
    assert shown.code() == 0


def answer(shown: bytes) -> bytes:
    """Without what was typed, the terminal's own marks and the speed."""
    plain = re.sub(rb"\x1b\[[?\d;]*[a-zA-Z]|\r", b"", shown)
    return re.sub(SPEED, b"", plain.partition(b"The number of\n")[2])


def test_ctrl_c_stops_the_answer_and_not_the_program(terminal):
    shown = terminal("--max-new-tokens", 2000, "--ignore-eos")
    for _ in range(2):
        shown.read(b"> ")
        shown.type(b"The number of\n")
        shown.read(rb"of.*\w\w")  # the answer has begun
        shown.type(CTRL_C)
        shown.read(SPEED + rb", stopped\)")
    shown.read(b"> ")
    shown.type(b"/quit\n")
    assert shown.code() == 0


def test_a_conversation_that_is_too_long_goes_on_after_reset(terminal):
    """The model takes 2048 tokens: a prompt of more is refused in a sentence."""
    shown = terminal("--max-new-tokens", 40, "--ignore-eos")
    shown.ask(b"word " * 300)
    shown.read(b"> ")
    for _ in range(8):
        shown.type(b"word " * 300 + b"\n")
        said = shown.read(SPEED + rb"[^)]*\)|error: [^\n]*\n")
        shown.read(b"> ")
        if b"error: " in said:
            break
    assert b"the model takes at most 2047" in said
    assert b"/reset" in said
    shown.type(b"/reset\n")
    shown.read(b"is forgotten")
    assert b"cut at" in shown.ask(b"The number of")
    shown.read(b"> ")
    shown.type(CTRL_D)
    assert shown.code() == 0


def test_lines_are_continued_where_there_is_no_template(terminal, demo, relist, tmp_path):
    import json
    import shutil

    plain = shutil.copytree(demo, tmp_path / "plain")
    config = json.loads((plain / "tokenizer_config.json").read_text(encoding="utf-8"))
    del config["chat_template"]
    (plain / "tokenizer_config.json").unlink()
    (plain / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    relist(plain)
    shown = terminal("--max-new-tokens", 4, bundle=plain)
    shown.read(b"no chat template: each line is continued")
    shown.ask(b"The number of")
    shown.read(b"> ")
    shown.type(CTRL_D)
    assert shown.code() == 0
    asked = terminal("--chat", bundle=plain)
    asked.read(b"error: the bundle has no chat template")
    assert asked.code() == 1


def test_json_wants_a_prompt(terminal):
    assert terminal("--json").code() == 2


def test_input_that_is_no_terminal_is_one_prompt(demo):
    command = [sys.executable, "-c", START, "generate", str(demo), "--max-new-tokens", "4", "--threads", "1"]
    run = subprocess.run(command, input=b"The number\nof\n", capture_output=True, timeout=WAIT)
    assert run.returncode == 0, run.stderr
    assert re.search(rb"\n4 tokens, [\d.]+ tokens/s, first after [\d.]+ s\n$", run.stderr)


def test_what_was_said_before_is_not_computed_again(demo, monkeypatch, capsys):
    """The pages of the conversation are found by their tokens."""
    from deepseek_trt.cli.prompting.chat import Chat
    from deepseek_trt.cli.prompting.prompts import ChatOptions
    from deepseek_trt.engines.generation.batching.limits import SchedulerLimits
    from deepseek_trt.engines.generation.llm import LLM
    from deepseek_trt.engines.generation.params import SamplingParams

    lines = iter(["word " * 100, "and then?"])

    def typed(prompt: str = "") -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    with LLM.open(demo, threads=1, limits=SchedulerLimits(max_running=1), pages=40) as llm:
        Chat(llm, llm.text, SamplingParams(4), ChatOptions(system="Be brief.")).run()
        assert llm.scheduler.counters.reused >= 64
    assert capsys.readouterr().err.count("tokens/s") == 2
