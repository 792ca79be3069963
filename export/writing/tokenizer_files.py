"""The files beside the weights that make text of token ids: carried as they are, and tried once."""

from __future__ import annotations

import shutil
from pathlib import Path

from deepseek_trt.export.errors import CheckpointError

CARRIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
_PROBE = "hello world"
# What byte-level tokenizers give back unchanged; others are reported.
_PROBES = {
    "ASCII": "".join(map(chr, range(32, 127))),
    "Chinese, Japanese and Korean": "深度求索 こんにちは 안녕하세요",
    "emoji": "🙂 👩\u200d👩\u200d👧 🇩🇪",
    "a leading space": " hello",
    "double spaces": "a  b   c",
    "newlines": "a\n\nb\r\n\tc\n",
}


def carry_files(source: Path, target: Path) -> None:
    """Copy what is there of CARRIED."""
    for name in CARRIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def check_tokenizer(source: Path) -> tuple[str, ...]:
    """Notes for people, one for each kind of text that the tokenizer does not give back.

    Raises CheckpointError when tokenizer.json cannot say "hello world" and back.
    """
    file = source / "tokenizer.json"
    if not file.is_file():
        return ("the checkpoint has no tokenizer.json: generate wants --token-ids instead of --prompt",)
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{file} cannot be loaded ({error}); download it again") from None

    def back_and_forth(text: str) -> str:
        return str(tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids))

    back = back_and_forth(_PROBE)
    if back != _PROBE:
        raise CheckpointError(f"{file} turns {_PROBE!r} into {back!r}; download it again")
    lost = [kind for kind, text in _PROBES.items() if back_and_forth(text) != text]
    return tuple(f"the tokenizer does not give {kind} back unchanged" for kind in lost)
