"""What a killed supervisor would leave: its server, which dies with it; shared memory, which the next start removes.

Standard library alone. Shared memory is known by a prefix of its names. A file of that prefix is locked as long as the
supervisor lives; the lock ends with the process, however that ends, so that what no lock guards is nobody's any more.
"""

import fcntl
import os
import secrets
import stat
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

MEMORY = Path("/dev/shm")
OURS, LOCK = "deepseek_trt_", "lock"
# The kernel kills the server when its parent dies (prctl's PR_SET_PDEATHSIG, 1), and one whose parent has died already
# does not begin.
BOUND = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""

# A process of the Python backend that has not come to its model yet waits for a dead server for ever: when the
# supervisor has ended, however, this ends all that is left of the server's process group.
GUARD = """
import os, sys
sys.stdin.buffer.read()
try:
    os.killpg(int(sys.argv[1]), 9)
except ProcessLookupError:
    pass
"""


def bound(command: list[str]) -> list[str]:
    """A command line that becomes `command`, and does not outlive this process."""
    return [sys.executable, "-I", "-S", "-c", BOUND, str(os.getpid()), *command]


def guard(group: int) -> subprocess.Popen[bytes]:
    """A process that outlives this one, and ends the group as soon as its standard input is closed."""
    command = [sys.executable, "-I", "-S", "-c", GUARD, str(group)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def new_prefix() -> str:
    """Of this process alone, in whatever container; the number is for people."""
    return f"{OURS}{os.getpid()}_{secrets.token_hex(4)}_"


class SharedMemory:
    """The files of a prefix, this process's own once it has the lock. Who has it not touches none."""

    def __init__(self, prefix: str, make: bool = True) -> None:
        self.prefix = prefix
        self._file = MEMORY / f"{prefix}{LOCK}"
        self._lock = _locked(self._file, os.O_CREAT if make else 0)

    def clear(self) -> None:
        """Remove them, but for the lock."""
        if self._lock is not None:
            for file in MEMORY.iterdir():
                if file.name.startswith(self.prefix) and file != self._file and _is_own(file):
                    file.unlink(missing_ok=True)

    def release(self) -> None:
        """Remove all of them."""
        if self._lock is not None:
            self.clear()
            self._file.unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None


def clear_leavings() -> None:
    """Remove shared memory of supervisors that were killed."""
    for file in MEMORY.glob(f"{OURS}*_{LOCK}"):
        SharedMemory(file.name.removesuffix(LOCK), make=False).release()


def _locked(file: Path, flags: int) -> int | None:
    """A descriptor that holds the lock; None where another process has it, or it is another user's."""
    while True:
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | flags, 0o600)
        except OSError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_uid == os.geteuid() and os.path.samestat(os.fstat(descriptor), file.lstat()):
                return descriptor
            missing = False
        except FileNotFoundError:  # whoever had it has just removed it
            missing = True
        except OSError:
            missing = False
        os.close(descriptor)
        if not missing:
            return None


def _is_own(file: Path) -> bool:
    with suppress(OSError):
        facts = file.lstat()
        return stat.S_ISREG(facts.st_mode) and facts.st_uid == os.geteuid()
    return False
