"""The published names of a checkpoint's tensors, whatever wrapped the model when it was saved."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from deepseek_trt.export.errors import CheckpointError
from deepseek_trt.export.reading.tensors import StoredTensor
from deepseek_trt.export.text.wording import shown, some

# Who puts what before the names: PEFT, DDP, torch.compile, FSDP, a vision model, other trainers.
PREFIXES = (
    "base_model.model.",
    "module.",
    "_orig_mod.",
    "_fsdp_wrapped_module.",
    "language_model.",
    "transformer.",
    "causal_lm.",
)
_DOUBLED = "model."  # of a model within a model; transformers takes it away, too
# What torch puts between two names: it holds no weights of its own.
_WRAPPERS = re.compile(r"(?<=\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_HEADS = ("lm_head.", "score.")
_BARE = ("layers.", "embed_tokens.", "norm.")  # of a model saved without its head (DeepseekV2Model)
_ADAPTERS = re.compile(r"\.(lora_|base_layer\.|modules_to_save\.|ia3_l\b|oft_|vera_lambda|hada_w|lokr_w)")


def published_names(tensors: Mapping[str, StoredTensor]) -> tuple[dict[str, StoredTensor], tuple[str, ...]]:
    """The tensors by their published names, and a sentence for what was taken from all of their names.

    Raises CheckpointError for a prefix that only some of them have, for one that is not known, and for the tensors of
    an adapter.
    """
    adapter = next((name for name in tensors if _ADAPTERS.search(name)), None)
    if adapter:
        raise CheckpointError(
            f"tensor {shown(adapter)} is an adapter's (LoRA), beside the model's own: merge them (peft's "
            "merge_and_unload), or export the model that was trained on with --adapter and the adapter's folder"
        )
    names, notes = {name: _WRAPPERS.sub("", name) for name in tensors}, []
    wrapped = next((stored for stored, name in names.items() if stored != name), None)
    if wrapped:
        notes.append(f"what torch puts between names is taken away, as in {shown(wrapped)}")
    while prefix := _common_prefix(names.values()):
        names = {stored: name.removeprefix(prefix) for stored, name in names.items()}
        notes.append(f"the tensors' names begin with {prefix}, which is taken away")
    if any(name.startswith("layers.") for name in names.values()):
        names = {stored: f"model.{name}" if name.startswith(_BARE) else name for stored, name in names.items()}
    _check_known(names.values())
    by_name: dict[str, str] = {}
    for stored, name in names.items():
        if by_name.setdefault(name, stored) != stored:
            raise CheckpointError(
                f"tensors {shown(by_name[name])} and {shown(stored)} are both {some([name])}: remove one"
            )
    return {name: tensors[stored] for name, stored in by_name.items()}, tuple(notes)


def _common_prefix(names: Collection[str]) -> str | None:
    """A known prefix of all names, or nothing; CheckpointError where only some of them have it."""
    for prefix in PREFIXES:
        having = [name for name in names if name.startswith(prefix)]
        others = [name for name in names if not name.startswith(prefix)]
        if not having:
            continue
        if not others or (_is_body(having, prefix) and all(name.startswith(_HEADS) for name in others)):
            return prefix
        raise CheckpointError(
            f"some tensors' names begin with {prefix} ({some(having, 1)}) and others do not ({some(others, 1)}): "
            "save the model again, unwrapped"
        )
    body = [name for name in names if not name.startswith(_HEADS)]
    marks = tuple(_DOUBLED + head for head in (_DOUBLED, *_HEADS))
    doubled = all(name.startswith(_DOUBLED) for name in body) and any(name.startswith(marks) for name in body)
    return _DOUBLED if doubled else None


def _is_body(names: Collection[str], prefix: str) -> bool:
    """Whether the prefix stands where the published names have their "model."."""
    return all(name.removeprefix(prefix).startswith(_BARE) for name in names)


def _check_known(names: Collection[str]) -> None:
    """Refuse names that would be the published ones but for what stands before them."""
    if any(name.startswith("model.") for name in names):
        return
    for name in names:
        prefix, found, _ = name.partition("layers.0.self_attn.")
        if found:
            raise CheckpointError(
                f"the tensors' names begin with {shown(prefix)} ({shown(name)}), which is no known prefix: "
                "save the model again, unwrapped"
            )
