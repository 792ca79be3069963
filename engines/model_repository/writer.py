"""Write a tritonserver model repository that is complete in itself: model, runtime, and the scripts to serve it."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from deepseek_trt.engines.generation.text import Text
from deepseek_trt.engines.model_repository.config import MODEL_FILE, config_pbtxt
from deepseek_trt.engines.model_repository.placing import bundle_files, place_bundle, plan_files
from deepseek_trt.engines.model_repository.runtime import REQUIREMENTS, runtime_files
from deepseek_trt.engines.model_repository.sizes import SizeRequest, settings_for
from deepseek_trt.engines.serving.settings import ServingSettings
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.bundle.interface import GENERATION
from deepseek_trt.export.errors import BundleError, OutputError, RequestError
from deepseek_trt.export.files import aside, file_sha256

MANIFEST = "manifest.json"
VERSION = "1"
_SERVING = ("serve.sh", "supervise.py")
_SCRIPTS = (*_SERVING, "client.py", "README.md")


@dataclass(frozen=True)
class RepositoryRequest:
    """Where the bundle is, where the repository goes, and the model's name in it."""

    bundle: Path
    repository: Path
    name: str = "deepseek_v2"
    sizes: SizeRequest = field(default_factory=SizeRequest)


@dataclass(frozen=True)
class Repository:
    """What was written; `fresh` is False where it was there already, from the same inputs."""

    path: Path
    name: str
    settings: ServingSettings
    requirements: tuple[str, ...]
    fresh: bool


def write_model_repository(request: RepositoryRequest) -> Repository:
    """The model as REPOSITORY/NAME beside others, which are left alone; a model of this name is replaced as a whole.

    Raises BundleError for a bundle that cannot be served, OutputError where the name is taken by something else.
    """
    bundle = _servable(request.bundle)
    check_name(request.name)
    settings = settings_for(bundle, request.sizes)
    target = request.repository / request.name
    inputs = _fingerprint(request.name, bundle, settings)
    requirements = REQUIREMENTS[settings.backend]
    fresh = written_inputs(target) != inputs
    if fresh:
        request.repository.mkdir(parents=True, exist_ok=True)
        replace_folder(target, lambda folder: _write_model(folder, request.name, bundle, settings, inputs))
    write_scripts(request.repository)
    return Repository(request.repository, request.name, settings, requirements, fresh)


def write_manifest(version_folder: Path, facts: dict[str, Any]) -> None:
    """manifest.json over all files that are in the folder now, and `facts`."""
    names = sorted(path.relative_to(version_folder).as_posix() for path in version_folder.rglob("*") if path.is_file())
    names = [name for name in names if name != MANIFEST and "__pycache__" not in name]
    with ThreadPoolExecutor() as threads:
        digests = threads.map(lambda name: file_sha256(version_folder / name), names)
        manifest = {**facts, "files": dict(zip(names, digests, strict=True))}
    (version_folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _servable(path: Path) -> Bundle:
    bundle = Bundle.open(path)
    if bundle.manifest.generation_refusal:
        raise BundleError(f"{path} cannot be served: {bundle.manifest.generation_refusal}")
    if bundle.manifest.by_reference:
        raise BundleError(
            f"{path} refers to {bundle.manifest.checkpoint} for its weights: export without --by-reference"
        )
    Text(bundle)  # BundleError where there is no tokenizer
    return bundle


def check_name(name: str) -> None:
    """RequestError for a name that cannot be a folder and a part of a URL."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise RequestError(f"name {name!r}: use letters, digits, '_', '-' and '.', as it becomes a folder and a URL")


def _write_model(folder: Path, name: str, bundle: Bundle, settings: ServingSettings, inputs: str) -> None:
    version_folder = folder / VERSION
    (version_folder / "bundle").mkdir(parents=True)
    place_bundle(bundle, settings.backend, version_folder / "bundle")
    for relative, source in runtime_files(settings.backend).items():
        target = version_folder / "runtime" / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    (version_folder / MODEL_FILE).write_bytes(script_bytes(MODEL_FILE))
    facts = {
        "inputs": inputs,
        "deepseek_trt": version("deepseek-trt"),
        "requirements": REQUIREMENTS[settings.backend],
    }
    write_manifest(version_folder, facts)
    (folder / "config.pbtxt").write_text(config_pbtxt(name, bundle, settings), encoding="utf-8")


def _fingerprint(name: str, bundle: Bundle, settings: ServingSettings) -> str:
    """Of all that decides what is written: settings, the bundle's files by size and time, this package's sources."""
    carried = [*bundle_files(bundle), *(plan_files(bundle) if settings.backend == "tensorrt" else ())]
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in carried]
    sources = [*runtime_files(settings.backend).values(), *Path(__file__).parent.glob("*.py")]
    digest = hashlib.sha256(repr((name, settings, stats)).encode())
    for data in (*(source.read_bytes() for source in sources), script_bytes(MODEL_FILE)):
        digest.update(hashlib.sha256(data).digest())
    return digest.hexdigest()


def written_inputs(target: Path) -> str | None:
    """The fingerprint of what is there; OutputError where something else is."""
    if not target.exists():
        return None
    try:
        written = json.loads((target / VERSION / MANIFEST).read_text(encoding="utf-8"))["inputs"]
        return str(written) if (target / "config.pbtxt").is_file() else None
    except (OSError, ValueError, KeyError, TypeError):
        raise OutputError(
            f"{target} is there and is no model of deepseek-trt's: move it away, or give --name"
        ) from None


def replace_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Written under another name, then renamed: a server never sees half a model."""
    fresh, old = (target.with_name(f".{target.name}.{kind}") for kind in ("tmp", "old"))
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir()
    try:
        write(fresh)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    if target.exists():
        target.rename(old)
    fresh.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def write_scripts(repository: Path) -> None:
    """What serves the repository, and how to ask its models that generate; those that classify say it themselves."""
    models = [path.parent for path in repository.glob("*/config.pbtxt") if not path.parent.name.startswith(".")]
    names = sorted(model.name for model in models if _task(model) == GENERATION)
    for name in _SCRIPTS if names else _SERVING:
        data = script_bytes(name)
        if name == "README.md":
            data = _readme(data.decode(), repository, names).encode()
        if not (repository / name).is_file() or (repository / name).read_bytes() != data:
            with aside(repository / name) as draft:
                draft.write_bytes(data)
                draft.chmod(0o755 if name == "serve.sh" else 0o644)


def _task(model: Path) -> str:
    manifest = json.loads((model / VERSION / MANIFEST).read_text(encoding="utf-8"))
    return str(manifest.get("task", GENERATION))


def _readme(template: str, repository: Path, names: Iterable[str]) -> str:
    """`@MODEL@` is the first model's name, `@MODELS@` all of them, `@REQUIREMENTS@` what the server's Python needs."""
    wanted: dict[str, None] = {}
    for name in names:
        manifest = json.loads((repository / name / VERSION / MANIFEST).read_text(encoding="utf-8"))
        wanted.update(dict.fromkeys(manifest["requirements"]))
    filled = template.replace("@MODELS@", ", ".join(f"`{name}`" for name in names))
    filled = filled.replace("@MODEL@", next(iter(names)))
    return filled.replace("@REQUIREMENTS@", " ".join(f'"{each}"' for each in wanted))


def script_bytes(name: str) -> bytes:
    """A file that comes with the package."""
    return files("deepseek_trt.engines.model_repository").joinpath("files").joinpath(name).read_bytes()
