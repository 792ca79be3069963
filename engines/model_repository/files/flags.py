"""Flags of serve.sh: tritonserver's, with defaults of ours, and those that are ours alone. Standard library alone."""

import os
import shutil
import sys
from pathlib import Path

from leavings import new_prefix

Flags = dict[str, list[str | None]]

SHARED_PREFIX, SHARED_SIZE = "python,shm-region-prefix-name=", "python,shm-default-byte-size="
SHARED_BYTES = 16 * 2**20  # a model's; its process can crash when it must grow
# Overridden by the same flags given to serve.sh.
DEFAULTS = {
    "model-repository": str(Path(__file__).resolve().parent),
    "model-control-mode": "explicit",
    "http-address": "127.0.0.1",
    "grpc-address": "127.0.0.1",
    "metrics-address": "127.0.0.1",
    "http-port": "8000",
    "grpc-port": "8001",
    "metrics-port": "8002",
    "exit-timeout-secs": "30",
    "pinned-memory-pool-byte-size": "0",
    "allow-gpu-metrics": "false",
    "allow-sagemaker": "false",  # these two load models by paths of their own
    "allow-vertex-ai": "false",
}
OFF = ("false", "0", "off")


def say(message: str) -> None:
    print(f"serve.sh: {message}", file=sys.stderr, flush=True)


def split_flags(arguments: list[str]) -> tuple[Flags, str]:
    """Flags as lists of values by name, in order, and the server's path; `--flag value` and `--flag=value` are one."""
    flags, rest = {}, list(arguments)
    while rest:
        name, given, value = rest.pop(0).partition("=")
        if not name.startswith("--"):
            sys.exit(f"serve.sh: {name!r} is no flag: see {Path(__file__).with_name('serve.sh')}")
        if not given and rest and not rest[0].startswith("--"):
            value, given = rest.pop(0), "="
        flags.setdefault(name[2:], []).append(value if given else None)
    server = (flags.pop("tritonserver", None) or [os.environ.get("TRITONSERVER", "tritonserver")])[-1]
    return flags, server


def command_of(server: str, flags: Flags, models: list[str]) -> list[str]:
    """The server's command line: what was given, the defaults for the rest."""
    found = shutil.which(server)
    if not found:
        sys.exit(f"serve.sh: there is no {server}: give --tritonserver=PATH, or set TRITONSERVER")
    chosen = {**{name: [value] for name, value in DEFAULTS.items()}, **flags}
    chosen.setdefault("disable-auto-complete-config", [None])
    if chosen["model-control-mode"] == ["explicit"]:
        chosen.setdefault("load-model", list(models))
    given = [f"--{name}" if value is None else f"--{name}={value}" for name in chosen for value in chosen[name]]
    return [found, *given]


def reachable(address: str) -> str:
    """Where a server that listens at `address` answers."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)


def take_number(flags: Flags, name: str, least: float, most: float, default: float) -> float:
    """The last value of a flag that is not the server's, out of `flags`."""
    given = (flags.pop(name, None) or [None])[-1] if name in flags else str(default)
    try:
        number = float(given or "")
    except ValueError:
        number = -1.0
    if not least <= number <= most:
        sys.exit(f"serve.sh: --{name} {given!r}: must be a number from {least:g} to {most:g}")
    return number


def take_probe(flags: Flags) -> tuple[int, str]:
    """Port and address of the probes, 0 for none; a server without metrics has no heart that could be watched."""
    wanted, address = "probe-port" in flags, flags.pop("probe-address", None)
    port = take_number(flags, "probe-port", 1, 65535, 1)
    off = [name for name in ("allow-http", "allow-metrics") if ((flags.get(name) or [""])[-1] or "").lower() in OFF]
    if not wanted and address:
        sys.exit("serve.sh: --probe-address is given without --probe-port")
    if wanted and (port % 1 or (address and not address[-1])):
        sys.exit("serve.sh: --probe-port must be a whole number, and --probe-address an address")
    if wanted and off:
        sys.exit(f"serve.sh: --probe-port needs what --{off[0]} takes away: leave one of them out")
    if off:
        say(f"without {off[0].removeprefix('allow-')} nobody sees an engine that stands still")
    return (int(port) if wanted else 0), (address[-1] if address else None) or "127.0.0.1"


def own_shared_memory(flags: Flags) -> str:
    """The prefix of the server's shared memory, in `flags` from now on, with its size: as given, else our own."""
    given = flags.setdefault("backend-config", [])
    for name, value in (SHARED_PREFIX, new_prefix()), (SHARED_SIZE, str(SHARED_BYTES)):
        if not any((each or "").startswith(name) for each in given):
            given.append(f"{name}{value}")
    prefixes = [each.removeprefix(SHARED_PREFIX) for each in given if each and each.startswith(SHARED_PREFIX)]
    if not prefixes[-1]:  # all files there would count as the server's, and be removed
        sys.exit(f"serve.sh: --backend-config={SHARED_PREFIX}: is empty: give a prefix, or leave it out")
    return prefixes[-1]
