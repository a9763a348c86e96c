"""A run's sites, as its coordinator knows them: who opened it, who is there, and who dropped out."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from atoll.contract.errors import AtollError, PlanError, ProtocolError, TransportError, refuse_all
from atoll.contract.plan import Plan
from atoll.contract.rounds import Round
from atoll.runtime.courier import session_of
from atoll.runtime.scheduler import is_dropout
from atoll.runtime.store import RunStore
from atoll.transport.base import Transport
from atoll.transport.spool import Incoming


class Attendance:
    """sessions, rows, members, quality: what sites told when they opened the run: their signed session keys, how many
    rows they have and how good these are (where they share it), and how many sites stand behind each name."""

    def __init__(
        self, run: str, plan: Plan, sites: tuple[str, ...], transport: Transport, store: RunStore,
        tell: Callable[..., None],
    ) -> None:  # fmt: skip
        self._run, self._plan, self._sites = run, plan, sites
        self._transport, self._store, self._tell = transport, store, tell
        self.opened: set[str] = set()
        self.sessions: dict[str, bytes] = {}
        self.rows: dict[str, int] = {}
        self.members: dict[str, int] = {}
        self.quality: dict[str, float] = {}
        self._absent: dict[str, int] = {}
        self._dropouts: dict[str, str] = {}

    def opening(self, answers: Mapping[str, Incoming | AtollError]) -> None:
        """Take in what sites answered to the announcement; raises what ends the run."""
        refusals = []
        for site, answer in answers.items():
            if isinstance(answer, AtollError) and is_dropout(answer):
                self.dropped(site, answer)
            elif isinstance(answer, AtollError):
                refusals.append(answer)
            else:
                members = answer.meta.get("members", 1)
                if type(members) is not int or not 0 < members <= self._plan.cohort.members:
                    refusals.append(too_many().at(site=site))
                    continue
                self.members[site] = members
                self.opened.add(site)
                self.sessions[site] = session_of(answer.meta)
                if isinstance(rows := answer.meta.get("rows"), int):
                    self.rows[site] = rows
                if isinstance(quality := answer.meta.get("quality"), int | float) and 0 < quality <= 1:
                    self.quality[site] = quality
        refuse_all(type(refusals[0]) if refusals else ProtocolError, "cohort.refused", refusals)

    def waiting(self, sites: list[str]) -> None:
        """Tell who must still ask their operator."""
        self._tell(waiting=sites)
        self._store.set_status(self._run, "running", f"awaiting approval: {', '.join(sites)}")

    def present(self, asked: Round | None = None) -> tuple[str, ...]:
        """The sites to ask: those of the round, less those that dropped out and did not come back."""
        reachable = self._transport.sites()
        self._absent = {s: since for s, since in self._absent.items() if reachable.get(s, since) == since}
        asked_sites = self._sites if asked is None or asked.sites is None else asked.sites
        return tuple(site for site in asked_sites if site in self.opened and site not in self._absent)

    def note(self) -> str:
        """Who dropped out, and why: what the operator reads while the run goes on, and after it."""
        return "\n".join(f"{site} dropped out: {why}" for site, why in self._dropouts.items())

    def dropped(self, site: str, error: AtollError) -> None:
        """A site dropped out: end the run if its rule says so, else go on without it."""
        rule = self._plan.cohort
        self._tell(dropout=site, reason=str(error))
        if rule.on_dropout == "fail":
            raise error
        self._dropouts[site] = str(error)
        self._store.set_status(self._run, "running", self.note())
        self._absent[site] = self._transport.sites().get(site, -1)
        left = len(self._sites) - len(self._absent)
        if left < rule.min_sites:
            raise self.too_few(left, error) from error

    def too_few(self, left: int, error: AtollError | None = None) -> TransportError:
        """The one error for fewer sites than the plan demands, the last of which was lost by *error*."""
        why, remedy = ("", "") if error is None else (f": {error.code}", error.remedy)
        return TransportError(
            "cohort.too-few-left", f"{left} sites are left, and the plan demands {self._plan.cohort.min_sites}{why}",
            field="cohort.min_sites", remedy=remedy or "bring the sites back", where=error.where if error else None,
        )  # fmt: skip


def too_many() -> PlanError:
    """The one error for a region with more sites than the plan says."""
    return PlanError(
        "cohort.members", "more sites stand behind a name than the plan says", field="cohort.members",
        remedy="set it to the most sites of any region of the cohort",
    )  # fmt: skip
