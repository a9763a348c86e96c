"""A simulated run: the study's generator driven against simulated sites, in no time but their own or in virtual time.

It does with rounds what the coordinator does: the same schedule decides who is asked, for how much work and how long
is waited, dropouts follow the cohort's rule, and replies are added in cohort order. What it leaves out is what only
processes need: the wire, signatures, ledgers and a store. A protection's masks and ciphertexts are left out too: its
sums are those of ``plain`` (to the resolution of its fixed point), with its rules of disclosure and its cost in time.
"""

from __future__ import annotations

import heapq
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.contract.disclosure import check_groups
from atoll.contract.errors import AtollError, ProtocolError, TransportError
from atoll.contract.plan import Plan
from atoll.contract.program import build, handler_of
from atoll.contract.protection import REPLY, find
from atoll.contract.rounds import (
    Arrival,
    Checkpoint,
    Gather,
    Gathered,
    Metrics,
    Ready,
    Reduced,
    Round,
    Steps,
    Stream,
    Sum,
    Summed,
    Together,
)
from atoll.contract.schedule import EFFORT
from atoll.contract.wire import Array, Json
from atoll.privacy.dp.release import Noise
from atoll.runtime.noise import noise_of, not_negative
from atoll.runtime.results import Seen, summarise
from atoll.runtime.scheduler import Scheduler
from atoll.runtime.simulation import Answers
from atoll.runtime.sizes import Sizes
from atoll.runtime.study import UNDEFINED, study
from atoll.runtime.timeline import Done, Simulated
from atoll.runtime.virtual_time import Clock, Immediate, Sent
from atoll.runtime.work import Work

Event = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class _Flight:
    """A request of a Stream that is on its way. answer: what comes of it then (None: it is yet to be asked)."""

    asked: Round
    number: int
    site: str
    at: float
    answer: dict[str, Array] | AtollError | None = None


class Simulation:
    """One run being simulated."""

    def __init__(
        self, plan: Plan, sites: tuple[str, ...], answers: Answers, *, work: Work, clock: Clock | None = None,
        on_event: Event | None = None,
    ) -> None:  # fmt: skip
        """plan: with its protection written out. sites: the cohort, in order."""
        self.plan, self.sites, self.answers, self.work = plan, sites, answers, work
        self.clock: Clock = clock or Immediate()
        self._place = {site: place for place, site in enumerate(sites)}
        self._scheduler, self._sizes, self.seen = Scheduler(plan), Sizes(plan, sites), Seen()
        self._tell = on_event or (lambda _: None)
        self._absent: set[str] = set()
        self._flying: list[tuple[float, int, _Flight]] = []
        self._order, self._look_s = 0, math.inf
        self.noise: Noise | None = None
        self.done = Simulated(secrets.token_hex(16), len(sites))

    # ---------------------------------------------------------------- the generator

    def run(self, steps: Steps | None = None) -> Simulated:
        """Drive the study (or *steps* of one) to its end; raises the AtollError that ended it sooner."""
        if len(self.sites) < self.plan.cohort.min_sites:
            raise _too_few(len(self.sites), self.plan)
        self.noise = noise_of(self.plan, len(self.sites)) if self.answers.real else None
        self._open()
        steps, number = steps or study(self.plan, self.sites), 0
        value: Any = None
        try:
            while True:
                try:
                    item = steps.send(value)
                except StopIteration as stop:
                    self.done.outcome = dict(stop.value)
                    return self.done
                except (AtollError, *UNDEFINED):
                    if self.answers.real:
                        raise
                    return self.done  # what comes next depends on data
                value = None
                if isinstance(item, Metrics):
                    self.done.metrics += [{"step": item.step, "name": n, "value": v} for n, v in item.values.items()]
                    self._tell({"metrics": dict(item.values), "step": item.step, "seconds": self.clock.now})
                    value = self._used_up()
                elif isinstance(item, Together):
                    value, number = self._together(item.rounds, number), number + len(item.rounds)
                elif not isinstance(item, Checkpoint):
                    value, end = self._reduce(item, number)
                    self.clock.to(end)
                    number += 1
        finally:
            self.done.seconds = self.clock.now

    def _open(self) -> None:
        """Every site is announced the study, and begins when it is there."""
        load = self._sizes.opening
        sent = self.clock.ask(self.sites, load, np.zeros(len(self.sites)))
        self.done.count(np.arange(len(self.sites)), load.down_bytes, load.up_bytes, ~sent.lost)
        for place in np.flatnonzero(sent.lost):
            self._dropped(self.sites[place], _silent(self.plan), float(sent.at[place]))
        self.clock.to(float(sent.at.max(initial=0.0)))

    def _together(self, rounds: Sequence[Round], number: int) -> tuple[Reduced, ...]:
        found = [self._reduce(asked, place) for place, asked in enumerate(rounds, number)]
        self.clock.to(max((end for _, end in found), default=0.0))
        return tuple(value for value, _ in found)

    def _used_up(self) -> bool:
        """Did the rounds until now use up what the plan's schedule lets them?"""
        schedule = self.plan.schedule
        size = float(self.done.to_bytes.sum() + self.done.from_bytes.sum())
        late = self.clock.now >= (schedule.stop_after_s or math.inf)
        return late or size >= (schedule.stop_after_bytes or math.inf)

    # ---------------------------------------------------------------- one round

    def _reduce(self, asked: Round, number: int) -> tuple[Reduced, float]:
        """(the round's reduction, when it is there)."""
        began = self.clock.now
        asked, sites = self._scheduler.choose(asked, number, self._present(asked))
        efforts = np.array([asked.send_to.get(site, {}).get(EFFORT, 1.0) for site in sites])
        self._tell({"round": number, "name": f"{asked.program}/{asked.name}", "seconds": began})
        if not sites and isinstance(asked.reduce, Stream | Ready):
            arrival, end = self._next(asked, number)
            self.seen.note(asked, arrival)
            return arrival, end
        where = np.array([self._place[site] for site in sites], np.int64)
        load = self._sizes.load(asked, number)
        sent = self.clock.ask(sites, load, self.work.seconds(asked, where, efforts))
        self.done.count(where, load.down_bytes, load.up_bytes, ~sent.lost)
        self.done.computed_s[where] += sent.compute_s
        arrays = {name: np.asarray(value) for name, value in asked.send.items()}
        running = [site for site, gone in zip(sites, sent.lost.tolist(), strict=True) if not gone]
        value: Reduced
        if isinstance(asked.reduce, Sum | Gather):
            value, end = self._answered(asked, number, sites, running, sent, arrays)
        else:
            self._dispatch(asked, number, sites, running, sent, arrays)
            value, end = self._next(asked, number)
        self.seen.note(asked, value)
        return value, max(end, began)

    def _answered(
        self, asked: Round, number: int, sites: tuple[str, ...], running: Sequence[str], sent: Sent,
        arrays: Mapping[str, Array],
    ) -> tuple[Reduced, float]:  # fmt: skip
        """A round that waits for all that it asked, or as long as the plan's schedule says."""
        if not sites:
            raise _too_few(0, self.plan)
        began, end = self.clock.now, self._end(asked, sent)
        timely = sent.at <= end
        counted = {site for site, t, gone in zip(sites, timely, sent.lost, strict=True) if t and not gone}
        result: Reduced
        if isinstance(asked.reduce, Sum):
            totals, there = self.answers.total(asked, number, running, counted, arrays)
            result = Summed(self._released(asked, totals), there)
        else:
            replies = self.answers.answers(asked, number, running, arrays)
            broken = {site: error.code for site, error in self.answers.broken.items() if site in counted}
            result = Gathered({site: reply for site, reply in replies.items() if site in counted}, broken)
            if broken and len(result) < self.plan.cohort.min_sites:
                raise next(iter(self.answers.broken.values()))
        at = dict(zip(sites, sent.at.tolist(), strict=True))
        self.clock.to(end)
        for site, gone, t in zip(sites, sent.lost.tolist(), timely.tolist(), strict=True):
            if gone and t:
                self._dropped(site, _silent(self.plan), at[site])
        for site, error in self.answers.lost.items():
            self._dropped(site, error, at[site])
        self._note(asked, number, sites, sent, timely, result.sites, end - began)
        return result, end

    def _end(self, asked: Round, sent: Sent) -> float:
        """When a round is over: when the last has answered, or was given up; or when its time is up and enough have."""
        within = self._scheduler.within_s(asked, REPLY)
        last = float(sent.at.max(initial=self.clock.now))
        if within is None or not self.clock.virtual or not len(sent.at):
            return last
        least = min(self._scheduler.least(asked, len(self.sites)), len(sent.at))
        return min(last, max(self.clock.now + within, float(np.partition(sent.at, least - 1)[least - 1])))

    def _released(self, asked: Round, totals: dict[str, Array]) -> dict[str, Array]:
        """The sum as the coordinator has it."""
        if self.noise is not None:
            return not_negative(totals, asked.reply)
        if self.answers.real and not find(self.plan.protection.sum).reveals:
            groups = handler_of(build(asked.program, asked.params), asked.name).groups
            check_groups(totals, groups, self.plan.run.min_group_size)
        return totals

    def _next(self, asked: Round, number: int) -> tuple[Arrival, float]:
        """Take the next answer of all that are in flight; who is away is asked when it is back."""
        began = self.clock.now
        for site in self._asked(asked) if self._absent else ():
            if site in self._absent:
                self._fly(_Flight(asked, number, site, self.clock.back_s(site)))
        while self._flying and self._flying[0][0] < math.inf:
            at, _, flight = heapq.heappop(self._flying)
            self.clock.to(at)
            if isinstance(flight.answer, AtollError):
                self._dropped(flight.site, flight.answer.at(site=flight.site, round=flight.number), at)
                self._fly(_Flight(flight.asked, flight.number, flight.site, self.clock.back_s(flight.site)))
            elif flight.answer is None:  # it is back, and asked again
                self._again(flight)
            else:
                self.done.arrived(Done(number, asked.stage, f"{asked.program}/{asked.name}", began,
                                   self.clock.now - began, 1, 1, last=flight.site))  # fmt: skip
                return Arrival(flight.site, flight.number, flight.answer), self.clock.now
        if self._flying:
            raise TransportError("stream.nobody", "none of the sites that were asked is ever there again",
                                 remedy="bring the sites back and submit again")  # fmt: skip
        raise ProtocolError("stream.idle", "a Stream round waits, but no site is computing")

    def _dispatch(
        self, asked: Round, number: int, sites: Sequence[str], running: Sequence[str], sent: Sent,
        arrays: Mapping[str, Array],
    ) -> None:  # fmt: skip
        """Those that are asked compute; what they answer is on its way."""
        replies = self.answers.answers(asked, number, running, arrays) if running else {}
        failed = self.answers.lost if running else {}
        for site, at, gone in zip(sites, sent.at.tolist(), sent.lost.tolist(), strict=True):
            answer = _silent(self.plan) if gone else replies[site] if site in replies else failed[site]
            self._fly(_Flight(asked, number, site, at, answer))

    def _again(self, flight: _Flight) -> None:
        """A site that was given up is back: it is asked what it was asked before."""
        asked, site = flight.asked, flight.site
        self._absent.discard(site)
        where, efforts = np.array([self._place[site]]), np.ones(1)
        load = self._sizes.load(asked, flight.number)
        sent = self.clock.ask((site,), load, self.work.seconds(asked, where, efforts))
        self.done.count(where, load.down_bytes, load.up_bytes, ~sent.lost)
        arrays = {name: np.asarray(value) for name, value in asked.send.items()}
        self._dispatch(asked, flight.number, (site,), () if sent.lost[0] else (site,), sent, arrays)

    def _fly(self, flight: _Flight) -> None:
        self._order += 1
        heapq.heappush(self._flying, (flight.at, self._order, flight))

    def _note(
        self, asked: Round, number: int, sites: tuple[str, ...], sent: Sent, timely: NDArray[np.bool_],
        answered: Sequence[str], seconds: float,
    ) -> None:  # fmt: skip
        """What the schedule learns from a round, and what is told of it."""
        began, took = self.clock.now - seconds, sent.at - (self.clock.now - seconds)
        there = set(answered)
        for site, seconds_ in zip(sites, took.tolist(), strict=True) if self.clock.virtual else ():
            if site in there:
                self._scheduler.answered(number, site, REPLY, seconds_)
        self._scheduler.over(asked, number, sites)
        last, typical = "", 0.0
        if self.clock.virtual and len(sites):
            among = np.where(timely, sent.at, -math.inf)
            order = np.argsort(among, kind="stable")
            last, typical = sites[int(order[-1])], float(np.median(took))
            if len(sites) > 1 and timely.all():
                self.done.waited_s[self._place[last]] += among[order[-1]] - among[order[-2]]
        lost = int((sent.lost & timely).sum()) + len(self.answers.lost)
        self.done.log(Done(number, asked.stage, f"{asked.program}/{asked.name}", began, seconds, len(sites),
                       len(answered), int((~timely).sum()), lost, last, typical))  # fmt: skip

    # ---------------------------------------------------------------- the cohort

    def _present(self, asked: Round) -> tuple[str, ...]:
        """The sites to ask: those of the round, less those that dropped out and did not come back."""
        if self.clock.now >= self._look_s:
            self._absent = {site for site in self._absent if self.clock.back_s(site) > self.clock.now}
            self._look_s = min(map(self.clock.back_s, self._absent), default=math.inf)
        chosen = self._asked(asked)
        return tuple(site for site in chosen if site not in self._absent) if self._absent else chosen

    def _asked(self, asked: Round) -> tuple[str, ...]:
        return self.sites if asked.sites is None else asked.sites

    def _dropped(self, site: str, error: AtollError, at_s: float) -> None:
        """A site dropped out: end the run if its rule says so, else go on without it."""
        rule = self.plan.cohort
        self._tell({"dropout": site, "reason": str(error)})
        self.done.dropouts.append((at_s, site, error.code))
        if rule.on_dropout == "fail":
            raise error.at(site=site)
        self._absent.add(site)
        self._look_s = min(self._look_s, self.clock.back_s(site))
        if (left := len(self.sites) - len(self._absent)) < rule.min_sites:
            raise _too_few(left, self.plan)

    # ---------------------------------------------------------------- the result

    def result(self, transport: str = "simulated") -> tuple[dict[str, Json], dict[str, Array]]:
        """result.json and the model of a run that came to its end."""
        done, known = self.done, self.answers.rows() if self.plan.privacy is None else {}
        return summarise(
            done.run, self.plan, done.outcome or {}, sites={site: known.get(site) for site in self.sites},
            rounds=done.num_rounds, seconds=done.seconds, transport=transport, traffic=asdict(done.traffic),
            noise=self.noise, seen=self.seen,
        )  # fmt: skip


def _too_few(left: int, plan: Plan) -> TransportError:
    return TransportError(
        "cohort.too-few-left", f"{left} sites are left, and the plan demands {plan.cohort.min_sites}",
        field="cohort.min_sites", remedy="bring the sites back, or lower cohort.min_sites",
    )  # fmt: skip


def _silent(plan: Plan) -> TransportError:
    return TransportError(
        "transport.deadline", f"no answer and no progress for {plan.run.deadline_s:g} s",
        remedy="check that the site is up and connected, or raise run.deadline_s",
    )  # fmt: skip
