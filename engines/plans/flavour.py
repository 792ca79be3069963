"""Flavour: TensorRT and TensorRT-RTX behind one adapter. Differences are asked for by capability, never by version."""

from __future__ import annotations

import collections
import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from deepseek_trt.export.errors import BuildError
from deepseek_trt.plugins.kernels.chips import SHARED_LIMITS

INSTALL = {
    "rtx": "pip install tensorrt-rtx-cu13",
    "tensorrt": "pip install 'deepseek-trt[tensorrt]' (NVIDIA's package index has the libraries), 10.15 or newer",
}
MODULES = {"rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
# What the builder cannot do without; a TensorRT that lacks one is older than 10.15.
_NEEDED = (("OnnxParserFlag", "ENABLE_PLUGIN_OVERRIDE"), ("PreviewFeature", "ALIASED_PLUGIN_IO_10_03"))


_OURS = "deepseek-trt: "  # how a message of the plugin library begins that is for the user


class ErrorLog:
    """TensorRT's last errors, each a severity and a message: it explains itself nowhere else.

    `notes` are what the plugin library says of how it computes, once each.
    """

    def __init__(self) -> None:
        self.errors: collections.deque[tuple[str, str]] = collections.deque(maxlen=100)
        self.notes: dict[str, None] = {}

    def __call__(self, severity: str, message: str) -> None:
        """Keep errors; TensorRT logs every verbose line, too, and those would pile up with the layers."""
        if message.startswith(_OURS):
            self.notes[message.removeprefix(_OURS)] = None
        elif severity in ("INTERNAL_ERROR", "ERROR"):
            self.errors.append((severity, message))

    def first(self) -> str:
        """The first message since `errors` were cleared; later ones are mostly consequences of it."""
        return self.errors[0][1].strip() if self.errors else "no reason was logged"

    def last(self) -> str:
        return ": ".join(self.errors[-1]) if self.errors else "no reason was logged"


@dataclass(frozen=True)
class Flavour:
    """One installed TensorRT, and what can be asked of it; its logger hands on to `log`."""

    name: str
    trt: ModuleType
    logger: Any
    log: ErrorLog = field(default_factory=ErrorLog)

    @property
    def version(self) -> str:
        return str(self.trt.__version__)

    @property
    def targets_chips(self) -> bool:
        """Whether it builds for named chips with no GPU; otherwise for the GPU of this machine."""
        return hasattr(self.trt, "ComputeCapability")

    def check_chips(self, sms: Sequence[int]) -> None:
        """BuildError for chips that it does not build for, or that the plugins' kernels do not run on."""
        if not self.targets_chips:
            if sms:
                raise BuildError(f"{self.name} builds for the GPU of this machine only: leave out --sm {sms[0]}")
            return
        if not sms:
            raise BuildError("say which chips to build for, e.g. --sm 86 --sm 120")
        known = [sm for sm in SHARED_LIMITS if f"SM{sm}" in self.trt.ComputeCapability.__members__]
        for sm in sms:
            if sm not in known:
                names = ", ".join(map(str, known))
                raise BuildError(f"{self.name} {self.version} does not build for SM {sm}; it builds for {names}")

    def set_chips(self, config: Any, sms: Sequence[int]) -> None:
        """Build for these chips. Left unset, TensorRT-RTX would silently take SM80."""
        self.check_chips(sms)
        if not self.targets_chips:
            return
        config.num_compute_capabilities = len(sms)
        for index, sm in enumerate(sms):
            config.set_compute_capability(self.trt.ComputeCapability.__members__[f"SM{sm}"], index)

    def keep_capturable(self, config: Any) -> None:
        """Build plans whose runs allocate nothing, which RTX asks for where runs are captured into CUDA graphs."""
        flag = getattr(self.trt.BuilderFlag, "REQUIRE_USER_ALLOCATION", None)
        if flag is not None:
            config.set_flag(flag)

    def network_flags(self) -> int:
        """Strongly typed, where that is not the only kind."""
        flag = getattr(self.trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        return 0 if flag is None else 1 << int(flag)


def open_flavour(name: str) -> Flavour:
    """Import the flavour `name`; BuildError saying how to install it where it is absent or too old."""
    try:
        trt = importlib.import_module(MODULES[name])
    except ImportError as error:
        raise BuildError(f"{MODULES[name]} cannot be imported ({error}): {INSTALL[name]}") from None
    for owner, member in _NEEDED:
        if not hasattr(getattr(trt, owner, None), member):
            raise BuildError(f"{MODULES[name]} {trt.__version__} lacks {owner}.{member}: {INSTALL[name]}")
    log = ErrorLog()
    return Flavour(name, trt, _logger(trt, log), log)


_LOGGERS: dict[str, Any] = {}


def _logger(trt: ModuleType, log: ErrorLog) -> Any:
    """TensorRT keeps a process's first logger and ignores later ones: so there is one, whose target can change."""
    if trt.__name__ not in _LOGGERS:

        class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)
                self.target = log

            def log(self, severity: Any, message: str) -> None:
                self.target(severity.name, message)

        _LOGGERS[trt.__name__] = Logger()
    _LOGGERS[trt.__name__].target = log
    return _LOGGERS[trt.__name__]
