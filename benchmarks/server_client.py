"""An asyncio client for benchmarks/server.py: cheap enough to leave the processor to the server it measures."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any

_END = b"\r\n0\r\n\r\n"  # of a chunked body


@dataclass(frozen=True)
class Call:
    """A body and where to post it."""

    path: str
    body: dict[str, Any]


@dataclass
class Answer:
    """What came back: events of a stream, or the one body. status 0: the client left before there was any."""

    status: int = 0
    events: list[dict[str, Any]] = field(default_factory=list)
    sent: float = 0.0
    first: float = 0.0  # when the first piece came; 0 for none
    last: float = 0.0

    @property
    def tokens(self) -> int:
        """Of tritonserver each event says its own, of serve the last one all of them."""
        usages = [event.get("usage") or {} for event in self.events]
        own = sum(event.get("num_output_tokens", 0) for event in self.events)
        return int(own + sum(usage.get("completion_tokens", 0) for usage in usages))

    @property
    def finals(self) -> int:
        said = [choice for event in self.events for choice in (event, *event.get("choices", ()))]
        return sum(bool(one.get("finish_reason")) for one in said)

    @property
    def pieces(self) -> int:
        """Events that bring something of the answer."""
        return sum(event.get("choices") != [] for event in self.events)


class Connection:
    """One connection, kept open from request to request; opened again after leaving."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, call: Call, leave_after: int | None = None) -> Answer:
        """The answer; with `leave_after` the connection is closed once so many chunks have come."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port, limit=2**20)
        reader, writer = self._streams
        data = json.dumps(call.body).encode()
        head = f"POST {call.path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
        answer = Answer(sent=time.perf_counter())
        writer.write(head.encode() + data)
        if leave_after == 0:
            await asyncio.sleep(0.02)  # it is being answered, and nothing has come
            self.close()
            return answer
        header = await reader.readuntil(b"\r\n\r\n")
        answer.status = int(header.split(b" ", 2)[1])
        if b"chunked" in header.lower():
            await self._read_chunks(reader, answer, leave_after)
        else:
            raw = header.lower().partition(b"content-length:")[2].split(b"\r\n")[0]
            answer.events = _events(await reader.readexactly(int(raw)))
            answer.first = answer.last = time.perf_counter()
        return answer

    def close(self) -> None:
        if self._streams:
            self._streams[1].close()
        self._streams = None

    async def _read_chunks(self, reader: asyncio.StreamReader, answer: Answer, leave_after: int | None) -> None:
        parts: list[bytes] = []
        while not (parts and b"".join(parts[-2:]).endswith(_END)):
            part = await reader.read(2**16)
            if not part:
                raise ConnectionError("the connection was closed in the middle of an answer")
            answer.last = time.perf_counter()
            answer.first = answer.first or answer.last
            parts.append(part)
            if leave_after is not None and len(parts) >= leave_after:
                self.close()
                break
        answer.events = _events(b"".join(parts))


def _events(body: bytes) -> list[dict[str, Any]]:
    """JSON objects of a body, an event a line or one alone; a half one at the end of a left stream is passed over."""
    found = []
    for line in body.split(b"\n"):
        text = line.strip().removeprefix(b"data: ")
        if text.startswith(b"{") and text.endswith(b"}"):
            found.append(json.loads(text))
    return found
