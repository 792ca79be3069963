"""Read a checkpoint's text files: where answers end, what is put around a text, and what is worth a note."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepseek_trt.export.config.model_config import ModelConfig
from deepseek_trt.export.errors import CheckpointError, ConfigError
from deepseek_trt.export.text.files import GENERATION_CONFIG, TOKENIZER
from deepseek_trt.export.text.generation_config import GenerationConfig

if TYPE_CHECKING:
    from deepseek_trt.export.text.tokenizer import LoadedTokenizer

Notes = tuple[str, ...]

# Vocabularies that are no tokenizer.json, and how to make one of them.
_SAVE = "make one with transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
_OTHERS = {
    "tokenizer.model": f"{_SAVE} (needs sentencepiece)",
    "tiktoken.model": "make one with transformers.integrations.tiktoken.convert_tiktoken_to_fast",
    "vocab.json": _SAVE,
}
# What byte-level tokenizers give back unchanged; others are noted.
_PROBES = {
    "ASCII": "".join(map(chr, range(32, 127))),
    "Chinese, Japanese and Korean": "深度求索 こんにちは 안녕하세요",
    "emoji": "🙂 👩\u200d👩\u200d👧 🇩🇪",
    "a leading space": " hello",
    "double spaces": "a  b   c",
    "newlines": "a\n\nb\r\n\tc\n",
}


def read_text(folder: Path, raw: dict[str, Any], config: ModelConfig) -> tuple[ModelConfig, Notes]:
    """`config` with all tokens that end an answer, and notes for people. `raw` is config.json.

    Answers end with the ids of config.json and with those of generation_config.json, as in vLLM; transformers takes the
    latter alone where they are there. Where neither names one, tokenizer_config.json's eos_token ends them. Raises
    ConfigError for an id outside the vocabulary and for wrong files, CheckpointError for a tokenizer.json that cannot
    say "hello world" and back.
    """
    generation = GenerationConfig.read(folder)
    ends, notes = _ends(raw, config, generation)
    notes += tuple(f"{GENERATION_CONFIG}: {what} is not honoured" for what in generation.not_honoured)
    if not (folder / TOKENIZER).exists():
        ends = ends or _default_ends(raw, config)
        return dataclasses.replace(config, eos_token_ids=ends), (*notes, *_no_tokenizer(folder))
    from deepseek_trt.export.text.tokenizer import LoadedTokenizer, check_bounded

    check_bounded(folder, tuple(_PROBES.values()))
    loaded = LoadedTokenizer.load(folder, dataclasses.replace(config, eos_token_ids=ends))
    _check_around(folder, config, loaded)
    if not ends:
        ends, note = _ends_by_tokenizer(raw, config, loaded)
        notes = (*notes, note)
    ended = dataclasses.replace(config, eos_token_ids=ends)
    return ended, (*notes, *loaded.special.notes, *_on_tokens(loaded, raw, ended), *_try_out(loaded, folder))


def _ends(raw: dict[str, Any], config: ModelConfig, generation: GenerationConfig) -> tuple[tuple[int, ...], Notes]:
    """The ids that config.json and generation_config.json write down, and a note where they differ."""
    own = config.eos_token_ids if raw.get("eos_token_id") is not None else ()
    more = generation.eos_token_ids or ()
    _check_ids(config, "config.json", own)
    _check_ids(config, GENERATION_CONFIG, more)
    ends = tuple(dict.fromkeys((*own, *more)))
    if not own or not more or set(own) == set(more):
        return ends, ()
    files = f"config.json ({_list(own)}) and of {GENERATION_CONFIG} ({_list(more)})"
    return ends, (f"answers end with the eos_token_id of {files}",)


def _default_ends(raw: dict[str, Any], config: ModelConfig) -> tuple[int, ...]:
    """What it means that config.json does not have the key; null is no end."""
    absent = "eos_token_id" not in raw
    return tuple(token for token in config.eos_token_ids if absent and token < config.vocab_size)


def _check_ids(config: ModelConfig, file: str, ids: Sequence[int]) -> None:
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool):
            raise ConfigError(f"{file}: eos_token_id {str(token)[:40]!r}: must be a token id or a list of them")
        if not 0 <= token < config.vocab_size:
            raise ConfigError(f"{file}: eos_token_id {token}: the model's token ids end at {config.vocab_size - 1}")


def _no_tokenizer(folder: Path) -> Iterator[str]:
    yield "the checkpoint has no tokenizer.json: generate wants --token-ids instead of --prompt"
    for name, mend in _OTHERS.items():
        if (folder / name).is_file():
            yield f"{name} cannot be read, tokenizer.json can: {mend}"


def _ends_by_tokenizer(
    raw: dict[str, Any], config: ModelConfig, loaded: LoadedTokenizer
) -> tuple[tuple[int, ...], str]:
    """Where neither config names an end: the tokenizer's, else what the key's absence means."""
    token = loaded.token_id("eos_token")
    if token is not None and token < config.vocab_size:
        text = loaded.special.text("eos_token")
        return (token,), f"no eos_token_id is given: answers end with the tokenizer's eos_token {text!r} ({token})"
    ends = _default_ends(raw, config)
    return ends, f"no eos_token_id is given: answers end with {_list(ends) or 'their length alone'}"


def _on_tokens(loaded: LoadedTokenizer, raw: dict[str, Any], config: ModelConfig) -> Iterator[str]:
    """What is put around a text, and where tokenizer and model do not agree."""
    around = [("before", loaded.front), ("after", loaded.back)]
    parts = [f"{_named(loaded, ids)} {where} it" for where, ids in around if ids]
    yield f"a text is encoded with {' and '.join(parts)}" if parts else "a text is encoded with no token around it"
    if (
        not loaded.front
        and loaded.special.add_bos is None
        and "Llama" in str(loaded.special.raw.get("tokenizer_class"))
    ):
        yield (
            "tokenizer_config.json does not say add_bos_token, which transformers below 5 takes for true with its "
            "Llama class: write true where the model is used to BOS"
        )
    bos, eos = loaded.token_id("bos_token"), loaded.token_id("eos_token")
    wanted = raw.get("bos_token_id")
    if bos is not None and wanted is not None and bos != wanted:
        yield f"the tokenizer's bos_token has id {bos}, config.json's bos_token_id is {wanted}: the tokenizer's is used"
    if eos is not None and eos not in config.eos_token_ids:
        text = loaded.special.text("eos_token")
        yield f"the tokenizer's eos_token {text!r} ({eos}) is no eos_token_id of the configs: it ends no answer"
    size = max(loaded.tokenizer.get_vocab().values(), default=-1) + 1
    if size > config.vocab_size:
        yield (
            f"the tokenizer has ids up to {size - 1}, the model up to {config.vocab_size - 1}: a text that has one "
            "above is refused"
        )


def _check_around(folder: Path, config: ModelConfig, loaded: LoadedTokenizer) -> None:
    outside = [token for token in (*loaded.front, *loaded.back) if token >= config.vocab_size]
    if outside:
        raise CheckpointError(
            f"{folder / TOKENIZER}: every text gets the token {_named(loaded, outside)}, and the model's ids end at "
            f"{config.vocab_size - 1}: take all files from one checkpoint"
        )


def _named(loaded: LoadedTokenizer, ids: Sequence[int]) -> str:
    return " ".join(f"{loaded.tokenizer.id_to_token(token)!r} ({token})" for token in ids)


def _try_out(loaded: LoadedTokenizer, folder: Path) -> Iterator[str]:
    """A note for each kind of text that does not survive."""
    from deepseek_trt.export.text.tokenizer import PROBE

    def back_and_forth(text: str) -> str | None:
        try:
            return str(loaded.tokenizer.decode(loaded.tokenizer.encode(text, add_special_tokens=False).ids))
        except Exception:  # the library raises bare ones, for what a vocabulary without <unk> does not hold
            return None

    back = back_and_forth(PROBE)
    if back != PROBE:
        raise CheckpointError(f"{folder / TOKENIZER} turns {PROBE!r} into {back!r}; download it again")
    for kind, text in _PROBES.items():
        if back_and_forth(text) != text:
            yield f"the tokenizer does not give {kind} back unchanged"


def _list(ids: Sequence[int]) -> str:
    return ", ".join(map(str, ids))
