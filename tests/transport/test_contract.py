"""What every transport keeps: the suite runs on each of them, with real TLS where there is any."""

from __future__ import annotations

import asyncio
import threading
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from atoll.contract.errors import AtollError, PolicyError, ProtocolError, TransportError
from atoll.contract.rounds import real
from atoll.contract.wire import DTYPES, HEADER_LIMIT_BYTES, Head, Message, encode_bytes
from atoll.transport.link import CHUNK_BYTES

PATIENCE_S = 120.0


def task(name: str, arrays: dict[str, Any] | None = None, run: str = "r", **meta: Any) -> Message:
    return Message("task", {"id": name, "run": run, **meta}, arrays or {})


async def answer(transport: Any, site: str, message: Message, check: Any, deadline_s: float = PATIENCE_S) -> Message:
    incoming = await transport.request(site, message, deadline_s, check)
    try:
        got = incoming.message()
        return Message(got.kind, got.meta, {name: array.copy() for name, array in got.arrays.items()})
    finally:
        incoming.close()


def same(got: dict[str, Any], sent: dict[str, Any]) -> None:
    assert list(got) == list(sent)
    for name, array in sent.items():
        assert got[name].dtype == array.dtype and got[name].shape == array.shape
        assert got[name].tobytes() == array.tobytes()


# ---------------------------------------------------------------- bits


async def test_arrays_of_every_dtype_come_back_bit_exactly(federated: Any) -> None:
    rng = np.random.default_rng(1)
    sent: dict[str, Any] = {}
    for dtype in sorted(DTYPES):
        noise = rng.integers(0, 256, (3, 7, int(dtype[2:])), dtype="|u1")
        noise = noise % 2 if dtype == "|b1" else noise
        sent[f"noise {dtype}"] = noise.view(dtype)[..., 0]  # any bits at all: NaN with payload, subnormals, -0.0
        sent[f"empty {dtype}"] = np.zeros((3, 0), dtype)
        sent[f"scalar {dtype}"] = np.ones((), dtype)
    transport = await federated.connect({"a": federated.echo})
    reply = await answer(transport, "a", task("1", sent), federated.anything)
    same(reply.arrays, sent)
    assert reply.kind == "echo" and reply.meta["re"] == "1"


@pytest.mark.parametrize("body_bytes", [0, 8, CHUNK_BYTES - 512, CHUNK_BYTES, CHUNK_BYTES + 8, 4 * CHUNK_BYTES + 8])
async def test_sizes_around_a_chunk(federated: Any, body_bytes: int) -> None:
    sent = {"x": np.random.default_rng(body_bytes).integers(0, 256, body_bytes, dtype="|u1")}
    transport = await federated.connect({"a": federated.echo})
    same((await answer(transport, "a", task("1", sent), federated.anything)).arrays, sent)


async def test_twenty_megabytes_come_back_in_pieces_or_whole(federated: Any) -> None:
    sent = {"small": np.arange(5), "large": np.random.default_rng(2).standard_normal(2_500_001)}
    transport = await federated.connect({"a": federated.echo})
    incoming = await transport.request("a", task("1", sent), PATIENCE_S, federated.anything)
    same(incoming.arrays(), sent)
    whole = np.empty_like(sent["large"])
    for offset, piece in incoming.pieces("large"):
        whole[offset : offset + len(piece)] = piece
    assert whole.tobytes() == sent["large"].tobytes()
    assert incoming.array("small").tobytes() == sent["small"].tobytes()
    incoming.close()


async def test_a_header_of_nearly_its_limit(federated: Any) -> None:
    text = "x" * (HEADER_LIMIT_BYTES // 2 - 500)
    sent = {"x": np.arange(9.0)}
    transport = await federated.connect({"a": federated.echo})
    reply = await answer(transport, "a", task("1", sent, text=[text]), federated.anything)
    assert reply.meta["sent"]["text"] == [text]
    same(reply.arrays, sent)


# ---------------------------------------------------------------- many at once


async def test_many_requests_to_several_sites_get_their_own_replies(federated: Any) -> None:
    sites = ["a", "b", "c"]
    sizes = [0, 1, 100, 10_000, 300_000]

    def endpoint(site: str) -> Callable[..., Message]:
        def handle(message: Message, progress: Any) -> Message:
            made = {name: array * (1 + sites.index(site)) for name, array in message.arrays.items()}
            return Message("done", {"re": message.meta["id"], "site": site}, made)

        return handle

    transport = await federated.connect({site: endpoint(site) for site in sites})

    async def one(site: str, number: int) -> None:
        x = np.random.default_rng(number).standard_normal(sizes[number % len(sizes)])
        reply = await answer(transport, site, task(f"{site}/{number}", {"x": x}), federated.anything)
        assert (reply.meta["re"], reply.meta["site"]) == (f"{site}/{number}", site)
        same(reply.arrays, {"x": x * (1 + sites.index(site))})

    await asyncio.gather(*(one(site, number) for number in range(40) for site in sites))


async def test_a_site_works_on_several_requests_at_once(federated: Any) -> None:
    meet = threading.Barrier(4)

    def handle(message: Message, progress: Any) -> Message:
        meet.wait(PATIENCE_S)
        return federated.echo(message, progress)

    transport = await federated.connect({"a": handle, "b": handle})
    requests = [(site, f"{site}{n}") for site in "ab" for n in range(2)]
    await asyncio.gather(*(answer(transport, site, task(name), federated.anything) for site, name in requests))


# ---------------------------------------------------------------- refused before the body is touched


async def test_a_reply_of_another_shape_is_refused_and_the_connection_stays(federated: Any) -> None:
    wrong = {"x": np.zeros(4), "y": np.zeros((2, 3)), "n": np.zeros(3, "<i4")}

    def handle(message: Message, progress: Any) -> Message:
        return Message("release", {"re": message.meta["id"]}, {"x": wrong[message.meta["id"][0]]})

    transport = await federated.connect({"a": handle})

    def check(head: Head) -> None:
        for spec in head.specs:
            real(3).check(spec.name, spec)

    for name, code in (("x", "reply.shape"), ("y", "reply.shape"), ("n", "reply.dtype")):
        with pytest.raises(ProtocolError) as error:
            await answer(transport, "a", task(name), check)
        assert error.value.code == code and error.value.field == "x"
    assert (await answer(transport, "a", task("x again"), federated.anything)).arrays["x"].shape == (4,)


async def test_a_huge_reply_is_refused_without_memory_for_it(federated: Any) -> None:
    huge, seen = np.zeros(200_000_000, "|u1"), []

    def handle(message: Message, progress: Any) -> Message:
        return Message("release", {"re": message.meta["id"]}, {"x": huge} if message.meta["id"] == "huge" else {})

    def refuse(head: Head) -> None:
        seen.append(head.body_bytes)
        raise ProtocolError("test.too-much", "too much", remedy="send less")

    transport = await federated.connect({"a": handle})
    tracemalloc.start()
    with pytest.raises(ProtocolError) as error:
        await answer(transport, "a", task("huge"), refuse)
    await answer(transport, "a", task("small"), federated.anything)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert error.value.code == "test.too-much" and seen == [huge.nbytes]
    assert peak < huge.nbytes / 4


@pytest.mark.parametrize("size", [10, 3 * CHUNK_BYTES])
async def test_what_one_check_refused_another_may_accept(federated: Any, size: int) -> None:
    """The same request again, after its first reply was refused half-way."""

    def refuse(head: Head) -> None:
        raise ProtocolError("test.no", "no")

    sent = {"x": np.arange(size, dtype="|u1")}
    transport = await federated.connect({"a": federated.echo})
    for _ in range(2):
        with pytest.raises(ProtocolError):
            await answer(transport, "a", task("1", sent), refuse)
        same((await answer(transport, "a", task("1", sent), federated.anything)).arrays, sent)


# ---------------------------------------------------------------- failures


async def test_a_failure_is_raised_as_the_site_meant_it(federated: Any) -> None:
    def handle(message: Message, progress: Any) -> Message:
        error = PolicyError("policy.denied", "a text that stays here", field="approval", remedy="ask the operator")
        return Message("failure", {"re": message.meta["id"], **error.public(), "site": "a"})

    transport = await federated.connect({"a": handle, "b": federated.echo})
    with pytest.raises(PolicyError) as error:
        await answer(transport, "a", task("1"), federated.anything)
    assert (error.value.code, error.value.field) == ("policy.denied", "approval")
    assert error.value.remedy == "ask the operator" and error.value.where["site"] == "a"
    assert "stays here" not in str(error.value)
    await answer(transport, "b", task("2"), federated.anything)


async def test_an_endpoint_that_breaks_is_a_failure_and_not_a_silence(federated: Any) -> None:
    """Sites never raise; should one, or should its reply be none, the other end still hears of it."""

    def handle(message: Message, progress: Any) -> Message:
        if message.meta["id"] == "raises":
            raise ValueError("secret 4711")
        if message.meta["id"] == "odd":
            return Message("odd", {"re": message.meta["id"]}, {"x": np.array(["secret 4711"])})
        if message.meta["id"] == "nan":
            return Message("odd", {"re": message.meta["id"], "x": float("nan")})
        return federated.echo(message, progress)

    transport = await federated.connect({"a": handle})
    for name in ("raises", "odd", "nan"):
        with pytest.raises(ProtocolError) as error:
            await answer(transport, "a", task(name), federated.anything)
        assert error.value.code and "4711" not in str(error.value)
    await answer(transport, "a", task("fine"), federated.anything)


async def test_a_request_that_cannot_be_sent_is_refused(federated: Any) -> None:
    transport = await federated.connect({"a": federated.echo})
    with pytest.raises(ProtocolError) as error:
        await answer(transport, "a", task("1", {"x": np.array(["text"])}), federated.anything)
    assert error.value.code == "wire.bad-dtype"
    await answer(transport, "a", task("1"), federated.anything)


async def test_silence_ends_with_the_deadline_and_names_the_site(federated: Any) -> None:
    go_on = threading.Event()

    def handle(message: Message, progress: Any) -> Message:
        if message.meta["id"] == "slow":
            go_on.wait(PATIENCE_S)
        return federated.echo(message, progress)

    transport = await federated.connect({"a": handle, "b": federated.echo})
    with pytest.raises(TransportError) as error:
        await answer(transport, "a", task("slow"), federated.anything, deadline_s=0.2)
    assert error.value.code == "transport.deadline" and error.value.where["site"] == "a" and error.value.remedy
    for site in "ab":  # the others are not held up
        await answer(transport, site, task("quick"), federated.anything)
    go_on.set()
    assert (await answer(transport, "a", task("slow"), federated.anything)).meta["re"] == "slow"


async def test_progress_extends_the_deadline(federated: Any) -> None:
    deadline_s, done = 3.0, threading.Event()
    notes: list[dict[str, Any]] = []
    threads: set[int] = set()
    loop = asyncio.get_running_loop()
    end = loop.time() + 1.3 * deadline_s

    def handle(message: Message, progress: Any) -> Message:
        number = 0
        while not done.wait(0.05):
            number += 1
            progress({"done": number, "total": 10})
        return federated.echo(message, progress)

    def listen(note: Any) -> None:
        notes.append(dict(note))
        threads.add(threading.get_ident())
        if loop.time() > end:
            done.set()

    transport = await federated.connect({"a": handle})
    incoming = await transport.request("a", task("1"), deadline_s, federated.anything, listen)
    assert incoming.kind == "echo" and loop.time() > end
    assert [note["done"] for note in notes] == list(range(1, len(notes) + 1)) and notes[0]["total"] == 10
    assert threads == {threading.get_ident()}  # listeners may touch what belongs to the event loop


@pytest.mark.parametrize("name", ["nobody", "Not A Name", ""])
async def test_a_site_that_is_not_there(federated: Any, name: str) -> None:
    transport = await federated.connect({"a": federated.echo})
    assert set(transport.sites()) == {"a"}
    with pytest.raises(TransportError) as error:
        await answer(transport, name, task("1"), federated.anything, deadline_s=0.2)
    assert error.value.code in ("transport.unknown-site", "transport.deadline")
    assert error.value.where.get("site", error.value.field) == name
    assert set(transport.sites()) == {"a"} and transport.sites()["a"] >= 1
    await answer(transport, "a", task("1"), federated.anything)


async def test_a_cancelled_request_leaves_the_others_alone(federated: Any) -> None:
    go_on, begun = threading.Event(), threading.Event()

    def handle(message: Message, progress: Any) -> Message:
        if message.meta["id"] == "given up":
            begun.set()
            go_on.wait(PATIENCE_S)
        return federated.echo(message, progress)

    transport = await federated.connect({"a": handle})
    given_up = asyncio.create_task(answer(transport, "a", task("given up"), federated.anything))
    await federated.until(begun.is_set)
    given_up.cancel()
    with pytest.raises(asyncio.CancelledError):
        await given_up
    await answer(transport, "a", task("other"), federated.anything)
    go_on.set()
    assert (await answer(transport, "a", task("given up"), federated.anything)).meta["re"] == "given up"


# ---------------------------------------------------------------- repeats and traffic


async def test_a_repeated_request_is_answered_the_same(federated: Any) -> None:
    sent = {"x": np.arange(200_000.0)}
    transport = await federated.connect({"a": federated.echo})
    first = await answer(transport, "a", task("1", sent), federated.anything)
    for _ in range(3):
        again = await answer(transport, "a", task("1", sent), federated.anything)
        assert encode_bytes(again) == encode_bytes(first)


async def test_traffic_is_the_bytes_of_the_messages_by_run(federated: Any) -> None:
    """Whatever the transport, the same messages cost the same."""

    def handle(message: Message, progress: Any) -> Message:
        if message.meta["id"].startswith("bad"):
            return Message("failure", {"re": message.meta["id"], "error": "PolicyError", "code": "policy.denied"})
        return federated.echo(message, progress)

    transport = await federated.connect({"a": handle, "b": handle})
    expected = {"one": [0, 0], "two": [0, 0]}
    for number, (site, run) in enumerate([("a", "one"), ("b", "one"), ("a", "two"), ("b", "two"), ("a", "one")]):
        for name, size in ((f"small {number}", 3), (f"large {number}", 400_000), (f"bad {number}", 1)):
            message = task(name, {"x": np.zeros(size)}, run)
            try:
                await answer(transport, site, message, federated.anything)
            except AtollError as error:
                assert error.code == "policy.denied"
            expected[run][0] += len(encode_bytes(message))
            expected[run][1] += len(encode_bytes(handle(message, None)))
    await answer(transport, "a", Message("task", {"id": "of no run"}), federated.anything)
    for run, (to_sites, from_sites) in expected.items():
        traffic = transport.traffic[run]
        assert (traffic.to_sites_bytes, traffic.from_sites_bytes) == (to_sites, from_sites)
    assert set(transport.traffic) == {"one", "two", ""}
