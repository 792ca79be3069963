"""Write a tritonserver model repository that is complete in itself: model, runtime, and the scripts to serve it."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import shutil
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from deepseek_trt.engines.model_repository.config import config_pbtxt
from deepseek_trt.engines.model_repository.folder import (
    MODEL_FILE,
    VERSION,
    replace_folder,
    write_manifest,
    written_inputs,
)
from deepseek_trt.engines.model_repository.placing import carried_files, place_bundle
from deepseek_trt.engines.model_repository.runtime import GENERATOR, SYNC, runtime_files
from deepseek_trt.engines.model_repository.scripts import script_bytes, write_scripts
from deepseek_trt.engines.model_repository.served import Served, served_model
from deepseek_trt.engines.model_repository.sizes import SizeRequest
from deepseek_trt.engines.model_repository.sync import SYNC_SUFFIX, check_sync, remove_sync, sync_of
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.errors import OutputError, RequestError
from deepseek_trt.export.text.valid import check_place
from deepseek_trt.export.writing.working import locked, remove_leftover


@dataclass(frozen=True)
class RepositoryRequest:
    """Where the bundle is, where the repository goes, and the model's name in it; `sizes` are for generation.

    `link` makes hard links of the bundle's files instead of copies, on the same disk. `sync` puts NAME_sync beside a
    model that generates, for unary inference.
    """

    bundle: Path
    repository: Path
    name: str = "deepseek_v2"
    sizes: SizeRequest = field(default_factory=SizeRequest)
    link: bool = False
    sync: bool = True


@dataclass(frozen=True)
class Repository:
    """What was written; `fresh` is False where it was there already, from the same inputs.

    sync: the model beside it for unary inference, None where there is none.
    """

    path: Path
    model: Served
    fresh: bool
    sync: Served | None = None


def write_model_repository(request: RepositoryRequest) -> Repository:
    """The model as REPOSITORY/NAME beside others, which are left alone; a model of this name is replaced as a whole.

    Raises BundleError for a bundle that cannot be served, RequestError for a name or sizes that cannot be had,
    OutputError where the name is taken by something else.
    """
    _check_name(request.name)
    check_place(request.repository, OutputError)
    bundle = Bundle.open(request.bundle)
    with locked(bundle.path, shared=True):  # nobody builds plans in it while they are copied
        model = served_model(bundle, request.name, request.sizes)
        sync = sync_of(model) if model.decoupled else None
        target, beside = request.repository / request.name, request.repository / f"{request.name}{SYNC_SUFFIX}"
        check_sync(target, None)
        if sync and request.sync:
            check_sync(beside, model.name)
        fresh = _write(target, model, request.link)
        if sync and request.sync:
            fresh = _write(beside, sync, request.link) or fresh
        else:
            remove_sync(beside, model.name)
    write_scripts(request.repository)
    return Repository(request.repository, model, fresh, sync if request.sync else None)


def _write(target: Path, model: Served, link: bool) -> bool:
    """Whether the model was not there already."""
    inputs = _fingerprint(model, link)
    if written_inputs(target) == inputs:
        remove_leftover(target)
        return False
    replace_folder(target, lambda folder: _write_model(folder, model, inputs, link))
    return True


def _check_name(name: str) -> None:
    """RequestError for a name that cannot be a folder and a part of a URL."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise RequestError(f"name {name!r}: use letters, digits, '_', '-' and '.', as it becomes a folder and a URL")


def _write_model(folder: Path, model: Served, inputs: str, link: bool) -> None:
    version_folder = folder / VERSION
    if model.start != SYNC:
        place_bundle(model.bundle, model.backend, version_folder / "bundle", link)
    for relative, source in runtime_files(model.backend, model.start).items():
        target = version_folder / "runtime" / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    (version_folder / MODEL_FILE).write_bytes(_model_file(model))
    facts = {"inputs": inputs, "deepseek_trt": version("deepseek-trt"), **model.facts}
    write_manifest(version_folder, {**facts, "requirements": model.requirements})
    (folder / "config.pbtxt").write_text(config_pbtxt(model), encoding="utf-8")
    if model.readme:
        (folder / "README.md").write_text(model.readme, encoding="utf-8")


def _model_file(model: Served) -> bytes:
    """The file that checks the folder, then starts the model's module of the runtime."""
    script = script_bytes(MODEL_FILE).decode()
    assert GENERATOR in script
    return script.replace(GENERATOR, model.start).encode()


def _fingerprint(model: Served, link: bool) -> str:
    """A digest of all that decides what is written.

    That is config.pbtxt, which holds the request, the bundle's manifest and files, and this package's sources.
    """
    facts: tuple[object, ...] = (config_pbtxt(model),)
    if model.start != SYNC:
        manifest = dataclasses.replace(model.bundle.manifest, added={}).to_json()
        facts += (manifest, carried_files(model.bundle, model.backend), model.bundle.path.resolve())
    sources = [*runtime_files(model.backend, model.start).values(), *Path(__file__).parent.glob("*.py")]
    digest = hashlib.sha256(repr((facts, link)).encode())
    for data in (*(source.read_bytes() for source in sources), _model_file(model)):
        digest.update(hashlib.sha256(data).digest())
    return digest.hexdigest()
