"""LoadedTokenizer: tokenizer.json with what the files beside it say of tokens, and what is put around every text."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from deepseek_trt.export.config.model_config import ModelConfig
from deepseek_trt.export.errors import CheckpointError, ConfigError, DeepseekTrtError
from deepseek_trt.export.files import read_file
from deepseek_trt.export.text.files import TOKENIZER, TOKENIZER_CONFIG
from deepseek_trt.export.text.special_tokens import SpecialTokens, Token
from deepseek_trt.export.trials.trial import TOKENIZER as TOKENIZER_SCRIPT
from deepseek_trt.export.trials.trial import plain, trial

PROBE = "hello world"
_MOST_BYTES = 2**27  # of tokenizer.json; the largest known has 34 million
# Long texts on which a pattern that looks back for ever, or a normalizer that multiplies, shows itself.
_LONG = ("a" * 4096 + "!", " " * 4096 + "a", "1" * 4096 + "a", "ab1 " * 1024, "\u00e9\u6df1\n" * 1024)


@dataclass(frozen=True)
class LoadedTokenizer:
    """`tokenizer` encodes without special tokens of its own; `front` and `back` are what a text is put between.

    Where tokenizer_config.json says add_bos_token or add_eos_token, that decides: true adds the token where
    tokenizer.json's post-processor does not, false takes it away where that adds it. Where it does not say, the
    post-processor decides. DeepSeek publishes add_bos_token true beside a post-processor that adds nothing.
    A text that begins with BOS already gets another one, as transformers and vLLM do it.
    """

    tokenizer: Tokenizer
    special: SpecialTokens
    front: tuple[int, ...]
    back: tuple[int, ...]

    @classmethod
    def load(cls, folder: Path, model: ModelConfig) -> LoadedTokenizer:
        """Load the folder's files. Raises ConfigError or CheckpointError naming file and key or token.

        Truncation, padding and dropout that a training run left in tokenizer.json are switched off.
        """
        special = SpecialTokens.read(folder)
        tokenizer = _from_file(folder / TOKENIZER)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if getattr(tokenizer.model, "dropout", None):
            tokenizer.model.dropout = None
        tokenizer.encode_special_tokens = special.split_special
        _add_tokens(tokenizer, special, folder)
        bos = _id_of(tokenizer, special, "bos_token", model.bos_token_id)
        eos = _id_of(tokenizer, special, "eos_token", next(iter(model.eos_token_ids), None))
        front, back = _around(tokenizer, folder)
        front = tuple(token for token in front if special.add_bos is not False or token != bos)
        back = tuple(token for token in back if special.add_eos is not False or token != eos)
        first = _added(special.add_bos, bos, front, "add_bos_token", folder)
        last = _added(special.add_eos, eos, back, "add_eos_token", folder)
        return cls(tokenizer, special, front=(*first, *front), back=(*back, *last))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, between `front` and `back`."""
        return [*self.front, *self.tokenizer.encode(text, add_special_tokens=False).ids, *self.back]

    def token_id(self, name: str) -> int | None:
        """The id of a named token, such as eos_token; None where the files name none."""
        return _id_of(self.tokenizer, self.special, name, None)


def check_bounded(folder: Path, texts: Sequence[str]) -> None:
    """Try tokenizer.json in a process with limits of time and memory: CheckpointError where it exceeds them.

    Also where the library panics on it, on long texts, or on `texts`. A bundle's own was tried when it was made.
    """
    special = SpecialTokens.read(folder)
    tokens = [*special.added.values(), *special.named.values(), *special.more]
    given = {
        "tokens": [dataclasses.asdict(token) for token in tokens],
        "split_special": special.split_special,
        "texts": [PROBE, *texts, *_LONG],
    }
    path = folder / TOKENIZER
    data = json.dumps(given).encode() + b"\n" + _bytes(path)
    reason = trial(TOKENIZER_SCRIPT, data)
    if reason:
        raise CheckpointError(f"{path} cannot be used: {reason}; download it again")


@contextmanager
def refusals(error: type[DeepseekTrtError], sentence: str) -> Iterator[None]:
    """What the tokenizers library raises as `error`, with {} in the sentence for its words: bare exceptions, and panics
    of its Rust code, which are no Exception.
    """
    try:
        yield
    except BaseException as raised:
        if not isinstance(raised, Exception) and type(raised).__name__ != "PanicException":
            raise
        raise error(sentence.format(plain(str(raised)))) from None


def _bytes(path: Path) -> bytes:
    try:
        return read_file(path, _MOST_BYTES)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def _from_file(path: Path) -> Tokenizer:
    data = _bytes(path)
    with refusals(CheckpointError, f"{_braced(path)} cannot be loaded ({{}}); download it again"):
        return Tokenizer.from_buffer(data)  # from_file wants a name that is UTF-8


def _braced(path: Path) -> str:
    return str(path).replace("{", "{{").replace("}", "}}")


def _add_tokens(tokenizer: Tokenizer, special: SpecialTokens, folder: Path) -> None:
    """Add tokens that tokenizer.json lacks, and the flags that others have, as transformers does."""
    known = {token_id: _as_token(added) for token_id, added in tokenizer.get_added_tokens_decoder().items()}
    wanted = {i: token for i, token in sorted(special.added.items()) if known.get(i) != token}
    for token_id, token in wanted.items():
        _check_id(tokenizer.token_to_id(token.content), token_id, token.content, folder)
    tokenizer.add_tokens([_as_added(token) for token in wanted.values()])
    for token_id, token in wanted.items():
        if tokenizer.token_to_id(token.content) is None:
            raise CheckpointError(f"{folder}: token {token.content!r} cannot be added to tokenizer.json")
        _check_id(tokenizer.token_to_id(token.content), token_id, token.content, folder)
    marked = {added.content for added in tokenizer.get_added_tokens_decoder().values() if added.special}
    named = [*special.named.values(), *special.more]
    tokenizer.add_special_tokens([_as_added(token) for token in named if token.content not in marked])


def _check_id(found: int | None, wanted: int, content: str, folder: Path) -> None:
    if found is not None and found != wanted:
        raise CheckpointError(
            f"{folder}: token {content!r} has id {wanted} in tokenizer_config.json or added_tokens.json, and {found} "
            "by tokenizer.json: take all files from one checkpoint"
        )


def _around(tokenizer: Tokenizer, folder: Path) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What tokenizer.json's post-processor puts before and after a text."""
    with refusals(CheckpointError, f"{_braced(folder / TOKENIZER)} cannot encode {PROBE!r} ({{}}); download it again"):
        plain, whole = (tokenizer.encode(PROBE, add_special_tokens=special).ids for special in (False, True))
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return tuple(whole[:start]), tuple(whole[start + len(plain) :])
    raise CheckpointError(f"{folder / TOKENIZER}: its post_processor does more than put tokens around a text")


def _id_of(tokenizer: Tokenizer, special: SpecialTokens, name: str, default: int | None) -> int | None:
    text = special.text(name)
    return tokenizer.token_to_id(text) if text else default


def _added(add: bool | None, token: int | None, ids: tuple[int, ...], key: str, folder: Path) -> tuple[int, ...]:
    """The token that goes outside of `ids`, or none: never a second one."""
    if add and token is None:
        raise ConfigError(f"{folder / TOKENIZER_CONFIG}: {key} is true, and no file says which token that is")
    return (token,) if add and token is not None and token not in ids else ()


def _as_token(added: AddedToken) -> Token:
    return Token(added.content, added.single_word, added.lstrip, added.rstrip, added.normalized, added.special)


def _as_added(token: Token) -> AddedToken:
    return AddedToken(
        token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=token.special,
    )
