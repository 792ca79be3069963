"""Drafters by the name of their way: prompt lookup, and the model's own layer of multi-token prediction."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np

from deepseek_trt.engines.generation.pages import page_table
from deepseek_trt.engines.generation.request import Request, Work
from deepseek_trt.engines.generation.speculation import AUTO, MOST_DRAFTED, MTP, OFF
from deepseek_trt.engines.sessions.session import Session
from deepseek_trt.export.arrays import Floats
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.errors import RequestError

Reach = Callable[[Request, int], int]  # for how many of so many tokens after its next one a request has pages
_TOGETHER = 256  # states that wait before the layer takes them without drafting


class Drafter(Protocol):
    """Proposes tokens for rows that decode. What it proposes never changes what is picked."""

    def propose(self, work: list[Work], room: int, reach: Reach) -> list[Work]:
        """The rows with their drafts, at most `room` tokens in all. What raises leaves every request as it was."""

    def keep(self, work: Sequence[Work]) -> None:
        """The session has computed these rows, whose requests have not advanced yet."""

    def catch_up(self, requests: Iterable[Request]) -> None:
        """Do what may not wait until the next draft."""

    def settled(self, request: Request) -> int:
        """Tokens whose pages hold all that they will hold: others may use them."""


class LookupDrafter:
    """What followed a row's last tokens where they stood before."""

    def propose(self, work: list[Work], room: int, reach: Reach) -> list[Work]:
        rows = []
        for request, _, _ in work:
            most = min(MOST_DRAFTED, _left(request), room)
            draft = request.lookup.draft(request.tokens, most) if most > 0 else []
            draft = draft[: reach(request, len(draft))]
            rows.append(Work(request, 1 + len(draft), draft))
            room -= len(draft)
        return rows

    def keep(self, work: Sequence[Work]) -> None:
        return None

    def catch_up(self, requests: Iterable[Request]) -> None:
        return None

    def settled(self, request: Request) -> int:
        return request.cached


class MtpDrafter:
    """The layer of multi-token prediction: the likeliest token, and by the state that this gives the next, up to three.

    The layer has a pool beside the model's, and the same pages: slot i holds what it made of the state at i and the
    token at i + 1. It takes states when it drafts, so that none is left out and none is taken of a refused token.
    """

    def __init__(self, session: Session) -> None:
        self._session = session

    def propose(self, work: list[Work], room: int, reach: Reach) -> list[Work]:
        counts = []
        for request, _, _ in work:
            states, is_new = request.states, request.states.drafted_at != request.cached
            if is_new:
                states.deepen(request.cached)
            most = min(states.depth, _left(request), room)
            if is_new and states.filled == request.cached:  # all of its pages are shared: there is no state yet
                most = 0
            counts.append(max(min(reach(request, most), most), 0) if most > 0 else 0)
            room -= counts[-1]
        wanted = [(request, count) for (request, _, _), count in zip(work, counts, strict=True) if count]
        self._draft([row for row in wanted if row[0].states.drafted_at != row[0].cached])
        drafts = [request.states.draft[:count] for (request, _, _), count in zip(work, counts, strict=True)]
        return [Work(request, 1 + len(draft), draft) for (request, _, _), draft in zip(work, drafts, strict=True)]

    def keep(self, work: Sequence[Work]) -> None:
        hidden = self._session.hidden
        for row, w in enumerate(work):
            w.request.states.keep(w.request.cached, hidden[row, : w.new].copy())

    def catch_up(self, requests: Iterable[Request]) -> None:
        """The last state waits for a draft: what it gives is one."""
        late = [request for request in requests if request.cached - request.states.filled > _TOGETHER]
        if late:
            self._take(late, [_TOGETHER] * len(late))

    def settled(self, request: Request) -> int:
        return min(request.cached, request.states.filled)

    def _draft(self, rows: list[tuple[Request, int]]) -> None:
        """As many tokens as each row says, into its states."""
        if not rows:
            return
        requests = [request for request, _ in rows]
        while late := [r for r in requests if r.cached - r.states.filled > _TOGETHER]:
            self.catch_up(late)
        logits = self._take(requests, [request.cached - request.states.filled for request in requests])
        drafts = [[token] for token in _likeliest(logits)]
        going, hidden = list(range(len(rows))), self._session.hidden
        for depth in range(1, max(count for _, count in rows)):
            kept = [at for at, row in enumerate(going) if rows[row][1] > depth]
            going = [going[at] for at in kept]
            last = [drafts[row][-1:] for row in going]
            logits = self._run([requests[row] for row in going], last, [hidden[at][None] for at in kept], depth - 1)
            hidden = self._session.hidden
            for row, token in zip(going, _likeliest(logits), strict=True):
                drafts[row].append(token)
        for request, draft in zip(requests, drafts, strict=True):
            request.states.draft, request.states.drafted_at = draft, request.cached

    def _take(self, requests: list[Request], counts: list[int]) -> Floats:
        """Give the layer the first so many states that wait; logits [B, vocab] after each row's last."""
        tokens = [
            request.tokens[request.states.filled + 1 : request.states.filled + 1 + count]
            for request, count in zip(requests, counts, strict=True)
        ]
        states = [request.states.take(count) for request, count in zip(requests, counts, strict=True)]
        logits = self._run(requests, tokens, states)
        for request, count in zip(requests, counts, strict=True):
            request.states.fill(count)
        return logits

    def _run(self, requests: list[Request], tokens: list[list[int]], states: list[Floats], beyond: int = 0) -> Floats:
        """Each row's tokens and states from the slots on that are not filled, `beyond` that many."""
        longest = max(map(len, tokens))
        ids = np.zeros((len(requests), longest), dtype=np.int64)
        hidden = np.zeros((len(requests), longest, states[0].shape[-1]), dtype=np.float32)
        for row, (own, rows) in enumerate(zip(tokens, states, strict=True)):
            ids[row, : len(own)], hidden[row, : len(own)] = own, rows
        new = np.array([len(own) for own in tokens], dtype=np.int32)
        past = np.array([request.states.filled + beyond for request in requests], dtype=np.int32)
        reached = [self._session.cache.pages_for(end) for end in (past + new).tolist()]
        table = page_table([request.pages[:count] for request, count in zip(requests, reached, strict=True)])
        return self._session.draft(ids, hidden, new, past, table)


def drafter_of(way: str, session: Session) -> Drafter | None:
    """The drafter of that way to speculate; for "auto" the session's own layer where it has one.

    RequestError where the session has none and it is asked for.
    """
    if way == OFF:
        return None
    if way == MTP and not session.drafts:
        raise RequestError(f"speculate {MTP!r}: this session has no such layer: {_NONE}, for the backend ort or torch")
    return MtpDrafter(session) if session.drafts and way in (MTP, AUTO) else LookupDrafter()


def check_drafts(bundle: Bundle, way: str) -> None:
    """RequestError, before anything is loaded, where the bundle cannot speculate in that way."""
    if way == MTP and bundle.manifest.speculation is None:
        raise RequestError(f"speculate {MTP!r}: {bundle.path} has no layer of multi-token prediction: {_NONE}")


_NONE = "export a checkpoint that has one with --mtp"


def _left(request: Request) -> int:
    """Tokens that the answer may have after the next one."""
    return request.limit - request.sampler.made - 1


def _likeliest(logits: Floats) -> list[int]:
    """The likeliest token of each row; of logits that are not finite any."""
    tokens: list[int] = np.argmax(logits, axis=-1).tolist()
    return tokens
