"""The runtime that goes into a repository: the modules that serving imports, found by reading their imports."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "deepseek_trt"
# Packages that the server's Python must have; tensorrt's are for a GPU machine.
_ALWAYS = ("numpy>=1.26,<2", "tokenizers>=0.21,<1", "jinja2>=3.1.6,<4", "ml_dtypes>=0.5,<1")
_REQUIREMENTS = {
    "ort": (*_ALWAYS, "onnxruntime>=1.23,<2"),
    "tensorrt": (*_ALWAYS, "cuda-bindings>=12.9,<14"),  # and the TensorRT that built the plans
}
_GUIDED = ("llguidance>=1.9,<2",)  # makes the masks of guided answers
GENERATOR = f"{PACKAGE}.engines.serving.triton_model"
SYNC = f"{PACKAGE}.engines.serving.sync_model"
CLASSIFIER = f"{PACKAGE}.engines.serving.classifier_model"
_OF_SYNC = ("numpy>=1.26,<2",)
# Imported by functions that the backend does not call.
_LEFT_OUT = {
    "ort": (
        "export.heads",
        "export.passes.widen",
        "plugins.cpu.fuse",
        "engines.sessions.torch",
        "engines.sessions.tensorrt.session",
    ),
    "tensorrt": ("engines.sessions.torch", "engines.sessions.ort"),
}


def requirements_of(backend: str, start: str) -> tuple[str, ...]:
    """Packages that the server's Python must have for the module `start` with this backend."""
    if start == SYNC:
        return _OF_SYNC
    return _REQUIREMENTS[backend] + (_GUIDED if start == GENERATOR else ())


def runtime_files(backend: str, start: str = GENERATOR) -> dict[str, Path]:
    """Map paths under runtime/ to the sources of the modules that the server imports for `start` with this backend."""
    modules: dict[str, Path] = {}
    _gather(start, modules, {f"{PACKAGE}.{name}" for name in _LEFT_OUT[backend]})
    return {_relative(name, path): path for name, path in sorted(modules.items())}


def _gather(name: str, modules: dict[str, Path], left_out: set[str]) -> None:
    """Add `name`, its packages (the root, too: an installed one must not stand before it), and all that they import."""
    if not name or name in modules or name in left_out:
        return
    path = _source(name)
    if path is None:  # a name in a module, not a module
        return
    modules[name] = path
    _gather(name.rpartition(".")[0], modules, left_out)
    for imported in _imports(path):
        _gather(imported, modules, left_out)


def _source(name: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        return None
    return Path(spec.origin) if spec and spec.origin else None


def _imports(path: Path) -> Iterator[str]:
    """Yield names under the package that the file imports, at its top or in a function."""
    nodes: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue  # nothing at run time
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith(PACKAGE))
        nodes.extend(ast.iter_child_nodes(node))


def _relative(name: str, path: Path) -> str:
    folders = name.replace(".", "/")
    return f"{folders}/__init__.py" if path.name == "__init__.py" else f"{folders}.py"
