"""The parts that a model is cut into when it is compared layer by layer, and how --layers names them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from deepseek_trt.export.errors import RequestError


@dataclass(frozen=True)
class Part:
    """The embedding (index -1), decoder layer `index`, or the last norm and the head (index `layers`)."""

    index: int
    layers: int  # of the model

    @property
    def is_embedding(self) -> bool:
        return self.index < 0

    @property
    def is_head(self) -> bool:
        return self.index == self.layers

    @property
    def is_layer(self) -> bool:
        return not (self.is_embedding or self.is_head)

    @property
    def name(self) -> str:
        if self.is_layer:
            return f"layer {self.index}"
        return "embedding" if self.is_embedding else "last norm and head"

    def owns(self, weight: str) -> bool:
        """Whether the graph tensor is one of this part's; a tied embedding is the head's too."""
        if self.is_layer:
            return weight.startswith(f"model.layers.{self.index}.")
        if self.is_embedding:
            return weight == "model.embed_tokens.weight"
        return not weight.startswith("model.layers.")


def parts_of(layers: str, count: int) -> tuple[Part, ...]:
    """The embedding, the layers that `layers` names ("0-3,26"), and the head, of a model with `count` layers.

    Raises RequestError naming what is wrong with `layers`.
    """
    chosen: set[int] = set()
    for piece in layers.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", piece)
        if match is None:
            raise RequestError(f"--layers {layers}: {piece!r} is no layer; name layers 0 to {count - 1}, as in 0-1,3")
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last:
            raise RequestError(f"--layers {layers}: {piece.strip()} runs backwards; write {last}-{first}")
        if last >= count:
            raise RequestError(f"--layers {layers}: there is no layer {last}; the bundle has layers 0 to {count - 1}")
        chosen.update(range(first, last + 1))
    return tuple(Part(index, count) for index in (-1, *sorted(chosen), count))


@dataclass(frozen=True)
class PartReport:
    """One part: what entered it, and each backend's verdict."""

    part: str
    inputs: str
    passed: dict[str, bool]
