"""Tokenizers as they are published: what is put around a text, tokens beside tokenizer.json, leavings of training."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from deepseek_trt.engines.tasks.rows import encoder_of
from deepseek_trt.engines.text.text import Text
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.config.model_config import ModelConfig
from deepseek_trt.export.errors import CheckpointError, ConfigError, RequestError
from deepseek_trt.export.text.reading import read_text
from deepseek_trt.export.text.tokenizer import LoadedTokenizer

BOS, EOS, PAD, USER = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>", "<｜User｜>"
SENTENCES = ["hello world, this is a small text", "the number of tokens is small", "深度求索 and more text"]
CONFIG = {"tokenizer_class": "LlamaTokenizerFast", "bos_token": BOS, "eos_token": EOS, "model_max_length": 16384}
MODEL = ModelConfig(vocab_size=400, bos_token_id=0, eos_token_ids=(1,))
TEXT = "hello world"
ADDED = {"300": {"content": USER, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}}


def trained(template=None) -> Tokenizer:
    """Byte-level BPE whose post-processor is ByteLevel, as DeepSeek publishes it, or the template's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(content, normalized=False, special=True) for content in (BOS, EOS, PAD)]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(template, special_tokens=[(BOS, 0), (EOS, 1)])
    return tokenizer


@pytest.fixture
def folder(tmp_path):
    """folder(tokenizer, **changes of tokenizer_config.json): a folder with both; ... leaves a key out."""

    def make(tokenizer=None, **changes) -> Path:
        path = tmp_path / "files"
        path.mkdir()
        (tokenizer or trained()).save(str(path / "tokenizer.json"))
        config = {key: value for key, value in {**CONFIG, **changes}.items() if value is not ...}
        (path / "tokenizer_config.json").write_text(json.dumps(config))
        return path

    return make


def ids_of(path, text=TEXT, model=MODEL):
    return Text(bundle_in(path, model)).encode(text)


def bundle_in(path, model=MODEL):
    """As much of a bundle as its text needs."""
    files = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in path.iterdir()}
    return Bundle(path, SimpleNamespace(model=model, files=files, added={}))


def plain(path, text=TEXT):
    return Tokenizer.from_file(str(path / "tokenizer.json")).encode(text, add_special_tokens=False).ids


def notes_of(path, model=MODEL, **raw):
    return read_text(path, {"bos_token_id": 0, "eos_token_id": 1, **raw}, model)[1]


BOTH = f"{BOS} $A {EOS}"


@pytest.mark.parametrize(
    ("template", "add_bos", "add_eos", "front", "back"),
    [
        (None, True, False, [0], []),  # DeepSeek's V2 and V3: the model's own rule, transformers 4.57
        (None, ..., ..., [], []),  # nobody says so: tokenizer.json alone
        (None, None, None, [], []),
        (None, True, True, [0], [1]),
        (None, False, True, [], [1]),
        (f"{BOS} $A", True, False, [0], []),  # never twice
        (f"{BOS} $A", ..., ..., [0], []),
        (f"{BOS} $A", False, ..., [], []),  # as transformers' Llama class takes it away
        (BOTH, ..., ..., [0], [1]),
        (BOTH, True, False, [0], []),
        (BOTH, False, False, [], []),
        (BOTH, ..., False, [0], []),
    ],
)
def test_what_is_put_around_a_text(folder, template, add_bos, add_eos, front, back):
    path = folder(trained(template), add_bos_token=add_bos, add_eos_token=add_eos)
    assert ids_of(path) == [*front, *plain(path), *back]


def test_every_way_to_encode_does_the_same(folder):
    """Embedder and TextClassifier take encoder_of, validate the tokenizer itself."""
    path = folder(add_bos_token=True)
    bundle = bundle_in(path)
    assert encoder_of(bundle)(TEXT) == LoadedTokenizer.load(path, MODEL).encode(TEXT) == ids_of(path)


@pytest.mark.parametrize("template", [None, f"{BOS} $A", BOTH])
@pytest.mark.parametrize(("add_bos", "add_eos"), [(True, False), (False, True), (True, True), (False, False)])
def test_transformers_says_the_same_where_it_is_told(folder, template, add_bos, add_eos):
    """5.24 loses the keys of tokenizer_config.json, which 4.57 follows; set on the object it follows them, too."""
    transformers = pytest.importorskip("transformers")
    path = folder(trained(template), add_bos_token=add_bos, add_eos_token=add_eos)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(path)
    theirs.add_bos_token, theirs.add_eos_token = add_bos, add_eos
    for text in (TEXT, BOS + TEXT, "", f"{USER} 1234  深"):
        assert ids_of(path, text) == theirs(text).input_ids


@pytest.mark.parametrize("bos", [BOS, {"__type": "AddedToken", "content": BOS, "normalized": True, "special": True}])
@pytest.mark.parametrize("where", ["tokenizer_config.json", "special_tokens_map.json", "config.json"])
def test_bos_is_named_by_any_file(folder, bos, where):
    """By tokenizer_config.json, else by special_tokens_map.json, else its id is config.json's."""
    path = folder(add_bos_token=True, bos_token=bos if where == "tokenizer_config.json" else ...)
    if where == "special_tokens_map.json":
        (path / where).write_text(json.dumps({"bos_token": bos}))
    assert ids_of(path) == [0, *plain(path)]


@pytest.mark.parametrize(("listed", "counts"), [(..., PAD), (ADDED, BOS)])
def test_where_two_files_name_bos(folder, listed, counts):
    """transformers reads special_tokens_map.json only beside a tokenizer_config.json without added_tokens_decoder."""
    path = folder(added_tokens_decoder=listed, add_bos_token=True)
    (path / "special_tokens_map.json").write_text(json.dumps({"bos_token": PAD}))
    assert LoadedTokenizer.load(path, MODEL).special.text("bos_token") == counts
    assert any(f"{counts!r} counts" in note for note in notes_of(path))
    transformers = pytest.importorskip("transformers")
    assert transformers.PreTrainedTokenizerFast.from_pretrained(path).bos_token == counts


def test_bos_that_nobody_names_is_an_error(folder):
    path = folder(add_bos_token=True, bos_token=None)
    with pytest.raises(ConfigError, match="add_bos_token is true, and no file says"):
        ids_of(path, model=ModelConfig(vocab_size=400, bos_token_id=None))


def test_a_text_that_begins_with_bos_gets_another_as_in_transformers_and_vllm(folder):
    path = folder(add_bos_token=True)
    assert ids_of(path, BOS + TEXT) == [0, 0, *plain(path)]


def test_bos_and_eos_may_be_one_token(folder):
    """add_eos_token false takes nothing away from the front."""
    path = folder(trained(f"{BOS} $A {BOS}"), eos_token=BOS, add_bos_token=True, add_eos_token=False)
    assert ids_of(path) == [0, *plain(path)]


def test_notes_say_what_is_put_around_and_what_does_not_agree(folder):
    path = folder(add_bos_token=True, add_eos_token=False)
    assert f"a text is encoded with {BOS!r} (0) before it" in notes_of(path)
    shutil.rmtree(path)
    path = folder()
    assert "a text is encoded with no token around it" in notes_of(path)
    assert any("does not say add_bos_token" in note for note in notes_of(path))
    assert any("bos_token has id 0, config.json's bos_token_id is 7" in note for note in notes_of(path, bos_token_id=7))
    small = ModelConfig(vocab_size=200, bos_token_id=0, eos_token_ids=(1,))
    assert any("the tokenizer has ids up to 299, the model up to 199" in note for note in notes_of(path, small))
    ends_elsewhere = ModelConfig(vocab_size=400, eos_token_ids=(5,))
    assert any("is no eos_token_id" in note for note in notes_of(path, ends_elsewhere, eos_token_id=5))


@pytest.mark.parametrize("key", ["clean_up_tokenization_spaces", "add_prefix_space"])
def test_keys_that_are_not_honoured_are_named(folder, key):
    assert any(f"{key} True is not honoured" in note for note in notes_of(folder(**{key: True})))


def test_leavings_of_a_training_run_are_switched_off(folder):
    tokenizer = trained()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(direction="left", pad_id=2, pad_token=PAD, length=13)
    tokenizer.model.dropout = 0.9
    path = folder(tokenizer, add_bos_token=True)
    expected = trained().encode(TEXT, add_special_tokens=False).ids
    assert len(expected) > 2
    assert ids_of(path) == [0, *expected]
    assert not [note for note in notes_of(path) if "unchanged" in note]  # export tries the same tokenizer
    assert read_text(path, {}, MODEL)[0].eos_token_ids == (1,)


@pytest.mark.parametrize("special", [True, False])
def test_tokens_beside_tokenizer_json_are_added(folder, special):
    """As transformers adds added_tokens_decoder: the token is one token, and decoding shows it unless it is special."""
    path = folder(added_tokens_decoder={"300": {**ADDED["300"], "special": special}})
    ids = ids_of(path, f"a{USER}b")
    assert ids[1] == 300
    assert Text(bundle_in(path)).decode(ids) == ("ab" if special else f"a{USER}b")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(path)
    assert theirs(f"a{USER}b").input_ids == ids
    assert theirs.decode(ids, skip_special_tokens=True) == ("ab" if special else f"a{USER}b")


def test_added_tokens_json_and_special_tokens_map(folder):
    path = folder()
    (path / "added_tokens.json").write_text(json.dumps({USER: 300, "<plain>": 301}))
    (path / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": [{"content": USER}]}))
    loaded = LoadedTokenizer.load(path, MODEL)
    assert loaded.tokenizer.encode(f"{USER}<plain>").ids == [300, 301]
    assert loaded.tokenizer.decode([300, 301]) == "<plain>"


def test_a_named_token_of_the_vocabulary_becomes_special(folder):
    """A eos_token that tokenizer.json holds as an ordinary token is one token in texts, and is not shown."""
    tokenizer = trained()
    tokenizer.add_tokens([AddedToken("<|im_end|>", normalized=False)])
    path = folder(tokenizer, eos_token="<|im_end|>")
    loaded = LoadedTokenizer.load(path, MODEL)
    assert loaded.tokenizer.encode("<|im_end|>").ids == [300]
    assert loaded.tokenizer.decode([300]) == ""


@pytest.mark.parametrize(
    ("added", "words"),
    [
        ({"7": {"content": EOS}}, "has id 7 in .* and 1 by tokenizer.json"),
        ({"305": {"content": USER}}, "has id 305 in .* and 300 by tokenizer.json"),
    ],
)
def test_ids_that_contradict_tokenizer_json_are_refused(folder, added, words):
    with pytest.raises(CheckpointError, match=words):
        LoadedTokenizer.load(folder(added_tokens_decoder=added), MODEL)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"add_bos_token": "yes"}, "add_bos_token 'yes': must be true or false"),
        ({"bos_token": 3}, "bos_token 3: must be a token's text"),
        ({"bos_token": {"text": "x"}}, "must be a token's text"),
        ({"bos_token": {"content": "x", "lstrip": "no"}}, "bos_token.lstrip 'no'"),
        ({"eos_token": "\ud800"}, "half a character"),
        ({"added_tokens_decoder": []}, "must be an object of tokens by id"),
        ({"added_tokens_decoder": [1]}, "added_tokens_decoder"),
        ({"added_tokens_decoder": {"x": {}}}, "added_tokens_decoder"),
        ({"added_tokens_decoder": {"3": "<x>"}}, "added_tokens_decoder"),
        ({"additional_special_tokens": "<x>"}, "additional_special_tokens"),
        ({"model_max_length": 1000000000000000019884624838656}, None),
        ({"chat_template": [{"name": "default", "template": "x"}]}, None),
    ],
)
def test_wrong_types_name_file_and_key(folder, changes, words):
    path = folder(**changes)
    if words is None:
        LoadedTokenizer.load(path, MODEL)
        return
    with pytest.raises(ConfigError, match=words) as caught:
        LoadedTokenizer.load(path, MODEL)
    assert "tokenizer_config.json" in str(caught.value)


@pytest.mark.parametrize("content", ["{", "[]", '{"a": NaN}', "\udcff", "[" * 100_000, '{"a": ' + "9" * 5000 + "}"])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"])
def test_broken_files_are_one_sentence(folder, name, content):
    path = folder()
    (path / name).write_text(content, errors="surrogateescape")
    with pytest.raises(ConfigError, match=name):
        LoadedTokenizer.load(path, MODEL)


def test_a_vocabulary_without_unk_is_one_sentence(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"hello": 0, "world": 1}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert any("emoji" in note for note in notes_of(tmp_path))
    with pytest.raises(RequestError, match="the prompt cannot be encoded"):
        ids_of(tmp_path, "hello moon")
    Tokenizer(models.WordLevel({"moon": 0}, unk_token="<unk>")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="cannot encode 'hello world'"):
        notes_of(tmp_path)


@pytest.mark.parametrize(("name", "mend"), [("tokenizer.model", "sentencepiece"), ("tiktoken.model", "tiktoken")])
def test_other_vocabularies_are_named(tmp_path, name, mend):
    (tmp_path / name).write_bytes(b"\x00")
    notes = notes_of(tmp_path)
    assert "--token-ids" in notes[0]
    assert (name in notes[1], mend in notes[1]) == (True, True)


def test_ids_beyond_the_model_are_refused(folder, made, verdict):
    """A tokenizer with more tokens than the model: noted at export, and such a text is refused, not computed."""
    from deepseek_trt.engines.generation.llm import LLM

    model, path = made("v2"), folder()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(path / name, model.path / name)
    judged = verdict(model.path)
    assert "the tokenizer has ids up to 299, the model up to 47" in judged.check
    assert "the tokenizer has ids up to 299, the model up to 47" in judged.export
    with (
        LLM.open(judged.bundle, backend="ort", threads=1) as llm,
        pytest.raises(RequestError, match=r"outside 0\.\.47"),
    ):
        llm.generate([TEXT])


@pytest.mark.parametrize("break_it", ["wrong json", "wrong type", "wrong id", "no tokenizer"])
def test_check_and_export_agree(folder, made, verdict, break_it):
    model = made("v2", vocab_size=320)
    path = folder(added_tokens_decoder={"9": {"content": EOS}} if break_it == "wrong id" else ...)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(path / name, model.path / name)
    if break_it == "wrong json":
        (model.path / "tokenizer_config.json").write_text("{")
    elif break_it == "wrong type":
        (model.path / "generation_config.json").write_text('{"eos_token_id": "1"}')
    elif break_it == "no tokenizer":
        (model.path / "tokenizer.json").write_text("{}")
    assert not verdict(model.path).accepted
