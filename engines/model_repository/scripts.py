"""The files of a repository that are not a model's: they start the server, and ask its models."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from deepseek_trt.engines.model_repository.folder import manifests
from deepseek_trt.export.bundle.interface import GENERATION
from deepseek_trt.export.writing.working import aside, locked

_SERVING = ("serve.sh", "supervise.py", "flags.py", "control.py", "probes.py", "leavings.py", "heart.py")
_SHARED = {"heart.py": "deepseek_trt.engines.serving"}  # modules of the package that supervise.py imports, too
_ASKING = ("client.py", "README.md")


def script_bytes(name: str) -> bytes:
    """A file that comes with the package."""
    if name in _SHARED:
        return files(_SHARED[name]).joinpath(name).read_bytes()
    return files("deepseek_trt.engines.model_repository").joinpath("files").joinpath(name).read_bytes()


def write_scripts(repository: Path) -> None:
    """What serves the repository, and how to ask its models that generate; those that classify say it themselves."""
    with locked(repository, wait=True):  # another run may write another model's: the last one knows them all
        _write_scripts(repository)


def _write_scripts(repository: Path) -> None:
    generators = {name: m for name, m in manifests(repository).items() if m.get("task", GENERATION) == GENERATION}
    for name in (*_SERVING, *_ASKING) if generators else _SERVING:
        data = script_bytes(name)
        if name == "README.md":
            data = _readme(data.decode(), generators).encode()
        if not (repository / name).is_file() or (repository / name).read_bytes() != data:
            with aside(repository / name) as draft:
                draft.write_bytes(data)
                draft.chmod(0o755 if name == "serve.sh" else 0o644)


def _readme(template: str, models: Mapping[str, dict[str, Any]]) -> str:
    """`@MODEL@` is the first model's name, `@MODELS@` all of them, `@REQUIREMENTS@` what the server's Python needs."""
    wanted = dict.fromkeys(package for manifest in models.values() for package in manifest["requirements"])
    filled = template.replace("@MODELS@", ", ".join(f"`{name}`" for name in models))
    filled = filled.replace("@MODEL@", next(iter(models)))
    return filled.replace("@REQUIREMENTS@", " ".join(f'"{package}"' for package in wanted))
