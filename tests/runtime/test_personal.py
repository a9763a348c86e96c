"""The model that a site has for itself: in its journal, as long as its run is good."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atoll.contract.errors import PlanError
from atoll.crypto.identity import Identity
from atoll.runtime.journal import PERSONAL, Journal
from atoll.runtime.personal import personal_model

IDENTITY = Identity.generate("north")
RUN = "ab" * 16
OWN = np.array([3.25, -7.125, 1e300 / 3])


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    made = Journal(tmp_path / "journal.db", "north", IDENTITY.public, IDENTITY.sign)
    made.open_run(RUN, "running", {})
    yield made
    made.close()


def personalise(journal: Journal, number: int, weights: Any = OWN, **more: Any) -> None:
    body = {"run": RUN, "task": f"t{number}", "round": number}
    journal.store_release(
        f"t{number}",
        RUN,
        "p",
        body,
        {},
        {"head": OWN},
        personal=None if weights is None else {"weights": weights},
        **more,
    )


def test_it_stays_when_the_run_has_finished_and_nothing_else_does(journal: Journal) -> None:
    journal.pin_view(RUN, {"1": {"x": 2.5}})
    personalise(journal, 4)
    personalise(journal, 5, None)
    journal.end_run(RUN, "finished", None, "")
    own = journal.personal(RUN)
    assert own.arrays["weights"].tobytes() == OWN.tobytes()
    assert own.meta["round"] == 4 and own.meta["fitted"] == {"1": {"x": 2.5}}
    assert journal.state(RUN, PERSONAL).keys() == {"weights"} and journal.state(RUN, "p") == {}


def test_a_later_one_replaces_it(journal: Journal) -> None:
    personalise(journal, 1)
    personalise(journal, 2, 2 * OWN)
    assert np.array_equal(journal.personal(RUN).arrays["weights"], 2 * OWN)
    assert journal.personal("another").arrays == {}


@pytest.mark.parametrize("status", ["failed", "cancelled", "denied"])
def test_it_goes_with_a_run_that_does_not_finish(journal: Journal, tmp_path: Path, status: str) -> None:
    personalise(journal, 1)
    assert OWN.tobytes() in b"".join(path.read_bytes() for path in tmp_path.iterdir())
    if status == "denied":
        journal.set_status(RUN, status)
    else:
        journal.end_run(RUN, status, None, "")
    assert journal.personal(RUN).arrays == {}
    assert OWN.tobytes() not in b"".join(path.read_bytes() for path in tmp_path.iterdir())


def study(federation: Any, program: str) -> Any:
    random = np.random.default_rng(1)
    columns = {"x": {"range": [-9, 9]}, "y": {"dtype": "integer", "values": [0, 1], "role": "label"}}
    tables = {}
    for i in range(3):
        x = random.normal(i, 1, 30)
        gaps = np.where(random.random(30) < 0.2, np.nan, x)
        tables[f"s{i}"] = federation.table({"x": gaps, "y": (x > random.normal(1, 1, 30)) * 1.0}, columns)
    params = {"family": "logistic", "target": "y", "features": ["x"], "rounds": 2}
    plan = federation.plan(
        program, params, tables, protection="secagg", run={"holdout": 0.3, "seed": 1},
        recipe={"steps": [{"step": "impute", "columns": ["x"]}]}, cohort={"min_sites": 2},
    )  # fmt: skip
    return federation.run(plan, tables)


def test_it_is_told_with_all_that_its_use_needs(federation: Any) -> None:
    outcome, run = study(federation, "horizontal.fedper"), federation.run_id
    plan, result, arrays = personal_model(federation.journals["s1"], run[:9])
    assert (plan.name, result["run"], result["plan_hash"]) == ("test", run, plan.hash)
    assert arrays["weights"].tobytes() == federation.journals["s1"].personal(run).arrays["weights"].tobytes()
    assert arrays["weights"][1] == outcome["result"]["model"].weights[1] and arrays["weights"][0] != 0
    assert result["model"]["site"] == "s1"
    assert result["model"]["coefficients"]["x"] == pytest.approx(outcome["result"]["coefficients"]["x"])
    assert result["fitted"] == outcome["fitted"] and result["fitted"]["0"]["x"]
    assert "at least 2 of 3 sites" in result["privacy"]["statement"]
    assert result["rounds"] == len(federation.store.rounds(run)) - 4, "evaluation, twice, comes after it"


@pytest.mark.parametrize(("prefix", "code"), [("", "site.no-personal-model"), ("zz", "run.unknown")])
def test_there_is_none_where_the_program_leaves_none(federation: Any, prefix: str, code: str) -> None:
    study(federation, "horizontal.fedavg")
    with pytest.raises(PlanError) as caught:
        personal_model(federation.journals["s0"], prefix)
    assert caught.value.code == code
