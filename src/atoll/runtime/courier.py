"""Carries one run's requests to sites, and their verified answers back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any

from atoll.contract.errors import AtollError, ProtocolError
from atoll.contract.plan import Plan
from atoll.contract.program import REGISTRY
from atoll.contract.protection import OWN, REPLY, Exchange, Terms
from atoll.contract.rounds import Arrival, Field, Round, Sum, TaskId
from atoll.contract.wire import Head, Json, Message
from atoll.crypto.session import SIGNED_BYTES
from atoll.runtime.receipts import verify_release
from atoll.runtime.roster import roster_hash
from atoll.transport.base import Progress, Transport
from atoll.transport.spool import Incoming


class Courier:
    """Makes tasks, checks what comes back, and keeps the receipts that sites are still owed."""

    def __init__(self, transport: Transport, run: str, plan: Plan, roster: Mapping[str, str]) -> None:
        """roster: the cohort's public keys (hex) by site."""
        self._transport, self._run, self._plan = transport, run, plan
        self._roster, self._plan_hash, self._roster_hash = dict(roster), plan.hash, roster_hash(roster)
        self._keys = {site: bytes.fromhex(key) for site, key in sorted(roster.items())}
        self._owed: dict[str, list[Json]] = {}

    def terms(self, asked: Round, number: int, attempt: int, question: str) -> Terms:
        """What all parties agree on before a round."""
        least, choice = self._plan.cohort.min_sites, self._plan.protection
        return Terms(
            self._run, number, attempt, self._keys, self._roster_hash, least, choice, question, cohort_of(asked)
        )

    def owe(self, receipts: Mapping[str, list[Json]]) -> None:
        """Sites are to be sent these receipts with what they are sent next."""
        for site, more in receipts.items():
            self._owed.setdefault(site, []).extend(more)

    async def announce(self, site: str, progress: Progress) -> Incoming:
        """Open the run at a site, which may ask its operator first."""
        meta: dict[str, Json] = {"id": f"{self._run}/open/{site}", "run": self._run}
        meta |= {"plan": self._plan.to_json(), "roster": self._roster}
        check = expect("opened", site=site, step="open", trace=self._run)
        return await self._transport.request(site, Message("open", meta), self._plan.run.deadline_s, check, progress)

    async def ask(
        self, asked: Round, number: int, exchange: Exchange, site: str, attempt: int = 0, question: str = ""
    ) -> Incoming:
        """One site's verified release. The task's id is the same after a restart, so nothing is done twice.
        question: what a protection binds every step to (see :func:`described`)."""
        task = TaskId(self._run, number, attempt, exchange.step, site)
        owed = list(self._owed.get(site, []))
        meta: dict[str, Json] = {
            "id": str(task),
            **task.to_json(),
            **described(asked),
            "question": question,
            "cohort": cohort_of(asked),
            "receipts": owed,
        }
        own = {OWN + name: value for name, value in {**exchange.send, **exchange.send_to.get(site, {})}.items()}
        sent = {**asked.send, **asked.send_to.get(site, {})} if exchange.step == REPLY else {}
        message = Message("task", meta, {**sent, **own})
        where = {"site": site, "round": number, "step": f"{asked.program}/{asked.name}", "trace": self._run}
        check = expect("release", exchange.fields, **where)
        incoming = await self._transport.request(site, message, self._plan.run.deadline_s, check)
        verify_release(incoming, message, bytes.fromhex(self._roster[site]), self._plan_hash, self._roster_hash)
        self._owed[site] = [receipt for receipt in self._owed.get(site, []) if receipt not in owed]
        if not isinstance(asked.reduce, Sum):  # a protection checks what it adds up, piece by piece
            for name, declared in exchange.fields.items():
                declared.check_values(name, incoming.array(name), undefined=True)
        return incoming

    async def close(self, site: str, status: str, error: dict[str, Json] | None) -> None:
        """Tell a site how the run ended, with the receipts it is still owed."""
        meta: dict[str, Json] = {"id": f"{self._run}/close/{site}", "run": self._run, "status": status}
        meta |= {"error": error, "receipts": self._owed.get(site, [])}
        patience = min(self._plan.run.deadline_s, 10.0)
        check = expect("closed", site=site, step="close", trace=self._run)
        await self._transport.request(site, Message("close", meta), patience, check)


async def announce(
    courier: Courier, sites: Sequence[str], waiting: Callable[[list[str]], None]
) -> list[Incoming | AtollError]:
    """Open the run at every site at once: its answer, or why there is none. waiting: told who must first ask
    their operator, whenever that changes."""
    there: set[str] = set()

    async def one(site: str) -> Incoming | AtollError:
        def tell(note: Mapping[str, Json]) -> None:
            if "waiting" in note and site not in there:
                there.add(site)
                waiting(sorted(there))

        try:
            return await courier.announce(site, tell)
        except AtollError as error:
            return error.at(site=site, step="open")
        finally:
            there.discard(site)

    return await all_of(one(site) for site in sites)


class Flights:
    """The Stream requests of a run that are in flight; those lost with a process are asked again."""

    def __init__(self, courier: Courier) -> None:
        self._courier = courier
        self._open: dict[tuple[str, int], Round] = {}
        self._flying: dict[asyncio.Task[Incoming], tuple[str, int]] = {}

    def replay(self, asked: Round, number: int, sites: Iterable[str], arrival: Arrival) -> None:
        """Take note of what was dispatched, and of what arrived, before a restart."""
        self._open |= {(site, number): asked for site in sites}
        self._open.pop((arrival.site, arrival.asked_round), None)

    def dispatch(self, asked: Round, number: int, sites: Iterable[str]) -> None:
        """Ask *sites*, and whomever a restart left unasked."""
        self._open |= {(site, number): asked for site in sites}
        for (site, when), what in self._open.items():
            if (site, when) not in self._flying.values():
                request = self._courier.ask(what, when, Exchange("reply", (site,), what.reply), site)
                self._flying[asyncio.ensure_future(request)] = (site, when)

    async def next(self) -> tuple[str, int, Incoming | AtollError]:
        """(site, round that asked, release or failure) of the next to arrive; raises ProtocolError if none flies."""
        if not self._flying:
            raise ProtocolError("stream.idle", "a Stream round waits, but no site is computing")
        done, _ = await asyncio.wait(self._flying, return_when=asyncio.FIRST_COMPLETED)
        task = done.pop()
        site, number = self._flying.pop(task)
        del self._open[site, number]
        try:
            return site, number, task.result()
        except AtollError as error:
            return site, number, error

    def cancel(self) -> None:
        """Wait for nobody any more."""
        for task in self._flying:
            task.cancel()


def cohort_of(asked: Round) -> tuple[str, ...] | None:
    """The sites among whose replies a round's sum is made; None: all of the roster."""
    return tuple(sorted(asked.sites)) if asked.among and asked.sites is not None else None


def described(asked: Round) -> dict[str, Json]:
    """What a round asks, as every site is told it, without its arrays."""
    return {
        "name": asked.name,
        "program": asked.program,
        "version": REGISTRY[asked.program].version,
        "params": asked.params,
        "fields": {name: declared.to_json() for name, declared in asked.reply.items()},
        "reduce": asked.reduce.tag,
        "view": asked.view,
    }


def expect(kind: str, fields: Mapping[str, Field] | None = None, **where: Any) -> Callable[[Head], None]:
    """A check of a reply's header: kind, names, dtypes and sizes, before memory is allocated.

    where: the place that a reported failure is put down to, whatever the site says of it.
    """
    declared = fields or {}

    def check(head: Head) -> None:
        if head.kind == "failure" and not head.specs:
            raise AtollError.from_public(head.meta, **where)
        if head.kind != kind or {spec.name for spec in head.specs} != set(declared):
            raise ProtocolError("reply.fields", f"a {head.kind} with other fields instead of a {kind}")
        for spec in head.specs:
            declared[spec.name].check(spec.name, spec)

    return check


def session_of(meta: Mapping[str, Json]) -> bytes:
    """The signed session key that a site opened a run with; raises ProtocolError when it is none."""
    try:
        signed = bytes.fromhex(str(meta["session"]))
    except (KeyError, ValueError):
        signed = b""
    if len(signed) != SIGNED_BYTES:
        raise ProtocolError("session.malformed", "a site opened the run without a session key", field="session")
    return signed


async def all_of(requests: Iterable[Any]) -> list[Any]:
    """Await all, in order; when one raises, the others are cancelled."""
    tasks = [asyncio.ensure_future(request) for request in requests]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


async def in_time(requests: Iterable[Any], within_s: float | None, least: int) -> list[Any]:
    """As :func:`all_of`; None for those that did not answer within *within_s* seconds, once *least* have."""
    if within_s is None:
        return await all_of(requests)
    tasks = [asyncio.ensure_future(request) for request in requests]
    waiting = set(tasks)
    try:
        done, waiting = await asyncio.wait(waiting, timeout=within_s)
        while waiting and not any(task.exception() for task in done) and len(done) < min(least, len(tasks)):
            more, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            done |= more
        return [task.result() if task in done else None for task in tasks]
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def unbroken(work: Coroutine[Any, Any, None]) -> None:
    """Await *work* to its end even when cancelled: what a thread has begun to write it does write."""
    task = asyncio.ensure_future(work)
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([task])
    task.result()
