"""RopeConfig: rotary position embedding, whatever config.json calls it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from deepseek_trt.export.errors import ConfigError

RopeKind = Literal["default", "linear", "dynamic", "yarn"]
ROPE_KINDS = ("default", "linear", "dynamic", "yarn")
DEFAULT_MAX_POSITIONS = 2048  # where config.json lacks max_position_embeddings


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: plain, linearly scaled, dynamic NTK, or YaRN (arXiv:2309.00071).

    original_max_position_embeddings is YaRN's, and for dynamic the length above which frequencies change.
    """

    theta: float = 10000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> RopeConfig:
        """Translate `rope_scaling: {type}`, `rope_scaling: {rope_type}` or `rope_parameters` of config.json."""
        scaling = rope_settings(raw)
        theta = float(scaling.get("rope_theta") or raw.get("rope_theta") or cls.theta)
        kind = rope_kind(scaling)
        if kind == "default":
            return cls(theta=theta)
        if scaling.get("factor") is None:
            raise ConfigError(f"rope scaling {kind!r} needs a 'factor' in config.json")
        if kind == "linear":
            return cls(theta=theta, kind="linear", factor=float(scaling["factor"]))
        if kind == "dynamic":
            trained = int(raw.get("max_position_embeddings") or DEFAULT_MAX_POSITIONS)
            factor = float(scaling["factor"])
            return cls(theta=theta, kind="dynamic", factor=factor, original_max_position_embeddings=trained)
        given = {f.name for f in dataclasses.fields(cls)} & scaling.keys()
        numbers = {name: float(scaling[name]) for name in given if scaling[name] is not None}
        original = int(numbers.pop("original_max_position_embeddings", cls.original_max_position_embeddings))
        return cls(theta=theta, kind="yarn", original_max_position_embeddings=original, **numbers)

    @property
    def rotation_amplitude(self) -> float:
        """Factor on cos and sin: m(mscale) / m(mscale_all_dim), exactly 1 for the published models."""
        if self.kind != "yarn":
            return 1.0
        return yarn_mscale(self.factor, self.mscale) / yarn_mscale(self.factor, self.mscale_all_dim)

    @property
    def softmax_amplitude(self) -> float:
        """Factor on the softmax scale: m(mscale_all_dim) squared when mscale_all_dim is non-zero."""
        if self.kind != "yarn" or not self.mscale_all_dim:
            return 1.0
        return yarn_mscale(self.factor, self.mscale_all_dim) ** 2

    def inverse_frequencies(self, dim: int) -> list[float]:
        """The dim/2 rotation speeds in radians a token, in double precision; dynamic: of sequences that are not long.

        YaRN blends plain and plain/factor; the ramp runs from floor(dim at beta_fast) to ceil(dim at beta_slow).
        """
        plain = [self.theta ** (-2.0 * i / dim) for i in range(dim // 2)]
        if self.kind in ("default", "dynamic"):
            return plain
        if self.kind == "linear":
            return [f / self.factor for f in plain]
        low = max(math.floor(self._dim_at_rotations(self.beta_fast, dim)), 0)
        high = min(math.ceil(self._dim_at_rotations(self.beta_slow, dim)), dim - 1)
        width = (high - low) or 0.001
        ramp = [min(max((i - low) / width, 0.0), 1.0) for i in range(dim // 2)]
        return [f * (1.0 - r) + f / self.factor * r for f, r in zip(plain, ramp, strict=True)]

    def _dim_at_rotations(self, rotations: float, dim: int) -> float:
        """The (fractional) dimension that turns `rotations` times over the original context."""
        turns = self.original_max_position_embeddings / (rotations * 2.0 * math.pi)
        return dim * math.log(turns) / (2.0 * math.log(self.theta))


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention amplitude m(x) = 0.1 x ln(factor) + 1, or 1 when nothing is stretched."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def rope_settings(raw: dict[str, Any]) -> dict[str, Any]:
    return raw.get("rope_parameters") or raw.get("rope_scaling") or {}


def rope_kind(scaling: dict[str, Any]) -> Any:
    return scaling.get("rope_type") or scaling.get("type") or "default"
