"""Text: a bundle's tokenizer and chat template, and text that grows token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from deepseek_trt.engines.text.messages import Message
from deepseek_trt.engines.text.stream import TextStream
from deepseek_trt.engines.text.template import ChatTemplates
from deepseek_trt.engines.text.template_files import Named, read_special_tokens, read_templates
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.errors import BundleError, RequestError
from deepseek_trt.export.text.tokenizer import LoadedTokenizer, refusals
from deepseek_trt.export.text.valid import check_text

_LONG = 4096  # characters: encoding one text stops all other threads, encoding a batch lets them run


class _BundleTemplates(ChatTemplates):
    """Those of a bundle, out of the files that it lists."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle.path)
        self._bundle = bundle

    @cached_property
    def named(self) -> Named:
        with self._bundle.text_folder() as folder:
            return read_templates(folder)

    @cached_property
    def tokens(self) -> Mapping[str, str]:
        with self._bundle.text_folder() as folder:
            return read_special_tokens(folder)


class Text:
    """The bundle's tokenizer.json with what the files beside it say: LoadedTokenizer has the rules."""

    def __init__(self, bundle: Bundle) -> None:
        """BundleError when the checkpoint had no tokenizer, ConfigError or CheckpointError when its files are wrong."""
        if bundle.tokenizer_path is None:
            raise BundleError(f"{bundle.path} has no tokenizer.json: give token ids instead of text")
        with bundle.text_folder() as folder:
            self._loaded = LoadedTokenizer.load(folder, bundle.manifest.model)
        self.chat = _BundleTemplates(bundle)
        self._tokenizer = self._loaded.tokenizer
        longest = max((len(token.encode()) for token in self._tokenizer.get_vocab()), default=1)
        # Of a prompt. Twice: normalizers may shorten.
        self.most_bytes = 2 * longest * bundle.manifest.model.max_position_embeddings
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = {token_id: token.content for token_id, token in added.items() if token.special}

    def encode(self, text: str) -> list[int]:
        """Token ids, between the special tokens that texts are put between (BOS first).

        RequestError for what is no valid text, and for one that is longer than all tokens that the model can take.
        """
        return [*self._loaded.front, *self._encode(text, "the prompt"), *self._loaded.back]

    def encode_chat(
        self,
        messages: Sequence[Message],
        /,
        tools: Sequence[dict[str, Any]] | None = None,
        chat_template: str | None = None,
        **arguments: Any,
    ) -> list[int]:
        """Token ids of a conversation rendered with the checkpoint's chat template, ready for the answer.

        The template itself writes the special tokens. `chat_template` is the name of one of several, or a file;
        `arguments` are what the template reads beside messages and tools, e.g. thinking=True. Raises RequestError.
        """
        return self._encode(self.chat.render(messages, tools, chat_template, arguments), "the conversation")

    def decode(self, ids: Sequence[int]) -> str:
        """The tokens' text without special tokens; bytes that are no UTF-8 become U+FFFD."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def stream(self) -> TextStream:
        """For one answer's tokens, one after another."""
        return TextStream(self._tokenizer, self._special)

    def _encode(self, text: str, name: str) -> list[int]:
        if len(text) > self.most_bytes:
            raise RequestError(f"{name} has {len(text)} characters, more than the model has tokens for: shorten it")
        check_text(text, name)
        with refusals(RequestError, f"{name} cannot be encoded ({{}}): leave out what the tokenizer does not know"):
            if len(text) < _LONG:
                ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
            else:
                ids = self._tokenizer.encode_batch([text], add_special_tokens=False)[0].ids
        return ids
