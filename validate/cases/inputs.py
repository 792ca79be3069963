"""What the backends are fed: drawn tokens, and a text where the bundle has a tokenizer."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deepseek_trt.engines.sessions.session import Session
from deepseek_trt.export.arrays import Int64s
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.errors import RequestError
from deepseek_trt.validate.cases.cases import Plan, build_case, case_plan, seeded_tokens, text_tokens
from deepseek_trt.validate.cases.long_cases import GREEDY, PROMPTS, WINDOWS, greedy_case, greedy_plan, window_cases
from deepseek_trt.validate.steps import Script, Step

DEFAULT_TEXT = Path(__file__).parent / "default_text.txt"


@dataclass(frozen=True)
class Inputs:
    """Tokens of every case. `sources` says of each case what it was made of; `text` holds the whole text's tokens."""

    bundle: Bundle
    seed: int
    sources: dict[str, str]
    text: tuple[int, ...]

    @property
    def pages(self) -> int:
        """Pages that the longest case needs."""
        cache, windows = self.bundle.manifest.cache, [plan for plan, _ in self._windows()]
        return max(plan.pages(cache) for plan in (self._plan, self._greedy_plan, *windows))

    def script(self) -> Script:
        """The case of drawn tokens, and one of text where there is one."""
        cases = self.rows(self._plan.tokens).items()
        made = [build_case(case, ids, self._plan, self.bundle.manifest.cache, self.seed) for case, ids in cases]
        return Script(tuple(itertools.chain.from_iterable(made)), self.pages)

    def rows(self, lengths: Sequence[int]) -> dict[str, list[Int64s]]:
        """Rows of these lengths, of the case of drawn tokens and, where there is one, of that of text."""
        rows = {"seeded": seeded_tokens(self.bundle.manifest.model.vocab_size, lengths, self.seed)}
        return rows | ({"text": text_tokens(self.text, lengths)} if self.text else {})

    def with_long_cases(self, script: Script, reference: Session) -> Script:
        """The script, then greedy generation and the whole text."""
        steps = script.steps + greedy_case(reference, self._prompts(), self._greedy_plan, self.seed)
        for _, more in self._windows():
            steps += more
        return dataclasses.replace(script, steps=steps)

    @property
    def _plan(self) -> Plan:
        return case_plan(self.bundle.manifest.cache.page_size)

    @property
    def _greedy_plan(self) -> Plan:
        return greedy_plan(self.bundle.manifest.model.max_position_embeddings)

    def _prompts(self) -> list[Int64s]:
        if self.text:
            return text_tokens(self.text, PROMPTS)
        return seeded_tokens(self.bundle.manifest.model.vocab_size, PROMPTS, self.seed)

    def _windows(self) -> list[tuple[Plan, tuple[Step, ...]]]:
        manifest = self.bundle.manifest
        model = manifest.model
        limits = (model.max_position_embeddings, model.vocab_size)
        return window_cases(self.text, manifest.cache, *limits, manifest.all_logits, self.seed)


def read_inputs(bundle: Bundle, text: Path | None, seed: int) -> Inputs:
    """`text` None takes the one that ships; RequestError where the model or the text is too short for the cases."""
    manifest = bundle.manifest
    needed, limit = max(case_plan(manifest.cache.page_size).tokens), manifest.model.max_position_embeddings
    if needed > limit:
        raise RequestError(f"sequences of {needed} tokens are needed, the model takes {limit}: use smaller pages")
    if bundle.tokenizer_path is None and text is not None:
        raise RequestError(f"{bundle.path} has no tokenizer.json: leave out --text, or export it with one")
    sources = {"seeded": f"tokens drawn evenly from the vocabulary, seed {seed}"}
    ids: tuple[int, ...] = ()
    if bundle.tokenizer_path is not None:
        ids = _encode(bundle, text or DEFAULT_TEXT)
    if text is not None and max(ids, default=0) >= manifest.model.vocab_size:
        raise RequestError(f"{text} has token {max(ids)}: the model's ids end at {manifest.model.vocab_size - 1}")
    if max(ids, default=0) >= manifest.model.vocab_size:  # a tokenizer with more tokens than the model
        ids = ()
    if ids:
        sources["text"] = str(text) if text else f"{DEFAULT_TEXT.name}, which ships with the package"
        sources[WINDOWS] = "the same text in windows, one token after the other"
    sources[GREEDY] = f"prompts of {'text' if ids else 'drawn tokens'}, then what torch in float32 generates"
    return Inputs(bundle, seed, sources, ids)


def _encode(bundle: Bundle, text: Path) -> tuple[int, ...]:
    from deepseek_trt.export.text.tokenizer import LoadedTokenizer

    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{text} cannot be read ({error}): give a text file in UTF-8") from None
    with bundle.text_folder() as folder:
        return tuple(LoadedTokenizer.load(folder, bundle.manifest.model).encode(content))
