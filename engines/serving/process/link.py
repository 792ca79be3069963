"""Link: whole messages over a socket, each after its length in four bytes."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from contextlib import suppress

import msgspec

from deepseek_trt.engines.serving.process.messages import Message, ToEngine, ToServer

_LENGTH = struct.Struct("<I")
_AT_ONCE = 2**18  # bytes
_encode = msgspec.msgpack.Encoder().encode


class EngineLink:
    """The engine's end: threads send, one thread receives."""

    def __init__(self, ours: socket.socket) -> None:
        self._socket, self._reader = ours, ours.makefile("rb")
        self._sending = threading.Lock()
        self._queued: list[bytes] = []
        self._decode = msgspec.msgpack.Decoder(ToEngine).decode

    def send(self, message: Message) -> None:
        """Send what is queued, and then this. Never fails: who receives will learn that the server has gone."""
        self.queue(message)
        self.flush()

    def queue(self, message: Message) -> None:
        """Have it sent by the next `send` or `flush`: a call to the system for each costs more than all the rest."""
        framed = _framed(message)
        with self._sending:
            self._queued.append(framed)

    def flush(self) -> None:
        """Send what is queued; never fails either."""
        with self._sending, suppress(OSError):
            queued, self._queued = self._queued, []
            if queued:
                self._socket.sendall(b"".join(queued))

    def receive(self) -> ToEngine | None:
        """The next message; None when the server has gone."""
        head = self._read(_LENGTH.size)
        if len(head) < _LENGTH.size:
            return None
        (size,) = _LENGTH.unpack(head)
        body = self._read(size)
        return self._decode(body) if len(body) == size else None

    def _read(self, size: int) -> bytes:
        """Less where the server has gone; the system calls it an error where that had not read all."""
        try:
            return self._reader.read(size)
        except OSError:
            return b""


class ServerLink:
    """The server's end, for one event loop."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._come = b""  # the beginning of a message
        self._decode = msgspec.msgpack.Decoder(ToServer).decode

    @classmethod
    async def over(cls, ours: socket.socket) -> ServerLink:
        return cls(*await asyncio.open_unix_connection(sock=ours))

    def send(self, message: Message) -> None:
        """Never waits and never fails: who reads will learn that the engine has gone."""
        if not self._writer.is_closing():
            self._writer.write(_framed(message))

    async def receive(self) -> ToServer | None:
        """The next message; None when the engine has gone."""
        try:
            (size,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
            message: ToServer = self._decode(await self._reader.readexactly(size))
            return message
        except (asyncio.IncompleteReadError, OSError):
            return None

    async def receive_all(self) -> list[ToServer] | None:
        """All messages that have come, one at least; None when the engine has gone. After it nobody calls `receive`."""
        messages: list[ToServer] = []
        while not messages:
            try:
                more = await self._reader.read(_AT_ONCE)
            except OSError:
                more = b""
            if not more:
                return None
            self._come += more
            messages = self._whole()
        return messages

    def close(self) -> None:
        self._writer.close()

    def _whole(self) -> list[ToServer]:
        """The whole messages among the bytes that have come."""
        messages, at = [], 0
        while len(self._come) - at >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(self._come, at)
            end = at + _LENGTH.size + size
            if end > len(self._come):
                break
            messages.append(self._decode(self._come[at + _LENGTH.size : end]))
            at = end
        self._come = self._come[at:]
        return messages


def _framed(message: Message) -> bytes:
    body = _encode(message)
    return _LENGTH.pack(len(body)) + body
