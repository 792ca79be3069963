"""The exceptions a user can cause, and can mend.

    DeepseekTrtError
    |- ConfigError        config.json names something that is not supported, or contradicts itself
    |- CheckpointError    a shard, tensor or index is missing, truncated, left over or of the wrong shape
    |- BundleError        a bundle folder is not what its manifest says
    |- OutputError        the place to write to is not empty, or too small
    |- BuildError         the plugin library or an engine cannot be built
    |- BackendError       a runtime cannot run what it is asked to run
    |- RequestError       a prompt or a sampling parameter is out of range

The command line prints the message without a traceback and exits with 1. Every message names what happened, the
offending value and the mend. Anything else that is raised is a bug.
"""

from __future__ import annotations


class DeepseekTrtError(Exception):
    """Base of all errors that a user can mend: one sentence, and `details` of several lines where a tool gave some."""

    def __init__(self, sentence: str = "", *, details: str = "") -> None:
        super().__init__(sentence)
        self.sentence, self.details = sentence, details

    def __str__(self) -> str:
        return f"{self.sentence}:\n{self.details}" if self.details else self.sentence


class ConfigError(DeepseekTrtError):
    """config.json names something that is not supported, or contradicts itself."""


class CheckpointError(DeepseekTrtError):
    """A shard, tensor or index is missing, truncated, left over or of the wrong shape."""


class BundleError(DeepseekTrtError):
    """A bundle folder is not what its manifest says."""


class OutputError(DeepseekTrtError):
    """The place to write to is not empty, or too small."""


class BuildError(DeepseekTrtError):
    """The plugin library or an engine cannot be built."""


class BackendError(DeepseekTrtError):
    """A runtime cannot run what it is asked to run."""


class RequestError(DeepseekTrtError):
    """A prompt or a sampling parameter is out of range."""
