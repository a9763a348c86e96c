"""The coordinator's driver: runs a study's generator against a transport.

It carries rounds to sites and reductions back, and stores each finished reduction, so
that resuming is replaying: after a crash the generator is run again and fed the stored
reductions, in order, until it reaches the round that was open.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any

from atoll.contract.errors import AtollError, PlanError, ProtocolError, TransportError, refuse_all
from atoll.contract.plan import Plan
from atoll.contract.program import REGISTRY
from atoll.contract.protection import Exchange, Replies, find
from atoll.contract.rounds import (
    Arrival,
    Checkpoint,
    Field,
    Gather,
    Gathered,
    Metrics,
    Reduced,
    Round,
    Sum,
    Summed,
    TaskId,
)  # fmt: skip
from atoll.contract.wire import Head, Json, Message
from atoll.runtime.receipts import Grouping, acknowledge, pack, unpack, verify_release
from atoll.runtime.site import roster_hash
from atoll.runtime.store import Ledger, RunStore
from atoll.runtime.study import study
from atoll.transport.base import Transport
from atoll.transport.spool import Incoming

Event = Callable[[dict[str, Any]], None]
SMALL_BYTES = 64 << 10
"""Larger replies are added up and stored by a thread, so that the event loop stays responsive."""


class Coordinator:
    """The party that drives rounds. One object serves many runs on one transport."""

    def __init__(
        self, transport: Transport, store: RunStore, ledger: Ledger, *, on_event: Event | None = None,
        receipts: Grouping = "round",
    ) -> None:  # fmt: skip
        """receipts: one signature per round over a Merkle root, or one per release."""
        self.transport, self.store, self.ledger = transport, store, ledger
        self.on_event = on_event or (lambda _: None)
        self.receipts = receipts
        self.ledger_lock = asyncio.Lock()

    async def run(self, run: str) -> dict[str, Any]:
        """Drive (or resume) a stored run to its end; returns the study's outcome.

        Whatever ends it, every site is told, and the store says how. Raises the AtollError
        that failed it, naming site, round and step, under the run's id as trace id.
        """
        record = self.store.run(run)
        driver = _Run(self, run, record["plan"], record["sites"])
        self.store.set_status(run, "running")
        try:
            outcome = await driver.drive()
        except asyncio.CancelledError as stop:
            if "stopping" in stop.args:  # the process ends, not the run: it resumes with the next process
                raise
            await asyncio.shield(driver.close("cancelled", None))
            self.store.set_status(run, "cancelled", "cancelled by the coordinator's operator")
            raise
        except Exception as error:
            if not isinstance(error, AtollError):
                error = ProtocolError("coordinator.internal", f"{type(error).__name__} in the coordinator")
            await driver.close("failed", error.at(trace=run))
            self.store.set_status(run, "failed", str(error))
            raise error from None if isinstance(error, AtollError) and error.code != "coordinator.internal" else error
        await driver.close("finished", None)
        return outcome


class _Run:
    """One run being driven."""

    def __init__(self, owner: Coordinator, run: str, plan: Plan, sites: tuple[str, ...]) -> None:
        self.owner, self.run, self.plan = owner, run, plan
        roster = owner.store.roster()
        self.sites = sites or plan.cohort.sites or tuple(roster)
        self.roster = {site: roster[site] for site in self.sites if site in roster}
        self.plan_hash, self.roster_hash = plan.hash, roster_hash(self.roster)
        self.absent: dict[str, int] = {}
        self.unanswered: dict[tuple[str, int], Round] = {}
        self.flying: dict[asyncio.Task[Incoming], tuple[str, int]] = {}
        self.owed: dict[str, list[Json]] = {}
        for finished in owner.store.rounds(run):  # a site's earlier receipts went out with its last task
            self.owed.update(finished["receipts"])

    # ---------------------------------------------------------------- the generator

    async def drive(self) -> dict[str, Any]:
        """Open the study at every site, then run the generator to its end."""
        await self.open()
        store = self.owner.store
        checkpoint = store.checkpoint(self.run)
        steps = study(self.plan, self.sites, checkpoint[1] if checkpoint else None)
        value: Reduced | None = None
        number = 0
        while True:
            try:
                item = steps.send(value)
            except StopIteration as stop:
                return dict(stop.value)
            value = None
            if isinstance(item, Metrics):
                store.add_metrics(self.run, item.step, item.values)
                self.tell(metrics=dict(item.values), step=item.step)
            elif isinstance(item, Checkpoint):
                if checkpoint is not None and checkpoint[0] > number:
                    number = checkpoint[0]
                else:
                    store.save_checkpoint(self.run, number, "program", item.state)
            else:
                stored = store.reduced(self.run, number)
                value = self.replay(item, number, stored) if stored else await self.reduce(item, number)
                number += 1

    def replay(self, asked: Round, number: int, stored: Message) -> Reduced:
        """A stored reduction, as the generator was sent it the first time."""
        value = unpack(stored, asked)
        if isinstance(value, Arrival):
            self.unanswered |= {(site, number): asked for site in asked.sites or self.sites}
            del self.unanswered[value.site, value.asked_round]
        return value

    async def reduce(self, asked: Round, number: int) -> Reduced:
        """Have one round answered, reduced, acknowledged and stored."""
        began = time.monotonic()
        sites = self.present(asked)
        self.tell(round=number, name=f"{asked.program}/{asked.name}", sites=list(sites))
        replies: dict[str, list[Incoming]] = {}
        result: Reduced
        if isinstance(asked.reduce, Sum):
            result = await self.sum(asked, number, sites, replies)
        elif isinstance(asked.reduce, Gather):
            arrived = await self.exchange(asked, number, Exchange("reply", sites, asked.reply))
            replies = {site: [incoming] for site, incoming in arrived.items()}
            result = Gathered({site: incoming.arrays() for site, incoming in arrived.items()})
        else:
            result, replies = await self.next_arrival(asked, number, sites)
        await self.finish(asked, number, result, replies, time.monotonic() - began)
        return result

    async def sum(
        self, asked: Round, number: int, sites: tuple[str, ...], replies: dict[str, list[Incoming]]
    ) -> Summed:
        """Carry the protection's exchanges until it has the sum."""
        combining = find(self.plan.protection).combine(asked, sites)
        step: Exchange | Summed = next(combining)
        while isinstance(step, Exchange):
            arrived = await self.exchange(asked, number, step)
            for site, incoming in arrived.items():
                replies.setdefault(site, []).append(incoming)
            large = any(incoming.head.body_bytes > SMALL_BYTES for incoming in arrived.values())
            step = await asyncio.to_thread(_advance, combining, arrived) if large else _advance(combining, arrived)
        return step

    async def finish(
        self, asked: Round, number: int, result: Reduced, replies: Mapping[str, Sequence[Incoming]], seconds: float
    ) -> None:
        """Store the reduction together with the signed ledger entries that acknowledge its releases."""
        chain, name, stored = self.owner.ledger.chain, f"{asked.program}/{asked.name}", pack(result, asked)
        about = {"run": self.run, "round": number, "program": asked.program, "handler": asked.name}
        async with self.owner.ledger_lock:
            mark = chain.seq, chain.head
            try:
                entries, receipts = acknowledge(chain, about, replies, self.owner.receipts)
                args = (self.run, number, asked.stage, name, seconds, stored, entries, receipts)
                if sum(array.nbytes for array in stored.arrays.values()) > SMALL_BYTES:
                    await asyncio.to_thread(self.owner.store.finish_round, *args)
                else:
                    self.owner.store.finish_round(*args)
            except BaseException:
                chain.seq, chain.head = mark
                raise
        for site, owed in receipts.items():
            self.owed.setdefault(site, []).extend(owed)
        for incoming in (incoming for incomings in replies.values() for incoming in incomings):
            incoming.close()

    def tell(self, **event: Any) -> None:
        """Tell whoever watches the run."""
        self.owner.on_event({"run": self.run, **event})

    # ---------------------------------------------------------------- the cohort

    def present(self, asked: Round) -> tuple[str, ...]:
        """The sites to ask: those of the round, less those that dropped out and did not come back."""
        reachable = self.owner.transport.sites()
        self.absent = {s: since for s, since in self.absent.items() if reachable.get(s, since) == since}
        asked_sites = self.sites if asked.sites is None else asked.sites
        return tuple(site for site in asked_sites if site not in self.absent)

    def dropped(self, site: str, error: AtollError) -> None:
        """A site dropped out: end the run if its rule says so, else go on without it."""
        rule = self.plan.cohort
        self.tell(dropout=site, reason=str(error))
        if rule.on_dropout == "fail":
            raise error
        self.absent[site] = self.owner.transport.sites().get(site, -1)
        left = len(self.sites) - len(self.absent)
        if left < rule.min_sites:
            raise TransportError(
                "cohort.too-few-left", f"{left} sites are left, and the plan demands {rule.min_sites}",
                field="cohort.min_sites", remedy="bring the sites back and submit again", where=error.where,
            ) from error  # fmt: skip

    async def open(self) -> None:
        """Announce the study to every site and wait until each opened it; sites may ask their operator first."""
        rule = self.plan.cohort
        if missing := [site for site in self.sites if site not in self.roster]:
            raise PlanError(
                "cohort.not-enrolled", "the plan names sites that are not enrolled", field=", ".join(missing),
                remedy="enrol them, or remove them from cohort.sites",
            )  # fmt: skip
        if len(self.sites) < rule.min_sites:
            raise PlanError(
                "cohort.too-small", f"the plan demands {rule.min_sites} sites, and {len(self.sites)} are there",
                field="cohort.min_sites", remedy="enrol more sites, or lower min_sites",
            )  # fmt: skip
        async with self.owner.ledger_lock:
            body = {"run": self.run, "plan": self.plan_hash, "study": self.plan.name, "roster": self.roster}
            self.owner.ledger.record("opened", body)
        waiting: set[str] = set()

        async def one(site: str) -> Incoming | AtollError:
            def tell(note: Mapping[str, Json]) -> None:
                if "waiting" in note and site not in waiting:
                    waiting.add(site)
                    self.tell(waiting=sorted(waiting))
                    self.owner.store.set_status(self.run, "running", f"awaiting approval: {', '.join(sorted(waiting))}")

            meta = {"id": f"{self.run}/open/{site}", "run": self.run, "roster": self.roster}
            meta["plan"] = self.plan.to_json()
            patience = self.plan.run.deadline_s
            try:
                return await self.owner.transport.request(site, Message("open", meta), patience, expect("opened"), tell)
            except AtollError as error:
                return error.at(site=site, step="open")
            finally:
                waiting.discard(site)

        refusals = []
        answers = await _all(one(site) for site in self.sites)
        self.owner.store.set_status(self.run, "running")
        for site, answer in zip(self.sites, answers, strict=True):
            if isinstance(answer, TransportError):
                self.dropped(site, answer)
            elif isinstance(answer, AtollError):
                refusals.append(answer)
            elif isinstance(rows := answer.meta.get("rows"), int):
                self.tell(site=site, rows=rows)
        refuse_all(type(refusals[0]) if refusals else ProtocolError, "cohort.refused", refusals)

    async def close(self, status: str, error: AtollError | None) -> None:
        """Tell every site how the run ended, with the receipts it is still owed; best effort."""
        for task in self.flying:
            task.cancel()
        public = {**error.public(), **error.where} if error is not None else None
        patience = min(self.plan.run.deadline_s, 10.0)

        async def one(site: str) -> None:
            meta = {"id": f"{self.run}/close/{site}", "run": self.run, "status": status, "error": public}
            message = Message("close", {**meta, "receipts": self.owed.get(site, [])})
            try:
                await self.owner.transport.request(site, message, patience, expect("closed"))
            except AtollError as failure:
                self.tell(not_told=site, reason=str(failure))

        reachable = self.owner.transport.sites()
        await _all(one(site) for site in self.roster if site in reachable)
        async with self.owner.ledger_lock:
            self.owner.ledger.record("closed", {"run": self.run, "status": status, "error": public})

    # ---------------------------------------------------------------- exchanges

    async def ask(self, asked: Round, number: int, exchange: Exchange, site: str) -> Incoming:
        """One site's verified release. The task's id is the same after a restart, so nothing is done twice."""
        task = TaskId(self.run, number, 0, exchange.step, site)
        owed = list(self.owed.get(site, []))
        meta: dict[str, Json] = {
            "id": str(task),
            **task.to_json(),
            "name": asked.name,
            "program": asked.program,
            "version": REGISTRY[asked.program].version,
            "params": asked.params,
            "fields": {name: declared.to_json() for name, declared in exchange.fields.items()},
            "reduce": asked.reduce.tag,
            "view": asked.view,
            "receipts": owed,
        }
        message = Message("task", meta, {**asked.send, **asked.send_to.get(site, {}), **exchange.send})
        check = expect("release", exchange.fields)
        incoming = await self.owner.transport.request(site, message, self.plan.run.deadline_s, check)
        public = bytes.fromhex(self.roster[site])
        verify_release(incoming, message, public, self.plan_hash, self.roster_hash)
        self.owed[site] = self.owed.get(site, [])[len(owed) :]
        return incoming

    async def exchange(self, asked: Round, number: int, exchange: Exchange) -> dict[str, Incoming]:
        """Verified replies of one exchange, in cohort order; sites that dropped out are absent.

        Raises the first failure that is not a dropout.
        """

        async def one(site: str) -> Incoming | None:
            try:
                return await self.ask(asked, number, exchange, site)
            except AtollError as error:
                error.at(site=site, round=number, step=f"{asked.program}/{asked.name}", trace=self.run)
                if isinstance(error, TransportError) or error.code == "site.out-of-memory":
                    self.dropped(site, error)
                elif not (asked.optional and error.code == "policy.withheld"):
                    raise
                return None

        answers = await _all(one(site) for site in exchange.sites)
        return {site: answer for site, answer in zip(exchange.sites, answers, strict=True) if answer is not None}

    async def next_arrival(
        self, asked: Round, number: int, sites: Sequence[str]
    ) -> tuple[Arrival, dict[str, list[Incoming]]]:
        """Dispatch to *sites*, then wait for one reply of all that are in flight."""
        self.unanswered |= {(site, number): asked for site in sites}
        for (site, when), what in self.unanswered.items():
            if (site, when) not in self.flying.values():
                task = asyncio.ensure_future(self.ask(what, when, Exchange("reply", (site,), what.reply), site))
                self.flying[task] = (site, when)
        while self.flying:
            done, _ = await asyncio.wait(self.flying, return_when=asyncio.FIRST_COMPLETED)
            task = done.pop()
            site, asked_round = self.flying.pop(task)
            del self.unanswered[site, asked_round]
            try:
                incoming = task.result()
            except AtollError as error:
                error.at(site=site, round=asked_round, step=f"{asked.program}/{asked.name}", trace=self.run)
                if not isinstance(error, TransportError):
                    raise
                self.dropped(site, error)
                continue
            return Arrival(site, asked_round, incoming.arrays()), {site: [incoming]}
        raise ProtocolError("stream.idle", "a Stream round waits, but no site is computing", field=asked.name)


def expect(kind: str, fields: Mapping[str, Field] | None = None) -> Callable[[Head], None]:
    """A check of a reply's header: kind, names, dtypes and sizes, before memory is allocated."""
    declared = fields or {}

    def check(head: Head) -> None:
        if head.kind == "failure" and not head.specs:
            raise AtollError.from_public(head.meta)
        if head.kind != kind or {spec.name for spec in head.specs} != set(declared):
            raise ProtocolError("reply.fields", f"a {head.kind} with other fields instead of a {kind}")
        for spec in head.specs:
            declared[spec.name].check(spec.name, spec)

    return check


def _advance(combining: Generator[Exchange, Replies, Summed], arrived: Replies) -> Exchange | Summed:
    """Feed a protection the replies: its next exchange, or the sum."""
    try:
        return combining.send(arrived)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]


async def _all(requests: Iterable[Any]) -> list[Any]:
    """Await all, in order; when one raises, the others are cancelled."""
    tasks = [asyncio.ensure_future(request) for request in requests]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
