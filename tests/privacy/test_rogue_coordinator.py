"""A coordinator that asks other things than the plan leads to, to get at exact values under differential privacy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from atoll.contract.errors import PlanError
from atoll.contract.plan import Plan
from atoll.contract.program import REGISTRY, build
from atoll.contract.protection import parted
from atoll.contract.rounds import Field, Round, Task, TaskId
from atoll.contract.schema import Column, TableSchema
from atoll.contract.wire import Message
from atoll.data.table import Table
from atoll.models.linear import LinearModel
from atoll.models.model import Examples
from atoll.runtime.budget import Budget
from atoll.runtime.memory import question_digest
from atoll.runtime.noise import dry, noise_of

COLUMNS: dict[str, dict[str, Any]] = {"x": {"range": [0, 10], "missing": "allow"}, "y": {"range": [0, 10]}}
PRIVACY = {"unit": "record", "epsilon": 1.0, "delta": 1e-6}
LEARN = {
    "family": "linear", "target": "y", "features": ["x"], "expected_rows": 500, "rounds": 4, "sampling_rate": 0.5,
}  # fmt: skip


class Rogue:
    """Asks one site by hand, whatever it likes."""

    def __init__(self, federation: Any, plan: Plan, tables: Mapping[str, Table]) -> None:
        federation.build(tables)
        self.site, self.journal = federation.sites["s0"], federation.journals["s0"]
        self.run = "ab" * 16
        roster = {name: site._identity.public.hex() for name, site in federation.sites.items()}
        meta = {"id": "o", "run": self.run, "plan": plan.to_json(), "roster": roster}
        opened = self.site.handle(Message("open", meta), lambda _: None)
        assert opened.kind == "opened", opened.meta
        self.planned = dry(plan)[0]

    def ask(self, asked: Round, number: int, fields: Mapping[str, Field] | None = None, **arrays: Any) -> Message:
        given = arrays or dict(asked.send)
        meta = {
            "id": "t", "run": self.run, "round": number, "attempt": 0, "step": "reply", "site": "s0",
            "name": asked.name, "program": asked.program, "version": REGISTRY[asked.program].version,
            "params": asked.params, "fields": {n: f.to_json() for n, f in (fields or asked.reply).items()},
            "reduce": asked.reduce.tag, "view": asked.view, "question": "", "receipts": [],
        }  # fmt: skip
        message = Message("task", meta, {name: np.asarray(value) for name, value in given.items()})
        return self.site.handle(message, lambda _: None)


def tables_of(federation: Any, missing: bool = False) -> dict[str, Table]:
    random = np.random.default_rng(0)
    x: list[Any] = list(random.uniform(0, 10, 500))
    if missing:
        x[3] = None
    return {"s0": federation.table({"x": x, "y": list(random.uniform(0, 10, 500))}, COLUMNS)}


def rogue_of(federation: Any, program: str, params: dict[str, Any], **more: Any) -> Rogue:
    tables = tables_of(federation, more.pop("missing", False))
    plan = federation.plan(program, params, tables, privacy=more.pop("privacy", PRIVACY), **more)
    return Rogue(federation, plan, tables)


@pytest.mark.parametrize("unit", ["record", "site"])
@pytest.mark.parametrize(
    "changed", [{"step": 1e5}, {"dtype": "<u8", "bound": 0}, {"dtype": "|i1"}, {"shape": (3,)}, {"dtype": "<f2"}]
)
def test_other_fields_than_the_plans_are_refused(federation: Any, unit: str, changed: dict[str, Any]) -> None:
    rogue = rogue_of(
        federation, "statistics.describe", {"columns": ["x", "y"], "bins": 8}, privacy={**PRIVACY, "unit": unit}
    )
    [asked] = rogue.planned
    fields = {**asked.reply, "count": replace(asked.reply["count"], **changed)}
    told = rogue.ask(asked, 0, fields)
    assert told.kind == "failure" and told.meta["code"] in ("dp.other-question", "dp.no-step")
    assert rogue.ask(asked, 0).kind == ("release" if told.meta["code"] == "dp.other-question" else "failure")


def test_rounds_are_the_plans_own_and_not_negative(federation: Any) -> None:
    rogue = rogue_of(federation, "horizontal.dpsgd", LEARN, run={"holdout": 0.4})
    step, evaluation = rogue.planned[0], rogue.planned[-1]
    assert rogue.ask(step, 0).kind == "release"
    for number in (-1, -5, 5, 1000):
        assert rogue.ask(step, number).kind == "failure"
    assert rogue.ask(evaluation, 1).meta["code"] == "dp.other-question"
    assert rogue.ask(step, len(rogue.planned) - 1).meta["code"] == "dp.other-question"


def test_a_limit_of_errors_that_the_plan_does_not_lead_to(federation: Any) -> None:
    rogue = rogue_of(federation, "horizontal.dpsgd", LEARN, run={"holdout": 0.4})
    evaluation = rogue.planned[-1]
    told = rogue.ask(evaluation, len(rogue.planned) - 1, None, weights=np.zeros(2), far=np.array(-1.0))
    assert told.kind == "failure" and told.meta["code"] == "task.array"


def test_a_failure_on_the_data_ends_the_run_and_costs_all_of_it(federation: Any) -> None:
    """Whether a question fails may tell of a record: so it can be asked once, at the full price."""
    rogue = rogue_of(federation, "horizontal.dpsgd", LEARN)
    assert rogue.ask(rogue.planned[0], 0).kind == "release"
    before = rogue.journal.spent("default", Budget()).epsilon
    sent = {**rogue.planned[0].send, "weights": np.array([np.nan, 0.0])}
    assert rogue.ask(rogue.planned[1], 1, None, **sent).kind == "failure"
    assert rogue.journal.spent("default", Budget()).epsilon == before == 1.0
    assert rogue.ask(rogue.planned[2], 2).meta["code"] == "run.not-open"
    rogue.journal.end_run(rogue.run, "failed", None, "")
    assert rogue.journal.spent("default", Budget()).epsilon == 1.0  # nothing comes back


def test_whether_an_answer_fails_is_told_of_one_question_a_round(federation: Any) -> None:
    """An answer that cannot be masked costs nothing, and tells that the handler did not fail: a threshold of failure,
    looked for with other weights each time, would be an exact function of the rows."""
    tables = {f"s{i}": tables_of(federation)["s0"] for i in range(3)}
    told: list[str] = []

    def wrap(name: str, endpoint: Any) -> Any:
        def handle(message: Message, progress: Any) -> Message:
            if name == "s1" and message.kind == "task" and message.meta["step"] == "reply" and not told:
                [masks] = [key for key in message.arrays if key.endswith("adverts of")]
                alone = {**message.arrays, masks: np.zeros_like(message.arrays[masks])}
                for weights in (alone["weights"], *(alone["weights"] + 10.0**power for power in (1, 100, np.inf))):
                    arrays = {**alone, "weights": weights}
                    meta = dict(message.meta)
                    meta["question"] = question_digest(meta, parted(arrays)[0])
                    told.append(endpoint(Message("task", meta, arrays), progress).meta["code"])
            return endpoint(message, progress)

        return handle

    plan = federation.plan(
        "horizontal.dpsgd", LEARN, tables, protection="secagg", privacy=PRIVACY, cohort={"min_sites": 3}
    )
    federation.run(plan, tables, wrap=wrap)
    assert told == ["secagg.too-few", *["budget.question"] * 3]
    promised = [journal.spent("default", Budget()).epsilon for journal in federation.journals.values()]
    assert len(set(promised)) == 1 and 0 < promised[0] <= 1.0, "the round itself went on, at its price"


def test_a_row_that_overflows_counts_as_nothing() -> None:
    """Else a coordinator could choose weights by which one row, if it is there, makes the sum infinite."""
    schema = TableSchema(name="t", columns={name: Column(**column) for name, column in COLUMNS.items()})
    model = LinearModel.zero("linear", schema, ("x",), "y")
    most = np.finfo(float).max
    design = np.array([[1.0, 0.1], [1.0, 0.9], [1.0, 1.0]])
    with np.errstate(over="ignore", invalid="ignore"):
        total, clipped, _ = model.clipped_gradient_sum(
            np.array([most * 0.5, most]), Examples((design,), np.zeros(3)), 1.0
        )
    assert np.isfinite(total).all() and np.linalg.norm(total) <= 3 and clipped == 3


def test_what_was_fitted_cannot_leave_the_schemas_range(federation: Any) -> None:
    recipe = {"steps": [{"step": "impute", "columns": ["x"], "with": "mean"}]}
    rogue = rogue_of(federation, "statistics.describe", {"columns": ["x"]}, missing=True, recipe=recipe)
    last = rogue.planned[-1]
    told = rogue.ask(replace(last, view={"0": {"x": 1e9}}), len(rogue.planned) - 1)
    assert told.kind == "failure" or abs(float(told.arrays["s1"][0])) < 1e4


@pytest.mark.parametrize(
    "recipe",
    [
        {"steps": [{"step": "impute", "columns": ["x"], "with": "forward_fill", "on": "t"}]},
        {"clean": [{"step": "deduplicate", "key": ["t"], "latest": "x"}]},
        {"steps": [{"step": "lag", "columns": ["x"], "on": "t", "lags": [1]}]},
    ],
)
def test_steps_that_tie_rows_together_are_refused(federation: Any, recipe: dict[str, Any]) -> None:
    schema = {"name": "t", "columns": {"x": {"range": [0, 10], "missing": "allow"}, "t": {"dtype": "date"}}}
    plan = federation.plan("statistics.describe", {"columns": ["x"]}, {}, schema=schema, privacy=PRIVACY, recipe=recipe)
    with pytest.raises(PlanError) as caught:
        noise_of(plan, 3)
    assert caught.value.code == "privacy.tied-rows"


def test_a_sites_quantised_update_keeps_to_its_norm(federation: Any) -> None:
    size, rows = 100, 200
    names = [f"f{i}" for i in range(size - 1)]
    columns = {name: {"range": [-1, 1]} for name in (*names, "y")}
    table = federation.table({name: np.ones(rows) for name in (*names, "y")}, columns, max_rows=rows)
    more = {"rounds": 1, "clip": 10.0, "clip_norm_l2": 1.0, "learning_rate": 0.01, "compress": {"bits": 2}}
    made: Any = build("horizontal.fedavg", {"family": "linear", "target": "y", "features": names, **more})

    class Desk:
        name, holdout, min_group_size = "s0", table, 1
        state: dict[str, Any] = {}  # noqa: RUF012

        def progress(self, *_: float) -> None: ...

        def shares(self, _: str) -> bool:
            return False

    Desk.table = table  # type: ignore[attr-defined]
    declared = made._per_site(table.schema, {})["weights"].l2
    for number in range(10):
        sent = {"weights": np.zeros(size), "support": np.arange(size)}
        reply = made.train(Desk(), Task(TaskId("a" * 32, number, 0, "reply", "s0"), sent, (number,)))
        assert np.linalg.norm(reply["weights"]) <= declared
