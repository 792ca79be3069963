"""Tokenizers and chat templates: carried as they are, tried at export, rendered in a sandbox."""

from __future__ import annotations

import filecmp
import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from deepseek_trt.engines.text.template import render_chat
from deepseek_trt.engines.text.text import Text
from deepseek_trt.export.errors import CheckpointError
from deepseek_trt.export.writing.tokenizer_files import CARRIED, carry_files, check_tokenizer

V2_TEMPLATE = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{{ bos_token }}"
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token }}"
    "{% elif message['role'] == 'system' %}{{ message['content'] + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# V2.5's and V3's: the system prompt is collected first, in a namespace.
V3_TEMPLATE = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{% set ns = namespace(is_first=true, system_prompt='') %}"
    "{%- for message in messages %}{%- if message['role'] == 'system' %}"
    "{%- if ns.is_first %}{% set ns.system_prompt = ns.system_prompt + message['content'] %}"
    "{% set ns.is_first = false %}"
    "{%- else %}{% set ns.system_prompt = ns.system_prompt + '\n\n' + message['content'] %}{%- endif %}"
    "{%- endif %}{%- endfor %}{{ bos_token }}{{ ns.system_prompt }}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}{%- endif %}"
    "{%- if message['role'] == 'assistant' and message['content'] is not none %}"
    "{{ '<｜Assistant｜>' + message['content'] + eos_token }}{%- endif %}{%- endfor -%}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": " and\n2 + 2?"},
]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (V2_TEMPLATE, f"{BOS}Be brief.\n\nUser: 1 + 1?\n\nAssistant: 2{EOS}User:  and\n2 + 2?\n\nAssistant:"),
        (V3_TEMPLATE, f"{BOS}Be brief.<｜User｜>1 + 1?<｜Assistant｜>2{EOS}<｜User｜> and\n2 + 2?<｜Assistant｜>"),
    ],
)
def test_chat_templates(template, expected):
    token = {"__type": "AddedToken", "content": BOS}
    config = {"chat_template": template, "bos_token": token, "eos_token": EOS}
    assert render_chat(config, TURNS) == expected


def test_files_arrive_as_they_are(demo_checkpoint, tmp_path):
    assert check_tokenizer(demo_checkpoint) == ()  # every kind of text survives
    carry_files(demo_checkpoint, tmp_path)
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
    notes = check_tokenizer(words(tmp_path / "lossy", ["hello", "world", "?"]))
    assert "the tokenizer does not give double spaces back unchanged" in notes
    with pytest.raises(CheckpointError, match="hello world"):
        check_tokenizer(words(tmp_path / "broken", ["hello", "?"]))
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        check_tokenizer(tmp_path / "broken")


def test_no_tokenizer_is_said(tmp_path):
    assert "no tokenizer.json" in check_tokenizer(tmp_path)[0]


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
