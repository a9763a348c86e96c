"""Data classes: what a site's policy keeps from every program, whatever the plan is."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from atoll.contract.errors import PolicyError
from atoll.contract.plan import Plan
from atoll.contract.program import REGISTRY, Cohort, ProgramParams, handler, program
from atoll.contract.rounds import Round, Sum, count
from atoll.contract.schema import Column
from atoll.data.recipe import STEPS, Prepared
from atoll.data.sources import SourceSpec
from atoll.runtime.policy import Policy

COLUMNS: dict[str, dict[str, Any]] = {
    "id": {"dtype": "text", "role": "entity", "data_class": "identifier"},
    "street": {"dtype": "text", "values": ["a", "b"], "data_class": "identifier+trajectory"},
    "age": {"range": [0, 120]},
    "fever": {"range": [35, 43], "data_class": "clinical"},
}
HOW = ("cells", "codes", "batches", "held-out cells", "held-out batches")


def open_policy(**changes: Any) -> Policy:
    return Policy.sandbox().model_copy(update=changes)


def data(federation: Any, rows: int = 12) -> dict[str, Any]:
    cells = {
        "id": [f"p{i}" for i in range(rows)], "street": ["a", "b"] * (rows // 2),
        "age": np.arange(rows) + 20.0, "fever": np.linspace(36, 40, rows),
    }  # fmt: skip
    return {name: federation.table(cells, COLUMNS) for name in ("one", "two")}


@pytest.fixture
def reader() -> Any:
    """A program that reads a column in whatever way, without naming it in its parameters as one."""

    @program("test.reader", needs={"sum"}, offers={"bounded", "resolution"})
    class Reader:
        class Params(ProgramParams):
            how: str

        def __init__(self, params: Any) -> None:
            self.params = params

        def coordinate(self, cohort: Cohort, start: Any = None) -> Any:
            total = yield Round("read", Sum(), {"n": count(bound=100)})
            return {"n": int(total["n"])}

        @handler("read")
        def read(self, site: Any, task: Any) -> Any:
            table = site.holdout if self.params.how.startswith("held-out") else site.table
            if self.params.how == "codes":
                return {"n": len(table.codes("street"))}
            if self.params.how.endswith("batches"):
                return {"n": sum(len(batch) for batch in table.batches(("age", "fever")))}
            return {"n": len(table["fever"])}

    yield Reader
    del REGISTRY["test.reader"]


@pytest.mark.parametrize("how", HOW)
def test_a_withheld_column_is_not_read_in_any_way(federation: Any, reader: Any, how: str) -> None:
    tables = data(federation)
    plan = federation.plan("test.reader", {"how": how}, tables, run={"holdout": 0.5})
    assert federation.run(plan, tables)["result"]["n"] == 12
    with pytest.raises(PolicyError) as caught:
        federation.run(plan, tables, {"two": open_policy(withhold=("clinical", "trajectory"))})
    error = caught.value
    column = "street" if how == "codes" else "fever"
    assert (error.code, error.field) == ("policy.column-withheld", column)
    assert error.where["site"] == "two" and "policy.yaml, 'withhold'" in error.remedy
    assert not [body for body in federation.releases() if body["site"] == "two"]


def test_other_columns_of_the_table_are_read_as_ever(federation: Any) -> None:
    tables = data(federation)
    plan = federation.plan("statistics.describe", {"columns": ["age"]}, tables)
    open_, kept = (
        federation.run(plan, tables, {"two": open_policy(withhold=kinds)})["result"]["columns"]
        for kinds in ((), ("identifier", "clinical"))
    )
    assert open_ == kept


def test_a_plan_that_names_a_withheld_column_is_refused_when_it_is_opened(federation: Any) -> None:
    tables = data(federation)
    plan = federation.plan("statistics.describe", {"columns": ["age", "fever"]}, tables)
    with pytest.raises(PolicyError) as caught:
        federation.run(plan, tables, {"one": open_policy(withhold=("clinical",))})
    assert (caught.value.code, caught.value.where["site"]) == ("policy.column-withheld", "one")
    assert "fever" in str(caught.value) and not federation.releases()


def test_a_site_withholds_columns_by_name_whatever_the_schema_says(federation: Any) -> None:
    tables = data(federation)
    plan = federation.plan("statistics.describe", {"columns": ["age"]}, tables)
    with pytest.raises(PolicyError, match="age"):
        federation.run(plan, tables, {"one": open_policy(withhold_columns=("ag*",))})


def test_the_rows_are_remembered_alike_with_and_without_withheld_columns(federation: Any) -> None:
    table = data(federation)["one"]
    assert table.without({"id": "identifier data"}).sketch.tolist() == table.sketch.tolist()
    assert table.without({"no such column": "x"}) is table


# ---------------------------------------------------------------- what a recipe makes of them


def planned(*steps: dict[str, Any], **columns: dict[str, Any]) -> Plan:
    schema = {"name": "t", "columns": columns or COLUMNS}
    return Plan.from_json({"name": "s", "program": "horizontal.glm", "schema": schema, "recipe": {"steps": steps}})


def test_what_a_recipe_makes_of_a_column_is_of_its_class() -> None:
    steps = (
        {"step": "bins", "column": "fever", "into": "hot", "edges": [38]},
        {"step": "one_hot", "columns": ["hot"]},
        {"step": "bins", "column": "age", "into": "band", "edges": [65]},
    )
    plan = planned(*steps)
    made = set(Prepared(plan.recipe).schema(plan.table).columns) - set(COLUMNS)
    kept = Policy(withhold=("clinical",)).withheld(plan)
    assert {"fever", "hot"} < set(kept) and "band" not in kept and "age" not in kept
    assert {name for name in made if name.startswith("hot")} <= set(kept)
    assert set(kept.values()) == {"clinical data"}
    by_name = Policy(withhold_columns=("fever",)).withheld(plan)
    assert set(by_name) == set(kept) and set(by_name.values()) == {"withheld data"}


def test_a_policy_withholds_nothing_by_default() -> None:
    assert Policy().withheld(planned()) == {} == Policy.sandbox().withheld(planned())
    assert Policy(withhold=("imaging",)).withheld(planned()) == {}


def test_a_column_that_is_changed_in_place_by_a_withheld_one_is_of_its_class() -> None:
    day, cases = {"dtype": "date"}, {"range": [0, 9]}
    fever, other = COLUMNS["fever"], {"range": [0, 1]}
    smoothed = {"step": "smooth", "columns": ["cases"], "method": "median", "on": "day", "by": ["fever"]}
    columns: dict[str, Any] = {"day": day, "cases": cases, "fever": fever, "other": other}
    policy = Policy(withhold=("clinical",))
    assert set(policy.withheld(planned(smoothed, **columns))) == {"fever", "cases"}
    lagged = {"step": "lag", "columns": ["cases"], "on": "day", "by": ["fever"], "lags": [1]}
    assert set(policy.withheld(planned(lagged, **columns))) == {"fever", "cases_lag1"}


# ---------------------------------------------------------------- the source's own names, and cleaning

NUMBER: dict[str, Any] = {"range": [0, 1000]}
HIDING = {"withhold_columns": ("hiv*",), "withhold": ("clinical",)}


def ask(federation: Any, folder: Path, steps: Iterable[dict[str, Any]], columns: dict[str, Any], **more: Any) -> Any:
    """What a study of the column "x" (or *asked*) is told by a site whose table has a column "hiv_load"."""
    rows = "".join(f"{20 + i % 50},{i * 10},{i % 3}\n" for i in range(60))
    (folder / "t.csv").write_text("age,hiv_load,x_ray\n" + rows)
    source = {"a": SourceSpec(path="t.csv", extra="ignore", columns=more.pop("ours", {}))}
    policy, asked = more.pop("policy", open_policy(**HIDING)), more.pop("asked", "x")
    recipe = {phase: [one for one in steps if STEPS[one["step"]].cleans == (phase == "clean")] for phase in PHASES}
    schema = {"name": "t", "columns": {name: {**NUMBER, **column} for name, column in columns.items()}}
    plan = federation.plan(
        "statistics.describe", {"columns": [asked], "bins": 1}, {}, schema=schema, recipe=recipe, **more
    )
    return federation.run(plan, source, {"a": policy}, base=folder)["result"]["columns"][asked]


PHASES = ("clean", "steps")
RENAMED = {"step": "rename", "columns": {"x": ["hiv_load"]}}
MADE = {"step": "combine", "into": "x", "template": "{hiv_load}"}


@pytest.mark.parametrize(
    "steps",
    [
        [RENAMED],
        [MADE],
        [{"step": "combine", "into": "y", "template": "{hiv_load}"}, {"step": "rename", "columns": {"x": ["y"]}}],
        [{"step": "rename", "columns": {"y": ["hiv_load"]}}, {"step": "combine", "into": "x", "template": "{y}"}],
        [{"step": "rename", "match": "loose", "columns": {"x": ["HIV load"]}}],
    ],
)
def test_cleaning_does_not_make_a_withheld_column_readable(
    federation: Any, tmp_path: Path, steps: list[dict[str, Any]]
) -> None:
    assert ask(federation, tmp_path, steps, {"x": {}}, policy=open_policy())["count"] == 60
    with pytest.raises(PolicyError) as caught:
        ask(federation, tmp_path, steps, {"x": {}})
    assert (caught.value.code, caught.value.field) == ("policy.column-withheld", "x")
    assert not federation.releases()


def test_a_name_that_only_the_source_tells_is_withheld_once_it_is_opened(federation: Any, tmp_path: Path) -> None:
    loose = {"step": "rename", "match": "loose"}
    for steps, ours, name in (([loose], {}, "h_i_v_load"), ([], {"x": "hiv_load"}, "x")):
        told = ask(federation, tmp_path, steps, {name: {}}, asked=name, ours=ours, policy=open_policy())
        assert told["count"] == 60
        with pytest.raises(PolicyError) as caught:
            ask(federation, tmp_path, steps, {name: {}}, asked=name, ours=ours)
        assert (caught.value.code, caught.value.field) == ("policy.column-withheld", name)
        assert not federation.releases()


def test_columns_that_cleaning_does_not_make_of_withheld_ones_are_read(federation: Any, tmp_path: Path) -> None:
    steps: list[dict[str, Any]] = [
        {"step": "rename", "columns": {"x": ["x_ray"]}},
        {"step": "numbers", "columns": ["age", "hiv_load"]},
        {"step": "deduplicate"},
        {"step": "range_rule", "columns": ["hiv_load"], "outside": "missing"},
    ]
    columns: dict[str, Any] = {"age": {}, "hiv_load": {}, "x": {}}
    for asked in ("age", "x"):
        told = ask(federation, tmp_path, steps, columns, asked=asked, ours={"age": "age"})
        assert told == ask(federation, tmp_path, steps, columns, asked=asked, policy=open_policy())


CLASSED: dict[str, Any] = {"age": {}, "load": {"data_class": "clinical"}}


@pytest.mark.parametrize(
    "step",
    [
        {"step": "drop_missing", "columns": ["hiv_load"]},
        {"step": "drop_missing", "columns": ["age", "load"]},
        {"step": "range_rule", "columns": ["load"], "range": [0, 100], "outside": "drop"},
        {"step": "deduplicate", "key": ["age"], "latest": "load"},
        {"step": "deduplicate", "key": ["load"], "latest": "age"},
        {"step": "complete_rows", "columns": ["load"]},
        {"step": "anonymise", "columns": ["load"], "k": 2},
    ],
)
def test_no_rows_are_chosen_by_a_withheld_column(federation: Any, tmp_path: Path, step: dict[str, Any]) -> None:
    copied = {"step": "combine", "into": "load", "template": "{x_ray}"}
    with pytest.raises(PolicyError) as caught:
        ask(federation, tmp_path, [copied, step], CLASSED, asked="age")
    assert (caught.value.code, caught.value.where["step"]) == ("policy.column-withheld", "open")
    assert not federation.releases()


def test_no_rows_are_merged_by_a_withheld_column() -> None:
    columns: dict[str, Any] = {"day": {"dtype": "date"}, "age": NUMBER, "fever": COLUMNS["fever"]}
    step = {"step": "resample", "on": "day", "by": ["fever"], "every": "1d", "columns": {"age": "mean"}}
    with pytest.raises(PolicyError, match="rows would be chosen by it"):
        Policy(withhold=("clinical",)).check_withheld(planned(step, **columns))
    kept = planned({**step, "by": [], "columns": {"fever": "mean"}}, **columns)
    assert set(Policy(withhold=("clinical",)).check_withheld(kept)) == {"fever"}


def test_rows_are_not_held_out_by_a_withheld_column(federation: Any, tmp_path: Path) -> None:
    made = [{"step": "combine", "into": "load", "template": "{x_ray}"}]
    run = {"holdout": 0.3, "holdout_by": "load", "min_group_size": 5}
    assert ask(federation, tmp_path, made, CLASSED, asked="age", run=run, policy=open_policy())["count"] < 60
    with pytest.raises(PolicyError) as caught:
        ask(federation, tmp_path, made, CLASSED, asked="age", run=run)
    assert (caught.value.code, caught.value.field) == ("policy.column-withheld", "load")
    assert not federation.releases()
    loose = [{"step": "rename", "match": "loose"}]
    hidden: dict[str, Any] = {"age": {}, "h_i_v_load": {}}
    with pytest.raises(PolicyError) as caught:
        ask(federation, tmp_path, loose, hidden, asked="age", run={**run, "holdout_by": "h_i_v_load"})
    assert (caught.value.code, caught.value.field) == ("policy.column-withheld", "h_i_v_load")


def test_which_cleaning_steps_copy_cells_from_one_column_to_another_is_known() -> None:
    """Whoever adds a cleaning step says in its `moves` and `chooses` what it does, and then adds it here."""
    alone = {"codes", "dates", "deduplicate", "drop_missing", "numbers", "range_rule", "text", "units"}
    assert {name for name, step in STEPS.items() if step.cleans} == {*alone, "combine", "rename"}


# ---------------------------------------------------------------- the contract


def test_a_schema_without_data_classes_is_hashed_as_before_there_were_any() -> None:
    plan = planned(age={"range": [0, 120]})
    assert "data_class" not in str(plan.to_json())
    assert plan.hash == "89dbdbd42017557bc5c96f2d56d20896a7797195b88b7339226e2dd7af2d0333"
    classed = planned(age={"range": [0, 120], "data_class": "clinical"})
    assert classed.hash != plan.hash
    assert Plan.from_json(classed.to_json()) == classed


@pytest.mark.parametrize("wrong", ["", "Clinical", "a b", "a+", "+a", "_withheld", "a" * 33])
def test_a_data_class_is_a_plain_word(wrong: str) -> None:
    with pytest.raises(ValidationError):
        Column(range=(0, 1), data_class=wrong)
