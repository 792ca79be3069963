"""The key that stands before tritonserver's control endpoints: made, kept, hidden. Standard library alone."""

import fcntl
import os
import re
import secrets
import stat
import sys
from contextlib import suppress
from pathlib import Path

from flags import Flags

# What runs code, maps memory or writes files, and the flags that keep it behind a header.
CONTROL = ("model-repository", "shared-memory", "trace", "logging")
HTTP_RESTRICTED, GRPC_RESTRICTED = "http-restricted-api", "grpc-restricted-protocol"
HEADER = "deepseek-trt-control"  # over gRPC with "triton-grpc-protocol-" before it
KEY = re.compile(r"[A-Za-z0-9_-]{32,256}")


def control_key(file: str | None) -> str:
    """A new key, kept in `file` as a line `header: key` that only its owner can read; or that of the file there is."""
    if not file:
        return secrets.token_hex(32)
    try:
        with suppress(FileExistsError):
            os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    except OSError as error:
        sys.exit(f"serve.sh: --control-file: {error}")
    return known_key(file) or filled_key(file)


def filled_key(file: str) -> str:
    """The key of a file that was empty: it is new, or who made it was killed."""
    try:
        with open(os.open(file, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK), "w") as made:
            fcntl.flock(made, fcntl.LOCK_EX)  # another start may do the same
            if not os.fstat(made.fileno()).st_size:
                made.write(f"{HEADER}: {secrets.token_hex(32)}\n")
    except OSError as error:
        sys.exit(f"serve.sh: --control-file {file!r}: {error}")
    return known_key(file)


def known_key(file: str) -> str:
    """The key of a file that nobody but its owner can read or write; nothing where it is empty."""
    try:
        with open(os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)) as kept:
            facts = os.fstat(kept.fileno())
            if not stat.S_ISREG(facts.st_mode) or facts.st_uid != os.geteuid() or facts.st_mode & 0o077:
                sys.exit(f"serve.sh: --control-file {file!r}: must be a file that you own and nobody else can read")
            name, _, key = kept.read(1024).strip().partition(": ")
            if not facts.st_size:
                return ""
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"serve.sh: --control-file {file!r}: {error}")
    if name != HEADER or not KEY.fullmatch(key):
        sys.exit(f"serve.sh: --control-file {file!r}: must hold one line, {HEADER}: and 32 letters or digits, or more")
    return key


def restrict(flags: Flags, key: str) -> dict[str, str]:
    """Keep control endpoints behind the key, but those that given flags restrict; the headers that HTTP asks for."""
    for flag in (HTTP_RESTRICTED, GRPC_RESTRICTED):
        given = flags.setdefault(flag, [])
        known = {api for each in given for api in (each or "").partition(":")[0].split(",")}
        ours = [api for api in CONTROL if api not in known]
        if ours:
            given.append(f"{','.join(ours)}:{HEADER}={key}")
    headers = ((each or "").partition(":")[2].partition("=") for each in flags[HTTP_RESTRICTED])
    return {name: value for name, _, value in headers}


def hide_argument(pid: int, key: str) -> bool:
    """Overwrite the key in the arguments of a process that has read them, as one with several threads has; whether it
    is gone.
    """
    try:
        facts = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        threads, first, last = int(facts[17]), int(facts[45]), int(facts[46])
        if threads < 2:
            return False
        with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
            memory.seek(first)
            words = memory.read(last - first)
            memory.seek(first)
            memory.write(words.replace(key.encode(), b"-" * len(key)))
        return key.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (OSError, ValueError, IndexError):
        return False
