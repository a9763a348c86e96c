"""The local transport's threads: what is done is handed back, whatever comes after it."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from typing import Any

import numpy as np
import pytest

from atoll.contract.errors import TransportError
from atoll.contract.wire import Head, Message
from atoll.transport.local import LocalTransport

PATIENCE_S = 120.0


def anything(head: Head) -> None:
    pass


def ask(transport: LocalTransport, site: str, name: str, deadline_s: float = PATIENCE_S) -> asyncio.Task[Any]:
    return asyncio.ensure_future(transport.request(site, Message("task", {"id": name}), deadline_s, anything))


async def test_a_reply_does_not_wait_for_the_work_behind_it() -> None:
    """One thread, a quick request and then a slow one: the quick one's reply is not held back."""
    go_on = threading.Event()

    def handle(message: Message, progress: Any) -> Message:
        if message.meta["id"] == "slow":
            assert go_on.wait(PATIENCE_S)
        return Message("done", {"re": message.meta["id"]})

    transport = LocalTransport({"a": handle}, threads=1)
    quick, slow = ask(transport, "a", "quick"), ask(transport, "a", "slow")
    assert (await quick).meta["re"] == "quick" and not slow.done()
    go_on.set()
    assert (await slow).meta["re"] == "slow"
    transport.close()


async def test_what_nobody_waits_for_any_more_is_not_begun() -> None:
    go_on, begun = threading.Event(), []

    def handle(message: Message, progress: Any) -> Message:
        begun.append(message.meta["id"])
        assert go_on.wait(PATIENCE_S)
        return Message("done", {"re": message.meta["id"]})

    transport = LocalTransport({"a": handle}, threads=1)
    first = ask(transport, "a", "first")
    with pytest.raises(TransportError):
        await ask(transport, "a", "late", deadline_s=0.1)
    given_up = ask(transport, "a", "given up")
    await asyncio.sleep(0)
    given_up.cancel()
    go_on.set()
    await first
    await ask(transport, "a", "last")
    assert begun == ["first", "last"]
    transport.close()


async def test_an_idle_thread_keeps_nothing() -> None:
    class Mark:
        pass

    marks = []

    def handle(message: Message, progress: Any) -> Message:
        mark = Mark()
        marks.append(weakref.ref(mark))
        message.meta["mark"] = mark
        return Message("done", {"re": message.meta["id"]}, {"x": np.zeros(3)})

    transport = LocalTransport({"a": handle}, threads=1)
    (await ask(transport, "a", "1")).close()
    async with asyncio.timeout(PATIENCE_S):
        while marks[0]() is not None:
            await asyncio.sleep(0)
            gc.collect()
    transport.close()


def test_one_transport_serves_one_event_loop_after_another() -> None:
    """Also when a loop ends while a thread still works for it."""
    go_on, begun = threading.Event(), threading.Event()

    def handle(message: Message, progress: Any) -> Message:
        if message.meta["id"] == "slow":
            begun.set()
            assert go_on.wait(PATIENCE_S)
            progress({"done": 1})
        return Message("done", {"re": message.meta["id"]})

    transport = LocalTransport({"a": handle}, threads=2)

    async def leave() -> None:
        ask(transport, "a", "slow")
        while not begun.is_set():
            await asyncio.sleep(0.001)

    async def many() -> None:
        replies = await asyncio.gather(*(ask(transport, "a", str(n)) for n in range(50)))
        assert [reply.meta["re"] for reply in replies] == [str(n) for n in range(50)]

    asyncio.run(leave())
    asyncio.run(many())
    go_on.set()
    asyncio.run(many())
    transport.close()
