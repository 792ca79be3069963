"""Two runs on one place at once: both right, or one waits, or one is refused in one sentence."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from deepseek_trt.engines.model_repository import writer
from deepseek_trt.engines.model_repository.folder import replace_folder
from deepseek_trt.engines.model_repository.runtime import runtime_files
from deepseek_trt.engines.model_repository.sizes import SizeRequest
from deepseek_trt.engines.model_repository.writer import RepositoryRequest, write_model_repository
from deepseek_trt.export.errors import BundleError, OutputError
from deepseek_trt.export.exporter import ExportRequest, export_bundle
from deepseek_trt.export.files import file_sha256
from deepseek_trt.export.writing.working import aside, locked, working_folder, write_text


def at_once(*functions: Callable[[], object]) -> list[object]:
    """What each gives, or the OutputError or BundleError that it raises, all begun at one moment."""
    barrier, given = threading.Barrier(len(functions)), [None] * len(functions)

    def run(index: int) -> None:
        barrier.wait()
        try:
            given[index] = functions[index]()
        except (OutputError, BundleError) as error:
            given[index] = error
        except BaseException as error:
            given[index] = AssertionError(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in given:
        assert not isinstance(one, AssertionError), one
    return given


def refused(given: list[object]) -> list[OutputError]:
    return [one for one in given if isinstance(one, OutputError)]


def nothing_hidden(folder: Path) -> bool:
    return not list(folder.rglob(".*"))


def test_one_of_several_claims_a_name(tmp_path):
    """However they come, one at a time is in the folder, and it is gone at the end."""
    inside = []

    def claim() -> str:
        with working_folder(tmp_path / "out") as folder:
            inside.append(1)
            assert len(inside) == 1
            (folder / "x").write_text("x")
            inside.pop()
        return "done"

    for _ in range(200):
        given = at_once(claim, claim, claim)
        assert "done" in given
        assert all("another deepseek-trt is writing" in str(one) for one in refused(given))
        assert not list(tmp_path.iterdir())


def test_files_written_at_once_are_one_of_them(tmp_path):
    texts = [letter * 100_000 for letter in "abc"]
    for _ in range(60):
        given = at_once(*(lambda text=text: write_text(tmp_path / "file", text) for text in texts))
        assert given == [None] * 3
        assert (tmp_path / "file").read_text() in texts
        assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_one_that_fails_leaves_the_others_place(tmp_path):
    def fail() -> str:
        try:
            with aside(tmp_path / "file") as draft:
                draft.write_text("half")
                raise ValueError
        except ValueError:
            return "failed"

    for _ in range(60):
        assert at_once(fail, lambda: write_text(tmp_path / "file", "whole"))[0] == "failed"
        assert (tmp_path / "file").read_text() == "whole"
        assert nothing_hidden(tmp_path)


def test_models_replaced_at_once(tmp_path):
    def write(text: str) -> str:
        def fill(folder: Path) -> None:
            for name in ("a", "b", "c"):
                (folder / name).write_text(text)

        replace_folder(tmp_path / "model", fill)
        return text

    for _ in range(100):
        given = at_once(lambda: write("one"), lambda: write("two"))
        assert len(refused(given)) < 2
        assert len({path.read_text() for path in (tmp_path / "model").iterdir()}) == 1
        assert nothing_hidden(tmp_path)


def test_two_exports(tmp_path, small_v2):
    for index in range(3):
        out = tmp_path / str(index) / "out"
        given = at_once(*[lambda out=out: export_bundle(ExportRequest(small_v2.checkpoint, out)).bundle] * 2)
        assert len(refused(given)) == 1 or given[0].manifest == given[1].manifest
        assert not export_bundle(ExportRequest(small_v2.checkpoint, out)).fresh
        assert nothing_hidden(out.parent)


def test_an_export_and_a_repository_of_it(tmp_path, demo_checkpoint, bundle_of):
    """The repository is of a whole bundle, or is refused."""
    bundle_of(demo_checkpoint)  # so that it is traced
    out = tmp_path / "out"
    given = at_once(
        lambda: export_bundle(ExportRequest(demo_checkpoint, out)),
        lambda: write_model_repository(RepositoryRequest(out, tmp_path / "repository")),
    )
    assert not isinstance(given[0], Exception), given[0]
    if isinstance(given[1], Exception):
        assert "is not a bundle" in str(given[1])
        assert not (tmp_path / "repository").exists()


def test_two_repositories(tmp_path, demo_checkpoint, bundle_of, monkeypatch):
    """Of one name, and of two names in one folder, whose README names both."""
    bundle = bundle_of(demo_checkpoint).path
    files = runtime_files("ort")  # Python 3.11's ast does not parse in two threads at once
    monkeypatch.setattr(writer, "runtime_files", lambda *_: files)

    def write(name: str, running: int) -> object:
        return write_model_repository(RepositoryRequest(bundle, tmp_path, name, SizeRequest(max_running=running)))

    for index in range(4):
        given = at_once(lambda i=index: write("one", 3 + i), lambda i=index: write("one", 13 + i))
        assert len(refused(given)) < 2
        assert is_whole(tmp_path / "one")
        assert nothing_hidden(tmp_path)
    for index in range(3):
        given = at_once(lambda i=index: write("two", 3 + i), lambda i=index: write("three", 3 + i))
        assert not refused(given)
        assert "`one`, `three`, `two`" in (tmp_path / "README.md").read_text()
        shutil.rmtree(tmp_path / "two")
        shutil.rmtree(tmp_path / "three")


def is_whole(model: Path) -> bool:
    """Whether every file is what the manifest says."""
    version = model / "1"
    files = json.loads((version / "manifest.json").read_text())["files"]
    return all(file_sha256(version / name) == digest for name, digest in files.items())


def test_what_changes_a_bundle_keeps_others_out_of_it(tmp_path):
    """plugins and build, and model-repository, which copies from it."""
    with locked(tmp_path, shared=True), locked(tmp_path, shared=True), pytest.raises(OutputError, match="at work in"):
        locked(tmp_path).__enter__()
    with locked(tmp_path):
        for shared in (True, False):
            with pytest.raises(OutputError, match="run this again"), locked(tmp_path, shared=shared):
                pass


@pytest.mark.slow
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("plugins", "plugins"),
        ("plugins", "build"),
        ("build", "build"),
        ("build", "model-repository"),
        ("validate", "validate"),
        ("export", "export"),
        ("model-repository", "model-repository"),
    ],
)
def test_two_commands(program, tmp_path, demo_checkpoint, bundle_of, contents, one, other):
    """As processes. Each ends well or is refused in one sentence; then one more run of each ends well."""
    bundle = Path(shutil.copytree(bundle_of(demo_checkpoint).path, tmp_path / "bundle"))
    build = ("--sm", "86", "--max-batch-size", "2", "--max-input-len", "32", "--max-seq-len", "64")
    commands = {
        "plugins": ("plugins", bundle, "--sm", "86", "--no-fallback"),
        "build": ("build", bundle, *build),
        "validate": ("validate", bundle, "--backend", "ort", "--no-independent", "--report", tmp_path / "report"),
        "export": ("export", demo_checkpoint, tmp_path / "out"),
        "model-repository": ("model-repository", bundle, tmp_path / "repository", "--backend", "ort"),
    }
    for _ in range(3):
        processes = [program.start(*commands[name]) for name in (one, other)]
        for process in processes:
            _, err = process.communicate(timeout=600)
            assert process.returncode in (0, 1), err
            assert b"Traceback" not in err
            if process.returncode:
                assert err.count(b"error: another deepseek-trt is") == 1, err
        for name in (one, other):
            assert program.run(*commands[name]).returncode == 0
        assert nothing_hidden(tmp_path)
