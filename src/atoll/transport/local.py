"""local: coordinator and sites in one process; the bytes really pass through the codec."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping

from atoll.contract.errors import TransportError
from atoll.contract.wire import Json, Message, encode, read_head
from atoll.transport.base import Endpoint, HeadCheck, Patience, Progress, Traffic
from atoll.transport.spool import Incoming

_Done = tuple[Incoming, int, int]
_Job = tuple[asyncio.AbstractEventLoop, Callable[[], _Done], "asyncio.Future[_Done]"]


def _through_codec(message: Message, check: HeadCheck | None = None) -> tuple[Incoming, int]:
    """The message as the other side receives it, and its size in bytes."""
    first, *parts = encode(message)
    head = read_head(first)
    if check is not None:
        check(head)
    incoming = Incoming(head)
    for part in parts:
        incoming.write(part)
    return incoming, head.total_bytes


class _Workers:
    """A few threads that hand finished work back to the event loop in batches: with one wake-up for
    many small requests, the threads do not fight the loop for the interpreter."""

    BATCH_S = 0.005

    def __init__(self, threads: int) -> None:
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._run, name=f"site-{i}", daemon=True) for i in range(threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, work: Callable[[], _Done]) -> asyncio.Future[_Done]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[_Done] = loop.create_future()
        self._queue.put((loop, work, future))
        return future

    def stop(self) -> None:
        for _ in self._threads:
            self._queue.put(None)

    def _run(self) -> None:
        finished: list[tuple[asyncio.Future[_Done], _Done | None, BaseException | None]] = []
        began = time.monotonic()
        while (job := self._queue.get()) is not None:
            loop, work, future = job
            if not finished:
                began = time.monotonic()
            try:
                finished.append((future, work(), None))
            except BaseException as error:
                finished.append((future, None, error))
            if self._queue.empty() or time.monotonic() - began > self.BATCH_S:
                with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits any more
                    loop.call_soon_threadsafe(_deliver, finished)
                finished = []


def _deliver(finished: list[tuple[asyncio.Future[_Done], _Done | None, BaseException | None]]) -> None:
    for future, result, error in finished:
        if future.done():  # cancelled, or its deadline has passed
            continue
        if result is not None:
            future.set_result(result)
        else:
            future.set_exception(error or RuntimeError("no result"))


class LocalTransport:
    """Sites as endpoints in this process, run on a few threads."""

    def __init__(self, endpoints: Mapping[str, Endpoint], threads: int | None = None) -> None:
        self._endpoints = dict(endpoints)
        self._workers = _Workers(threads or os.cpu_count() or 1)
        self.traffic: dict[str, Traffic] = defaultdict(Traffic)

    def sites(self) -> Mapping[str, int]:
        """All endpoints; they never reconnect."""
        return dict.fromkeys(self._endpoints, 1)

    async def request(
        self, site: str, message: Message, deadline_s: float, check: HeadCheck, progress: Progress | None = None
    ) -> Incoming:
        """See :class:`atoll.transport.base.Transport`."""
        patience = Patience(site, deadline_s)

        def tell(note: Mapping[str, Json]) -> None:
            patience.heard()
            if progress is not None:
                progress(note)

        def work() -> tuple[Incoming, int, int]:
            arrived, sent_bytes = _through_codec(message)
            reply = self._endpoints[site](arrived.message(), tell)
            incoming, received_bytes = _through_codec(reply, check)
            return incoming, sent_bytes, received_bytes

        if site not in self._endpoints:
            raise TransportError("transport.unknown-site", f"there is no site {site!r}", field=site)
        incoming, sent_bytes, received_bytes = await patience.wait(self._workers.submit(work))
        traffic = self.traffic[str(message.meta.get("run", ""))]
        traffic.to_sites_bytes += sent_bytes
        traffic.from_sites_bytes += received_bytes
        return incoming

    def close(self) -> None:
        """Stop the threads; work in progress is not waited for."""
        self._workers.stop()
