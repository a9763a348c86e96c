"""Comparison of sites' tables: planted differences are found, where they are, and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from atoll.contract.disclosure import Rule
from atoll.contract.errors import ProtocolError
from atoll.contract.program import Cohort, build
from atoll.contract.rounds import Task, TaskId
from atoll.data.table import Table
from atoll.runtime.checkup import findings
from atoll.runtime.policy import Policy

NAN = float("nan")
COLUMNS: dict[str, dict[str, Any]] = {
    "id": {"dtype": "text", "role": "entity"},
    "glucose": {"range": [0, 10_000], "unit": "mmol/L"},
    "ward": {"dtype": "text", "values": ["north", "south", "west"]},
    "died": {"dtype": "integer", "values": [0, 1], "role": "label"},
    "note": {"dtype": "text"},
    "seen": {"dtype": "datetime", "role": "time"},
}


def office(federation: Any, n: int, seed: int, **changed: Any) -> Table:
    random = np.random.default_rng(seed)
    start = np.datetime64("2024-01-01T00:00")
    data = {
        "id": [f"s{seed}p{i}" for i in range(n)],
        "glucose": random.normal(6, 1, n).clip(2, 20),
        "ward": random.choice(["north", "south"], n).astype(object),
        "died": (random.random(n) < 0.2).astype(float),
        "note": np.array([f"note {i}" for i in range(n)], object),
        "seen": (start + np.arange(n).astype("timedelta64[h]")).astype("datetime64[us]"),
    }
    made = federation.table({**data, "seen": None}, {n: c for n, c in COLUMNS.items() if n != "seen"})
    schema = made.schema.model_copy(update={"columns": {**made.schema.columns, "seen": _datetime()}})
    columns = {**made.columns, "seen": data["seen"]}
    return Table(schema, {**columns, **{k: np.asarray(v) for k, v in changed.items()}})


def _datetime() -> Any:
    from atoll.contract.schema import Column

    return Column(dtype="datetime", role="time")


def compare(drive: Any, tables: dict[str, Table], smallest: int = 1) -> Any:
    schema = next(iter(tables.values())).schema
    steps = build("statistics.comparison", {}).coordinate(Cohort(tuple(tables), schema, 0, smallest))
    return drive(steps, tables, rule=Rule(smallest)).result


def test_tables_that_are_alike_raise_nothing(federation: Any, drive: Any) -> None:
    tables = {name: office(federation, 400, seed) for seed, name in enumerate("abc", 1)}
    result = compare(drive, tables, 5)
    assert findings(result) == []
    assert result["comparison"]["sites"] == 3
    assert result["comparison"]["grains"] == {"seen": {"1h": 3}}
    assert result["comparison"]["codes"]["ward"] == {"north": 3, "south": 3, "west": 0}


@pytest.mark.parametrize("smallest", [1, 5])
def test_planted_differences_are_found_where_they_are(federation: Any, drive: Any, smallest: int) -> None:
    n = 400
    day = (np.datetime64("2024-01-01") + np.arange(n)).astype("datetime64[us]")
    random = np.random.default_rng(9)
    wrong = office(
        federation, n, 3, glucose=office(federation, n, 3)["glucose"] * 100, died=np.ones(n), seen=day,
        ward=np.where(np.arange(n) < 200, "west", "north").astype(object), note=np.full(n, None, object),
    )  # fmt: skip
    holes = np.where(random.random(n) < 0.6, NAN, 6.0)
    tables = {"a": office(federation, n, 1), "b": office(federation, n, 2, glucose=holes), "c": wrong}
    found = {(one.column, one.what.split(":")[0]): one.where for one in findings(compare(drive, tables, smallest))}
    assert found[("glucose", "its median is about 10^2 times the cohort's")] == "c"
    assert found[("glucose", "has far more or fewer missing cells than the cohort")] == "b"
    assert found[("glucose", "has one value only")] == "b"
    assert found[("note", "has no value at all")] == "c"
    assert found[("died", "has one value only")] == "c"
    assert "c" in found[("died", "has other shares of codes than the cohort")]
    assert found[("ward", "lacks codes that are common elsewhere")] in ("c", "a, b, c")
    assert found[("ward", "only it has the code west")] == "one site"
    assert found[("seen", "the time grain differs")] == "between sites"


def test_sites_are_named_only_where_they_share(federation: Any) -> None:
    tables = {
        "a": office(federation, 60, 1),
        "b": office(federation, 60, 2),
        "c": office(federation, 60, 3, died=np.ones(60)),
    }
    plan = federation.plan("statistics.comparison", {}, tables)
    shy = Policy.sandbox().model_copy(update={"share": ()})
    outcome = federation.run(plan, tables, dict.fromkeys(tables, shy))["result"]
    assert outcome["comparison"]["own"] == {}
    (flag,) = [one for one in findings(outcome) if (one.column, one.what) == ("died", "has one value only")]
    assert flag.where == "1 site of 3"


@pytest.mark.parametrize("n", [0, 1, 3])
def test_small_tables_raise_no_flags(federation: Any, drive: Any, n: int) -> None:
    tables = {"a": office(federation, 200, 1), "b": office(federation, 200, 2), "c": office(federation, n, 3)}
    found = compare(drive, tables, 5)
    assert not any("c" in one.where.split(", ") for one in findings(found))


@pytest.mark.parametrize("missing", [0, 1, 7])
def test_no_total_tells_a_small_count_by_subtracting(federation: Any, drive: Any, missing: int) -> None:
    columns = {name: COLUMNS[name] for name in ("glucose", "ward")}
    ward = np.array(["north"] * 60 + ["south"] * 37 + ["west"] * 3, object)
    ward[:missing] = None
    glucose = np.where(np.arange(100) < missing, NAN, 6.0 + np.arange(100) / 50)
    table = federation.table({"glucose": glucose, "ward": ward}, columns)
    steps = build("statistics.comparison", {}).coordinate(Cohort(("a",), table.schema, 0, 5))
    driven = drive(steps, {"a": table}, rule=Rule(5))
    (reply,) = [replies["a"] for replies in driven.replies if "coded" in replies["a"]]
    told = missing != 1
    assert reply["cells"].tolist() == [[missing, 100 - missing] if told else [0, 0]] * 2
    assert reply["coded"].tolist() == reply["cells"][1:].tolist()
    assert reply["codes"][:, 1].tolist() == [[60 - missing, 0, 0] if told else [0, 0, 0]]
    flags = driven.result["comparison"]["columns"]["ward"]
    assert flags["missing"] == 0
    assert (flags["shares"], flags["absent"]) == (0, 0)


def test_a_site_compares_itself_with_one_set_of_shares(federation: Any, drive: Any) -> None:
    """Else the threshold could be moved until it tells a site's own share."""
    table = office(federation, 50, 1)

    class Desk:
        name, holdout, state, min_group_size = "a", table.rows(np.zeros(50, bool)), {}, 5

        def __init__(self) -> None:
            self.table = table

        def shares(self, what: str) -> bool:
            return True

        def progress(self, done: float, total: float) -> None:
            pass

    made, desk = build("statistics.comparison", {}), Desk()
    shares = {"missing": np.zeros(5), "codes": np.zeros((2, 3))}
    task = TaskId("0" * 32, 0, 0, "reply", "a")
    made.apart(desk, Task(task, shares, (0,)))  # type: ignore[attr-defined]
    with pytest.raises(ProtocolError):
        made.apart(desk, Task(task, {**shares, "missing": np.full(5, 0.3)}, (0,)))  # type: ignore[attr-defined]
