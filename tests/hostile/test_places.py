"""Places to write to: what others put there is neither used, followed nor removed, and what is left is cleaned up."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from deepseek_trt.engines.model_repository.folder import replace_folder
from deepseek_trt.engines.model_repository.writer import RepositoryRequest, write_model_repository
from deepseek_trt.export.bundle.folder import WEIGHTS_FILE
from deepseek_trt.export.bundle.manifest import Manifest, list_added
from deepseek_trt.export.errors import BundleError, CheckpointError, DeepseekTrtError, OutputError
from deepseek_trt.export.exporter import ExportRequest, export_bundle
from deepseek_trt.export.writing.carried_files import carry_files
from deepseek_trt.export.writing.partial import INPUTS_FILE, finish, partial_folder
from deepseek_trt.export.writing.working import (
    MARKER,
    aside,
    claimed_folder,
    put_in_place,
    remove_leftover,
    scratch_folder,
    working_folder,
)

# What others may have put at the name of a working folder; each gets it and a folder of theirs.


def a_link_to_a_folder(place: Path, theirs: Path) -> None:
    place.symlink_to(theirs)


def a_link_to_nothing(place: Path, theirs: Path) -> None:
    place.symlink_to(theirs / "none")


def a_file(place: Path, theirs: Path) -> None:
    place.write_text("precious")


def a_folder_with_files(place: Path, theirs: Path) -> None:
    place.mkdir()
    (place / "precious").write_text("precious")


def a_folder_that_all_may_write(place: Path, theirs: Path) -> None:
    place.mkdir()
    (place / MARKER).write_text("")
    place.chmod(0o777)


def a_folder_whose_marker_is_a_link(place: Path, theirs: Path) -> None:
    place.mkdir(mode=0o700)
    (place / MARKER).symlink_to(theirs / "precious")


def a_folder_whose_marker_leads_nowhere(place: Path, theirs: Path) -> None:
    place.mkdir(mode=0o700)
    (place / MARKER).symlink_to(theirs / "none")


def a_folder_whose_marker_is_a_pipe(place: Path, theirs: Path) -> None:
    place.mkdir(mode=0o700)
    os.mkfifo(place / MARKER)


def a_folder_whose_marker_is_a_folder(place: Path, theirs: Path) -> None:
    place.mkdir(mode=0o700)
    (place / MARKER).mkdir()


def a_folder_of_another_user(place: Path, theirs: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    place.mkdir(mode=0o700)
    (place / MARKER).write_text("")
    os.chown(place, 12345, 12345)


FOREIGN = (
    a_link_to_a_folder,
    a_link_to_nothing,
    a_file,
    a_folder_with_files,
    a_folder_that_all_may_write,
    a_folder_whose_marker_is_a_link,
    a_folder_whose_marker_leads_nowhere,
    a_folder_whose_marker_is_a_pipe,
    a_folder_whose_marker_is_a_folder,
    a_folder_of_another_user,
)


def export_to(target: Path) -> None:
    with partial_folder(target, "inputs", 0) as folder:
        finish(folder, target)


def replace_at(target: Path) -> None:
    replace_folder(target, lambda folder: (folder / "x").write_text("x"))


def write_aside(target: Path) -> None:
    with aside(target) as draft:
        draft.write_text("x")


@pytest.mark.parametrize("write", [export_to, replace_at, write_aside])
@pytest.mark.parametrize("put", FOREIGN)
def test_what_others_put_at_a_working_name_stays(tmp_path, contents, put, write):
    theirs, place = tmp_path / "theirs", tmp_path / ".out.partial"
    theirs.mkdir()
    (theirs / "precious").write_text("precious")
    put(place, theirs)
    before = contents(tmp_path)
    with pytest.raises(OutputError) as refused:
        write(tmp_path / "out")
    assert str(place) in str(refused.value)
    assert "move it away" in str(refused.value)
    assert contents(tmp_path) == before
    assert os.path.lexists(place)
    assert not (tmp_path / "out").exists()
    remove_leftover(tmp_path / "out")
    assert contents(tmp_path) == before


def left_by_a_kill(target: Path) -> Path:
    place = target.with_name(f".{target.name}.partial")
    place.mkdir(mode=0o700)
    (place / MARKER).touch(0o600)
    return place


def test_an_export_killed_before_its_last_step_is_continued(tmp_path, contents, demo_checkpoint, bundle_of):
    """All lies there, the manifest and a half written one too, but not at its place."""
    whole = bundle_of(demo_checkpoint)
    place = left_by_a_kill(tmp_path / "out")
    (place / INPUTS_FILE).write_text(whole.manifest.fingerprint)
    shutil.copytree(whole.path, place / "new")
    left_by_a_kill(place / "new" / "manifest.json")
    assert export_bundle(ExportRequest(demo_checkpoint, tmp_path / "out")).fresh
    assert contents(tmp_path / "out").keys() == contents(whole.path).keys()
    assert not place.exists()


def test_what_a_killed_run_left_goes_where_nothing_is_new(tmp_path, contents, demo_checkpoint, bundle_of):
    bundle = Path(shutil.copytree(bundle_of(demo_checkpoint).path, tmp_path / "bundle"))
    before = contents(bundle)
    left_by_a_kill(bundle / "manifest.json")
    assert list_added(bundle, ()) == Manifest.read(bundle)
    assert contents(bundle) == before


def test_links_inside_a_working_folder_are_not_followed(tmp_path):
    """As a killed run's leftovers: the links go, what they lead to stays."""
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "precious").write_text("precious")
    place = tmp_path / ".out.partial"
    place.mkdir(mode=0o700)
    (place / MARKER).write_text("")
    (place / "new").symlink_to(theirs)
    (place / "other").symlink_to(theirs / "precious")
    with working_folder(tmp_path / "out") as folder:
        assert not list(folder.iterdir())
        (folder / "link").symlink_to(theirs)
    assert (theirs / "precious").read_text() == "precious"
    assert [p.name for p in tmp_path.iterdir()] == ["theirs"]


@pytest.mark.parametrize("letters", [1, 190, 210, 250, 255])
def test_names_of_any_length_have_a_working_folder(tmp_path, letters):
    for name in ("n" * letters, "é" * max(1, letters // 2)):
        write_aside(tmp_path / name)
        replace_at(tmp_path / f"{name[:-1]}r")
        assert sorted(p.name for p in tmp_path.iterdir()) == sorted({name, f"{name[:-1]}r"})
        shutil.rmtree(tmp_path / f"{name[:-1]}r")
        (tmp_path / name).unlink()


def test_a_target_that_is_a_link_is_replaced_or_refused_never_followed(tmp_path, contents):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "precious").write_text("precious")
    (tmp_path / "file").symlink_to(theirs / "precious")
    (tmp_path / "folder").symlink_to(theirs)
    write_aside(tmp_path / "file")
    assert not (tmp_path / "file").is_symlink()
    with pytest.raises(OutputError, match="is a link"):
        replace_at(tmp_path / "folder")
    assert contents(theirs) == {"precious": b"precious"}


_LEAVE = """
import os, signal, sys
from pathlib import Path
from deepseek_trt.export.writing.working import scratch_folder, working_folder
with working_folder(Path(sys.argv[1])) as folder, scratch_folder() as scratch:
    (folder / "half").write_text("half")
    (scratch / "half").write_text("half")
    print(scratch, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_runs_leftovers_go_with_the_next_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    left = subprocess.run([sys.executable, "-c", _LEAVE, tmp_path / "out"], check=False, capture_output=True, text=True)
    assert left.returncode == -signal.SIGKILL
    scratch = Path(left.stdout.strip())
    assert (scratch / "half").exists()
    assert (tmp_path / ".out.partial" / "new" / "half").exists()
    (tmp_path / "deepseek-trt-mine").mkdir()  # no marker: somebody's own
    with scratch_folder() as mine, scratch_folder() as other:
        assert not scratch.exists()
        assert mine.exists()
        assert other.exists()
    remove_leftover(tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deepseek-trt-mine"]
    monkeypatch.setattr(tempfile, "tempdir", None)


def test_a_folder_in_use_is_not_cleaned_up(tmp_path):
    with claimed_folder(tmp_path / "out") as folder:
        (folder / "half").write_text("half")
        remove_leftover(tmp_path / "out")
        assert (folder / "half").exists()
        with pytest.raises(OutputError, match="another deepseek-trt is writing"), claimed_folder(tmp_path / "out"):
            pass


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_folder_takes_anothers_place(tmp_path, monkeypatch, can_exchange):
    if not can_exchange:
        monkeypatch.setattr("deepseek_trt.export.writing.working._exchange", lambda one, other: False)
    for text in ("first", "second"):
        with working_folder(tmp_path / "out") as folder:
            (folder / "x").write_text(text)
            put_in_place(folder, tmp_path / "out")
        assert (tmp_path / "out" / "x").read_text() == text
        assert [p.name for p in tmp_path.iterdir()] == ["out"]


# Where a bundle goes


@pytest.fixture
def export(small_v2):
    def make(out: Path, checkpoint: Path = small_v2.checkpoint):
        return export_bundle(ExportRequest(checkpoint, out))

    return make


def test_places_that_no_bundle_goes_to(tmp_path, export, monkeypatch, small_v2):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    (tmp_path / "nowhere").symlink_to("none")
    (tmp_path / "file").write_text("x")
    (tmp_path / "here" / "in").mkdir(parents=True)
    checkpoint = shutil.copytree(small_v2.checkpoint, tmp_path / "checkpoint")
    monkeypatch.chdir(tmp_path / "here" / "in")
    table = {
        tmp_path / "link": "is a link to empty: name the folder itself",
        tmp_path / "nowhere": "is a link to none",
        tmp_path / "file": "is not empty",
        Path("."): "is the current folder",
        Path(""): "is the current folder",
        tmp_path / "here" / "in": "is the current folder",
        Path(".."): "is not empty",
        tmp_path / "file" / "out": "file is a file",
        tmp_path / ("n" * 300): "File name too long",
        tmp_path / "checkpoint": "is not empty",
        Path("/proc/out"): "cannot write",
        Path("/dev/null"): "is not empty",
    }
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    for out, words in table.items():
        with pytest.raises((DeepseekTrtError, OSError), match=words):
            export(out, checkpoint)
        assert sorted(str(p) for p in tmp_path.rglob("*")) == before, out


def test_places_that_a_bundle_goes_to(tmp_path, export, contents, small_v2):
    checkpoint = shutil.copytree(small_v2.checkpoint, tmp_path / "checkpoint")
    (tmp_path / "real").mkdir()
    (tmp_path / "parent").symlink_to("real")
    (tmp_path / "empty").mkdir()
    plain = export(tmp_path / "plain", checkpoint).bundle.path
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        for out in (tmp_path / "parent" / "out", tmp_path / "empty", checkpoint / "onnx", Path(other, "out")):
            assert export(out, checkpoint).fresh
            assert contents(out).keys() == contents(plain).keys(), out
            assert (out / WEIGHTS_FILE).read_bytes() == (plain / WEIGHTS_FILE).read_bytes()
            assert not export(out, checkpoint).fresh
            assert not [p for p in out.parent.iterdir() if p.name.startswith(".")]
    assert oct(plain.stat().st_mode) == oct((tmp_path / "real").stat().st_mode)


# Links in what is read


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "LICENSE", "additional_chat_templates/a.jinja"])
def test_links_of_a_checkpoint_are_followed_inside_it_alone(tmp_path, name):
    checkpoint, secret = tmp_path / "checkpoint", tmp_path / "secret"
    (checkpoint / name).parent.mkdir(parents=True)
    (checkpoint / "config.json").write_text("{}")
    secret.write_text("root:x:0:0")
    (checkpoint / "real").write_text("{}")
    (tmp_path / "copy").mkdir()
    (checkpoint / name).unlink(missing_ok=True)
    (checkpoint / name).symlink_to(checkpoint / "real")
    carry_files(checkpoint, tmp_path / "copy")
    assert (tmp_path / "copy" / name).read_text() == "{}"
    assert not (tmp_path / "copy" / name).is_symlink()
    (checkpoint / name).unlink()
    (checkpoint / name).symlink_to(secret)
    with pytest.raises(CheckpointError, match=r"is a link to .*secret, outside of"):
        carry_files(checkpoint, tmp_path / "copy")


def test_links_of_a_snapshot_are_followed_into_its_blobs(tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "c0ffee", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (tmp_path / "copy").mkdir()
    for name in ("config.json", "LICENSE"):
        (blobs / f"hash-of-{name}").write_text(name)
        (snapshot / name).symlink_to(f"../../blobs/hash-of-{name}")
    (tmp_path / "model").symlink_to(snapshot)
    for checkpoint in (snapshot, tmp_path / "model"):
        carry_files(checkpoint, tmp_path / "copy")
        assert (tmp_path / "copy" / "LICENSE").read_text() == "LICENSE"
    (tmp_path / "secret").write_text("secret")
    (snapshot / "LICENSE").unlink()
    (snapshot / "LICENSE").symlink_to("../../../secret")
    with pytest.raises(CheckpointError, match="is a link"):
        carry_files(snapshot, tmp_path / "copy")


def test_links_out_of_a_bundle_are_not_copied_into_a_repository(tmp_path, demo_checkpoint, bundle_of):
    made = bundle_of(demo_checkpoint)
    for name in (*made.manifest.files, "weights.safetensors"):
        bundle = Path(shutil.copytree(made.path, tmp_path / "bundle"))
        (tmp_path / "elsewhere").write_bytes((bundle / name).read_bytes())  # the right bytes, even
        (bundle / name).unlink()
        (bundle / name).symlink_to(tmp_path / "elsewhere")
        with pytest.raises(BundleError, match=r"leads out of|is a link|regular"):
            write_model_repository(RepositoryRequest(bundle, tmp_path / "repository"))
        assert not (tmp_path / "repository").exists(), name
        shutil.rmtree(bundle)
