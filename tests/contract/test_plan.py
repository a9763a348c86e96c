"""The plan: unknown keys get their path and the nearest name, and the hash is the study's identity."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from atoll.contract.errors import PlanError
from atoll.contract.plan import Plan
from atoll.contract.settings import read_yaml, validate
from atoll.contract.wire import parse_json, to_json

WHOLE: dict[str, Any] = {
    "atoll": 1,
    "name": "heart-disease",
    "purpose": "research",
    "dataset": "heart",
    "schema": {
        "name": "heart",
        "version": "1",
        "max_rows": 1000,
        "columns": {
            "age": {"dtype": "real", "unit": "year", "range": [0, 120]},
            "sex": {"dtype": "integer", "values": [0, 1], "missing": "forbid"},
            "ward": {"dtype": "text", "values": ["a", "b"], "null_values": ["?"], "description": "of the hospital"},
        },
    },
    "recipe": {"version": "1", "steps": [{"step": "impute", "columns": ["age"], "with": "mean"}]},
    "program": "horizontal.glm",
    "params": {"family": "logistic", "features": ["age", "sex"], "nested": {"b": 1, "a": [1.5, None]}},
    "protection": "plain",
    "cohort": {"sites": ["north", "south"], "min_sites": 2, "on_dropout": "fail"},
    "run": {"seed": 7, "holdout": 0.25, "deadline_s": 60.0, "evaluate": False},
}


def changed(path: str, value: Any, whole: dict[str, Any] = WHOLE) -> dict[str, Any]:
    """A copy of *whole* with another value at a dotted *path*."""
    made = copy.deepcopy(whole)
    inside = made
    *places, last = path.split(".")
    for place in places:
        inside = inside[place]
    inside[last] = value
    return made


def problem(value: Any) -> PlanError:
    with pytest.raises(PlanError) as error:
        Plan.from_json(value)
    return error.value


# ---------------------------------------------------------------- unknown keys and wrong values


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("progam", "program"), ("Name", "name"), ("protections", "protection"), ("shema", "schema"), ("ru", "run"),
        ("cohort.min_site", "min_sites"), ("cohort.on_drop_out", "on_dropout"), ("run.sed", "seed"),
        ("run.deadline", "deadline_s"), ("recipe.step", "steps"), ("schema.max_row", "max_rows"),
        ("schema.colums", "columns"), ("schema.columns.age.rang", "range"), ("schema.columns.sex.value", "values"),
        ("schema.columns.ward.null_value", "null_values"),
    ],
)  # fmt: skip
def test_an_unknown_key_gets_its_path_and_the_nearest_name(path: str, near: str) -> None:
    error = problem(changed(path, 1))
    assert (error.code, error.field) == ("plan.unknown-key", path)
    assert error.remedy == f"did you mean {near!r}?" and repr(path) in str(error)


@pytest.mark.parametrize("path", ["zzzzz", "run.zzzzz", "cohort.zzzzz", "schema.zzzzz", "schema.columns.age.zzzzz"])
def test_a_key_like_no_other_gets_its_path(path: str) -> None:
    error = problem(changed(path, 1))
    assert (error.code, error.field, error.remedy) == ("plan.unknown-key", path, "remove it")


def test_a_columns_name_is_no_key() -> None:
    """A column may be called like a key of the schema, and the suggestion still comes from Column."""
    whole = changed("schema.columns.name", {"range": [0, 1], "rangee": 1})
    assert problem(whole).remedy == "did you mean 'range'?"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("atoll", 2), ("atoll", None), ("name", "Heart"), ("name", ""), ("name", "a" * 65), ("name", "a\n"),
        ("name", "../a"),
        ("program", None), ("params", [1]), ("run.seed", -1), ("run.seed", 2**63), ("run.seed", 1.5),
        ("run.holdout", 1), ("run.holdout", -0.1), ("run.holdout", float("nan")), ("run.deadline_s", 0),
        ("run.deadline_s", float("inf")), ("run.evaluate", "perhaps"), ("cohort.min_sites", 0),
        ("cohort.on_dropout", "explode"), ("cohort.sites", "north"), ("schema.columns", {}), ("schema.max_rows", 0),
        ("schema.columns.age.range", [120, 0]), ("schema.columns.age.range", [0, float("inf")]),
        ("schema.columns.age.dtype", "float"), ("schema.columns.sex.values", []), ("recipe.steps", {"step": "x"}),
    ],
)  # fmt: skip
def test_a_wrong_value_gets_its_path(path: str, value: Any) -> None:
    error = problem(changed(path, value))
    assert error.code == "plan.bad-value" and error.field.startswith(path.rsplit(".", 1)[0])
    assert path in str(error) or path.startswith("schema.columns")


@pytest.mark.parametrize("key", ["schema", "name", "program", "atoll"])
def test_a_missing_key_is_named(key: str) -> None:
    whole = {k: v for k, v in WHOLE.items() if k != key}
    if key == "atoll":
        assert Plan.from_json(whole).atoll == 1
    else:
        assert problem(whole).field == key


def test_all_problems_are_listed_at_once() -> None:
    whole = changed("progam", "x")
    whole = changed("run.holdout", 2, whole)
    whole = changed("schema.columns.age.rang", [0, 1], whole)
    whole = changed("cohort.min_sites", "many", whole)
    error = problem(whole)
    assert error.code == "plan.invalid"
    assert {part.field for part in error.parts} == {
        "progam", "run.holdout", "schema.columns.age.rang", "cohort.min_sites",
    }  # fmt: skip
    assert all(part.field in str(error) for part in error.parts) and str(error).startswith("4 problems")
    assert "did you mean 'program'?" in str(error) and "did you mean 'range'?" in str(error)


@pytest.mark.parametrize("value", [None, [], "text", 5, {}, [WHOLE]])
def test_anything_but_a_plan_is_refused(value: Any) -> None:
    assert problem(value).code in ("plan.bad-value", "plan.invalid")


@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), {1, 2}, b"x", object(), [float("nan")], {"a": float("-inf")}, 10**5000],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("where", ["params", "recipe"])
def test_options_that_json_cannot_say_are_refused(where: str, value: Any) -> None:
    """Else they would be hashed, or arrive at the sites, as something else."""
    whole = changed("params.x", value) if where == "params" else changed("recipe.steps", [{"step": "x", "y": value}])
    error = problem(whole)
    assert error.code == "plan.bad-value" and error.field.startswith(where)


def test_suggestions_reach_into_lists_mappings_and_optional_parts() -> None:
    class Inner(BaseModel, extra="forbid"):
        width: int = 0

    class Outer(BaseModel, extra="forbid"):
        one: Inner | None = None
        many: tuple[Inner, ...] = ()
        named: dict[str, Inner] = {}
        deep: dict[str, list[Inner]] = {}

    for value, path in [
        ({"one": {"widht": 1}}, "one.widht"),
        ({"many": [{}, {"widht": 1}]}, "many.1.widht"),
        ({"named": {"width": {"widht": 1}}}, "named.width.widht"),
        ({"deep": {"x": [{"widht": 1}]}}, "deep.x.0.widht"),
    ]:
        with pytest.raises(PlanError) as error:
            validate(Outer, value, "thing")
        assert (error.value.field, error.value.remedy) == (path, "did you mean 'width'?")
        assert str(error.value).startswith("thing: unknown key")


# ---------------------------------------------------------------- the hash


def leaves(value: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [leaf for k, v in value.items() for leaf in leaves(v, f"{path}.{k}" if path else k)]
    return [(path, value)]


OTHER = {
    "name": "other", "dtype": "integer", "missing": "forbid", "on_dropout": "continue", "range": [0, 121],
    "values": [0, 2], "null_values": ["!"], "sites": ["south", "north"], "steps": [], "evaluate": True,
}  # fmt: skip


@pytest.mark.parametrize("path", [path for path, _ in leaves(WHOLE) if path != "atoll"])
def test_any_change_changes_the_hash(path: str) -> None:
    old = dict(leaves(WHOLE))[path]
    value = OTHER.get(path.rsplit(".", 1)[-1])
    if value is None or value == old:
        value = "forbid-not" if old is None else old + 1 if isinstance(old, int | float) else "changed"
    if path.endswith(("sex.missing", "sex.dtype", "ward.dtype", "ward.values")):
        value = {"missing": "allow", "sex.dtype": "real", "ward.dtype": "date", "values": ["b", "a"]}[
            next(k for k in ("missing", "sex.dtype", "ward.dtype", "values") if path.endswith(k))
        ]
    if path == "run.holdout":
        value = 0.26
    if path == "params.features":
        value = ["sex", "age"]
    assert Plan.from_json(changed(path, value)).hash != Plan.from_json(WHOLE).hash


def test_the_hash_covers_the_order_of_columns_and_steps() -> None:
    columns = WHOLE["schema"]["columns"]
    turned = changed("schema.columns", dict(reversed(columns.items())))
    assert Plan.from_json(turned).hash != Plan.from_json(WHOLE).hash
    assert list(Plan.from_json(turned).table.columns) == ["ward", "sex", "age"]
    steps = [{"step": "a"}, {"step": "b"}]
    one, two = (Plan.from_json(changed("recipe.steps", order)) for order in (steps, steps[::-1]))
    assert one.hash != two.hash


def test_the_hash_ignores_the_order_of_keys_and_written_out_defaults() -> None:
    def turned(value: Any, path: str = "") -> Any:
        if isinstance(value, dict):
            items = [(k, turned(v, f"{path}.{k}")) for k, v in value.items()]
            return dict(items if path == ".schema.columns" else reversed(items))
        return value

    plan = Plan.from_json(WHOLE)
    assert Plan.from_json(turned(WHOLE)).hash == plan.hash
    assert Plan.from_json(plan.to_json()).hash == plan.hash
    short = {k: v for k, v in WHOLE.items() if k not in ("purpose", "recipe", "run", "cohort")}
    written = {**short, "purpose": "research", "recipe": {}, "run": {"holdout": 0}, "cohort": {"min_sites": 3}}
    assert Plan.from_json(short).hash == Plan.from_json(written).hash


def test_the_hash_can_be_computed_elsewhere() -> None:
    plan = Plan.from_json({"name": "p", "program": "x", "schema": {"name": "t", "columns": {"a": {"range": [0, 1]}}}})
    text = json.dumps([plan.to_json(), ["a"]], sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert plan.hash == hashlib.sha256(b"atoll plan 1\0" + text.encode()).hexdigest()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), JSON, max_size=4))
def test_json_round_trip(params: dict[str, Any]) -> None:
    plan = Plan.from_json(changed("params", params))
    back = Plan.from_json(parse_json(to_json(plan.to_json())))
    assert back == plan and back.hash == plan.hash and back.params == params
    assert list(back.table.columns) == list(plan.table.columns)


def test_a_plan_made_in_python_is_the_one_that_is_sent() -> None:
    plan = Plan.from_json(changed("params", {"features": ("age", "sex"), "deep": {"x": (1, 2)}}))
    assert plan.params == {"features": ["age", "sex"], "deep": {"x": [1, 2]}}
    assert Plan.from_json(plan.to_json()) == plan


def test_a_plan_is_frozen() -> None:
    plan = Plan.from_json(WHOLE)
    with pytest.raises(ValueError, match="frozen"):
        plan.name = "other"  # type: ignore[misc]


# ---------------------------------------------------------------- files


def write(folder: Path, **files: Any) -> Path:
    for name, content in files.items():
        text = content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False)
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder / "plan.yaml"


def test_schema_and_recipe_are_read_relative_to_the_plan(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path, schema=WHOLE["schema"])
    path = write(
        tmp_path / "sub", plan={**WHOLE, "schema": "../schema.yaml", "recipe": "recipe.yaml"}, recipe=WHOLE["recipe"]
    )
    assert Plan.load(path) == Plan.load(str(path)) == Plan.from_json(WHOLE)
    assert Plan.load(write(tmp_path, plan=WHOLE)).hash == Plan.from_json(WHOLE).hash


def test_recipes_one_after_another_are_one(tmp_path: Path) -> None:
    first, second = {"version": "3", "steps": [{"step": "a"}]}, {"clean": [{"step": "b"}], "steps": [{"step": "c"}]}
    plan = {**WHOLE, "recipe": ["first.yaml", second]}
    made = Plan.load(write(tmp_path, plan=plan, first=first)).recipe
    assert [one["step"] for one in made.steps] == ["a", "c"] and [one["step"] for one in made.clean] == ["b"]
    with pytest.raises(PlanError) as error:
        Plan.load(write(tmp_path, plan={**plan, "recipe": ["first.yaml", {"stepps": []}]}, first=first))
    assert error.value.code == "plan.unknown-key" and "steps" in error.value.remedy


def test_a_byte_order_mark_does_no_harm(tmp_path: Path) -> None:
    path = write(tmp_path, plan="\ufeff" + yaml.safe_dump(WHOLE))
    assert Plan.load(path).name == "heart-disease"


def load_problem(path: Path) -> PlanError:
    with pytest.raises(PlanError) as error:
        Plan.load(path)
    return error.value


def test_missing_files_are_named(tmp_path: Path) -> None:
    error = load_problem(tmp_path / "plan.yaml")
    assert (error.code, error.field) == ("plan.missing-file", "plan.yaml") and "no plan file" in str(error)
    for part in ("schema", "recipe"):
        error = load_problem(write(tmp_path, plan={**WHOLE, part: "other.yaml"}))
        assert (error.code, error.field) == ("plan.missing-file", "other.yaml") and f"no {part} file" in str(error)


@pytest.mark.parametrize(
    "text",
    [
        "a: [1", "a: b: c", "\ta: 1", "a: *nowhere", "!!python/object:os.system x", "a: \0", "{[1]: 2}",
        "a: 2024-13-01", "[" * 3000, "a: " + "9" * 5000,
    ],
    ids=lambda text: repr(text[:20]),
)  # fmt: skip
def test_files_that_are_not_yaml(tmp_path: Path, text: str) -> None:
    error = load_problem(write(tmp_path, plan=text))
    assert (error.code, error.field) == ("plan.not-yaml", "plan.yaml")


def test_the_line_of_a_mistake_is_told(tmp_path: Path) -> None:
    assert "line 3" in str(load_problem(write(tmp_path, plan="name: x\nprogram: y\nrun: [1}\n")))


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just text", "5", "null"])
def test_files_that_hold_no_mapping(tmp_path: Path, text: str) -> None:
    assert load_problem(write(tmp_path, plan=text)).code == "plan.not-a-mapping"


def test_other_unreadable_files(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_bytes(b"name: \xff\xfe\xfa")
    assert load_problem(path).code == "plan.not-yaml"
    assert load_problem(tmp_path).code == "plan.not-yaml"
    with path.open("wb") as file:
        os.truncate(file.fileno(), (4 << 20) + 1)
    assert load_problem(path).code == "plan.too-large"


def test_yaml_makes_no_objects(tmp_path: Path) -> None:
    mark = tmp_path / "made"
    path = write(tmp_path, plan=f"name: !!python/object/apply:os.mkdir ['{mark}']")
    assert load_problem(path).code == "plan.not-yaml" and not mark.exists()
    assert read_yaml(write(tmp_path, plan="when: 2024-01-01"), "x")


def test_an_unquoted_date_is_refused_with_the_remedy(tmp_path: Path) -> None:
    text = yaml.safe_dump(changed("params", {})).replace("params: {}", "params: {since: 2024-01-01}")
    assert "quote dates" in str(load_problem(write(tmp_path, plan=text)))


def test_only_true_and_false_are_booleans(tmp_path: Path) -> None:
    """In YAML 1.1 "on" is true, and Norway's code is false."""
    (tmp_path / "x.yaml").write_text("on: time\ncountry: [NO, SE]\noff: yes\nevaluate: false\nholdout: 0.5\n")
    assert read_yaml(tmp_path / "x.yaml", "file") == {
        "on": "time", "country": ["NO", "SE"], "off": "yes", "evaluate": False, "holdout": 0.5
    }  # fmt: skip
