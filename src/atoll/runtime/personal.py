"""The model that a site has for itself when a personalised run has ended: out of its journal, for its own engineers."""

from __future__ import annotations

from typing import Any

from atoll.contract.errors import PlanError
from atoll.contract.plan import Plan
from atoll.contract.program import build
from atoll.contract.wire import Array
from atoll.data.recipe import Prepared
from atoll.models.linear import named
from atoll.models.model import restored
from atoll.runtime.journal import Journal
from atoll.runtime.results import Seen, described, told_privacy


def personal_model(journal: Journal, prefix: str) -> tuple[Plan, dict[str, Any], dict[str, Array]]:
    """(plan, what result.json would say of it, model arrays) of the one run that begins with *prefix*.

    Raises PlanError where there is no such run, or the site has no model of its own in it.
    """
    runs = {run: opened for run, _, opened, _ in journal.runs() if run.startswith(prefix)}
    if len(runs) != 1:
        raise PlanError(
            "run.unknown", f"{len(runs)} runs begin with {prefix!r}", field="run", remedy="atoll site status"
        )
    [(run, opened)] = runs.items()
    plan, own = Plan.from_json(opened["plan"]), journal.personal(run)
    program: Any = build(plan.program, plan.params)
    if "weights" not in own.arrays:
        raise PlanError(
            "site.no-personal-model", "the site has no model of its own in this run", field="run",
            remedy="a personalised program (horizontal.fedper, say) leaves one at each site when its run has finished",
        )  # fmt: skip
    schema = Prepared(plan.recipe).schema(plan.table)
    model, sites = restored(own.arrays, schema, program.model(schema)), dict.fromkeys(opened["roster"])
    result = {
        "study": plan.name,
        "program": plan.program,
        "plan_hash": opened["hash"],
        "run": run,
        "rounds": own.meta["round"] + 1,
        "sites": {site: {"rows": None} for site in sites},
        "model": {**described(model), "site": journal.chain.party, **named(model)},
        "fitted": own.meta["fitted"],
        "metrics": {"federated": {}, "per_site": {}},
        "privacy": told_privacy(plan, sites, seen=Seen(plan.cohort.min_sites)),
    }
    return plan, result, model.arrays()
