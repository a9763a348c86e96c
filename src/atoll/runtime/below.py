"""What a region asks of its own sites: a coordinator's rounds, asked from above instead of by a study."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from atoll.contract.errors import AtollError, ProtocolError
from atoll.contract.rounds import Reduced, Round
from atoll.runtime.coordinator import Coordinator, Driver
from atoll.runtime.noise import noise_of


@dataclass(frozen=True, slots=True)
class Standing:
    """An open run's cohort: rows, if all sites told theirs, and how many sites stand behind its names."""

    rows: int | None
    members: int


class Below:
    """A coordinator whose runs are driven from above."""

    def __init__(self, coordinator: Coordinator) -> None:
        self.coordinator = coordinator
        self._asked: dict[str, Driver] = {}

    async def opened(self, run: str) -> Standing:
        """Open a stored run, or open it again, for rounds that a region is asked from above. Raises AtollError."""
        record = self.coordinator.store.run(run)
        driver = Driver(self.coordinator, run, record["plan"], record["sites"])
        driver.noise = await asyncio.to_thread(noise_of, driver.plan, len(driver.sites))
        await driver.open()
        self._asked[run] = driver
        told = [driver.cohort.rows.get(site) for site in driver.cohort.opened]
        rows = None if None in told else sum(filter(None, told))
        return Standing(rows, sum(driver.cohort.members.values()))

    async def asked(self, run: str, asked: Round, number: int, question: str) -> Reduced:
        """One round of a run that is open, or its stored reduction. question: the digest of what is asked.

        Raises ProtocolError when the round was asked before, in other words, TransportError when too few sites are
        left, and whatever ends the round.
        """
        driver, stored = self._asked[run], self.coordinator.store.reduced(run, number)
        if stored is None and (left := len(driver.cohort.present(asked))) < driver.plan.cohort.min_sites:
            raise driver.cohort.too_few(left)
        if stored is not None and stored.meta["question"] != question:
            raise ProtocolError("task.changed", "the round was asked before, in other words")
        driver.questions[number] = question
        return await driver.answered(asked, number)

    async def ended(self, run: str, status: str, error: AtollError | None) -> None:
        """Such a run has ended above: tell its sites, unless they were told."""
        if (record := self.coordinator.store.run(run))["status"] == "running":
            driver = self._asked.pop(run, None) or Driver(self.coordinator, run, record["plan"], record["sites"])
            await driver.end(status, driver.cohort.note() if error is None else str(error), error)
            self.coordinator.transport.traffic.pop(run, None)
