"""tokenizer.json and the files beside it, judged by transformers' tokenizer, generation config and templates."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
from pathlib import Path
from random import Random
from typing import Any

from fuzzing import good
from fuzzing.mutate import mutated_bytes, mutated_json
from fuzzing.runner import DisagreementError
from fuzzing.weights import strict

# Keys of tokenizer_config.json and the others that transformers obeys, and that a note of ours names or that cannot
# be obeyed, with the reason.
KNOWN_DIFFERENCES = {
    "clean_up_tokenization_spaces": "of decoded text alone; a note says that it is not honoured",
    "tokenizer_class": "tokenizer.json alone says how texts are cut; transformers may convert by the class",
}


class Texts:
    """Changes one of the text files; what is read is what check reads of them."""

    patience = 90.0

    def __init__(self, name: str, *changed: str) -> None:
        self.name, self.changed = name, changed

    def prepare(self, folder: Path) -> None:
        import transformers

        from deepseek_trt.export.config.model_config import ModelConfig

        transformers.logging.set_verbosity_error()
        logging.disable(logging.WARNING)
        self.good, self.model = good.text_files(), ModelConfig.from_hf(good.CONFIG)
        _try_each_once()

    def change(self, rng: Random, folder: Path) -> None:
        name = rng.choice(self.changed)
        data = self.good.get(name, b'{"<more>": 288}')
        as_json = name.endswith(".json") and rng.random() < 0.9
        good.write(folder, {**self.good, name: (mutated_json if as_json else mutated_bytes)(rng, data)})

    def read(self, folder: Path) -> Any:
        from deepseek_trt.export.text.generation_config import GenerationConfig
        from deepseek_trt.export.text.reading import read_text
        from deepseek_trt.export.text.tokenizer import LoadedTokenizer

        config, notes = read_text(folder, good.CONFIG, self.model)
        loaded = LoadedTokenizer.load(folder, config)
        ids = {}
        for text in good.TEXTS:
            with contextlib.suppress(Exception):  # what a vocabulary does not hold
                ids[text] = loaded.encode(text)
        return config, notes, loaded, ids, GenerationConfig.read(folder)

    def judge(self, folder: Path, found: Any) -> None:
        config, notes, loaded, ids, generation = found
        for note in notes:
            if not note.isprintable():
                raise DisagreementError(f"a note is no plain line: {note!r}")
        for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json"):
            if (folder / name).exists():
                strict((folder / name).read_bytes())
        _judge_generation(folder, config, generation)
        _judge_ids(folder, loaded, ids)


def _try_each_once() -> None:
    """Trials of the same bytes give the same: only changed tokenizers take a process of their own."""
    from deepseek_trt.export.text import tokenizer

    real, known = tokenizer.trial, {}

    def trial(script: Path, data: bytes) -> str:
        key = hashlib.sha256(data).digest()
        if key not in known:
            known[key] = real(script, data)
        return known[key]

    if real.__module__.startswith("deepseek_trt"):
        tokenizer.trial = trial


def _judge_generation(folder: Path, config: Any, ours: Any) -> None:
    """transformers' GenerationConfig holds the same values."""
    from transformers import GenerationConfig

    raw = strict((folder / "generation_config.json").read_bytes())
    try:
        theirs = GenerationConfig.from_dict(dict(raw))
    except Exception as error:
        if "dtype" in raw:  # nothing here reads it, and a note says so
            return
        raise DisagreementError(f"transformers refuses generation_config.json: {error!r}") from None
    for name, value in ours.sampling:
        if value != float(getattr(theirs, name)):
            raise DisagreementError(f"{name} {value!r} was read, transformers reads {getattr(theirs, name)!r}")
    ends = theirs.eos_token_id if isinstance(theirs.eos_token_id, list) else [theirs.eos_token_id]
    if not {end for end in ends if end is not None} <= set(config.eos_token_ids):
        raise DisagreementError(f"answers end with {config.eos_token_ids}, transformers' with {ends}")


def _judge_ids(folder: Path, loaded: Any, ids: dict[str, list[int]]) -> None:
    """transformers' fast tokenizer makes the same ids of the same texts, special tokens around them included."""
    from transformers import PreTrainedTokenizerFast

    raw = strict((folder / "tokenizer_config.json").read_bytes())
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            theirs = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
            wanted = {text: theirs(text).input_ids for text in ids}
            plain = {text: theirs(text, add_special_tokens=False).input_ids for text in ids}
    except Exception as error:
        words = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if any(known in words for known in REFUSED_BY_TRANSFORMERS_ALONE):
            return
        raise DisagreementError(f"transformers refuses the tokenizer: {words[:400]}") from None
    for text, wanted_ids in wanted.items():
        ours = ids[text][len(loaded.front) : len(ids[text]) - len(loaded.back)]
        if ids[text] != wanted_ids and (ours != plain[text] or not _adds(raw)):
            raise DisagreementError(
                f"{text!r} is {ids[text]}, transformers makes {wanted_ids}; add_bos_token {raw.get('add_bos_token')!r}"
            )


def _adds(raw: dict[str, Any]) -> bool:
    """add_bos_token and add_eos_token are honoured for every class; transformers honours them for some, as Llama's."""
    return raw.get("add_bos_token") is not None or raw.get("add_eos_token") is not None


# What transformers alone refuses, and why it is right here.
REFUSED_BY_TRANSFORMERS_ALONE = {
    "'>' not supported between instances of 'int' and": "model_max_length: config.json says the context",
}


class Templates:
    """chat_template.jinja, judged by transformers' own rendering."""

    name, patience = "chat_template", 30.0

    def prepare(self, folder: Path) -> None:
        self.good = good.text_files()

    def change(self, rng: Random, folder: Path) -> None:
        name = rng.choice(("chat_template.jinja", "chat_template.jinja", "tokenizer_config.json"))
        data = self.good[name]
        files = dict(self.good)
        if name == "tokenizer_config.json":
            del files["chat_template.jinja"]
            config = json.loads(data)
            config["chat_template"] = rng.choice((good.TEMPLATE, [{"name": "default", "template": good.TEMPLATE}]))
            files[name] = mutated_json(rng, good.dumped(config))
        else:
            files[name] = _damaged_template(rng, data)
        good.write(folder, files)

    def read(self, folder: Path) -> Any:
        from deepseek_trt.engines.text.template import ChatTemplates

        return ChatTemplates(folder).render(good.MESSAGES)

    def judge(self, folder: Path, found: Any) -> None:
        from transformers.utils.chat_template_utils import render_jinja_template

        from deepseek_trt.engines.text.template import ChatTemplates

        templates = ChatTemplates(folder)
        (text,), _ = render_jinja_template(
            [good.MESSAGES],
            chat_template=templates.named["default"].text,
            add_generation_prompt=True,
            **templates.tokens,
        )
        if text != found:
            raise DisagreementError(f"{found!r} was rendered, transformers renders {text!r}")


_STATEMENTS = (
    *("{% for i in range(10**9) %}x{% endfor %}", "{{ 'x' * 3000000000 }}", "{{ messages }}", "{{ ''.__class__ }}"),
    *("{% for a in range(9999) %}{% for b in range(9999) %}{{ a }}{% endfor %}{% endfor %}", "{{ 10**10**10 }}"),
    *("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{% include 'x' %}", "{{ messages[0].x.y }}", "{{ 1/0 }}"),
    *(
        "{% set x = messages %}{{ x | tojson }}",
        "{{ raise_exception('no') }}",
        "{{ '%2000000000d' % 1 }}",
        "{{ bos_token",
    ),
    *(
        "{{ namespace(a=1).a }}",
        "{% break %}",
        "{{ strftime_now('%Y')[0] }}",
        "{{ [1,2] | join('x' * 99) }}",
        "\0",
        "{#",
    ),
    "{{ (((" * 200,
    "{% if 1 %}" * 500,
)


def _damaged_template(rng: Random, data: bytes) -> bytes:
    if rng.random() < 0.6:
        return mutated_bytes(rng, data)
    at = rng.choice([i for i in range(len(data) + 1) if data[i : i + 1] in (b"{", b"") or data[i - 1 : i] == b"}"])
    return data[:at] + rng.choice(_STATEMENTS).encode() + data[at:]
