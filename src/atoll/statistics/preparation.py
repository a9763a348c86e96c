"""Preparation: how many rows the recipe kept, and how many it left out for each reason.

Parties: sites and coordinator. Messages: one round, one Sum. The coordinator learns, of the
cohort's total: rows kept, and rows left out by reason; small numbers are withheld; and how many sites
achieved which k-anonymity and l-diversity, where the recipe makes for them. Threat model:
as the plan's protection. Dropout: the numbers of the survivors. Cost: one round, 9 bytes a
reason and site.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from atoll.contract.disclosure import Cells
from atoll.contract.program import Cohort, ProgramParams, SiteView, handler, program
from atoll.contract.rounds import Reply, Round, Steps, Sum, Task, count, withheld
from atoll.contract.schema import TableSchema
from atoll.contract.sensitivity import Norms, touches
from atoll.contract.wire import Array
from atoll.statistics.noise import NOTHING, smallest

MOST = 50
"""A larger k or l is told as this."""
LEFT_OUT = Cells("dropped", "withheld")


@program("statistics.preparation", needs={"sum"}, offers={"bounded", "resolution", "bounded-weight"})
class Preparation:
    """Rows kept and rows left out by the recipe's steps, by reason, by one Sum."""

    class Params(ProgramParams):
        """reasons: as the recipe's steps name them. anonymity: also ask for the k and l that were achieved."""

        reasons: tuple[str, ...]
        anonymity: bool = False

    def __init__(self, params: Params) -> None:
        self.params = params

    def coordinate(self, cohort: Cohort, start: Mapping[str, Array] | None = None) -> Steps:
        """Returns {"rows": kept, "dropped": {reason: rows, or None where too few to be told}, "achieved": {"k", "l"}}:
        the smallest of any site's (MOST means so many or more; None where not asked for), or {}."""
        size, most = len(self.params.reasons), 2**40
        fields = {"rows": count(bound=cohort.schema.max_rows), "dropped": count(size, bound=most)}
        if self.params.anonymity:
            fields |= {"k": count(MOST + 1, bound=1), "l": count(MOST + 1, bound=1)}
        total = yield Round("left out", Sum(), {**fields, "withheld": withheld(size)})
        hidden = LEFT_OUT.hidden(total, smallest(cohort))
        dropped = {r: None if hidden[i] else int(total["dropped"][i]) for i, r in enumerate(self.params.reasons)}
        achieved = {}
        for name in ("k", "l") if self.params.anonymity else ():
            sites = np.flatnonzero(total[name])
            achieved[name] = int(sites[0]) if len(sites) else None
        return {"rows": int(total["rows"]), "dropped": dropped, "achieved": achieved}

    def _per_record(self, schema: TableSchema, sent: Mapping[str, Array]) -> dict[str, Norms]:
        """A record is kept, or left out for one reason; but one may decide about others where tables are made
        anonymous: nothing is then declared."""
        if self.params.anonymity:
            return {}
        return {"rows": touches(), "dropped": touches(), "withheld": NOTHING}

    @handler("left out", groups=("rows",), cells=LEFT_OUT, record=_per_record)
    def left_out(self, site: SiteView, task: Task) -> Reply:
        """At the site: rows kept, and rows left out for each reason."""
        dropped = [site.table.dropped.get(reason, 0) for reason in self.params.reasons]
        told: dict[str, Any] = {"rows": len(site.table) + len(site.holdout), "dropped": np.array(dropped, np.int64)}
        for name in ("k", "l") if self.params.anonymity else ():
            told[name] = np.zeros(MOST + 1, np.int64)
            if name in site.table.achieved:
                told[name][min(site.table.achieved[name], MOST)] = 1
        return told
