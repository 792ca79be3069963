"""From a served model's folder and settings to an LLM that has computed once."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from deepseek_trt.engines.generation.defaults import SamplingDefaults
from deepseek_trt.engines.generation.llm import LLM
from deepseek_trt.engines.generation.params import SamplingParams
from deepseek_trt.engines.serving.settings import ServingSettings
from deepseek_trt.engines.sessions.opening import SessionRequest, open_session
from deepseek_trt.engines.text.text import Text
from deepseek_trt.export.bundle.folder import Bundle

# How long the engine's thread waits at most for another one's Python when a step has ended; Python's own is 5 ms, as
# long as a step.
_SWITCH_SECONDS = 0.0002


def open_llm(path: Path, settings: ServingSettings) -> LLM:
    """The bundle at `path`, within the settings' limits; prefill and decode have run once.

    For a process that serves: its threads take turns more often from now on.
    """
    sys.setswitchinterval(_SWITCH_SECONDS)
    bundle = Bundle.open(path, judges_weights=True)  # as model.py of the repository has just hashed them
    defaults = SamplingDefaults.of_bundle(bundle) if settings.generation_config else SamplingDefaults()
    started = open_session(SessionRequest(bundle, settings.pages, settings.threads), settings.backend)
    config = dataclasses.replace(bundle.manifest.model, max_position_embeddings=settings.max_model_len)
    llm = LLM(started.session, config, Text(bundle), settings.limits, started.choice, defaults)
    if settings.max_model_len > 2:
        llm.generate([[0]], SamplingParams(max_new_tokens=2, ignore_eos=True))
    return llm
