"""A request's tensors and parameters, as a server gives them, judged by what was sent."""

from __future__ import annotations

import json
import math
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from fuzzing import good
from fuzzing.exports import trace_once
from fuzzing.mutate import mutated_json
from fuzzing.runner import DisagreementError
from fuzzing.weights import strict

_GOOD: dict[str, tuple[Any, str]] = {
    "max_tokens": (8, "int32"),
    "min_tokens": (0, "int32"),
    "top_k": (4, "int32"),
    "top_p": (0.9, "float32"),
    "min_p": (0.1, "float32"),
    "temperature": (0.7, "float32"),
    "repetition_penalty": (1.1, "float32"),
    "presence_penalty": (0.5, "float32"),
    "frequency_penalty": (0.5, "float32"),
    "seed": (7, "uint64"),
    "stream": (True, "bool"),
    "exclude_input_in_output": (True, "bool"),
    "return_log_probs": (False, "bool"),
    "timeout_ms": (1000, "int32"),
    "stop_words": (b"end", "object"),
    "stop_token_ids": (3, "int32"),
}
_NUMBERS = (0, 1, -1, 2, 0.5, -0.5, 2**31 - 1, -(2**31), 2**32, 2**63 - 1, -(2**63), 2**64 - 1, 1e30, 1e308, 1e-30)
_ODD = (math.nan, math.inf, -math.inf)
_TEXTS = (b"", b"hello", b"\xff\xfe", b"\0", b"\x1b[31m", b"a" * 100_000, "深é\n".encode(), b"\xed\xa0\x80", b"<bos>")
_OF_JSON = ("tools", "chat_template_kwargs", "bad_words", "sampling_parameters", "logit_bias", "guided_decoding_guide")
_PARAMETERS = (
    {"n": 1},
    {"temperature": "0.5"},
    {"stop": ["a"], "beam_width": 2},
    {"structured_outputs": "{"},
    {"id": 1},
    {"x": 1},
    {"\n": 2},
    {"triton_x": "y"},
    {"sequence_start": True},
    {"": ""},
)


class Requests:
    """parse_request of random tensors over a bundle with a tokenizer and a chat template."""

    name, patience = "request", 30.0

    def prepare(self, folder: Path) -> None:
        from deepseek_trt.engines.text.text import Text
        from deepseek_trt.export.exporter import ExportRequest, export_bundle

        trace_once()
        (folder / "in").mkdir()
        files = {"config.json": good.dumped(good.CONFIG), **good.one_file(good.tensors_of(good.CONFIG))}
        good.write(folder / "in", {**files, **good.text_files()})
        self.text = Text(export_bundle(ExportRequest(folder / "in", folder / "out")).bundle)

    def change(self, rng: Random, folder: Path) -> None:
        chosen = rng.sample(list(_GOOD), rng.randrange(6))
        self.tensors = {name: np.array([_GOOD[name][0]], dtype=_GOOD[name][1]) for name in chosen}
        how = rng.random()
        if how < 0.5:
            self.tensors["text_input"] = np.array([rng.choice(_TEXTS) if rng.random() < 0.4 else b"hi"], object)
        if how > 0.4:
            messages = mutated_json(rng, json.dumps(good.MESSAGES).encode())
            self.tensors["messages"] = np.array([messages], object)
        if rng.random() < 0.2:
            self.tensors[rng.choice(_OF_JSON)] = np.array([self._json(rng)], object)
        for name in rng.sample(list(self.tensors), min(len(self.tensors), rng.choice((0, 1, 1, 2)))):
            self.tensors[name] = self._other(rng, self.tensors[name])
        self.parameters = rng.choice(_PARAMETERS) if rng.random() < 0.3 else {}
        self.timeout = rng.choice((0, 0, 1, 10**6, 2**63))

    def _json(self, rng: Random) -> bytes:
        return mutated_json(
            rng, json.dumps([{"type": "function", "function": {"name": "f", "parameters": {}}}]).encode()
        )

    def _other(self, rng: Random, array: Any) -> Any:
        how = rng.randrange(4)
        if how == 0:
            return np.empty(rng.choice(((0,), (1, 0), ())), array.dtype)
        if how == 1:
            return np.concatenate([array.reshape(-1)] * rng.choice((2, 200)))
        if how == 2:
            return array.reshape(rng.choice(((1, 1), (1, 1, 1), ())))
        with np.errstate(all="ignore"):
            number, dtype = rng.choice(_NUMBERS + _ODD), array.dtype  # the server sees to the dtypes
            if dtype.kind == "O":
                return np.array([rng.choice(_TEXTS)], object)
            if dtype.kind in "iub":
                number = 1 if not math.isfinite(number) else number
                low, high = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
                return np.array([int(max(low, min(high, int(number))))], dtype)
            return np.array([number]).astype(dtype)

    def read(self, folder: Path) -> Any:
        from deepseek_trt.engines.serving.request import parse_request

        return parse_request(self.tensors, self.parameters, self.text, self.timeout)

    def judge(self, folder: Path, found: Any) -> None:
        p, sent = found.params, {name: array.reshape(-1).tolist() for name, array in self.tensors.items()}
        for name in (
            "top_k",
            "top_p",
            "min_p",
            "temperature",
            "repetition_penalty",
            "max_tokens",
            "min_tokens",
            "seed",
        ):
            mine = getattr(p, "max_new_tokens" if name == "max_tokens" else name)
            if (name, sent.get(name)) == ("top_k", [-1]):  # another word for 0
                continue
            if name in sent and np.dtype(_GOOD[name][1]).type(mine) != sent[name][0]:
                raise DisagreementError(f"{name} {sent[name]} was sent, {mine} was read")
        whole = (p.max_new_tokens, p.top_k, p.seed, p.min_tokens, *p.stop_token_ids, *found.prompt_ids)
        if not all(isinstance(number, (int, np.integer)) and 0 <= number < 2**64 for number in whole):
            raise DisagreementError(f"whole numbers were read as {whole}")
        if not all(math.isfinite(x) for x in (p.temperature, p.top_p, p.min_p, p.repetition_penalty)):
            raise DisagreementError("a number is not finite")
        if "messages" in sent:
            strict(sent["messages"][0])
        if "text_input" in sent:
            prompt = sent["text_input"][0]
            wanted = self.text.encode_prompt(prompt.decode() if isinstance(prompt, bytes) else str(prompt))
            if found.prompt_ids != wanted:
                raise DisagreementError(f"{sent['text_input']} became {found.prompt_ids[:9]}")
