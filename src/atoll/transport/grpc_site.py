"""A site's side of grpc: one connection that it opens and keeps, and answers to what comes over it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import grpc
import grpc.aio

from atoll.contract.errors import AtollError, IntegrityError, ProtocolError, TransportError
from atoll.contract.wire import Head, Json, Message, to_json
from atoll.transport.base import Endpoint, broken
from atoll.transport.grpc_channel import SERVICE, open_channel, pump, raise_refusal, until_either
from atoll.transport.link import Link, frame_id
from atoll.transport.spool import Incoming

log = logging.getLogger("atoll.transport")
TELL_S = 1.0
"""How often at most a site tells that more of a task is here."""
APART_H = 2.0
"""Clocks that are further apart are told of: certificates begin so long before they are made."""
Renew = Callable[[grpc.aio.Channel], Awaitable[bool]]
"""Renews a site's certificate over a channel if it is time; True if it was."""


class GrpcSite:
    """A site's side: keeps one connection to the coordinator and answers what comes over it."""

    def __init__(
        self,
        address: str,
        ca_pem: bytes,
        pair: Callable[[], tuple[bytes, bytes]],
        endpoint: Endpoint,
        *,
        max_message_bytes: int,
        on_state: Callable[[str], None] = lambda _: None,
        retry_s: float = 5.0,
        check_s: float = 10.0,
        again: Callable[[], bool] = lambda: False,
    ) -> None:
        """pair: the current TLS (key, certificate), asked for at every connection. retry_s: longest
        pause between two attempts to connect. check_s: how often the certificate's age is looked at, and *again*,
        which is true once whenever it is time to connect anew."""
        self._address, self._ca, self._pair, self._endpoint = address, ca_pem, pair, endpoint
        self._limit, self._on_state, self._retry_s, self._check_s = max_message_bytes, on_state, retry_s, check_s
        self._again = again
        self._pool = ThreadPoolExecutor(32, thread_name_prefix="request")
        self._busy: set[bytes] = set()
        self._answered: dict[bytes, str] = {}
        self._link: Link | None = None
        self._told: dict[bytes, float] = {}
        self._clock = ""

    def coordinator_time(self) -> float:
        """What the coordinator's clock says now, seconds since 1970 (see :meth:`Link.peer_time`)."""
        return self._link.peer_time() if self._link is not None else time.time()

    def _clocks_agree(self) -> bool:
        """Whether this site's clock is about the coordinator's; tells it once if it is not."""
        apart_h, told = (time.time() - self.coordinator_time()) / 3600, ""
        if abs(apart_h) > APART_H:
            by = f"{abs(apart_h) / 24:.0f} days" if abs(apart_h) > 48 else f"{abs(apart_h):.0f} hours"
            way = "ahead of" if apart_h > 0 else "behind"
            told = f"this site's clock is {by} {way} the coordinator's: set it right"
        if told != self._clock:
            log.warning("%s", told or "this site's clock is right again")
            self._on_state(told or "connected")
        self._clock = told
        return not told

    async def run(self, renew: Renew | None = None) -> None:
        """Stay connected until cancelled. *renew* may, now and then, renew the certificate over the
        channel and return True to reconnect. Raises IntegrityError when the coordinator refuses this site."""
        self._loop = asyncio.get_running_loop()
        self._link = Link(self)
        wait_s = 0.05
        while True:
            async with open_channel(self._address, self._ca, self._pair()) as channel:
                try:
                    await self._stay(channel, self._link, renew)
                    wait_s = 0.05
                except grpc.aio.AioRpcError as error:
                    raise_refusal(error)
                    log.info("not connected: %s", error.details())
                except ProtocolError as error:
                    log.warning("%s", error)
            self._on_state("disconnected")
            await asyncio.sleep(wait_s)
            wait_s = min(wait_s * 2, self._retry_s)

    async def _renewed(self, channel: grpc.aio.Channel, renew: Renew) -> None:
        """Return once it is time to connect anew, as with a certificate that was renewed."""
        renewed = False
        while not self._again():
            agree = self._clocks_agree()
            try:
                renewed = await renew(channel) or renewed
            except (TransportError, IntegrityError) as error:
                if agree and isinstance(error, IntegrityError):
                    raise
                log.warning("the certificate was not renewed: %s", error)
            if renewed and agree:  # else no certificate would be good: this connection still is
                return
            await asyncio.sleep(self._check_s)

    async def _stay(self, channel: grpc.aio.Channel, link: Link, renew: Renew | None) -> None:
        call = channel.stream_stream(f"/{SERVICE}/Connect")()
        try:
            await call.write(link.hello([*self._busy, *self._answered]))
            first = await call.read()
            if first is grpc.aio.EOF:
                raise ProtocolError("link.no-hello", "the coordinator closed the connection")
            link.attach(first)
            self._clocks_agree()
            self._on_state("connected")

            async def read() -> None:
                while (frame := await call.read()) is not grpc.aio.EOF:
                    link.feed(frame)

            work = [read(), pump(link, call.write), *([self._renewed(channel, renew)] if renew else [])]
            await until_either(*work)
        except asyncio.InvalidStateError:  # writing to a call that just ended: its status says why
            pass
        finally:
            call.cancel()
        if await call.code() not in (grpc.StatusCode.OK, grpc.StatusCode.CANCELLED):
            raise grpc.aio.AioRpcError(await call.code(), None, None, details=await call.details())

    # -- the link's owner

    def accept(self, head: Head) -> None:
        if head.total_bytes > self._limit:
            raise ProtocolError(
                "site.too-large", "the task is larger than the site's policy allows", field="max_message_bytes",
                remedy="the site's operator decides: policy.yaml, 'max_message_bytes'",
            )  # fmt: skip

    def arrived(self, incoming: Incoming) -> None:
        name = str(incoming.meta.get("id"))
        self._told.pop(frame_id(name), None)
        if frame_id(name) in self._busy or frame_id(name) in self._answered:
            return
        self._busy.add(frame_id(name))
        if incoming.kind == "open":  # it may wait for an operator for days: not in the way of others
            threading.Thread(target=self._work, args=(incoming.message(), name), daemon=True).start()
        else:
            self._loop.run_in_executor(self._pool, self._work, incoming.message(), name)

    def refused(self, head: Head, error: AtollError) -> None:
        self._answer(str(head.meta.get("id")), Message("failure", {"re": head.meta.get("id"), **error.public()}))

    def heard(self, frame: bytes, note: dict[str, Json] | None) -> None:
        """Part of a task is here: tell so now and then, as buffers on the way hide it from the coordinator."""
        now = self._loop.time()
        if frame not in self._answered and now > self._told.get(frame, 0.0) + TELL_S:
            self._told[frame] = now
            self._progress(frame, b"{}")

    def acknowledged(self, frame: bytes) -> None:
        name = self._answered.pop(frame, None)
        if name is not None and self._link is not None:
            self._link.forget(name)

    def _work(self, message: Message, name: str) -> None:
        frame = frame_id(name)

        def tell(note: Mapping[str, Json]) -> None:
            self._loop.call_soon_threadsafe(self._progress, frame, to_json(dict(note)))

        try:
            reply = self._endpoint(message, tell)
        except Exception as error:
            reply = broken(name, error)
        with contextlib.suppress(RuntimeError):  # the loop has ended: the process is going down
            self._loop.call_soon_threadsafe(self._answer, name, reply)

    def _progress(self, frame: bytes, note: bytes) -> None:
        if self._link is not None:
            self._link.control(b"P", frame, note)

    def _answer(self, name: str, reply: Message) -> None:
        frame = frame_id(name)
        self._busy.discard(frame)
        if self._link is not None:
            self._answered[frame] = name
            try:
                self._link.send(name, reply)
            except (AtollError, ValueError, TypeError) as error:  # it cannot be encoded
                self._link.send(name, broken(name, error))
