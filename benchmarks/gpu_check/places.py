"""Where things lie: the checkout or the unpacked pack, and the package in it, which is not installed here."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("export", "plugins", "engines", "validate", "cli")
PREPARED = ROOT / "build" / "gpu-check"


@dataclass(frozen=True)
class Prepared:
    """What was made beforehand, as no GPU machine is asked to compile: see prepare.py."""

    folder: Path

    @property
    def libraries(self) -> Path:
        """A folder a model and dtype: the plugin library, its manifest, config.json."""
        return self.folder / "libraries"

    @property
    def demo(self) -> Path:
        """A folder a dtype: the demo model's bundle with its plugin library; and tokens.json."""
        return self.folder / "demo"

    @property
    def sites(self) -> tuple[Path, Path]:
        """Python packages that the machine may lack, as they are installed; TensorRT-RTX's apart, as they are large."""
        return self.folder / "site", self.folder / "site-rtx"


def add_package(folder: Path) -> None:
    """Make the checkout's own deepseek_trt importable, by links in `folder`; ahead of one that is installed."""
    package = folder / "deepseek_trt"
    if not package.is_dir():
        package.mkdir(parents=True)
        for source in (*(ROOT / name for name in FOLDERS), *(ROOT / "api").iterdir()):
            if source.exists() and source.name != "__pycache__":
                (package / source.name).symlink_to(source)
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = os.pathsep.join((str(folder), str(ROOT / "benchmarks")))


def name_rtx(folder: Path, sites: Iterable[Path]) -> Path:
    """A folder in which TensorRT-RTX's library has the name by which its parser opens it, where it is there at all.

    The wheel ships libtensorrt_rtx.so.1 alone. The package makes a library of the other name, which takes a compiler; a
    link on LD_LIBRARY_PATH needs none.
    """
    folder.mkdir(exist_ok=True)
    spec = importlib.util.find_spec("tensorrt_rtx_libs")
    homes = [
        *(site / "tensorrt_rtx_libs" for site in sites),
        *(Path(p) for p in (spec.submodule_search_locations or () if spec else ())),
    ]
    real = next((home / "libtensorrt_rtx.so.1" for home in homes if (home / "libtensorrt_rtx.so.1").is_file()), None)
    link = folder / "libtensorrt_rtx.so"
    if real is not None and not link.is_symlink():
        link.symlink_to(real)
    return folder
