"""Incentive records: each site's share in what a run gained, as the coordinator signed it and told every site.

An entry of kind "contribution" in the coordinator's ledger has the body {"run", "study", "plan", "method", "rule",
"shares": {site: share}}; shares are in millionths, and sum to 1, or to 0 where nobody's value was positive. A site that
is told of it, when the run is closed, keeps the whole signed entry in an entry of its own, {"run", "share", "entry"},
so that neither side can say another share later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from atoll.contract.errors import IntegrityError
from atoll.contract.wire import Json
from atoll.ledger.entry import Entry, Verifier, verify_entry

CONTRIBUTION = "contribution"
RULE = "positive values, to sum 1"
"""How shares follow from values (see ``aggregation.contribution.shares``)."""


def record(run: str, study: str, plan: str, found: Json) -> Entry | None:
    """The entry's body; None where there is nothing to record. found: what a program's result says of it, {"method",
    "sites": {site: {"share"}}}."""
    match found:
        case {"method": str(), "sites": dict(sites)} if all("share" in one for one in sites.values()):
            told = {site: round(float(one["share"]), 6) for site, one in sites.items()}
        case _:
            return None
    return {"run": run, "study": study, "plan": plan, "method": found["method"], "rule": RULE, "shares": told}


def share_of(entry: Json, run: str, site: str, coordinator_public: bytes, verify: Verifier) -> float:
    """*site*'s share by the coordinator's signed *entry* about *run*; raises IntegrityError when it is not one."""
    match entry:
        case {"kind": "contribution", "party": "coordinator", "body": {"run": str(about), "shares": dict(told)}}:
            verify_entry(entry, coordinator_public, verify)
            mine = told.get(site)
            right = all(isinstance(share, int | float) and 0 <= share <= 1 for share in told.values())
            if about == run and right and sum(told.values()) < 1 + 1e-6 and isinstance(mine, int | float):
                return float(mine)
    raise IntegrityError(
        "contribution.malformed", "what the coordinator says of contributions is no signed record of this run",
        field="contribution", remedy="compare both parties' ledgers",
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Credit:
    """One run's shares, by site."""

    run: str
    study: str
    method: str
    shares: Mapping[str, float]


def credited(entries: Sequence[Entry]) -> list[Credit]:
    """All of a ledger's, each run once; of a site's ledger, as the coordinator signed them: whether it did, only both
    ledgers together show. Raises IntegrityError for two records of one run."""
    found: dict[str, Credit] = {}
    for entry in entries:
        if entry["kind"] == CONTRIBUTION:
            body = entry["body"]["entry"]["body"] if "entry" in entry["body"] else entry["body"]
            credit = Credit(body["run"], body["study"], body["method"], body["shares"])
            if found.setdefault(credit.run, credit) != credit:
                raise IntegrityError(
                    "contribution.twice", "a ledger has two records of one run's contributions", field=credit.run,
                    remedy="compare it with the other parties' ledgers",
                )  # fmt: skip
    return list(found.values())


def sums(found: Sequence[Credit]) -> dict[str, tuple[int, float]]:
    """(runs, sum of shares) by site, the largest sum first."""
    totals: dict[str, tuple[int, float]] = {}
    for credit in found:
        for site, share in credit.shares.items():
            runs, total = totals.get(site, (0, 0.0))
            totals[site] = runs + 1, round(total + share, 6)
    return dict(sorted(totals.items(), key=lambda item: (-item[1][1], item[0])))
