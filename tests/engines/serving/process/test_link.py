"""The engine's end of a link whose server has gone."""

from __future__ import annotations

import socket

import pytest

pytest.importorskip("msgspec", reason="the extra `serve` is not installed")

from deepseek_trt.engines.serving.process.link import EngineLink
from deepseek_trt.engines.serving.process.messages import Drain, Drained


@pytest.fixture
def ends():
    theirs, ours = socket.socketpair()
    with theirs, ours:
        yield theirs, EngineLink(ours)


def test_a_server_that_had_not_read_all_has_gone_like_another(ends):
    """The system then says "connection reset" to who reads, and not that the stream has ended."""
    theirs, link = ends
    link.send(Drained())
    theirs.close()
    assert link.receive() is None


@pytest.mark.parametrize("sent", [0, 3, 5])
def test_nothing_of_a_message_or_a_part_of_it(ends, sent):
    theirs, link = ends
    other, own = socket.socketpair()
    with other, own:
        EngineLink(own).send(Drain())
        whole = other.recv(1000)
    assert len(whole) > sent
    theirs.sendall(whole[:sent])
    theirs.close()
    assert link.receive() is None


def test_who_sends_to_a_server_that_has_gone_is_not_told(ends):
    theirs, link = ends
    theirs.close()
    link.send(Drained())
