"""Valid text: what UTF-8 can hold. Python's strings can hold more, from arguments that are no UTF-8 and from JSON."""

from __future__ import annotations

from pathlib import Path

from deepseek_trt.export.errors import DeepseekTrtError, RequestError

_FIRST_ESCAPED, _LAST_ESCAPED = 0xDC80, 0xDCFF  # what Python makes of bytes that are no UTF-8 (PEP 383)


def flaw_of(text: str) -> str:
    """What makes `text` invalid, to go on after its name; nothing where it is valid. NUL is a character like others."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        if _FIRST_ESCAPED <= code <= _LAST_ESCAPED:
            return f"is not UTF-8 (byte 0x{code - 0xDC00:02x} at character {error.start})"
        return f"holds half a character (the lone surrogate U+{code:04X} at character {error.start})"
    return ""


def check_text(text: str, name: str) -> str:
    """`text` itself; RequestError that calls it `name` where it is no valid text."""
    flaw = flaw_of(text)
    if flaw:
        raise RequestError(f"{name} {flaw}: give valid Unicode text")
    return text


def text_of_bytes(data: bytes, name: str) -> str:
    """`data` as text; RequestError that calls it `name` where it is no UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{name} is not UTF-8 ({error.reason} at byte {error.start}): encode it as UTF-8") from None


def check_place(path: Path, error: type[DeepseekTrtError]) -> None:
    """Raise `error` for a path that is not UTF-8: ONNX Runtime opens no file there."""
    if flaw_of(str(path)):
        raise error(f"{str(path)!r} {flaw_of(str(path))}: name a folder in UTF-8")


def printable(text: str) -> str:
    """`text` with what UTF-8 cannot hold escaped, such as bytes of a file's name."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
