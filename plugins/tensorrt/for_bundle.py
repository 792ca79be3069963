"""The plugin library of a bundle: its kernels compiled for some chips, linked into its plugins folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.bundle.manifest import list_added
from deepseek_trt.export.errors import BundleError, RequestError
from deepseek_trt.export.writing.working import locked
from deepseek_trt.plugins.aot.compile import compile_all
from deepseek_trt.plugins.aot.narrow_use import narrow_use
from deepseek_trt.plugins.tensorrt.library import PluginLibrary, build_library
from deepseek_trt.plugins.tensorrt.manifest import LIBRARY, MANIFEST, PLUGINS_FOLDER

_FILES = tuple(f"{PLUGINS_FOLDER}/{name}" for name in (LIBRARY, MANIFEST))
DEFAULT_SMS = (80, 86, 89, 90, 100, 120)


@dataclass(frozen=True)
class PluginRequest:
    """Build the library of the bundle in the folder `bundle` for the chips `sms`.

    fallback adds PTX, which other chips compile for themselves; cxx names a compiler to use instead of zig; `jobs`
    kernels are compiled at once.
    """

    bundle: Path
    sms: tuple[int, ...] = DEFAULT_SMS
    fallback: bool = True
    cxx: str | None = None
    jobs: int = 2

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise RequestError(f"jobs {self.jobs}: must be at least 1")


@dataclass(frozen=True)
class PluginReporter:
    """Where progress goes: `say` takes a line, `advance` kernels compiled and in all."""

    say: Callable[[str], None] = lambda line: None
    advance: Callable[[int, int], None] = lambda done, total: None


def build_plugins(request: PluginRequest, report: PluginReporter = PluginReporter()) -> PluginLibrary:
    """Compile and link; nothing where the library is there, made of the same inputs.

    Raises BundleError, BuildError, and OutputError where another process builds in the bundle.
    """
    with locked(Bundle.open(request.bundle).path):
        return build_in_locked(request, report)


def build_in_locked(request: PluginRequest, report: PluginReporter) -> PluginLibrary:
    """As `build_plugins`, for whoever has locked the bundle."""
    bundle = Bundle.open(request.bundle)
    manifest = bundle.manifest
    binaries = compile_all(
        manifest.model,
        manifest.dtype,
        request.sms,
        page_size=manifest.cache.page_size,
        jobs=request.jobs,
        on_progress=report.advance,
        fallback=request.fallback,
        narrow=narrow_use((weight.recipe for weight in manifest.weights), manifest.cache.narrow),
    )
    folder = bundle.path / PLUGINS_FOLDER
    if not is_listed(bundle):
        _clear(folder)
    made = build_library(
        binaries,
        manifest.model,
        manifest.dtype,
        folder,
        page_size=manifest.cache.page_size,
        cxx=request.cxx,
        say=report.say,
    )
    list_added(bundle.path, _FILES)
    return made


def is_listed(bundle: Bundle) -> bool:
    """Whether the bundle lists a plugin library, and it is the one that is listed."""
    return all(map(bundle.files.is_true, _FILES))


def _clear(folder: Path) -> None:
    """Remove a library that somebody else put there: it must not pass for one that is up to date."""
    if folder.is_symlink():
        raise BundleError(f"{folder} is a link: remove it, then run this again")
    for name in (LIBRARY, MANIFEST):
        (folder / name).unlink(missing_ok=True)
