"""A region: a site towards the level above, and the coordinator of its own sites; so sums of sums, to any depth.

Asked for a Sum, a region asks the same round (program, handler, parameters, fields, arrays, number) of its own sites
under its own protection, and replies with their sum, by its own gate and under the protection of the level above. As
addition is associative, the result is that of one cohort of all the sites, up to the order of additions.

Parties: the coordinator above, regions, their own sites, which may be regions again. Messages: at each level those of
its protection. What each learns: a site's coordinator what that level's protection shows it, mostly the region's sum;
the level above, and the other regions, what its own protection shows of the regions' sums, and how many sites stand
behind each. Under the plan's ``privacy`` a site's share of the noise is of the fewest sites that its own region may
have left, so every region's sum holds all of it, whatever others are or say, and a region adds none. (That is more than
one cohort of all would have: of regions that hold the noise r₁, r₂, … times, √Σr.) A site with regions beside it adds
all of it itself. Threat model: at each level that of its protection, and a region's operator is to its sites what any
coordinator is. Dropout: of a site, by the region's rule; a region that has too few sites left drops out above.
Cost: at each level that of its protection; one level waits for the one below it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import hashlib
from collections.abc import Coroutine, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, field_validator

from atoll.contract.disclosure import Cells, Rule, judged
from atoll.contract.errors import AtollError, PlanError, PolicyError, ProtocolError, TransportError
from atoll.contract.plan import CohortRule, Plan
from atoll.contract.protection import Choice
from atoll.contract.rounds import Round, Sum, Summed, alike
from atoll.contract.schedule import EFFORT, Schedule
from atoll.contract.settings import read_yaml, validate
from atoll.contract.wire import Array, Json, Message
from atoll.crypto.identity import Identity
from atoll.data.recipe import Prepared
from atoll.data.site_data import SiteData
from atoll.data.sketch import CELLS, Sketch
from atoll.runtime.below import Below, Standing
from atoll.runtime.cohort import too_many
from atoll.runtime.coordinator import Coordinator
from atoll.runtime.egress import Request
from atoll.runtime.home import CoordinatorHome, SiteHome
from atoll.runtime.job import Done, Job
from atoll.runtime.journal import OPEN, Journal, Receipt, not_running
from atoll.runtime.memory import question_digest
from atoll.runtime.policy import Policy
from atoll.runtime.site import Site
from atoll.runtime.study import check_plan
from atoll.transport.base import Progress

BEAT_S = 0.5
"""How often the level above is told that work goes on below; that ends by deadlines of its own."""
LOST = ("policy.too-few-survivors",)
"""What ends a round below, beside what the transport tells, when too few sites are left."""


class Level(BaseModel):
    """How a region asks its own sites. protection: of their sums. cohort: who takes part (default: all that are
    enrolled), how few may be left, and how many sites stand behind one of these, where some are regions themselves."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    protection: Choice = Choice(sum="secagg")
    cohort: CohortRule = CohortRule()

    @field_validator("protection", mode="before")
    @classmethod
    def _named(cls, value: Json) -> Json:
        return {"sum": value} if isinstance(value, str) else value

    def told(self) -> Json:
        """The protection as it is written: a name alone, where its options are the defaults."""
        same = self.protection == Choice(sum=self.protection.sum)
        return self.protection.sum if same else self.protection.model_dump(mode="json", exclude_defaults=True)

    def plan(self, above: Plan, sites: Iterable[str]) -> Plan:
        """What a region asks of *sites*, when it is asked for *above*: sites approve it as any plan.

        Raises PlanError for what cannot be answered with sums of sums.
        """
        cohort = self.cohort.model_copy(update={"sites": tuple(sites), "above": above.hash})
        schedule = Schedule(effort_min=above.schedule.effort_min)  # who is asked, and for how long, is chosen above
        plan = above.model_copy(update={"protection": self.protection, "cohort": cohort, "schedule": schedule})
        check_plan(plan)
        return plan


class RegionConfig(Level):
    """region.yaml. site, coordinator: the folders of the region's two sides, made by ``atoll site init`` and ``atoll
    coordinator init``; relative to this file."""

    site: str
    coordinator: str


class RegionHome:
    """A region's folder: region.yaml."""

    def __init__(self, folder: Path) -> None:
        """Raises PlanError where it is not set up."""
        if not (folder / "region.yaml").is_file():
            raise PlanError(
                "home.missing", f"{folder} is not set up", field="home", remedy="run `atoll region init` first"
            )
        self.folder = folder
        self.level: RegionConfig = validate(RegionConfig, read_yaml(folder / "region.yaml", "config"), "config")
        self.site = SiteHome(folder / self.level.site)
        self.coordinator = CoordinatorHome(folder / self.level.coordinator)

    @staticmethod
    def create(folder: Path, config: RegionConfig) -> RegionHome:
        """Write region.yaml; raises PlanError where there is one, or the two sides are not set up."""
        if (folder / "region.yaml").exists():
            raise PlanError("home.exists", f"{folder} is set up already", field="home", remedy="choose another folder")
        SiteHome(folder / config.site)
        CoordinatorHome(folder / config.coordinator)
        folder.mkdir(parents=True, exist_ok=True)
        shown = {**config.model_dump(mode="json", exclude={"cohort": {"above"}}), "protection": config.told()}
        (folder / "region.yaml").write_text(yaml.safe_dump(shown, sort_keys=False))
        return RegionHome(folder)


class Region(Site):
    """A site whose replies are the sums of its own sites."""

    def __init__(
        self, identity: Identity, journal: Journal, policy: Policy, coordinator_public: bytes, level: Level,
        below: Coordinator, loop: asyncio.AbstractEventLoop,
    ) -> None:  # fmt: skip
        """coordinator_public: of the level above. below: the coordinator of the region's own sites, in *loop*."""
        super().__init__(identity, journal, policy, _no_table, coordinator_public)
        self._level, self._below, self._loop = level, Below(below), loop
        self._standing: dict[str, Standing] = {}
        self._lost: Mapping[str, int] | None = None
        self._work_below: set[concurrent.futures.Future[Any]] = set()

    def tidy(self) -> None:
        """End below what ended above while this process was away."""
        for row in self._below.coordinator.store.runs("running"):
            if (status := self._journal.status(row["run"])) not in (*OPEN, "unknown"):
                self._end(row["run"], "cancelled" if status == "denied" else status, None)

    def stop(self) -> None:
        """Wait for nothing below any more: this process ends."""
        for future in list(self._work_below):
            future.cancel()

    def back(self) -> bool:
        """Whether sites came back since the level above was told that too few are left: it asks a region again that
        connects anew."""
        if self._lost is None or all(
            self._lost.get(s, -1) >= n for s, n in self._below.coordinator.transport.sites().items()
        ):
            return False
        self._lost = None
        return True

    # ---------------------------------------------------------------- open

    def _members(self, run: str, progress: Progress) -> int:
        with self._lock(run):
            return self._joined(run, progress).members

    def _rows(self, run: str) -> int | None:
        return self._standing[run].rows

    def _quality(self, run: str) -> str:
        return ""

    def _joined(self, run: str, progress: Progress) -> Standing:
        """Make sure that the run is open below, as after a restart of this process. Raises AtollError."""
        if run not in self._standing:
            above = self._opened(run).plan
            store = self._below.coordinator.store
            try:
                if store.run(run)["plan"].cohort.above != above.hash:
                    raise ProtocolError("run.changed", "the run was asked before for another plan")
            except PlanError:
                plan = self._level.plan(above, self._level.cohort.sites or store.roster())
                store.create_run(plan, plan.cohort.sites, run, "running")
            standing = self._wait(run, self._below.opened(run), progress)
            if standing.members > above.cohort.members:
                raise too_many()
            self._standing[run] = standing
        return self._standing[run]

    # ---------------------------------------------------------------- tasks

    def _work(self, job: Job, asked: Request, progress: Progress) -> Done:
        """Have the region's own sites answer."""
        task, meta, plan = asked.task, job.message.meta, job.opened.plan
        schema = Prepared(plan.recipe).seen(plan.table, meta["view"])
        if asked.handler.reduce != "sum":
            raise PolicyError(
                "policy.withheld", "a region answers only with sums of its own sites", field=asked.name,
                remedy="choose a program that needs only sums, or ask the sites themselves",
            )  # fmt: skip
        self._joined(task.run, progress)
        same = {name: value for name, value in alike(job.told).items() if name != EFFORT}
        other = {name: value for name, value in job.told.items() if name not in same}  # what was for this region alone
        sites = self._below.coordinator.store.run(task.run)["sites"]
        below = Round(
            asked.name, Sum(), asked.fields, same, dict.fromkeys(sites, other) if other else {},
            program=job.program.name, params=meta["params"], view=meta["view"], schema=schema,
        )  # fmt: skip
        question = question_digest(meta, same)
        total = self._wait(task.run, self._below.asked(task.run, below, task.round, question), progress)
        shown = job.protection.reveals and job.opened.noise is None
        reply = told_of(total, asked.handler.cells, self._policy.min_group_size if shown else 1)
        job.party.query = job.opened.remembered(job.message, _who(total), job.protection, question)
        cost = job.opened.cost(task, job.program, asked.name, schema, asked.fields, job.sent, job.question)
        room = asked.room
        if cost.noised is not None:  # the sum holds all of the noise, by its sites
            room, none = cost.noised.fields, dict.fromkeys(cost.noised.scales, 0.0)
            cost = replace(cost, noised=replace(cost.noised, scales=none))
        handler = replace(asked.handler, cells=())  # they are judged
        known = replace(asked, handler=handler, fields=room or asked.fields, members=total.members)
        return Done(known, reply, cost)

    def _wait(self, run: str, work: Coroutine[Any, Any, Any], progress: Progress) -> Any:
        """The result of *work* below, in whose loop it runs; the level above hears meanwhile that it goes on.

        Raises TransportError where too few sites are left, and whatever else ends the work.
        """
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        self._work_below.add(future)
        try:
            while not concurrent.futures.wait([future], BEAT_S).done:
                if (status := self._journal.status(run)) not in OPEN:
                    raise not_running(status)
                asks = self._below.coordinator.store.run(run)["note"].startswith("awaiting")
                progress({"waiting": "approval at the region's own sites"} if asks else {"done": 0, "total": 1})
            return future.result()
        except concurrent.futures.CancelledError:
            raise _left("this region's process ends") from None
        except AtollError as error:
            if isinstance(error, TransportError) or error.code in LOST:
                self._lost = dict(self._below.coordinator.transport.sites())
                raise _left(f"too few of this region's own sites are left: {error}") from error
            raise
        finally:
            future.cancel()
            self._work_below.discard(future)

    def _verified(self, receipts: list[Json]) -> list[Receipt]:
        """And forget the reductions that the level above has."""
        found = super()._verified(receipts)
        for seq, _ in found:
            body = self._journal.entry(seq)["body"]
            self._below.coordinator.store.forget(str(body["run"]), int(body["round"]))
        return found

    # ---------------------------------------------------------------- close

    def _close(self, message: Message, progress: Progress) -> Message:
        answer, meta = super()._close(message, progress), message.meta
        told = AtollError.from_public(meta["error"]) if meta.get("error") else None
        self._end(str(meta["run"]), str(meta["status"]), told)
        return answer

    def _end(self, run: str, status: str, error: AtollError | None) -> None:
        """Tell the region's own sites; nobody above waits for it."""
        self._standing.pop(run, None)
        asyncio.run_coroutine_threadsafe(self._told(run, status, error), self._loop)

    async def _told(self, run: str, status: str, error: AtollError | None) -> None:
        try:
            await self._below.ended(run, status, error)
        except AtollError as failure:  # it was never opened below
            self._below.coordinator.on_event({"run": run, "not_told": "", "reason": str(failure)})


def told_of(total: Summed, tables: Iterable[Cells], min_group_size: int) -> dict[str, Array]:
    """A region's sums as they may be shown: cells of fewer than *min_group_size* people are withheld, and so stays
    whatever one of its sites withheld. Who dominates a cell is judged where its people are known: at the sites."""
    tables = [replace(table, largest="") for table in tables]
    reply = judged(total, tables, Rule(min_group_size)) if tables else dict(total)
    for table in tables:
        reply[table.withheld] = np.maximum(reply[table.withheld], np.minimum(total[table.withheld], 1))
    return reply


def _who(total: Summed) -> Sketch:
    """Which of its sites a region's sum is of, in place of which rows, [2, CELLS]: each site is as one row, so that the
    same question to a few sites more or fewer is a near repeat."""
    cells = np.zeros((2, CELLS), np.uint64)
    for site in total.sites:
        place, value = np.frombuffer(hashlib.sha256(site.encode()).digest(), "<u8")[:2]
        cells[:, int(place) % CELLS] += value
    return cells


def _left(why: str) -> TransportError:
    return TransportError(
        "region.lost", why, field="region", remedy="the region's operator sees which sites: atoll region status"
    )


def _no_table(_: Plan) -> SiteData:
    raise PlanError("region.no-table", "a region has no table of its own", field="dataset")
