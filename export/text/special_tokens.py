"""SpecialTokens: what the files beside tokenizer.json say of tokens: which are special, and what surrounds a text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek_trt.export.text.files import (
    ADDED_TOKENS,
    SPECIAL_TOKENS_MAP,
    TOKENIZER_CONFIG,
    read_object,
    wrong_value,
)
from deepseek_trt.export.text.valid import flaw_of

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# Keys of tokenizer_config.json with which transformers makes other text than tokenizer.json does by itself.
_NOT_HONOURED = ("clean_up_tokenization_spaces", "do_lower_case", "add_prefix_space")


@dataclass(frozen=True)
class Token:
    """A token's text, and how it is found in texts: the flags of the tokenizers package's AddedToken."""

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    special: bool = True


@dataclass(frozen=True)
class SpecialTokens:
    """tokenizer_config.json, special_tokens_map.json and added_tokens.json, typed.

    named: bos_token and the others that are given. Where both files name one, special_tokens_map.json counts if
    tokenizer_config.json lists no added_tokens_decoder (transformers' rule), else tokenizer_config.json. more: special
    ones without a name. added: by id. add_bos and add_eos are None where tokenizer_config.json does not say.
    added_tokens.json counts where it lists none. raw: tokenizer_config.json as it is.
    """

    raw: Mapping[str, Any]
    named: Mapping[str, Token]
    more: tuple[Token, ...]
    added: Mapping[int, Token]
    add_bos: bool | None
    add_eos: bool | None
    split_special: bool
    notes: tuple[str, ...]

    @classmethod
    def read(cls, folder: Path) -> SpecialTokens:
        """Read the folder's files, those that there are. Raises ConfigError naming file and key for a wrong type."""
        path, other = folder / TOKENIZER_CONFIG, folder / SPECIAL_TOKENS_MAP
        raw, mapped = read_object(path), read_object(other)
        own, second = _named(path, raw), _named(other, mapped)
        by_id, legacy = _by_id(path, raw), _by_content(folder / ADDED_TOKENS, {*own.values(), *second.values()})
        named = {**second, **own} if "added_tokens_decoder" in raw else {**own, **second}
        return cls(
            raw=raw,
            named=named,
            more=(*_listed(path, raw), *_listed(other, mapped)),
            added=by_id if "added_tokens_decoder" in raw else legacy,
            add_bos=_flag(path, raw, "add_bos_token"),
            add_eos=_flag(path, raw, "add_eos_token"),
            split_special=_flag(path, raw, "split_special_tokens") or False,
            notes=(*_contradictions(own, second, named), *_legacy_note(raw, by_id, legacy), *_ignored(path, raw)),
        )

    def text(self, name: str) -> str:
        """The text of a named token, such as bos_token; empty where there is none."""
        return self.named[name].content if name in self.named else ""


def _named(path: Path, raw: Mapping[str, Any]) -> dict[str, Token]:
    tokens = {name: _token(path, name, raw[name]) for name in NAMES if raw.get(name) is not None}
    return {name: token for name, token in tokens.items() if token.content}


def _listed(path: Path, raw: Mapping[str, Any]) -> tuple[Token, ...]:
    found: list[Token] = []
    for key in _LISTS:
        given = [] if raw.get(key) is None else raw[key]
        given = list(given.values()) if isinstance(given, dict) else given
        if not isinstance(given, list):
            raise wrong_value(path, key, given, "must be a list of tokens")
        found += [_token(path, key, token) for token in given]
    return tuple(token for token in found if token.content)


def _by_id(path: Path, raw: Mapping[str, Any]) -> dict[int, Token]:
    given = raw.get("added_tokens_decoder", {})
    if not isinstance(given, dict):
        raise wrong_value(path, "added_tokens_decoder", given, "must be an object of tokens by id")
    found: dict[int, Token] = {}
    for key, value in given.items():
        if not key.isdecimal() or not isinstance(value, dict):
            raise wrong_value(path, f"added_tokens_decoder[{key!r}]", value, "must be an id and its token's object")
        found[int(key)] = _token(path, f"added_tokens_decoder[{key!r}]", value, special=False)
    return found


def _by_content(path: Path, special: set[Token]) -> dict[int, Token]:
    names = {token.content for token in special}
    found: dict[int, Token] = {}
    for content, token_id in read_object(path).items():
        if not isinstance(token_id, int) or isinstance(token_id, bool) or token_id < 0:
            raise wrong_value(path, repr(content), token_id, "must be a token id")
        found[token_id] = Token(content, special=content in names, normalized=content not in names)
    return found


def _token(path: Path, key: str, value: Any, special: bool = True) -> Token:
    """A token written as text, or as an object; `special` is what an object means that does not say."""
    if isinstance(value, str):
        token = Token(value)
    elif isinstance(value, dict) and isinstance(value.get("content"), str):
        flags = {name: value.get(name, False) for name in _FLAGS}
        wrong = [name for name, flag in flags.items() if not isinstance(flag, bool)]
        if wrong:
            raise wrong_value(path, f"{key}.{wrong[0]}", flags[wrong[0]], "must be true or false")
        token = Token(value["content"], **{**flags, "special": value.get("special", special)})
    else:
        raise wrong_value(path, key, value, "must be a token's text, or an object with its content")
    if flaw_of(token.content):
        raise wrong_value(path, key, value, f"{flaw_of(token.content)}; download it again")
    return token


def _flag(path: Path, raw: Mapping[str, Any], key: str) -> bool | None:
    value = raw.get(key)
    if value is not None and not isinstance(value, bool):
        raise wrong_value(path, key, value, "must be true or false")
    return value


def _contradictions(
    own: Mapping[str, Token], second: Mapping[str, Token], named: Mapping[str, Token]
) -> tuple[str, ...]:
    return tuple(
        f"{name} is {own[name].content!r} in {TOKENIZER_CONFIG} and {second[name].content!r} in {SPECIAL_TOKENS_MAP}: "
        f"{named[name].content!r} counts"
        for name in NAMES
        if name in own and name in second and own[name].content != second[name].content
    )


def _legacy_note(raw: Mapping[str, Any], by_id: Mapping[int, Token], legacy: Mapping[int, Token]) -> tuple[str, ...]:
    """Where tokenizer_config.json lists added tokens, added_tokens.json is not read (transformers' rule)."""
    more = [token.content for i, token in legacy.items() if i not in by_id or by_id[i].content != token.content]
    if not more or "added_tokens_decoder" not in raw:
        return ()
    return (
        f"{ADDED_TOKENS} is not read, as {TOKENIZER_CONFIG} lists added_tokens_decoder; the latter lacks {more[0]!r}",
    )


def _ignored(path: Path, raw: Mapping[str, Any]) -> tuple[str, ...]:
    wanted = [key for key in _NOT_HONOURED if raw.get(key)]
    return tuple(f"{path.name}: {key} {raw[key]!r} is not honoured: tokenizer.json alone decides" for key in wanted)
