"""Headers, indexes, configs and the weights themselves, judged by the safetensors library and transformers' configs."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from random import Random
from typing import Any

import safetensors
import torch
from fuzzing import good
from fuzzing.mutate import mutated_bytes, mutated_json
from fuzzing.runner import DisagreementError
from safetensors.torch import save

INDEX = "model.safetensors.index.json"
SMALL = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b.weight": torch.ones(4, dtype=torch.bfloat16),
    "c": torch.tensor(3, dtype=torch.uint8),
    "d": torch.zeros(0, 3),
    "e": torch.arange(3, dtype=torch.int64),
}


def damaged_safetensors(rng: Random, data: bytes) -> bytes:
    """A change of the header's JSON with its length made right, or of any byte, or of the length."""
    length = struct.unpack("<Q", data[:8])[0]
    header, rest = data[8 : 8 + length], data[8 + length :]
    how = rng.random()
    if how < 0.7:
        header = mutated_json(rng, header.rstrip())
        if rng.random() < 0.3:
            rest = rng.choice((rest[:-1], rest + b"\0", rest * 2, rest[: len(rest) // 2]))
        return struct.pack("<Q", len(header)) + header + rest
    if how < 0.8:
        other = rng.choice((0, 1, length - 1, length + 1, 2 * length, 2**31, 2**63, 2**64 - 1, 100_000_001, len(data)))
        return struct.pack("<Q", other) + data[8:]
    return mutated_bytes(rng, data)


def library_reads(data: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """dtype, shape and bytes of each tensor, by the safetensors library."""
    try:
        found = safetensors.deserialize(data)
    except Exception as error:
        raise DisagreementError(f"safetensors refuses it: {error}") from None
    return {name: (one["dtype"], tuple(one["shape"]), bytes(one["data"])) for name, one in found}


def strict(data: bytes) -> Any:
    """The JSON, by the json module with hooks that refuse what JSON does not have."""

    def no(constant: str) -> Any:
        raise DisagreementError(f"json: {constant}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise DisagreementError(f"json: a key twice among {[key for key, _ in pairs]}")
        return dict(pairs)

    def finite(text: str) -> float:
        return float(text) if abs(float(text)) != float("inf") else no(text)

    try:
        return json.loads(data.decode(), object_pairs_hook=unique, parse_constant=no, parse_float=finite)
    except (ValueError, RecursionError) as error:
        raise DisagreementError(f"json refuses it: {error}") from None


class Header:
    """The header of one file, and its tensors' bytes."""

    name, patience = "header", 10.0

    def prepare(self, folder: Path) -> None:
        self.good = save(SMALL, metadata={"format": "pt"})

    def change(self, rng: Random, folder: Path) -> None:
        (folder / "x.safetensors").write_bytes(damaged_safetensors(rng, self.good))

    def read(self, folder: Path) -> Any:
        from deepseek_trt.export.reading.header import read_header

        return list(read_header(folder / "x.safetensors"))

    def judge(self, folder: Path, found: Any) -> None:
        data = (folder / "x.safetensors").read_bytes()
        theirs = library_reads(data)
        ours = {t.name: (tuple(t.shape), data[t.offset : t.offset + t.nbytes]) for t in found}
        if ours != {name: (shape, content) for name, (_, shape, content) in theirs.items()}:
            raise DisagreementError(f"safetensors reads {theirs}, read was {ours}")
        strict(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])


class Checkpoints:
    """A whole folder, of which one file is changed: the index, a shard's header, or config.json."""

    patience = 20.0

    def __init__(self, name: str, *changed: str, v3: bool = False) -> None:
        self.name, self.changed, self.config = name, changed, good.V3 if v3 else good.CONFIG
        if name == "classifier":
            self.config = good.CLASSIFIER

    def prepare(self, folder: Path) -> None:
        tensors = good.tensors_of(self.config)
        if self.name == "classifier":
            del tensors["lm_head.weight"]
            tensors["score.weight"] = torch.ones(len(self.config["id2label"]), self.config["hidden_size"])
        weights = good.sharded(tensors) if self.name == "index" else good.one_file(tensors)
        self.good = {"config.json": good.dumped(self.config), **weights}

    def change(self, rng: Random, folder: Path) -> None:
        name = rng.choice(self.changed)
        data = self.good[name]
        if name.endswith(".json"):
            data = mutated_json(rng, data) if rng.random() < 0.85 else mutated_bytes(rng, data)
        else:
            data = damaged_safetensors(rng, data)
        good.write(folder, {**self.good, name: data})

    def read(self, folder: Path) -> Any:
        from deepseek_trt.export.reading.source import read_source

        return read_source(folder)

    def judge(self, folder: Path, found: Any) -> None:
        for note in found.notes:
            if not note.isprintable():
                raise DisagreementError(f"a note is no plain line: {note!r}")
        self.judge_tensors(folder, found.checkpoint.tensors)
        from fuzzing.configs import judge_config

        judge_config(strict((folder / "config.json").read_bytes()), found)

    def judge_tensors(self, folder: Path, tensors: Any) -> None:
        """Of what the files hold, by the library, in the order in which transformers loads them."""
        index = folder / INDEX
        names = ["model.safetensors"]
        if index.exists() and not (folder / names[0]).exists():
            weight_map = strict(index.read_bytes())["weight_map"]
            names = sorted(set(weight_map.values()))
        theirs: dict[str, Any] = {}
        for name in names:
            theirs |= library_reads((folder / name).read_bytes())
        if index.exists():
            for tensor, file in weight_map.items():
                if tensor not in library_reads((folder / file).read_bytes()):
                    raise DisagreementError(f"{tensor} does not lie in {file}")
        ours = {}
        for t in tensors.values():
            ours[t.name] = (tuple(t.shape), t.file.read_bytes()[t.offset : t.offset + t.nbytes])
        if ours != {name: (shape, content) for name, (_, shape, content) in theirs.items()}:
            raise DisagreementError(f"of {sorted(theirs)}, {sorted(ours)} were read, or other bytes of them")
