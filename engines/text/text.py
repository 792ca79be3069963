"""Text: a bundle's tokenizer and chat template, and text that grows token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from deepseek_trt.engines.text.messages import Message
from deepseek_trt.engines.text.template import ChatTemplates
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.errors import BundleError, RequestError

_LONG = 4096  # characters: encoding one text stops all other threads, encoding a batch lets them run


class Text:
    """The bundle's tokenizer.json, as it came."""

    def __init__(self, bundle: Bundle) -> None:
        """BundleError when the checkpoint had no tokenizer."""
        if bundle.tokenizer_path is None:
            raise BundleError(f"{bundle.path} has no tokenizer.json: give token ids instead of text")
        self._tokenizer = Tokenizer.from_file(str(bundle.tokenizer_path))
        self.chat = ChatTemplates(bundle.path)
        longest = max((len(token.encode()) for token in self._tokenizer.get_vocab()), default=1)
        self._most_bytes = 2 * longest * bundle.manifest.model.max_position_embeddings  # twice: normalizers may shorten

    def encode(self, text: str) -> list[int]:
        """Token ids, special tokens as the tokenizer adds them (BOS first).

        RequestError for a text that is longer than all tokens that the model can take.
        """
        return self._encode(text, special=True)

    def encode_chat(
        self,
        messages: Sequence[Message],
        /,
        tools: Sequence[dict[str, Any]] | None = None,
        chat_template: str | None = None,
        **arguments: Any,
    ) -> list[int]:
        """Token ids of a conversation rendered with the checkpoint's chat template, ready for the answer.

        `chat_template` is the name of one of several, or a file; `arguments` are what the template reads beside
        messages and tools, e.g. thinking=True. Raises RequestError.
        """
        return self._encode(self.chat.render(messages, tools, chat_template, arguments), special=False)

    def _encode(self, text: str, special: bool) -> list[int]:
        if len(text) > self._most_bytes:
            raise RequestError(f"the prompt has {len(text)} characters, more than the model has tokens for: shorten it")
        if len(text) < _LONG:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=special).ids
        else:
            ids = self._tokenizer.encode_batch([text], add_special_tokens=special)[0].ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def stream(self) -> Callable[[int], str]:
        """A function from one answer's tokens, one after another, to the text that each completes, possibly none."""
        stream = DecodeStream(skip_special_tokens=True)
        return lambda token: stream.step(self._tokenizer, token) or ""
