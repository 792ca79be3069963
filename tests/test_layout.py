"""The shape of the project: packages, the direction of imports, what a command imports, and what a wheel holds."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import deepseek_trt

ROOT = Path(__file__).parent.parent
ORDER = ("export", "plugins", "engines", "validate", "cli")
MOST_FILES = 16  # of Python and C++ in a folder
# Tests that need a GPU or a server, or try the whole from outside.
OTHER_TESTS = ("gpu", "server", "serving", "api", "inputs", "fuzz", "hostile")
HEAVY = ("torch", "onnx", "onnxruntime", "onnxscript", "tensorrt", "tensorrt_rtx", "polygraphy", "triton", "numpy")


def project_table() -> dict:
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10: pytest brings tomli there
        import tomli as tomllib
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_packages_are_the_folders():
    setuptools = project_table()["tool"]["setuptools"]
    found = {
        "deepseek_trt." + ".".join(init.parent.relative_to(ROOT).parts)
        for folder in ORDER
        for init in (ROOT / folder).rglob("__init__.py")
    }
    assert set(setuptools["packages"]) == {"deepseek_trt", *found}
    folders = {f"deepseek_trt.{folder}": folder for folder in ORDER}
    assert setuptools["package-dir"] == {"deepseek_trt": "api", **folders}


def test_triton_is_the_one_that_torch_requires():
    """Of torch's builds those for CUDA name one version; with another beside them nothing can be installed."""
    required = [Requirement(r) for r in metadata.requires("torch") or () if r.startswith("triton")]
    if not required:
        pytest.skip("this torch is a CPU build, which requires no Triton")
    (pinned,) = (Requirement(r) for r in project_table()["project"]["dependencies"] if r.startswith("triton"))
    assert pinned.specifier == required[0].specifier


def sources() -> dict[str, Path]:
    """The product's Python files by module name; what is copied into a repository is no module of ours."""
    found = {}
    for folder in (*ORDER, "api"):
        for file in (ROOT / folder).rglob("*.py"):
            if "files" not in file.relative_to(ROOT).parts:
                parts = file.relative_to(ROOT).with_suffix("").parts
                name = ".".join(("deepseek_trt", *(parts if folder != "api" else parts[1:])))
                found[name.removesuffix(".__init__")] = file
    return found


def imported_names(file: Path) -> Iterator[tuple[str, str]]:
    """(module, name) of every import in the file, at its top or in a function."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield from ((node.module or "", alias.name) for alias in node.names)


def imported_modules(file: Path, modules: dict[str, Path]) -> set[str]:
    """Modules of the product that the file imports."""
    found = set()
    for module, name in imported_names(file):
        whole = f"{module}.{name}"
        found |= {whole} if whole in modules else {module} & modules.keys()
    return found


@pytest.mark.parametrize("folder", ORDER)
def test_imports_go_one_way(folder):
    allowed = set(ORDER[: ORDER.index(folder) + 1])
    for file in (ROOT / folder).rglob("*.py"):
        for module, name in imported_names(file):
            parts = [*module.split("."), name]
            if parts[0] == "deepseek_trt":  # api is on top: nothing below imports from it
                assert parts[1] in allowed, f"{file.relative_to(ROOT)} imports {module}.{name}"


def test_imports_have_no_circle():
    modules = sources()
    left = {name: imported_modules(file, modules) - {name} for name, file in modules.items()}
    while free := {name for name, imports in left.items() if not imports & left.keys()}:
        left = {name: imports for name, imports in left.items() if name not in free}
    assert not left, f"modules that import each other, or import such: {sorted(left)}"


def test_no_module_imports_what_is_private_to_another():
    for file in sources().values():
        for module, name in imported_names(file):
            if module.startswith("deepseek_trt") and name.startswith("_"):
                raise AssertionError(f"{file.relative_to(ROOT)} imports {module}.{name}")


def test_folders_are_small_enough_to_survey():
    for folder in {file.parent for name in (*ORDER, "api") for file in (ROOT / name).rglob("*") if file.is_file()}:
        count = sum(file.suffix in (".py", ".cpp", ".h") for file in folder.iterdir())
        assert count <= MOST_FILES, f"{folder.relative_to(ROOT)} holds {count} source files: it wants a room more"


def test_every_c_source_is_installed():
    """What lies deeper than a pattern of package-data reaches is in no wheel, and in no editable install."""
    installed = Path(deepseek_trt.__file__).parent
    for folder in ("plugins/cpu/csrc", "plugins/tensorrt/csrc"):
        ours = {file.relative_to(ROOT) for file in (ROOT / folder).rglob("*") if file.suffix in (".cpp", ".h")}
        assert ours == {f.relative_to(installed) for f in (installed / folder).rglob("*") if f.suffix in (".cpp", ".h")}


def test_tests_mirror_the_folders():
    """A folder of tests has the name of the folder that it tests."""
    for file in (ROOT / "tests").rglob("test_*.py"):
        folder = file.parent.relative_to(ROOT / "tests")
        assert folder.parts[:1] in ((), *(((name,)) for name in OTHER_TESTS)) or (ROOT / folder).is_dir(), file


def test_tests_have_no_packages():
    assert not list((ROOT / "tests").rglob("__init__.py"))


@pytest.mark.parametrize(
    "command", ["", "export", "validate", "generate", "bench", "classify", "model-repository", "serve", "build"]
)
def test_help_imports_nothing_heavy(command):
    arguments = [command, "--help"] if command else ["--help"]
    code = (
        "import sys, json\nfrom deepseek_trt.cli.main import main\n"
        f"main.main({arguments!r}, standalone_mode=False)\n"
        f"print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(run.stdout.splitlines()[-1]) == []


def test_every_command_has_help_with_an_example():
    from click.testing import CliRunner

    from deepseek_trt.cli.main import COMMANDS, main

    for name in COMMANDS:
        result = CliRunner().invoke(main, [name, "--help"])
        assert result.exit_code == 0
        assert "Example: deepseek-trt " + name in " ".join(result.output.split())


def test_the_public_names_are_there_typed_and_light():
    """Every name of deepseek_trt can be had; importing the package imports none of them."""
    code = (
        "import sys, json, deepseek_trt\n"
        f"heavy = [m for m in {HEAVY!r} if m in sys.modules]\n"
        "mine = [m for m in sys.modules if m.startswith('deepseek_trt.')]\n"
        "print(json.dumps([heavy, mine, [n for n in deepseek_trt.__all__ if getattr(deepseek_trt, n) is None]]))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == [[], [], []]
    tree = ast.parse((ROOT / "api" / "__init__.py").read_text(encoding="utf-8"))
    typed = {alias.asname for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    import deepseek_trt

    assert set(deepseek_trt.__all__) - {"__version__"} == typed - {None}
    assert (ROOT / "api" / "py.typed").is_file()


@pytest.mark.slow
def test_wheel_holds_what_is_needed(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for name in (
        "__init__.py",
        "py.typed",
        "cli/demo_model/tokenizer.json",
        "plugins/tensorrt/csrc/plugin.h",
        "export/ops/mla_decode.py",
        "plugins/cpu/csrc/linear.h",
        "engines/model_repository/files/serve.sh",
    ):
        assert f"deepseek_trt/{name}" in names
    assert not [n for n in names if not n.startswith(("deepseek_trt/", "deepseek_trt-"))]
