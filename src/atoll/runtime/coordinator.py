"""The coordinator's driver: runs a study's generator against a transport.

It carries rounds to sites and reductions back, and stores each finished reduction, so
that resuming is replaying: after a crash the generator is run again and fed the stored
reductions, in order, until it reaches the round that was open.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from atoll.contract.disclosure import check_groups
from atoll.contract.errors import AtollError, ProtocolError, TransportError, refuse_all
from atoll.contract.plan import Plan
from atoll.contract.program import build, handler_of
from atoll.contract.protection import REPLY, Exchange, Replies, find
from atoll.contract.rounds import (
    Arrival,
    Checkpoint,
    Gather,
    Gathered,
    Metrics,
    Reduced,
    Round,
    Steps,
    Sum,
    Summed,
    Together,
)
from atoll.contract.schedule import Schedule
from atoll.contract.wire import Array, Json, Message
from atoll.privacy.dp.release import Noise
from atoll.runtime.courier import Courier, Flights, all_of, announce, described, in_time, session_of, unbroken
from atoll.runtime.memory import question_digest
from atoll.runtime.noise import noise_of, not_negative, with_room
from atoll.runtime.receipts import Grouping, acknowledge, pack, unpack
from atoll.runtime.results import Seen, summarise
from atoll.runtime.roster import check_cohort
from atoll.runtime.scheduler import Scheduler
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
        driver = _Run(self, run, record["plan"], record["sites"])
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
        await driver.end("finished", driver.note(), None, driver.result(outcome))
        return outcome

    async def tell_ended(self, site: str) -> None:
        """Tell a site that came back how runs ended that it could not be told of."""
        for run, status, error in self.store.owed_closes(site):
            record = self.store.run(run)
            courier = Courier(self.transport, run, record["plan"], {})
            courier.owe({site: _owed(self.store, run).get(site, [])})
            try:
                await courier.close(site, status, error)
            except AtollError as failure:
                self.on_event({"run": run, "not_told": site, "reason": str(failure)})
            else:
                self.store.close_told(run, site)


class _Run:
    """One run being driven."""

    def __init__(self, owner: Coordinator, run: str, plan: Plan, sites: tuple[str, ...]) -> None:
        self.owner, self.run, self.plan = owner, run, plan
        roster = owner.store.roster()
        self.sites = sites or plan.cohort.sites or tuple(roster)
        self.roster = {site: roster[site] for site in self.sites if site in roster}
        self.courier = Courier(owner.transport, run, plan, self.roster)
        self.courier.owe(_owed(owner.store, run))
        self.flights = Flights(self.courier)
        self.noise: Noise | None = None
        self.opened: set[str] = set()
        self.sessions: dict[str, bytes] = {}
        self.absent: dict[str, int] = {}
        self.dropouts: dict[str, str] = {}
        self.rows: dict[str, int] = {}
        self.took: dict[int, dict[str, float]] = {}
        self.scheduler = Scheduler(plan, self.sites)
        for paces in owner.store.paces(run):
            self.scheduler.note(*paces)
        self.traffic_before = owner.store.spent(run, 2**31)[1]
        self.seen = Seen()
        self.began = time.monotonic()

    # ---------------------------------------------------------------- the generator

    async def drive(self) -> dict[str, Any]:
        """Open the study at every site, then run the generator to its end."""
        self.noise = await asyncio.to_thread(noise_of, self.plan, len(self.sites))
        await self.open()
        store = self.owner.store
        checkpoint = store.checkpoint(self.run)
        steps = study(self.plan, self.sites, checkpoint[1] if checkpoint else None)
        value: Reduced | tuple[Reduced, ...] | bool | None = None
        number = 0
        while True:
            ended, item = await asyncio.to_thread(_resumed, steps, value)  # a program may compute for long
            if ended:
                return dict(item)
            value = None
            if isinstance(item, Metrics):
                store.add_metrics(self.run, item.step, item.values)
                self.tell(metrics=dict(item.values), step=item.step)
                value = self.used_up(number)
            elif isinstance(item, Checkpoint):
                if checkpoint is not None and checkpoint[0] > number:
                    number = checkpoint[0]
                else:
                    store.save_checkpoint(self.run, number, "program", item.state)
            elif isinstance(item, Together):
                asked = enumerate(item.rounds, number)
                value = tuple(await all_of(self.answered(one, place) for place, one in asked))
                number += len(item.rounds)
            else:
                value = await self.answered(item, number)
                number += 1

    async def answered(self, asked: Round, number: int) -> Reduced:
        """A round's reduction: the stored one if there is one."""
        stored = self.owner.store.reduced(self.run, number)
        value = self.replay(asked, number, stored) if stored else await self.reduce(asked, number)
        self.seen.note(asked, value)
        return value

    def used_up(self, number: int) -> bool:
        """Did the rounds before *number* use up what the plan's schedule lets them?"""
        schedule = self.plan.schedule
        if schedule.stop_after_s is None and schedule.stop_after_bytes is None:
            return False
        seconds, size = self.owner.store.spent(self.run, number)
        return seconds >= (schedule.stop_after_s or math.inf) or size >= (schedule.stop_after_bytes or math.inf)

    def replay(self, asked: Round, number: int, stored: Message) -> Reduced:
        """A stored reduction, as the generator was sent it the first time."""
        value = unpack(stored, asked)
        if isinstance(value, Arrival):
            self.flights.replay(asked, number, self.sites if asked.sites is None else asked.sites, value)
        return value

    async def reduce(self, asked: Round, number: int) -> Reduced:
        """Have one round answered, reduced, acknowledged and stored."""
        began = time.monotonic()
        sites = self.scheduler.chosen(asked, number, self.present(asked))
        if asked.draw is not None or (asked.paced and self.plan.schedule.priority):
            asked = replace(asked, sites=sites, among=len(sites) >= (asked.draw or 1))
        if asked.paced and self.plan.schedule.effort_min < 1:
            efforts = {site: {**asked.send_to.get(site, {}), "effort": self.scheduler.effort(site)} for site in sites}
            asked = replace(asked, send_to=efforts)
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
        await self.finish(asked, number, result, replies, time.monotonic() - began, self.paces(asked, number, sites))
        return result

    def paces(self, asked: Round, number: int, sites: Sequence[str]) -> dict[str, tuple[float, float | None]]:
        """What the schedule learns from a round; nothing, where it is none of its rounds."""
        took = self.took.pop(number, {})
        if not asked.paced or self.plan.schedule == Schedule():
            return {}
        efforts = {site: float(asked.send_to.get(site, {}).get("effort", 1.0)) for site in sites}
        self.scheduler.note(efforts, took)
        return {site: (effort, took.get(site)) for site, effort in efforts.items()}

    async def sum(
        self, asked: Round, number: int, sites: tuple[str, ...], replies: dict[str, list[Incoming]]
    ) -> Summed:
        """Carry the protection's exchanges until it has the sum."""
        protection, fields = find(self.plan.protection.sum), asked.reply
        attempt = self.owner.store.begin_attempt(self.run, number) if protection.attempts else 0
        question = "" if protection.reveals else question_digest(described(asked), asked.send)
        terms = self.courier.terms(asked, number, attempt, question)
        if self.noise is not None:
            fields = with_room(self.noise, self.plan, asked, number)
        combining = protection.combine(replace(asked, reply=fields), sites, terms, self.sessions)
        step: Exchange | Summed = next(combining)
        while isinstance(step, Exchange):
            arrived = await self.exchange(asked, number, step, attempt, question)
            for site, incoming in arrived.items():
                replies.setdefault(site, []).append(incoming)
            large = any(incoming.head.body_bytes > SMALL_BYTES for incoming in arrived.values())
            step = await asyncio.to_thread(_advance, combining, arrived) if large else _advance(combining, arrived)
        if self.noise is not None:
            return replace(step, arrays=not_negative(step.arrays, asked.reply))
        if not protection.reveals:
            groups = handler_of(build(asked.program, asked.params), asked.name).groups
            check_groups(step.arrays, groups, self.plan.run.min_group_size)
        return step

    async def finish(
        self, asked: Round, number: int, result: Reduced, replies: Mapping[str, Sequence[Incoming]], seconds: float,
        paces: Mapping[str, tuple[float, float | None]],
    ) -> None:  # fmt: skip
        """Store the reduction together with the signed ledger entries that acknowledge its releases."""
        chain, name, stored = self.owner.ledger.chain, f"{asked.program}/{asked.name}", pack(result, asked)
        about = {"run": self.run, "round": number, "program": asked.program, "handler": asked.name}
        async with self.owner.ledger_lock:
            mark = chain.seq, chain.head
            try:
                entries, receipts = acknowledge(chain, about, replies, self.owner.receipts)
                size = 0 if self.plan.schedule.stop_after_bytes is None else self.traffic_before + self.traffic()
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

    def traffic(self) -> int:
        """Bytes of this run, since this process drives it."""
        return sum(asdict(self.owner.transport.traffic[self.run]).values())

    def tell(self, **event: Any) -> None:
        """Tell whoever watches the run."""
        self.owner.on_event({"run": self.run, **event})

    # ---------------------------------------------------------------- the cohort

    def present(self, asked: Round) -> tuple[str, ...]:
        """The sites to ask: those of the round, less those that dropped out and did not come back."""
        reachable = self.owner.transport.sites()
        self.absent = {s: since for s, since in self.absent.items() if reachable.get(s, since) == since}
        asked_sites = self.sites if asked.sites is None else asked.sites
        return tuple(site for site in asked_sites if site in self.opened and site not in self.absent)

    def note(self) -> str:
        """Who dropped out, and why: what the operator reads while the run goes on, and after it."""
        return "\n".join(f"{site} dropped out: {why}" for site, why in self.dropouts.items())

    def dropped(self, site: str, error: AtollError) -> None:
        """A site dropped out: end the run if its rule says so, else go on without it."""
        rule = self.plan.cohort
        self.tell(dropout=site, reason=str(error))
        if rule.on_dropout == "fail":
            raise error
        self.dropouts[site] = str(error)
        self.owner.store.set_status(self.run, "running", self.note())
        self.absent[site] = self.owner.transport.sites().get(site, -1)
        left = len(self.sites) - len(self.absent)
        if left < rule.min_sites:
            raise TransportError(
                "cohort.too-few-left", f"{left} sites are left, and the plan demands {rule.min_sites}: {error.code}",
                field="cohort.min_sites", remedy=error.remedy or "bring the sites back", where=error.where,
            ) from error  # fmt: skip

    async def open(self) -> None:
        """Announce the study to every site and wait until each opened it; sites may ask their operator first."""
        check_cohort(self.plan, self.sites, self.roster)
        async with self.owner.ledger_lock:
            body = {"run": self.run, "plan": self.plan.hash, "study": self.plan.name, "roster": self.roster}
            self.owner.ledger.record("opened", body)
        answers = await announce(self.courier, self.sites, self.waiting)
        self.owner.store.set_status(self.run, "running")
        refusals = []
        for site, answer in zip(self.sites, answers, strict=True):
            if isinstance(answer, TransportError):
                self.dropped(site, answer)
            elif isinstance(answer, AtollError):
                refusals.append(answer)
            else:
                self.opened.add(site)
                self.sessions[site] = session_of(answer.meta)
                if isinstance(rows := answer.meta.get("rows"), int):
                    self.rows[site] = rows
                if isinstance(quality := answer.meta.get("quality"), float) and 0 < quality <= 1:
                    self.scheduler.quality[site] = quality
        refuse_all(type(refusals[0]) if refusals else ProtocolError, "cohort.refused", refusals)

    def waiting(self, sites: list[str]) -> None:
        """Tell who must still ask their operator."""
        self.tell(waiting=sites)
        self.owner.store.set_status(self.run, "running", f"awaiting approval: {', '.join(sites)}")

    def result(self, outcome: Mapping[str, Any]) -> tuple[dict[str, Json], dict[str, Array]]:
        """The result and the model, as they are stored."""
        store, traffic = self.owner.store, self.owner.transport.traffic.pop(self.run)
        return summarise(
            self.run, self.plan, outcome, sites={site: self.rows.get(site) for site in self.sites},
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
        store.end_run(self.run, status, note, tuple(self.roster), public, result)
        reachable = self.owner.transport.sites()

        async def one(site: str) -> None:
            try:
                await self.courier.close(site, status, public)
                store.close_told(self.run, site)
            except AtollError as failure:
                self.tell(not_told=site, reason=str(failure))

        await all_of(one(site) for site in self.roster if site in reachable)
        async with self.owner.ledger_lock:
            self.owner.ledger.record("closed", {"run": self.run, "status": status, "error": public})

    # ---------------------------------------------------------------- exchanges

    async def exchange(
        self, asked: Round, number: int, exchange: Exchange, attempt: int = 0, question: str = ""
    ) -> dict[str, Incoming]:
        """Verified replies of one exchange, in cohort order; sites that dropped out are absent.

        Raises the first failure that is not a dropout.
        """

        async def one(site: str) -> Incoming | None:
            began = time.monotonic()
            try:
                answer = await self.courier.ask(asked, number, exchange, site, attempt, question)
                self.took.setdefault(number, {}).setdefault(site, time.monotonic() - began)
                return answer
            except AtollError as error:
                error.at(site=site, round=number, step=f"{asked.program}/{asked.name}", trace=self.run)
                if _is_dropout(error):
                    self.dropped(site, error)
                elif not (asked.optional and error.code == "policy.withheld"):
                    raise
                return None

        within = self.plan.schedule.within_s if asked.paced and exchange.step == REPLY else None
        answers = await in_time((one(site) for site in exchange.sites), within, self.plan.cohort.min_sites)
        return {site: answer for site, answer in zip(exchange.sites, answers, strict=True) if answer is not None}

    async def next_arrival(
        self, asked: Round, number: int, sites: Sequence[str]
    ) -> tuple[Arrival, dict[str, list[Incoming]]]:
        """Dispatch to *sites*, then wait for one reply of all that are in flight."""
        self.flights.dispatch(asked, number, sites)
        while True:
            site, asked_round, answer = await self.flights.next()
            if isinstance(answer, Incoming):
                return Arrival(site, asked_round, answer.arrays()), {site: [answer]}
            answer.at(site=site, round=asked_round, step=f"{asked.program}/{asked.name}", trace=self.run)
            if not _is_dropout(answer):
                raise answer
            self.dropped(site, answer)


def _owed(store: RunStore, run: str) -> dict[str, list[Json]]:
    """The receipts of every site's last round; its earlier ones went out with its last task."""
    last: dict[str, list[Json]] = {}
    for finished in store.rounds(run):
        last.update(finished["receipts"])
    return last


def _is_dropout(error: AtollError) -> bool:
    """A site that cannot be reached, or cannot do its work: others may go on without it."""
    ours = error.code.startswith("spool.")  # it is the coordinator that has no room
    return (isinstance(error, TransportError) and not ours) or error.code in ("site.out-of-memory", "site.diverged")


def _resumed(steps: Steps, value: Any) -> tuple[bool, Any]:
    """Send a program a reduction: (False, what it yields), or (True, its result)."""
    try:
        return False, steps.send(value)
    except StopIteration as stop:
        return True, stop.value


def _advance(combining: Generator[Exchange, Replies, Summed], arrived: Replies) -> Exchange | Summed:
    """Feed a protection the replies: its next exchange, or the sum."""
    try:
        return combining.send(arrived)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]
