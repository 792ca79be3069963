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


def carry_files(source: Path, target: Path) -> tuple[str, ...]:
    """Copy what is there of CARRIED; returns notes for the manifest.

    Raises CheckpointError when tokenizer.json cannot say "hello world" and back.
    """
    for name in CARRIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if not (target / "tokenizer.json").is_file():
        return ("the checkpoint has no tokenizer.json: generate wants --token-ids instead of --prompt",)
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(target / "tokenizer.json"))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{source / 'tokenizer.json'} cannot be loaded ({error}); download it again") from None
    back = tokenizer.decode(tokenizer.encode(_PROBE, add_special_tokens=False).ids)
    if back != _PROBE:
        raise CheckpointError(f"{source / 'tokenizer.json'} turns {_PROBE!r} into {back!r}; download it again")
    return ()
