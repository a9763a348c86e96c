"""The transport port: the coordinator's one way to reach sites, and a site's one way to be reached.

A request is a message with a unique ``meta["id"]``; exactly one reply carries the same
text as ``meta["re"]``. Requests may be delivered more than once (after a reconnect or a
restart); sites answer a repeated request with the same reply. A transport adds nothing
to messages, reads nothing but kind, id and sizes, and reports failure only as
TransportError.
"""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

from atoll.contract.errors import AtollError, ProtocolError, TransportError
from atoll.contract.wire import Head, Json, Message
from atoll.transport.spool import Incoming

log = logging.getLogger("atoll.transport")
T = TypeVar("T")
Progress = Callable[[Mapping[str, Json]], None]
"""Called with a small JSON object whenever the peer tells that work goes on. The coordinator's is
called in its event loop; an endpoint may call its own from any thread."""

HeadCheck = Callable[[Head], None]
"""Called with a reply's header before memory is allocated for its body; raises to refuse it."""

Endpoint = Callable[[Message, Progress], Message]
"""A site as transports see it: answers one request (in a worker thread), telling progress."""


class Patience:
    """Waits for a site's reply as long as something is heard of it at least every *deadline_s* seconds."""

    def __init__(self, site: str, deadline_s: float) -> None:
        self._site, self._deadline_s = site, deadline_s
        self._loop = asyncio.get_running_loop()
        self.heard()

    def heard(self) -> None:
        """Something was heard (callable from any thread): the deadline starts anew."""
        self._last = self._loop.time()

    async def wait(self, future: asyncio.Future[T]) -> T:
        """The future's result; raises TransportError("transport.deadline") after too long a silence."""
        future.add_done_callback(_seen)
        timer: asyncio.TimerHandle

        def look() -> None:
            nonlocal timer
            left = self._last + self._deadline_s - self._loop.time()
            if left > 0:
                timer = self._loop.call_later(left, look)
            elif not future.done():
                future.set_exception(
                    TransportError(
                        "transport.deadline",
                        f"no answer and no progress for {self._deadline_s:g} s",
                        remedy="check that the site is up and connected, or raise run.deadline_s",
                        where={"site": self._site},
                    )
                )

        timer = self._loop.call_later(self._deadline_s, look)
        try:
            return await future
        finally:
            timer.cancel()


def _seen(future: asyncio.Future[T]) -> None:
    """A failure that nobody waits for any more is no news."""
    if not future.cancelled():
        future.exception()


@dataclass(slots=True)
class Traffic:
    """Bytes exchanged with sites, message headers included."""

    to_sites_bytes: int = 0
    from_sites_bytes: int = 0


def broken(request: Json, error: Exception) -> Message:
    """What a site answers to *request* (an id) when its endpoint raised, or gave no message: never silence."""
    if not isinstance(error, AtollError):
        frames = "".join(traceback.format_tb(error.__traceback__))  # its message may quote a cell: it is not logged
        log.error("unexpected %s in a request\n%s", type(error).__name__, frames)
        error = ProtocolError(
            "site.internal", "unexpected error", remedy="the site's own log has the details under the trace id"
        )
    return Message("failure", {"re": request, **error.public()})


class Transport(Protocol):
    """What the coordinator's driver needs. Implementations pass tests/transport/test_contract.py."""

    name: str
    traffic: dict[str, Traffic]
    """By run id; "" collects what belongs to none."""

    def sites(self) -> Mapping[str, int]:
        """The sites that can be reached now, with a number that grows whenever one reconnects."""

    async def request(
        self, site: str, message: Message, deadline_s: float, check: HeadCheck, progress: Progress | None = None
    ) -> Incoming:
        """Send *message* and return the reply; its header passed *check* before its body was read.

        A site that is not connected, or whose connection breaks, has until the deadline to come
        back; progress (bytes, or the site saying so) extends the deadline. Raises
        TransportError("transport.deadline") otherwise, and whatever *check* raises.
        """
