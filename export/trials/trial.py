"""Work on foreign data that may never end or fill the memory: tried first by a script, within limits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

SECONDS = 10  # of the processor; the largest tokenizer.json known (34 MB) loads in two
_PATIENCE = 60  # seconds on the clock
MEMORY = 2 * 2**30  # bytes of address space; libraries take a tenth
_LONGEST_REASON = 200  # characters
REFUSED = 3  # exit code of a script that says why on its last line
TOKENIZER, PATTERNS = (Path(__file__).with_name(f"{name}_script.py") for name in ("tokenizer", "patterns"))


def trial(script: Path, data: bytes, seconds: int = SECONDS) -> str:
    """What keeps `script` from going through `data`, its stdin, within `seconds` of a processor and MEMORY, or nothing.

    The script sets the limits that it is given as arguments. It runs isolated: it imports nothing of the current
    folder.
    """
    command = [sys.executable, "-I", str(script), str(seconds), str(MEMORY)]
    try:
        ended = subprocess.run(command, input=data, capture_output=True, timeout=_PATIENCE, env=_environment())
    except subprocess.TimeoutExpired:
        return f"it takes more than {_PATIENCE} seconds"
    if ended.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return f"it takes more than {seconds} seconds of a processor"
    if ended.returncode == -signal.SIGABRT:
        return f"it takes more than {MEMORY // 2**30} GB of memory"
    if ended.returncode == REFUSED:
        return plain(ended.stdout.decode(errors="replace"))
    if ended.returncode:
        return f"the library that reads it ended with {ended.returncode}"
    return ""


def plain(words: str) -> str:
    """A library's words on one line, cut and escaped."""
    line = " ".join(words.split())[:_LONGEST_REASON]
    return line if line.isprintable() else repr(line)[1:-1]


def _environment() -> dict[str, str]:
    """Nothing but what Python needs to start, and one thread: every thread takes address space."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    return {**kept, "TOKENIZERS_PARALLELISM": "false", "PYTHONIOENCODING": "utf-8"}
