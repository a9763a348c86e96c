"""The coordinator's driver: runs a study's generator against a transport.

It carries rounds to sites and reductions back, and stores each finished reduction, so
that resuming is replaying: after a crash the generator is run again and fed the stored
reductions, in order, until it reaches the round that was open.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from atoll.contract.disclosure import check_groups
from atoll.contract.errors import AtollError, ProtocolError, TransportError
from atoll.contract.fields import for_members
from atoll.contract.plan import Plan
from atoll.contract.program import build, handler_of, resumed
from atoll.contract.protection import Exchange, find
from atoll.contract.rounds import (
    Arrival,
    Checkpoint,
    Gather,
    Gathered,
    Metrics,
    Reduced,
    Round,
    Sum,
    Summed,
    Together,
    alike,
)
from atoll.contract.wire import Array, Json, Message
from atoll.ledger.contributions import CONTRIBUTION, record
from atoll.ledger.entry import Entry
from atoll.privacy.dp.release import Noise
from atoll.runtime.cohort import Attendance
from atoll.runtime.courier import Courier, Flights, all_of, announce, cohort_of, described, in_time, unbroken
from atoll.runtime.memory import question_digest
from atoll.runtime.noise import noise_of, not_negative, with_room
from atoll.runtime.receipts import Grouping, acknowledge, members_of, pack, unpack
from atoll.runtime.results import Seen, summarise
from atoll.runtime.roster import check_cohort
from atoll.runtime.scheduler import Scheduler, is_dropout
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
        """Drive (or resume) a stored run to its end; stores its result and returns the study's outcome.

        Whatever ends it, the store says how, and then every site is told. Raises the AtollError
        that failed it, naming site, round and step, under the run's id as trace id.
        """
        record = self.store.run(run)
        driver = Driver(self, run, record["plan"], record["sites"])
        self.store.set_status(run, "running")
        try:
            outcome = await driver.drive()
        except asyncio.CancelledError as stop:
            if "stopping" not in stop.args:  # else the process ends, not the run: it resumes with the next process
                await asyncio.shield(driver.end("cancelled", "cancelled by the coordinator's operator", None))
            raise
        except AtollError as error:
            await driver.end("failed", str(error.at(trace=run)), error)
            raise
        except Exception as error:
            failure = ProtocolError("coordinator.internal", f"{type(error).__name__} in the coordinator").at(trace=run)
            await driver.end("failed", str(failure), failure)
            raise failure from error
        await driver.end("finished", driver.cohort.note(), None, driver.result(outcome))
        return outcome

    async def tell_ended(self, site: str) -> None:
        """Tell a site that came back how runs ended that it could not be told of."""
        for run, status, error in self.store.owed_closes(site):
            record = self.store.run(run)
            courier = Courier(self.transport, run, record["plan"], {})
            courier.owe({site: self.store.owed(run).get(site, [])})
            try:
                await courier.close(site, status, error, self.store.entry_of(CONTRIBUTION, run))
            except AtollError as failure:
                self.on_event({"run": run, "not_told": site, "reason": str(failure)})
            else:
                self.store.close_told(run, site)


class Driver:
    """One run being driven."""

    def __init__(self, owner: Coordinator, run: str, plan: Plan, sites: tuple[str, ...]) -> None:
        self.owner, self.run, self.plan = owner, run, plan
        roster = owner.store.roster()
        self.sites = sites or plan.cohort.sites or tuple(roster)
        self.roster = {site: roster[site] for site in self.sites if site in roster}
        self.courier = Courier(owner.transport, run, plan, self.roster)
        self.courier.owe(owner.store.owed(run))
        self.flights = Flights(self.courier)
        self.noise: Noise | None = None
        self.broken: dict[tuple[int, str], str] = {}
        self.questions: dict[int, str] = {}
        self.scheduler = Scheduler.resumed(plan, run, owner.store)
        self.cohort = Attendance(run, plan, self.sites, owner.transport, owner.store, self.tell)
        self.seen = Seen()
        self.began = time.monotonic()
        self.fresh: float = math.inf
        """From this round on none is stored yet."""

    # ---------------------------------------------------------------- the generator

    async def drive(self) -> dict[str, Any]:
        """Open the study at every site, then run the generator to its end."""
        self.noise = await asyncio.to_thread(noise_of, self.plan, len(self.sites))
        await self.open()
        store = self.owner.store
        checkpoint, self.fresh = store.checkpoint(self.run), store.next_round(self.run)
        steps = study(self.plan, self.sites, checkpoint[1] if checkpoint else None)
        value: Reduced | tuple[Reduced, ...] | bool | None = None
        number = 0
        while True:
            ended, item = await asyncio.to_thread(resumed, steps, value)  # a program may compute for long
            if ended:
                return dict(item)
            value = None
            if isinstance(item, Metrics):
                store.add_metrics(self.run, item.step, item.values)
                self.tell(metrics=dict(item.values), step=item.step)
                value = self.scheduler.used_up(store, number)
            elif isinstance(item, Checkpoint):
                if checkpoint is not None and checkpoint[0] > number:
                    number = checkpoint[0]
                    self.flights.restore(store.flights(self.run))
                else:
                    store.save_checkpoint(self.run, number, "program", item.state, self.flights.saved())
            elif isinstance(item, Together):
                asked = enumerate(item.rounds, number)
                value = tuple(await all_of(self.answered(one, place) for place, one in asked))
                number += len(item.rounds)
            else:
                value = await self.answered(item, number)
                number += 1

    async def answered(self, asked: Round, number: int) -> Reduced:
        """A round's reduction: the stored one if there is one."""
        stored = self.owner.store.reduced(self.run, number) if number < self.fresh else None
        value = self.replay(asked, number, stored) if stored else await self.reduce(asked, number)
        self.seen.note(asked, value)
        return value

    def replay(self, asked: Round, number: int, stored: Message) -> Reduced:
        """A stored reduction, as the generator was sent it the first time."""
        value = unpack(stored, asked)
        if isinstance(value, Arrival):
            self.flights.dispatch(asked, number, self.sites if asked.sites is None else asked.sites, value)
        return value

    async def reduce(self, asked: Round, number: int) -> Reduced:
        """Have one round answered, reduced, acknowledged and stored."""
        began = time.monotonic()
        asked, sites = self.scheduler.choose(asked, number, self.cohort.present(asked))
        self.tell(round=number, name=f"{asked.program}/{asked.name}", sites=list(sites))
        replies: dict[str, list[Incoming]] = {}
        result: Reduced = Summed({}, ())
        if isinstance(asked.reduce, Sum):
            try:
                result = await self.sum(asked, number, sites, replies)
            except AtollError as error:
                error.at(round=number, step=f"{asked.program}/{asked.name}")
                ends = self.plan.cohort.on_dropout == "fail" and isinstance(error, TransportError)
                if ends or not asked.reduce.lenient or error.code.startswith(("spool.", "cohort.")):
                    raise
                self.tell(left_out=", ".join(sites), reason=str(error))
        elif isinstance(asked.reduce, Gather):
            arrived = await self.exchange(asked, number, Exchange("reply", sites, asked.reply))
            replies = {site: [incoming] for site, incoming in arrived.items()}
            broken = {site: self.broken.pop((number, site)) for site in sites if (number, site) in self.broken}
            result = Gathered({site: incoming.arrays() for site, incoming in arrived.items()}, broken)
        else:
            result, replies = await self.next_arrival(asked, number)
        paces = self.scheduler.over(asked, number, sites)
        await self.finish(asked, number, result, replies, time.monotonic() - began, paces)
        return result

    async def sum(
        self, asked: Round, number: int, sites: tuple[str, ...], replies: dict[str, list[Incoming]]
    ) -> Summed:
        """Carry the protection's exchanges until it has the sum."""
        protection = find(self.plan.protection.sum)
        fields = for_members(asked.reply, self.plan.cohort.members)
        attempt = self.owner.store.begin_attempt(self.run, number) if protection.attempts else 0
        question = "" if protection.reveals else question_digest(described(asked), alike(asked.send))
        terms = self.courier.terms(asked, number, attempt, question)
        if self.noise is not None:
            fields = with_room(self.noise, self.plan, asked, number)
        combining = protection.combine(replace(asked, reply=fields), sites, terms, self.cohort.sessions)
        step: Exchange | Summed = next(combining)
        while isinstance(step, Exchange):
            arrived = await self.exchange(asked, number, step, attempt, question)
            for site, incoming in arrived.items():
                replies.setdefault(site, []).append(incoming)
            large = any(incoming.head.body_bytes > SMALL_BYTES for incoming in arrived.values())
            on = partial(resumed, combining, arrived)
            _, step = await asyncio.to_thread(on) if large else on()
        if (most := self.plan.cohort.members) > 1:
            step = replace(step, behind=sum(members_of(replies[site], most) for site in step.sites))
        step = replace(step, cohort=cohort_of(asked))
        if self.noise is not None:  # of regions' sums the whole is judged, above
            return step if self.plan.cohort.above else replace(step, arrays=not_negative(step.arrays, asked.reply))
        if not protection.reveals:
            groups = handler_of(build(asked.program, asked.params), asked.name).groups
            check_groups(step.arrays, groups, self.plan.run.min_group_size)
        return step

    async def finish(
        self, asked: Round, number: int, result: Reduced, replies: Mapping[str, Sequence[Incoming]], seconds: float,
        paces: Mapping[str, tuple[float, float | None]],
    ) -> None:  # fmt: skip
        """Store the reduction together with the signed ledger entries that acknowledge its releases."""
        chain, name = self.owner.ledger.chain, f"{asked.program}/{asked.name}"
        stored = pack(result, asked, self.questions.pop(number, ""))
        about = {"run": self.run, "round": number, "program": asked.program, "handler": asked.name}
        async with self.owner.ledger_lock:
            mark = chain.seq, chain.head
            try:
                entries, receipts = acknowledge(chain, about, replies, self.owner.receipts)
                size = self.scheduler.travelled(self.owner.transport.traffic)
                args = (self.run, number, asked.stage, name, seconds, stored, entries, receipts, paces, size)
                if sum(array.nbytes for array in stored.arrays.values()) > SMALL_BYTES:
                    await unbroken(asyncio.to_thread(self.owner.store.finish_round, *args))
                else:
                    self.owner.store.finish_round(*args)
            except BaseException:
                chain.seq, chain.head = mark
                raise
        self.courier.owe(receipts)
        for incoming in (incoming for incomings in replies.values() for incoming in incomings):
            incoming.close()

    def tell(self, **event: Any) -> None:
        """Tell whoever watches the run."""
        self.owner.on_event({"run": self.run, **event})

    # ---------------------------------------------------------------- beginning and end

    async def open(self) -> None:
        """Announce the study to every site and wait until each opened it; sites may ask their operator first."""
        check_cohort(self.plan, self.sites, self.roster)
        async with self.owner.ledger_lock:
            body = {"run": self.run, "plan": self.plan.hash, "study": self.plan.name, "roster": self.roster}
            self.owner.ledger.record("opened", body)
        answers = await announce(self.courier, self.sites, self.cohort.waiting)
        self.owner.store.set_status(self.run, "running")
        self.cohort.opening(dict(zip(self.sites, answers, strict=True)))
        self.scheduler.quality |= self.cohort.quality

    def result(self, outcome: Mapping[str, Any]) -> tuple[dict[str, Json], dict[str, Array]]:
        """The result and the model, as they are stored."""
        store, traffic = self.owner.store, self.owner.transport.traffic.pop(self.run)
        return summarise(
            self.run, self.plan, outcome, sites={site: self.cohort.rows.get(site) for site in self.sites},
            rounds=len(store.rounds(self.run)), seconds=time.monotonic() - self.began,
            transport=self.owner.transport.name, traffic=asdict(traffic), noise=self.noise, seen=self.seen,
        )  # fmt: skip

    async def end(
        self, status: str, note: str, error: AtollError | None,
        result: tuple[dict[str, Json], dict[str, Array]] | None = None,
    ) -> None:  # fmt: skip
        """Store how the run ended, then tell every site, with the receipts it is still owed. Sites that
        cannot be told now are told when they come back."""
        self.flights.cancel()
        store, public = self.owner.store, error.told() if error is not None else None
        credited = await self.credit({} if result is None else result[0].get("output", {}).get(CONTRIBUTION, {}))
        store.end_run(self.run, status, note, tuple(self.roster), public, result)
        reachable = self.owner.transport.sites()

        async def one(site: str) -> None:
            try:
                await self.courier.close(site, status, public, credited)
                store.close_told(self.run, site)
            except AtollError as failure:
                self.tell(not_told=site, reason=str(failure))

        await all_of(one(site) for site in self.roster if site in reachable)
        async with self.owner.ledger_lock:
            self.owner.ledger.record("closed", {"run": self.run, "status": status, "error": public})

    async def credit(self, found: Mapping[str, Json]) -> Entry | None:
        """Record, once, who contributed how much, if the result says it."""
        body = record(self.run, self.plan.name, self.plan.hash, found)
        if body is None:
            return None
        async with self.owner.ledger_lock:
            return self.owner.store.entry_of(CONTRIBUTION, self.run) or self.owner.ledger.record(CONTRIBUTION, body)

    # ---------------------------------------------------------------- exchanges

    async def exchange(
        self, asked: Round, number: int, exchange: Exchange, attempt: int = 0, question: str = ""
    ) -> dict[str, Incoming]:
        """Verified replies of one exchange, in cohort order; sites that dropped out are absent.

        Raises the first failure that is not a dropout; of a lenient round, only where too few answered.
        """
        failures: list[AtollError] = []

        async def one(site: str) -> Incoming | None:
            began = time.monotonic()
            try:
                answer = await self.courier.ask(asked, number, exchange, site, attempt, question)
                self.scheduler.answered(number, site, exchange.step, time.monotonic() - began)
                return answer
            except AtollError as error:
                error.at(site=site, round=number, step=f"{asked.program}/{asked.name}", trace=self.run)
                if is_dropout(error):
                    self.cohort.dropped(site, error)
                elif asked.reduce == Gather(lenient=True) and not error.code.startswith("spool."):
                    failures.append(error)
                    self.broken[number, site] = error.code
                    self.tell(left_out=site, reason=str(error))
                elif not (asked.optional and error.code == "policy.withheld"):
                    raise
                return None

        within = self.scheduler.within_s(asked, exchange.step)
        least = self.scheduler.least(asked, len(self.sites))
        answers = await in_time((one(site) for site in exchange.sites), within, least)
        if failures and sum(answer is not None for answer in answers) < self.plan.cohort.min_sites:
            raise failures[0]
        return {site: answer for site, answer in zip(exchange.sites, answers, strict=True) if answer is not None}

    async def next_arrival(self, asked: Round, number: int) -> tuple[Arrival, dict[str, list[Incoming]]]:
        """Dispatch to the round's sites, then wait for one reply of all that are in flight."""

        def lost(site: str, when: int, error: AtollError) -> None:
            error.at(site=site, round=when, step=f"{asked.program}/{asked.name}", trace=self.run)
            if not is_dropout(error):
                raise error
            self.cohort.dropped(site, error)

        self.flights.dispatch(asked, number, self.sites if asked.sites is None else asked.sites)
        site, when, answer = await self.flights.next(self.cohort.present, lost, self.plan.run.deadline_s)
        return Arrival(site, when, answer.arrays()), {site: [answer]}
