"""ServingSettings: how one repository's model is served, kept as parameters in its config.pbtxt."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from deepseek_trt.engines.generation.batching.limits import SchedulerLimits
from deepseek_trt.engines.generation.speculation import OFF, check_speculate
from deepseek_trt.engines.sessions.threads import check_threads
from deepseek_trt.export.errors import RequestError


@dataclass(frozen=True)
class ServingSettings:
    """max_inflight: requests that are taken at once, waiting ones counted; more are refused as UNAVAILABLE.

    max_running: those of them that own cache pages. max_model_len: tokens of a prompt and its answer together.
    pages: of the cache, the scratch page counted. threads: of ONNX Runtime, 0 for its own choice.
    generation_config: whether requests take defaults from the bundle's generation_config.json.
    speculate: SchedulerLimits'.
    drain_ms: how long running answers may go on after an unload or SIGTERM before they are ended with an error.
    """

    backend: str
    max_inflight: int
    max_running: int
    max_model_len: int
    pages: int
    prefill_chunk: int
    token_budget: int
    threads: int = 0
    prefix_reuse: bool = True
    drain_ms: int = 5000
    generation_config: bool = True
    speculate: str = OFF

    def __post_init__(self) -> None:
        for name in ("prefill_chunk", "token_budget"):  # of the scheduler's own kind of int, which cannot be sent
            object.__setattr__(self, name, int(getattr(self, name)))
        for name in ("max_inflight", "max_running", "max_model_len", "prefill_chunk"):
            if getattr(self, name) < 1:
                raise RequestError(f"{name} {getattr(self, name)}: must be at least 1")
        check_threads(self.threads)
        check_speculate(self.speculate)
        if self.drain_ms < 0:
            raise RequestError(f"drain_ms {self.drain_ms}: must not be negative")
        if self.pages < 2:
            raise RequestError(f"pages {self.pages}: must be at least 2, one of them is scratch")

    @property
    def limits(self) -> SchedulerLimits:
        sizes = self.max_running, self.token_budget, self.prefill_chunk
        return SchedulerLimits(*sizes, self.prefix_reuse, self.speculate)

    def to_parameters(self) -> dict[str, str]:
        """As config.pbtxt holds them: JSON's spelling of each value."""
        return {name: str(value).lower() for name, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str]) -> ServingSettings:
        """Read config.pbtxt's parameters, others among them; RequestError for a setting that is missing or mistyped."""
        values = {field.name: _parsed(field.name, parameters) for field in dataclasses.fields(cls)}
        return cls(**values)  # type: ignore[arg-type]


def _parsed(name: str, parameters: Mapping[str, str]) -> str | int | bool:
    value = parameters.get(name)
    if value is None:
        raise RequestError(f"parameter {name} is missing in config.pbtxt: write the repository again")
    if name in ("backend", "speculate"):
        return value
    if name in ("prefix_reuse", "generation_config"):
        if value not in ("true", "false"):
            raise RequestError(f"parameter {name} {value!r} in config.pbtxt: must be true or false")
        return value == "true"
    try:
        return int(value)
    except ValueError:
        raise RequestError(f"parameter {name} {value!r} in config.pbtxt: must be a whole number") from None
