"""local: coordinator and sites in one process; the bytes really pass through the codec."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping

from atoll.contract.errors import TransportError
from atoll.contract.wire import Head, Json, Message, encode, read_head
from atoll.transport.base import Endpoint, HeadCheck, Patience, Progress, Traffic, broken
from atoll.transport.spool import Incoming

_Job = tuple[asyncio.AbstractEventLoop, Callable[[], Incoming], "asyncio.Future[Incoming]"]
_Done = tuple["asyncio.Future[Incoming]", Incoming | None, BaseException | None]


def _received(head: Head, parts: list[memoryview | bytes]) -> Incoming:
    """A message as the other side receives it."""
    incoming = Incoming(head)
    for part in parts:
        incoming.write(part)
    return incoming


class _Workers:
    """A few threads that hand finished work back to the event loop in batches: with one wake-up for
    many small requests, the threads do not fight the loop for the interpreter."""

    BATCH_S = 0.005

    def __init__(self, threads: int) -> None:
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._finished: dict[asyncio.AbstractEventLoop, list[_Done]] = {}
        self._guard = threading.Lock()
        self._threads = [threading.Thread(target=self._run, name=f"site-{i}", daemon=True) for i in range(threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, work: Callable[[], Incoming]) -> asyncio.Future[Incoming]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Incoming] = loop.create_future()
        self._queue.put((loop, work, future))
        return future

    def stop(self) -> None:
        for _ in self._threads:
            self._queue.put(None)

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            self._do(*job)
            del job  # what may be large is not kept until the next

    def _do(
        self, loop: asyncio.AbstractEventLoop, work: Callable[[], Incoming], future: asyncio.Future[Incoming]
    ) -> None:
        if future.done():  # cancelled, or its deadline has passed
            return
        done: _Done
        try:
            done = (future, work(), None)
        except BaseException as error:
            done = (future, None, error)
        with self._guard:
            batch = self._finished.setdefault(loop, [])
            batch.append(done)
            first = len(batch) == 1
        try:
            if self._queue.empty():
                loop.call_soon_threadsafe(self._deliver, loop)
            elif first:  # at most so much later, however long the next piece of work takes
                loop.call_soon_threadsafe(loop.call_later, self.BATCH_S, self._deliver, loop)
        except RuntimeError:  # the loop was closed: nobody waits any more
            self._taken(loop)

    def _taken(self, loop: asyncio.AbstractEventLoop) -> list[_Done]:
        with self._guard:
            return self._finished.pop(loop, [])

    def _deliver(self, loop: asyncio.AbstractEventLoop) -> None:
        for future, result, error in self._taken(loop):
            if future.done():
                continue
            if result is not None:
                future.set_result(result)
            else:
                future.set_exception(error or RuntimeError("no result"))


class LocalTransport:
    """Sites as endpoints in this process, run on a few threads."""

    name = "local"

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
        patience, loop, passed = Patience(site, deadline_s), asyncio.get_running_loop(), Traffic()

        def tell(note: Mapping[str, Json]) -> None:
            patience.heard()
            if progress is not None:
                with contextlib.suppress(RuntimeError):  # the loop was closed
                    loop.call_soon_threadsafe(progress, note)

        def work() -> Incoming:
            first, *parts = encode(message)
            head = read_head(first)
            passed.to_sites_bytes = head.total_bytes
            try:
                first, *parts = encode(self._endpoints[site](_received(head, parts).message(), tell))
            except Exception as error:
                first, *parts = encode(broken(message.meta["id"], error))
            head = read_head(first)
            passed.from_sites_bytes = head.total_bytes
            check(head)
            return _received(head, parts)

        if site not in self._endpoints:
            raise TransportError("transport.unknown-site", f"there is no site {site!r}", field=site)
        try:
            return await patience.wait(self._workers.submit(work))
        finally:
            traffic = self.traffic[str(message.meta.get("run", ""))]
            traffic.to_sites_bytes += passed.to_sites_bytes
            traffic.from_sites_bytes += passed.from_sites_bytes

    def close(self) -> None:
        """Stop the threads; work in progress is not waited for."""
        self._workers.stop()
