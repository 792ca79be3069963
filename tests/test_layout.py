"""The shape of the project: packages, the direction of imports, what a command imports, and what a wheel holds."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
ORDER = ("export", "plugins", "engines", "validate", "cli")
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
    assert set(setuptools["packages"]) == found
    assert setuptools["package-dir"] == {f"deepseek_trt.{folder}": folder for folder in ORDER}


def test_triton_is_the_one_that_torch_requires():
    """Of torch's builds those for CUDA name one version; with another beside them nothing can be installed."""
    required = [Requirement(r) for r in metadata.requires("torch") or () if r.startswith("triton")]
    if not required:
        pytest.skip("this torch is a CPU build, which requires no Triton")
    (pinned,) = (Requirement(r) for r in project_table()["project"]["dependencies"] if r.startswith("triton"))
    assert pinned.specifier == required[0].specifier


def imported_modules(file: Path) -> list[str]:
    names: list[str] = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names.append(node.module or "")
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("folder", ORDER)
def test_imports_go_one_way(folder):
    allowed = set(ORDER[: ORDER.index(folder) + 1])
    for file in (ROOT / folder).rglob("*.py"):
        for name in imported_modules(file):
            if name.startswith("deepseek_trt."):
                assert name.split(".")[1] in allowed, f"{file.relative_to(ROOT)} imports {name}"


def test_tests_have_no_packages():
    assert not list((ROOT / "tests").rglob("__init__.py"))


@pytest.mark.parametrize(
    "command", ["", "export", "validate", "generate", "bench", "classify", "model-repository", "build"]
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


@pytest.mark.slow
def test_wheel_holds_what_is_needed(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for name in (
        "cli/demo_model/tokenizer.json",
        "plugins/tensorrt/csrc/plugin.h",
        "export/ops/mla_decode.py",
        "plugins/cpu/csrc/linear.h",
        "engines/model_repository/files/serve.sh",
    ):
        assert f"deepseek_trt/{name}" in names
    assert not [n for n in names if not n.startswith(("deepseek_trt/", "deepseek_trt-"))]
