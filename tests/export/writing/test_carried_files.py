"""Tokenizers and chat templates: carried as they are, tried at export."""

from __future__ import annotations

import filecmp
import hashlib
import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from deepseek_trt.engines.text.text import Text
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.config.model_config import ModelConfig
from deepseek_trt.export.errors import CheckpointError
from deepseek_trt.export.text.files import CARRIED
from deepseek_trt.export.text.reading import read_text
from deepseek_trt.export.writing.carried_files import carried_digests, carry_files


def test_files_arrive_as_they_are(demo_checkpoint, tmp_path):
    carry_files(demo_checkpoint, tmp_path)
    carried = {path.name for path in tmp_path.iterdir()}
    assert carried == {"config.json", *(name for name in CARRIED if (demo_checkpoint / name).is_file())}
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


def notes_of(folder):
    return read_text(folder, {"eos_token_id": 1}, ModelConfig(eos_token_ids=(1,)))[1]


def test_every_kind_of_text_survives_the_demo_models(demo_checkpoint):
    assert not [note for note in notes_of(demo_checkpoint) if "unchanged" in note]


def test_lossy_tokenizer_is_reported_and_a_broken_one_refused(tmp_path):
    notes = notes_of(words(tmp_path / "lossy", ["hello", "world", "?"]))
    assert "the tokenizer does not give double spaces back unchanged" in notes
    with pytest.raises(CheckpointError, match="hello world"):
        notes_of(words(tmp_path / "broken", ["hello", "?"]))
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        notes_of(tmp_path / "broken")


def test_no_tokenizer_is_said(tmp_path):
    assert "no tokenizer.json" in notes_of(tmp_path)[0]


def test_templates_in_a_folder_are_carried(tmp_path):
    source, target = tmp_path / "a", tmp_path / "b"
    (source / "additional_chat_templates").mkdir(parents=True)
    target.mkdir()
    (source / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    for name in ("chat_template.json", "config.json"):
        (source / name).write_text("{}")
    carry_files(source, target)
    assert (target / "additional_chat_templates" / "rag.jinja").read_text() == "{{ messages }}"
    names = ["chat_template.json", "additional_chat_templates/rag.jinja"]
    assert [name for name, _ in carried_digests(source)] == names


LICENCES = ("LICENSE", "LICENSE-MODEL", "LICENCE.txt", "MODEL_LICENSE", "NOTICE.md", "license_code")


def test_licences_are_carried(tmp_path):
    source, target = tmp_path / "a", tmp_path / "b"
    source.mkdir()
    target.mkdir()
    (source / "LICENSES").mkdir()
    for name in (*LICENCES, "README.md", "licensed.bin", "noticeable.txt", "config.json", "model.safetensors"):
        (source / name).write_text(name)
    carry_files(source, target)
    assert {p.name for p in target.iterdir()} == {"config.json", *LICENCES}
    before = carried_digests(source)
    (source / "LICENSE").write_text("another")
    assert carried_digests(source) != before


def test_template_in_a_file_of_its_own(tmp_path, demo_checkpoint):
    """Newer checkpoints keep it in chat_template.jinja."""
    from types import SimpleNamespace

    carry_files(demo_checkpoint, tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}", encoding="utf-8")
    files = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in tmp_path.iterdir()}
    manifest = SimpleNamespace(model=ModelConfig(max_position_embeddings=64), files=files, added={})
    bundle = Bundle(tmp_path, manifest)
    ids = Text(bundle).encode_chat([{"role": "user", "content": "hello"}])
    bos = json.loads((demo_checkpoint / "config.json").read_text())["bos_token_id"]
    assert ids[0] == bos
    assert Text(bundle).decode(ids) == "hello"
