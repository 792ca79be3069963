"""Tokenizers and chat templates: carried as they are, tried at export."""

from __future__ import annotations

import filecmp
import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from deepseek_trt.engines.text.text import Text
from deepseek_trt.export.errors import CheckpointError
from deepseek_trt.export.writing.tokenizer_files import CARRIED, carry_files


def test_files_arrive_as_they_are(demo_checkpoint, tmp_path):
    assert carry_files(demo_checkpoint, tmp_path) == ()  # every kind of text survives
    carried = {path.name for path in tmp_path.iterdir()}
    assert carried == {name for name in CARRIED if (demo_checkpoint / name).is_file()}
    for name in carried:
        assert filecmp.cmp(demo_checkpoint / name, tmp_path / name, shallow=False)


@pytest.mark.parametrize("text", ["a  b", "  两个 字", "🙂 ok", "x\n\n\ty", ""])
def test_round_trips(demo_checkpoint, text):
    tokenizer = Tokenizer.from_file(str(demo_checkpoint / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text


def words(path, vocabulary):
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    path.mkdir()
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def test_lossy_tokenizer_is_reported_and_a_broken_one_refused(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    notes = carry_files(words(tmp_path / "lossy", ["hello", "world", "?"]), out)
    assert "the tokenizer does not give double spaces back unchanged" in notes
    with pytest.raises(CheckpointError, match="hello world"):
        carry_files(words(tmp_path / "broken", ["hello", "?"]), out)
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        carry_files(tmp_path / "broken", out)


def test_no_tokenizer_is_said(tmp_path):
    (tmp_path / "a").mkdir()
    assert "no tokenizer.json" in carry_files(tmp_path, tmp_path / "a")[0]


def test_template_in_a_file_of_its_own(tmp_path, demo_checkpoint):
    """Newer checkpoints keep it in chat_template.jinja."""
    from types import SimpleNamespace

    carry_files(demo_checkpoint, tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}", encoding="utf-8")
    manifest = SimpleNamespace(model=SimpleNamespace(max_position_embeddings=64))
    bundle = SimpleNamespace(path=tmp_path, tokenizer_path=tmp_path / "tokenizer.json", manifest=manifest)
    ids = Text(bundle).encode_chat([{"role": "user", "content": "hello"}])
    bos = json.loads((demo_checkpoint / "config.json").read_text())["bos_token_id"]
    assert ids[0] == bos
    assert Text(bundle).decode(ids) == "hello"
