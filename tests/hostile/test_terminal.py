"""Names and texts from files on a terminal: shown escaped, on one line, cut, and never as markup."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from deepseek_trt.cli.main import main
from deepseek_trt.cli.printing import accuracy
from deepseek_trt.cli.printing.output import print_json, print_result, print_rich, say, say_error, write_model_text
from deepseek_trt.export.text.wording import controls_escaped, escaped, sentence, shown, some

NAMES = {
    "escape": "\x1b[2J\x1b]0;title\x07",
    "eight-bit escape": "\x9b2J",
    "carriage return": "safe\roops",
    "new line": "one\nerror: two",
    "markup": "[/foo][red]x[/]",
    "link": "[link=https://example.org]x[/link]",
    "emoji": ":boom:",
    "right to left": "a\u202eb\u2066c",
    "separators": "a\u2028b\u2029c\u0085d",
    "no UTF-8": os.fsdecode(b"\xff\xfe"),
    "NUL and DEL": "a\x00b\x7f",
    "long": "n" * 5000,
}
RAW = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
every_name = pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)


def check_shown(text: str, lines: int, most: int = 2500) -> None:
    """No character that a terminal obeys, no line too many, none too long."""
    assert not RAW.search(text), text
    assert len(text.splitlines()) == lines, text
    assert max(map(len, text.splitlines()), default=0) <= most


@every_name
def test_escaping(name):
    for made in (escaped(name), sentence(f"{name} {name}"), shown(name), shown([name]), shown({name: 1}), some([name])):
        assert made.isprintable()
    assert len(shown(name)) < 200
    assert len(sentence(name)) < 2100
    assert escaped(escaped(name)) == escaped(name)
    assert not RAW.search(controls_escaped(name).replace("\u202e", "").replace("\u2066", "")) or "\u2028" in name


def test_what_is_harmless_stays_as_it_is():
    for text in ("a plain name", "größer", "深度求索", "-_.~", "[not markup]", "🙂"):
        assert escaped(text) == controls_escaped(text) == text
    assert controls_escaped("two\nlines\tand a tab") == "two\nlines\tand a tab"
    assert (shown(None), shown(True), shown(1.5), shown("x")) == ("null", "true", "1.5", "'x'")


@every_name
@pytest.mark.parametrize("printer", ["say", "error", "details", "result", "rich", "usage"])
def test_every_way_to_print(name, printer, capsys):
    """Each prints one line for each that it was given."""
    from rich.table import Table

    if printer == "say":
        say(f"note: {name}")
    elif printer == "error":
        say_error(f"{name} is wrong: mend {name}")
    elif printer == "details":
        say_error("the compiler failed", details=name.replace("\n", ""))
    elif printer == "result":
        print_result(False, {}, f"wrote {name[:100]}")
    elif printer == "rich":
        table = Table(box=None, show_header=False)
        table.add_row(escaped(name[:50]))
        print_rich(f"note: {name[:100]}", table)
    else:
        result = CliRunner().invoke(main, ["export", "a", "b", "--dtype", name])
        assert result.exit_code == 2
        check_shown(result.stderr, lines=4)
        return
    printed = capsys.readouterr()
    text = printed.out + printed.err
    lines = text.splitlines()
    check_shown(text, lines=len(lines))
    assert len(lines) <= 2
    if "foo" in name:
        assert "[/foo]" in text


@every_name
def test_json_has_no_raw_character_and_the_same_meaning(name, capsys):
    print_json({name: [name]})
    text = capsys.readouterr().out
    assert text[:-1].isprintable()
    assert json.loads(text) == {name: [name]}


@every_name
def test_errors_of_files_are_one_line(name, tmp_path, small_v2):
    """A checkpoint's keys, values, tensor names and file names."""
    folder = shutil.copytree(small_v2.checkpoint, tmp_path / "checkpoint")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    cases = {
        "key": ("config.json", {**small_v2.raw, name: 1}),
        "value": ("config.json", {**small_v2.raw, "topk_method": name}),
        "tensor": (
            "model.safetensors.index.json",
            {**index, "weight_map": {**index["weight_map"], name: "model-00001-of-000002.safetensors"}},
        ),
        "shard": (
            "model.safetensors.index.json",
            {**index, "weight_map": {**index["weight_map"], "lm_head.weight": f"{name}.safetensors"}},
        ),
    }
    for case, (file, raw) in cases.items():
        before = (folder / file).read_text()
        (folder / file).write_text(json.dumps(raw))
        for arguments in ((), ("--json",)):
            result = CliRunner().invoke(main, ["check", str(folder), *arguments])
            assert isinstance(result.exception, (SystemExit, type(None))), (case, result.exception)
            check_shown(result.stderr, lines=len(result.stderr.splitlines()))
            assert len(result.stderr.splitlines()) <= 2, (case, result.stderr)
            check_shown(result.stdout, len(result.stdout.splitlines()), most=10**6)
        (folder / file).write_text(before)


@every_name
def test_a_bundles_manifest_and_folder(name, tmp_path, demo_checkpoint, bundle_of):
    """Keys of the manifest (one raised MarkupError), and the bundle's own name."""
    bundle = Path(shutil.copytree(bundle_of(demo_checkpoint).path, tmp_path / "bundle"))
    raw = json.loads((bundle / "manifest.json").read_text())
    raw["files"][name] = "0" * 64
    (bundle / "manifest.json").write_text(json.dumps(raw))
    command = ["model-repository", str(bundle), str(tmp_path / "repository")]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 1
    check_shown(result.stderr, lines=1)
    (bundle / "manifest.json").write_text(json.dumps({**raw, "schema_version": name}))
    result = CliRunner().invoke(main, ["classify", str(bundle), "--text", name])
    assert result.exit_code == 1
    check_shown(result.stderr, lines=1)
    if "\x00" not in name and len(name) < 200:
        for arguments in (["generate", str(tmp_path / name), "--prompt", "x"], ["check", str(tmp_path / name)]):
            result = CliRunner().invoke(main, arguments)
            assert result.exit_code == 1
            check_shown(result.stderr, lines=1)


def on_a_terminal(program, *arguments: object) -> str:
    """What the program writes to a pseudo-terminal, both streams."""
    leader, follower = pty.openpty()
    process = program.start(*arguments, stdin=follower, stdout=follower, stderr=follower)
    os.close(follower)
    data = b""
    while True:
        try:
            piece = os.read(leader, 4096)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        data += piece
    os.close(leader)
    process.wait()
    return data.decode("utf-8", "surrogateescape").replace("\r\n", "\n")


def test_on_a_real_terminal(program, tmp_path, small_v2):
    folder = shutil.copytree(small_v2.checkpoint, tmp_path / "checkpoint")
    hostile = "".join(name for name in NAMES.values() if len(name) < 100 and "\udcff" not in name)
    (folder / "config.json").write_text(json.dumps({**small_v2.raw, hostile: hostile}))
    said = on_a_terminal(program, "check", folder)
    assert "config.json" in said
    colours = re.sub(r"\x1b\[[0-9;]*m", "", said)  # rich's own
    assert not RAW.search(colours), said
    assert "\\x1b[2J" in said
    assert "[link=https://example.org]x[/link]" in said


def test_a_models_text_is_escaped_on_a_terminal_and_raw_in_a_pipe(capsys, monkeypatch):
    text = "fine\n\ttext \x1b[2J\r\x9b\x07 مرحبا"
    write_model_text(text)
    assert capsys.readouterr().out == text
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    write_model_text(text)
    assert capsys.readouterr().out == "fine\n\ttext \\x1b[2J\\r\\x9b\\x07 مرحبا"


def test_help_says_so():
    assert "escaped" in CliRunner().invoke(main, ["generate", "--help"]).output


def test_a_report_with_hostile_names(capsys, monkeypatch):
    """Its lines come from one helper, which takes no markup."""
    for name in NAMES.values():
        print_rich(accuracy.styled_line(name[:60], "red"))
    text = capsys.readouterr().out
    assert not RAW.search(text)
    assert "[/foo]" in text
    assert len(text.splitlines()) == len(NAMES)


def test_no_command_prints_past_the_one_place():
    """click.echo, print and rich's Console stand in cli/printing alone."""
    found = subprocess.run(
        ["git", "grep", "-nE", r"click\.(s)?echo|[^_.]print\(|Console\(", "--", "cli"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    if found.returncode > 1:
        pytest.skip("no git here")
    allowed = ("cli/printing/output.py", "cli/printing/progress.py", "cli/printing/ending.py", "cli/prompting/chat.py")
    assert [line for line in found.stdout.splitlines() if not line.startswith(allowed)] == []
