"""Carries one run's requests to sites, and their verified answers back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from atoll.contract.errors import AtollError, ProtocolError, TransportError
from atoll.contract.fields import COMPARE
from atoll.contract.plan import Plan
from atoll.contract.program import REGISTRY
from atoll.contract.protection import OWN, REPLY, Exchange, Terms
from atoll.contract.rounds import Arrival, Field, Ready, Round, Stream, Sum, TaskId
from atoll.contract.wire import Array, Head, Json, Message
from atoll.crypto.session import SIGNED_BYTES
from atoll.ledger.entry import Entry
from atoll.runtime.receipts import verify_release
from atoll.runtime.roster import agreement, roster_hash
from atoll.transport.base import Progress, Transport
from atoll.transport.spool import Incoming

LOOK_S = 0.5
"""How often it is looked for sites that came back."""


class Courier:
    """Makes tasks, checks what comes back, and keeps the receipts that sites are still owed."""

    def __init__(self, transport: Transport, run: str, plan: Plan, roster: Mapping[str, str]) -> None:
        """roster: the cohort's public keys (hex) by site."""
        self._transport, self._run, self._plan = transport, run, plan
        self._roster, self._plan_hash, self._roster_hash = dict(roster), plan.hash, roster_hash(roster)
        self._agreed = agreement(self._plan_hash, self._roster_hash)
        self._keys = {site: bytes.fromhex(key) for site, key in sorted(roster.items())}
        self._owed: dict[str, list[Json]] = {}
        self._last: tuple[Round, dict[str, Json]] | None = None

    def terms(self, asked: Round, number: int, attempt: int, question: str) -> Terms:
        """What all parties agree on before a round."""
        least, choice = self._plan.cohort.min_sites, self._plan.protection
        return Terms(self._run, number, attempt, self._keys, self._agreed, least, choice, question, cohort_of(asked))

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
        if self._last is None or self._last[0] is not asked:  # all sites are told the same of it, in every step
            self._last = (asked, {**described(asked), "cohort": cohort_of(asked)})
        told: dict[str, Json] = {**self._last[1], "question": question, "receipts": owed}
        meta: dict[str, Json] = {"id": str(task), **task.to_json(), **told}
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
                declared.check_values(name, incoming.array(name), undefined=asked.optional)
        return incoming

    async def close(
        self, site: str, status: str, error: dict[str, Json] | None, contribution: Entry | None = None
    ) -> None:
        """Tell a site how the run ended, with the receipts it is still owed, and the signed record of who contributed
        how much, if there is one."""
        meta: dict[str, Json] = {"id": f"{self._run}/close/{site}", "run": self._run, "status": status}
        meta |= {"error": error, "receipts": self._owed.get(site, [])}
        if contribution is not None:
            meta["contribution"] = contribution
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
    """The Stream and Ready requests of a run that are in flight. A site that is not there is asked when it comes back;
    what was lost with a process is asked again, in the same words, so that no site computes it twice."""

    def __init__(self, courier: Courier) -> None:
        self._courier = courier
        self._open: dict[tuple[str, int], Round] = {}
        self._flying: dict[asyncio.Task[Incoming], tuple[str, int]] = {}
        self._landed: list[asyncio.Task[Incoming]] = []
        self._news = asyncio.Event()

    def _land(self, task: asyncio.Task[Incoming]) -> None:
        self._landed.append(task)
        self._news.set()

    def dispatch(self, asked: Round, number: int, sites: Iterable[str], arrival: Arrival | None = None) -> None:
        """Round *number* asks *sites*; in a replay, of an *arrival* that is known."""
        self._open |= {(site, number): asked for site in sites}
        if arrival is not None:
            self._open.pop((arrival.site, arrival.asked_round), None)

    async def next(
        self, present: Callable[[], Collection[str]], lost: Callable[[str, int, AtollError], None], patience_s: float
    ) -> tuple[str, int, Incoming]:
        """(site, round that asked, release) of the next to arrive. present: which sites can be asked now. lost: told of
        a failure; raises it unless the site may come back. Raises ProtocolError if nobody was asked, TransportError if
        for *patience_s* nobody was there of those that were."""
        gone_s = 0.0
        while True:
            here = present()
            for (site, when), what in self._open.items():
                if site in here and (site, when) not in self._flying.values():
                    request = self._courier.ask(what, when, Exchange(REPLY, (site,), what.reply), site)
                    task = asyncio.ensure_future(request)
                    self._flying[task] = (site, when)
                    task.add_done_callback(self._land)
            if not self._open:
                raise ProtocolError("stream.idle", "a Stream round waits, but no site is computing")
            if gone_s >= patience_s:
                raise TransportError("stream.nobody", f"none of the sites that were asked was there for {gone_s:g} s",
                                     remedy="bring the sites back and submit again")  # fmt: skip
            if not self._flying:
                gone_s += LOOK_S
                await asyncio.sleep(LOOK_S)
                continue
            gone_s = 0.0
            if not self._landed:
                self._news.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._news.wait(), LOOK_S)
            while self._landed:
                task = self._landed.pop(0)
                site, number = self._flying.pop(task)
                try:
                    answer = task.result()
                except AtollError as error:
                    lost(site, number, error)
                    continue
                del self._open[site, number]
                return site, number, answer

    def saved(self) -> Message | None:
        """All that is in flight, for a checkpoint; None if it is nothing."""
        meta, arrays = [], dict[str, Array]()
        for number in sorted({number for _, number in self._open}):
            sites = [site for site, when in self._open if when == number]
            asked = self._open[sites[0], number]
            meta.append({"round": number, "sites": sites, **described(asked)})
            for site, sent in (("", asked.send), *((site, asked.send_to.get(site, {})) for site in sites)):
                arrays |= {f"{number}/{site}/{name}": np.asarray(value) for name, value in sent.items()}
        return Message("flights", {"rounds": meta}, arrays) if meta else None

    def restore(self, saved: Message) -> None:
        """Inverse of :meth:`saved`."""
        sent: dict[tuple[int, str], dict[str, Array]] = {}
        for key, value in saved.arrays.items():
            when, site, name = key.split("/", 2)
            sent.setdefault((int(when), site), {})[name] = value
        for one in saved.meta["rounds"]:
            number, fields = int(one["round"]), {n: Field.from_json(value) for n, value in one["fields"].items()}
            asked = Round(
                one["name"], Ready() if one["reduce"] == "ready" else Stream(), fields, sent.get((number, ""), {}),
                {site: sent[number, site] for site in one["sites"] if (number, site) in sent},
                program=one["program"], params=one["params"], view=one["view"],
            )  # fmt: skip
            self._open |= {(site, number): asked for site in one["sites"]}

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
            what = "has other fields" if head.kind == kind else "is of another kind"
            raise ProtocolError("reply.fields", f"a reply {what} than was asked for", remedy=COMPARE)
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
