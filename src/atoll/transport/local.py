"""local: coordinator and sites in one process; the bytes really pass through the codec."""

from __future__ import annotations

import asyncio
import os
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from atoll.contract.errors import TransportError
from atoll.contract.wire import Json, Message, encode, read_head
from atoll.transport.base import Endpoint, HeadCheck, Patience, Progress, Traffic
from atoll.transport.spool import Incoming


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


class LocalTransport:
    """Sites as endpoints in this process, run on a few threads."""

    def __init__(self, endpoints: Mapping[str, Endpoint], threads: int | None = None) -> None:
        self._endpoints = dict(endpoints)
        self._pool = ThreadPoolExecutor(threads or os.cpu_count() or 1, thread_name_prefix="site")
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
        future = asyncio.get_running_loop().run_in_executor(self._pool, work)
        incoming, sent_bytes, received_bytes = await patience.wait(future)
        traffic = self.traffic[str(message.meta.get("run", ""))]
        traffic.to_sites_bytes += sent_bytes
        traffic.from_sites_bytes += received_bytes
        return incoming

    def close(self) -> None:
        """Stop the threads; work in progress is not waited for."""
        self._pool.shutdown(wait=False, cancel_futures=True)
