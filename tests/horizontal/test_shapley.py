"""FedAvg with contributions: a linear toy whose coalitions' models are made and judged a second time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from atoll.aggregation.contribution import exact, leave_one_out, shares, valued
from atoll.contract.errors import AtollError, PlanError
from atoll.contract.program import Cohort, build
from atoll.horizontal.validation import Parts

ALL = {"between": 0.0, "within": 0.0, "passes": 400}


def train(study: Any, drive: Any, **more: Any) -> Any:
    params = {"rounds": 3, "batch_size": 1000, "learning_rate": 0.8, "worth": "loss", **more}
    return study.train(drive, "horizontal.shapley", study.params(**params))


def second(study: Any, rounds: int = 3, method: Any = exact) -> tuple[dict[str, float], float]:
    """Values by enumeration in plain numpy: full-batch steps, Σ nᵢΔᵢ / Σ nᵢ, mean absolute error of held-back rows."""
    parts = {name: Parts.of(table, name, 0.2) for name, table in study.tables.items()}
    sizes = {name: len(part.kept) for name, part in parts.items()}
    x = np.concatenate([study.x[name][part.held] for name, part in parts.items()])
    y = np.concatenate([study.y[name][part.held] for name, part in parts.items()])
    w, values, gained = np.zeros(3), dict.fromkeys(study.tables, 0.0), 0.0

    def worth(weights: Any) -> float:
        return -float(np.abs(x @ weights - y).mean())

    for _ in range(rounds):
        change = {name: -0.8 * study.gradient(name, w, parts[name].kept) for name in study.tables}

        def made(some: Any, w: Any = w, change: Any = change) -> Any:
            mass = sum(sizes[name] for name in some)
            return w + (sum(sizes[n] * change[n] for n in some) / mass if mass else 0)

        found = valued(method(tuple(study.tables)), lambda some, made=made: worth(made(some)))
        values = {name: values[name] + found[name] for name in values}
        gained += worth(made(tuple(study.tables))) - worth(w)
        w = made(tuple(study.tables))
    return values, gained


@pytest.mark.parametrize("method", ["exact", "leave_one_out"])
def test_values_are_those_of_an_enumeration(hospitals: Any, drive: Any, method: str) -> None:
    study = hospitals("linear", (40, 25, 33, 20))
    found = train(study, drive, method=method).result["contribution"]
    wanted, gained = second(study, method={"exact": exact, "leave_one_out": leave_one_out}[method])
    values = {site: told["value"] for site, told in found["sites"].items()}
    assert values == pytest.approx(wanted, abs=1e-9)
    assert {site: told["share"] for site, told in found["sites"].items()} == shares(values)
    if method == "exact":
        assert found["gained"] == pytest.approx(gained, abs=1e-9)
        assert found["coalitions"] == 3 * 2**4


def test_guided_permutations_come_near_and_add_up(hospitals: Any, drive: Any) -> None:
    study = hospitals("linear", (40, 25, 33, 20))
    found = train(study, drive, method="gtg", **ALL).result["contribution"]
    wanted, gained = second(study)
    assert found["gained"] == pytest.approx(gained, abs=1e-9)
    for site, told in found["sites"].items():
        assert told["value"] == pytest.approx(wanted[site], abs=0.05 * max(map(abs, wanted.values())))


def test_the_model_is_fedavg_s_whatever_is_valued(hospitals: Any, drive: Any) -> None:
    study = hospitals("logistic")
    models = [
        train(study, drive, method=method, worth="accuracy", models_per_round=size).result["model"].weights
        for method, size in (("gtg", 16), ("exact", 3), ("leave_one_out", 1))
    ]
    assert np.allclose(models[0], models[1:], rtol=0, atol=1e-12)  # rows are shuffled by the round's number
    kept = {n: t.rows(np.isin(np.arange(len(t)), Parts.of(t, n, 0.2).kept)) for n, t in study.tables.items()}
    params = study.params(rounds=3, batch_size=1000, learning_rate=0.8)
    cohort = Cohort(tuple(kept), kept["s0"].schema)
    plain = drive(build("horizontal.fedavg", params).coordinate(cohort), kept).result["model"].weights
    assert np.allclose(models[0], plain, atol=1e-12)


def test_models_are_judged_in_rounds_of_bounded_size(hospitals: Any, drive: Any) -> None:
    study = hospitals("linear", (40, 25, 33))
    driven = train(study, drive, method="exact", models_per_round=3)
    sizes = [len(asked.send["models"]) for asked in driven.rounds if asked.name == "judge"]
    assert sizes == [3, 3, 2] * 3


def test_a_site_whose_labels_are_wrong_is_named_and_gets_nothing(hospitals: Any, drive: Any, federation: Any) -> None:
    study = hospitals("linear", (60, 60, 60, 40))
    for site in study.tables:
        y = 0.7 * study.x[site][:, 1]
        schema = {n: c.model_dump(exclude_defaults=True) for n, c in study.tables[site].schema.columns.items()}
        rows = {**{n: study.tables[site][n] for n in ("u", "v")}, "y": -y if site == "s3" else y}
        study.tables[site] = federation.table(rows, schema)
    for method in ("exact", "gtg"):
        found = train(study, drive, method=method).result["contribution"]
        assert found["negative"] == ["s3"]
        assert found["sites"]["s3"]["share"] == 0
        assert sum(told["share"] for told in found["sites"].values()) == pytest.approx(1, abs=1e-9)


def test_a_site_without_rows_is_worth_nothing(hospitals: Any, drive: Any) -> None:
    study = hospitals("linear", (40, 25, 33))
    study.tables["empty"] = study.tables["s0"].rows(np.zeros(40, bool))
    found = train(study, drive, method="exact").result["contribution"]
    assert found["sites"]["empty"] == {"value": pytest.approx(0, abs=1e-12), "share": pytest.approx(0, abs=1e-6)}


def test_it_goes_on_from_a_checkpoint(hospitals: Any, drive: Any) -> None:
    study = hospitals("linear", (40, 25, 33))
    params = study.params(rounds=4, batch_size=1000, worth="loss", checkpoint_every=2)
    made = build("horizontal.shapley", params)
    cohort = Cohort(tuple(study.tables), study.tables["s0"].schema)
    whole = drive(made.coordinate(cohort), study.tables)
    done, checkpoint = whole.checkpoints[0]
    resumed = drive(made.coordinate(cohort, dict(checkpoint.state)), study.tables, first_round=done)
    assert resumed.result["contribution"] == whole.result["contribution"]


def test_it_needs_what_secure_aggregation_hides(hospitals: Any, federation: Any) -> None:
    study = hospitals("linear")
    with pytest.raises(AtollError) as caught:
        federation.run(
            federation.plan("horizontal.shapley", study.params(), study.tables, protection="secagg"), study.tables
        )
    assert "plan.illegal-combination" in {caught.value.code, *(part.code for part in caught.value.parts)}


def test_exact_values_of_many_sites_are_refused() -> None:
    params = {"family": "linear", "features": ["u", "v"], "target": "y", "method": "exact"}
    steps = build("horizontal.shapley", params).coordinate(Cohort(tuple("abcdefghi"), None))  # type: ignore[arg-type]
    with pytest.raises(PlanError) as caught:
        next(steps)
    assert caught.value.code == "contribution.too-many-sites"
