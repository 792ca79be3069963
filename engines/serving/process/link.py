"""Link: whole messages over a socket, each after its length in four bytes."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading

import msgspec

from deepseek_trt.engines.serving.process.messages import Message, ToEngine, ToServer

_LENGTH = struct.Struct("<I")
_encode = msgspec.msgpack.Encoder().encode


class EngineLink:
    """The engine's end: threads send, one thread receives."""

    def __init__(self, ours: socket.socket) -> None:
        self._socket, self._reader = ours, ours.makefile("rb")
        self._sending = threading.Lock()
        self._decode = msgspec.msgpack.Decoder(ToEngine).decode

    def send(self, message: Message) -> None:
        """Raises OSError where the server has gone."""
        with self._sending:
            self._socket.sendall(_framed(message))

    def receive(self) -> ToEngine | None:
        """The next message; None when the server has gone."""
        head = self._reader.read(_LENGTH.size)
        if len(head) < _LENGTH.size:
            return None
        (size,) = _LENGTH.unpack(head)
        body = self._reader.read(size)
        return self._decode(body) if len(body) == size else None


class ServerLink:
    """The server's end, for one event loop."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
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

    def close(self) -> None:
        self._writer.close()


def _framed(message: Message) -> bytes:
    body = _encode(message)
    return _LENGTH.pack(len(body)) + body
