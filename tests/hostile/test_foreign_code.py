"""Code that lies about: modules in the current folder, and variables that bring code in, are not run."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from deepseek_trt.export.config.model_config import ModelConfig
from deepseek_trt.export.errors import BuildError
from deepseek_trt.plugins import isolated
from deepseek_trt.plugins.aot import compile as aot
from deepseek_trt.plugins.aot.variants import variants_for
from deepseek_trt.plugins.aot.worker import Request
from deepseek_trt.plugins.cxx import find_compiler

MODULES = (
    "pickle",
    "json",
    "ziglang",
    "sitecustomize",
    "usercustomize",
    "struct",
    "triton",
    "numpy",
    "typing",
    "torch",
)
MODULES += ("deepseek_trt", "hashlib", "subprocess", "signal", "io", "click", "rich", "onnx", "polygraphy", "readline")
DENSE = ModelConfig(
    num_attention_heads=4,
    kv_lora_rank=64,
    qk_rope_head_dim=16,
    qk_nope_head_dim=32,
    v_head_dim=32,
    n_routed_experts=0,
)


@pytest.fixture
def planted(tmp_path, monkeypatch) -> Path:
    """The current folder, full of modules that leave a file `ran` beside it; and where variables point, too."""
    folder = tmp_path / "current"
    folder.mkdir()
    code = f"import os; open({str(tmp_path / 'ran')!r}, 'a').write(__name__ + chr(10)); raise SystemError('planted')"
    for name in MODULES:
        (folder / f"{name}.py").write_text(code)
        (folder / name).mkdir()
        for file in ("__init__.py", "__main__.py"):
            (folder / name / file).write_text(code)
    for header in ("cstddef", "stddef.h", "NvInferRuntime.h"):
        (folder / header).write_text("#error planted\n")
    monkeypatch.chdir(folder)
    yield folder
    assert not (tmp_path / "ran").exists(), (tmp_path / "ran").read_text()


def test_a_compiler_of_kernels_imports_nothing_of_it(planted, monkeypatch):
    """With the current folder on sys.path, even, as `python -m deepseek_trt` puts it there."""
    monkeypatch.syspath_prepend("")
    monkeypatch.syspath_prepend(str(planted))
    monkeypatch.setenv("PYTHONPATH", f"{planted}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("PYTHONSTARTUP", str(planted / "json.py"))
    monkeypatch.setenv("PYTHONHOME", "")
    monkeypatch.setattr(sys, "path", [*sys.path])
    write = next(v for v in variants_for(DENSE, "float16", 86) if v.kernel == "latent_write")
    (compiled,) = aot.compile_requests([Request(write, 86)], jobs=1)
    assert aot.checked(compiled).image.startswith(b"\x7fELF")


def test_a_cxx_compiler_reads_nothing_of_it(planted, tmp_path, monkeypatch):
    for variable in ("CPATH", "CPLUS_INCLUDE_PATH", "C_INCLUDE_PATH", "LIBRARY_PATH", "ZIG_LIB_DIR", "PYTHONPATH"):
        monkeypatch.setenv(variable, str(planted))
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "a.cpp").write_text('extern "C" int answer() { return 42; }\n')
    find_compiler().run(["-shared", "-fPIC", "-nostdlib", "a.cpp", "-o", "a.so"], folder)
    assert (folder / "a.so").read_bytes().startswith(b"\x7fELF")
    with pytest.raises(BuildError) as failed:
        find_compiler().run(["none.cpp"], folder)
    assert "none.cpp" in failed.value.details
    assert "\n" not in failed.value.sentence


def test_the_folders_that_a_child_imports_from(planted, monkeypatch):
    monkeypatch.setattr(sys, "path", ["", ".", "relative", str(planted), f"{planted}/", "/usr/lib/python3"])
    own = str(Path(isolated.__file__).absolute().parents[2])
    assert isolated.import_folders() == ["/usr/lib/python3", own]


def test_no_program_is_started_but_through_one_place():
    """Each that is must be looked at: it needs no code of the current folder."""
    root = Path(__file__).parents[2]
    allowed = {
        "engines/model_repository/files/leavings.py",
        "engines/model_repository/files/supervise.py",
        "engines/serving/openai/server.py",
        "export/trials/trial.py",
        "plugins/cxx.py",
        "plugins/isolated.py",
    }
    for folder in ("api", "cli", "engines", "export", "plugins", "validate"):
        for file in (root / folder).rglob("*.py"):
            text = file.read_text()
            starts = any(
                word in text for word in ("subprocess.run(", "subprocess.Popen(", "os.system(", "os.popen(", "os.exec")
            )
            assert not starts or file.relative_to(root).as_posix() in allowed, file


COMMANDS = ("check", "generate", "model-repository", "classify")
SLOW = ("export", "validate", "plugins", "build", "bench", "env", "demo")


@pytest.mark.parametrize(
    "command", [*COMMANDS[:2], *(pytest.param(c, marks=pytest.mark.slow) for c in COMMANDS[2:] + SLOW)]
)
def test_a_command_in_such_a_folder(program, planted, tmp_path, demo_checkpoint, bundle_of, command):
    bundle = Path(shutil.copytree(bundle_of(demo_checkpoint).path, tmp_path / "bundle"))
    sizes = ("--max-batch-size", "2", "--max-input-len", "32", "--max-seq-len", "64")
    arguments = {
        "check": (demo_checkpoint,),
        "generate": (bundle, "--prompt", "x", "--max-new-tokens", "2"),
        "model-repository": (bundle, tmp_path / "repository", "--backend", "ort"),
        "classify": (bundle, "--text", "x"),
        "export": (demo_checkpoint, tmp_path / "out"),
        "validate": (bundle, "--backend", "ort"),
        "plugins": (bundle, "--sm", "86", "--no-fallback"),
        "build": (bundle, "--sm", "86", *sizes),
        "bench": (bundle, "--context", "8", "--new-tokens", "3"),
        "env": (),
        "demo": (tmp_path / "demo",),
    }[command]
    done = program.run(command, *arguments)
    assert done.returncode == (1 if command == "classify" else 0), done.stderr
    assert "planted" not in done.stderr
