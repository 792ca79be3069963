"""RopeConfig: rotary position embedding, whatever config.json calls it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, cast

from deepseek_trt.export.config.rope_keys import rope_faults, rope_key_notes, rope_kind, rope_settings
from deepseek_trt.export.errors import ConfigError
from deepseek_trt.export.text.wording import shown

RopeKind = Literal["default", "linear", "dynamic", "yarn"]
DEFAULT_MAX_POSITIONS = 2048  # where config.json lacks max_position_embeddings
_YARN_NUMBERS = ("beta_fast", "beta_slow", "mscale", "attention_factor")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: plain, linearly scaled, dynamic NTK, or YaRN (arXiv:2309.00071).

    original_max_position_embeddings is YaRN's, and for dynamic the length above which frequencies change.
    attention_factor, where it is given, is the factor on YaRN's cos and sin.
    """

    theta: float = 10000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    truncate: bool = True

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> RopeConfig:
        """Translate config.json's rope_scaling, or else rope_parameters, and rope_theta inside or beside them.

        Raises ConfigError naming the setting.
        """
        faults = rope_faults(raw)
        if faults:
            raise ConfigError(faults[0])
        _, scaling = rope_settings(raw)
        theta = float(scaling.get("rope_theta") or raw.get("rope_theta") or cls.theta)
        kind = cast(RopeKind, rope_kind(scaling))
        if kind == "default":
            return cls(theta)
        given: dict[str, Any] = {"mscale_all_dim": float(scaling.get("mscale_all_dim") or 0.0)}
        if kind == "dynamic":
            given["original_max_position_embeddings"] = raw.get("max_position_embeddings") or DEFAULT_MAX_POSITIONS
        if kind == "yarn":
            given |= _yarn(scaling)
        return cls(theta, kind, float(scaling["factor"]), **given)

    @property
    def rotation_amplitude(self) -> float:
        """Factor on cos and sin: m(mscale) / m(mscale_all_dim), exactly 1 for the published models."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        return yarn_mscale(self.factor, self.mscale) / yarn_mscale(self.factor, self.mscale_all_dim)

    @property
    def softmax_amplitude(self) -> float:
        """Factor on the softmax scale: m(mscale_all_dim) squared when that is non-zero, for every kind but default."""
        if self.kind == "default" or not self.mscale_all_dim:
            return 1.0
        return yarn_mscale(self.factor, self.mscale_all_dim) ** 2

    def inverse_frequencies(self, dim: int) -> list[float]:
        """The dim/2 rotation speeds in radians a token, in double precision; dynamic: of sequences that are not long.

        YaRN blends plain and plain/factor; the ramp runs from floor(dim at beta_fast) to ceil(dim at beta_slow), or
        from and to just these where `truncate` is false.
        """
        plain = [self.theta ** (-2.0 * i / dim) for i in range(dim // 2)]
        if self.kind in ("default", "dynamic"):
            return plain
        if self.kind == "linear":
            return [f / self.factor for f in plain]
        low, high = self._dim_at_rotations(self.beta_fast, dim), self._dim_at_rotations(self.beta_slow, dim)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        width = (high - low) or 0.001
        ramp = [min(max((i - low) / width, 0.0), 1.0) for i in range(dim // 2)]
        return [f * (1.0 - r) + f / self.factor * r for f, r in zip(plain, ramp, strict=True)]

    def _dim_at_rotations(self, rotations: float, dim: int) -> float:
        """The (fractional) dimension that turns `rotations` times over the original context."""
        turns = self.original_max_position_embeddings / (rotations * 2.0 * math.pi)
        return dim * math.log(turns) / (2.0 * math.log(self.theta))


def _yarn(scaling: dict[str, Any]) -> dict[str, Any]:
    """YaRN's own settings, those that are given."""
    given: dict[str, Any] = {name: float(scaling[name]) for name in _YARN_NUMBERS if scaling.get(name) is not None}
    if scaling.get("original_max_position_embeddings") is not None:
        given["original_max_position_embeddings"] = int(scaling["original_max_position_embeddings"])
    return {**given, "truncate": scaling.get("truncate", True)}


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention amplitude m(x) = 0.1 x ln(factor) + 1, or 1 when nothing is stretched."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def rope_notes(raw: dict[str, Any]) -> tuple[str, ...]:
    """One sentence for each rope setting that is not read, or that other readers of config.json read otherwise."""
    name, scaling = rope_settings(raw)
    found = [*rope_key_notes(raw)]
    if raw.get("rope_parameters") and name == "rope_scaling" and _differ(raw):
        found.append(
            "config.json holds rope_scaling and other rope_parameters: rope_scaling counts, as in transformers"
        )
    inside, beside = scaling.get("rope_theta"), raw.get("rope_theta")
    if inside and beside and inside != beside:
        found.append(f"{name}.rope_theta {shown(inside)} counts, not the rope_theta {shown(beside)} beside it")
    if rope_kind(scaling) == "yarn":
        found += _yarn_notes(name, scaling, raw)
    return tuple(found)


def _differ(raw: dict[str, Any]) -> bool:
    """Whether rope_parameters would mean another rotation than rope_scaling does."""
    alone = {**raw, "rope_scaling": None}
    return bool(rope_faults(alone)) or RopeConfig.from_hf(alone) != RopeConfig.from_hf(raw)


def _yarn_notes(name: str, scaling: dict[str, Any], raw: dict[str, Any]) -> list[str]:
    """Where a setting is absent, DeepSeek's own code and transformers do not always assume the same."""
    found, rope = [], RopeConfig.from_hf(raw)
    positions = raw.get("max_position_embeddings")
    if scaling.get("original_max_position_embeddings") is None and positions != rope.original_max_position_embeddings:
        found.append(
            f"{name} lacks original_max_position_embeddings: it is {rope.original_max_position_embeddings}, as in "
            f"DeepSeek's own code; transformers takes max_position_embeddings, {shown(positions)}"
        )
    both = scaling.get("mscale") and scaling.get("mscale_all_dim")
    theirs = rope.rotation_amplitude if both or rope.attention_factor else yarn_mscale(rope.factor, 1.0)
    if not math.isclose(theirs, rope.rotation_amplitude):
        found.append(
            f"{name} lacks mscale or mscale_all_dim: cos and sin are multiplied by {rope.rotation_amplitude:.6g}, as "
            f"in DeepSeek's own code; transformers takes {theirs:.6g}"
        )
    return found
