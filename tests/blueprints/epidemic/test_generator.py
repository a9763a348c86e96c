"""The outbreak keeps its model, the records mean what they say, and the recipe mends what offices did to them."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from atoll.blueprints.epidemic.generator import YANGTZE_DELTA, recipe, schema, write
from atoll.blueprints.epidemic.line_list import ELSEWHERE, NEAR, OUTSIDE, line_list
from atoll.blueprints.epidemic.outbreak import NEVER, Outbreak, Region, Scenario, simulate
from atoll.contract.errors import PlanError
from atoll.contract.plan import Recipe
from atoll.contract.schema import TableSchema
from atoll.data.check import checked
from atoll.data.engine import Engine
from atoll.data.recipe import Prepared
from atoll.data.sources import SourceSpec, known_columns, open_source
from atoll.data.table import Table

SMALL = dataclasses.replace(YANGTZE_DELTA, days=40)
TWO = (Region("one", {"a": 4e5, "b": 3e5}, imports_per_day=2), Region("two", {"c": 3e5}, imports_per_day=1))


@pytest.fixture(scope="module")
def outbreak() -> Outbreak:
    return simulate(SMALL, 7)


@pytest.fixture(scope="module")
def records(outbreak: Outbreak) -> dict[str, Any]:
    return line_list(outbreak, 7, extra=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cases")
    write(out, 7, SMALL, rows=700)
    return out


# ---------------------------------------------------------------- the outbreak


def test_everybody_is_infected_by_somebody_infectious(outbreak: Outbreak) -> None:
    by = outbreak.infector
    known = by >= 0
    when, who = outbreak.infected[known], by[known]
    assert known.sum() > 5000
    assert (outbreak.infectious[who] <= when).all()
    assert (when < outbreak.recovered[who]).all()
    assert (who < np.flatnonzero(known)).all()
    assert (outbreak.recovered > outbreak.infectious).all()
    assert (outbreak.infectious > outbreak.infected).all()


def test_residents_are_conserved(outbreak: Outbreak) -> None:
    infected = outbreak.daily("infected", by="city").cumsum(axis=0)
    assert (outbreak.susceptible + infected == SMALL.populations()).all()
    assert (outbreak.daily("infected").sum(axis=1) == outbreak.daily("infected", by="city").sum(axis=1)).all()


def test_durations_and_delays_have_their_means(outbreak: Outbreak) -> None:
    latent = outbreak.infectious - outbreak.infected
    ill = outbreak.recovered - outbreak.infectious
    assert latent.mean() == pytest.approx(SMALL.latent_days, rel=0.03)
    assert ill.mean() == pytest.approx(SMALL.infectious_days, rel=0.03)
    assert np.median(outbreak.onset - outbreak.infected) == pytest.approx(5.1, abs=0.5)
    assert np.corrcoef(latent, outbreak.onset - outbreak.infected)[0, 1] > 0.8
    first = (outbreak.region() == 0) & (outbreak.reported < NEVER)
    delay = (outbreak.reported - outbreak.onset)[first]
    assert delay[~outbreak.traced[first]].mean() == pytest.approx(4.6, rel=0.05)
    assert delay[outbreak.traced[first]].mean() == pytest.approx(2.7, rel=0.05)
    assert first.sum() / (outbreak.region() == 0).sum() == pytest.approx(0.7 * 0.9, abs=0.02)


@pytest.mark.parametrize("dispersion", [0.43, 5.0])
def test_offspring_have_mean_r0_and_the_variance_of_a_negative_binomial(dispersion: float) -> None:
    # 20,000 index cases among many, on the first day only: nobody runs out of contacts
    region = Region("one", {"a": 1e9}, imports_per_day=20_000)
    scenario = Scenario((region,), days=60, imports=(0, 0), contact=((0, 1.0),), max_infections=10**7, r0=1.5,
                        dispersion=dispersion)  # fmt: skip
    made = simulate(dataclasses.replace(scenario, days=22), 3)
    offspring = made.offspring()[(made.infector < 0) & (made.recovered < 22)]
    assert len(offspring) > 18_000
    p = 1 / scenario.infectious_days
    least = 1 / (1 - p)  # the dispersion of equal infectiousness over a geometric time
    assert offspring.mean() == pytest.approx(1.5, rel=0.05)
    k = min(dispersion, least)
    assert offspring.var() == pytest.approx(1.5 + 1.5**2 / k, rel=0.12)


def test_without_travel_nothing_crosses_and_with_mobility_it_does() -> None:
    still = Scenario(TWO, days=60, travel=0.0)
    made = simulate(still, 1)
    known = made.infector >= 0
    assert (made.city[known] == made.city[made.infector[known]]).all()
    apart = Scenario(
        (TWO[0], dataclasses.replace(TWO[1], imports_per_day=0)), days=60,
        mobility=((0.9, 0.05, 0.05), (0.0, 1.0, 0.0), (0.1, 0.0, 0.9)),
    )  # fmt: skip
    made = simulate(apart, 1)
    there = np.flatnonzero(made.region() == 1)
    assert len(there) > 50
    assert made.region()[made.infector[there[0]]] == 0
    source, target = made.city[made.infector[made.infector >= 0]], made.city[made.infector >= 0]
    assert not ((source == 1) & (target == 2)).any() or apart.mix()[0, 1] > 0  # b's people meet c's only in a


def test_contact_falls_when_it_is_said_to() -> None:
    base = Scenario(TWO, days=80, r0=2.4)
    closed = dataclasses.replace(base, contact=((0, 1.0), (30, 0.0)))
    free, held = simulate(base, 5), simulate(closed, 5)
    assert (free.daily("infected")[:30] == held.daily("infected")[:30]).all()  # the same until then
    late = held.infected >= 30
    assert (held.infector[late] < 0).all()
    assert len(free) > 2 * len(held)


def test_equal_seeds_give_equal_epidemics(outbreak: Outbreak) -> None:
    again = simulate(SMALL, 7)
    for name in ("city", "infector", "infected", "reported", "infectiousness", "traced"):
        assert np.array_equal(getattr(again, name), getattr(outbreak, name)), name
    assert not np.array_equal(simulate(SMALL, 8).infector[:500], outbreak.infector[:500])


def test_impossible_scenarios_are_refused() -> None:
    for wrong in (
        {"days": 0}, {"latent_days": 0.5}, {"contact": ((3, 1.0),)}, {"contact": ((0, 1.0), (9, 0.2), (4, 0.1))},
        {"mobility": ((1.0, 0.0), (0.0, 1.0))}, {"mobility": ((0.5, 0.0, 0.0), (0, 1, 0), (0, 0, 1))},
    ):  # fmt: skip
        with pytest.raises(PlanError) as told:
            Scenario(TWO, **wrong)
        assert told.value.code == "epidemic.bad-scenario"
    with pytest.raises(PlanError):
        Scenario((Region("empty", {}),))
    with pytest.raises(PlanError) as told:
        simulate(Scenario(TWO, days=80, r0=4.0, max_infections=5000), 1)
    assert told.value.code == "epidemic.too-large"


def test_no_imports_no_epidemic() -> None:
    made = simulate(Scenario((Region("one", {"a": 1e5}),), days=30), 1)
    assert len(made) == 0
    assert made.daily().sum() == 0
    assert len(line_list(made, 1)["x0"]) == 0


# ---------------------------------------------------------------- the records


def test_records_keep_the_contract(records: dict[str, Any]) -> None:
    declared = TableSchema.model_validate(schema(extra=4))
    for name, column in declared.columns.items():
        values = records[name]
        if column.numeric:
            present = values[~np.isnan(values)]
            low, high = column.bounds()
            assert (present >= low).all(), name
            assert (present <= high).all(), name
            if column.values is not None:
                assert set(present.tolist()) <= set(column.values), name
                assert len(set(present.tolist())) > 1, name
            if column.missing == "forbid":
                assert len(present) == len(values), name
    assert len(set(records["x0"])) == len(records["x0"])
    late = ~np.isnat(records["x5"])
    assert (records["x5"][late] <= records["report_date"][late]).all()
    assert (np.diff(records["report_date"].astype(int)) >= 0).all()


def test_case_ids_are_unique_where_regions_begin_alike() -> None:
    regions = (Region("north", {"a": 1e5}, imports_per_day=9), Region("northwest", {"b": 1e5}, imports_per_day=9))
    ids = line_list(simulate(Scenario(regions, days=25), 1), 1)["x0"]
    assert len(set(ids)) == len(ids) > 50


def test_variables_depend_on_age_and_severity(records: dict[str, Any]) -> None:
    case, ill = records["confirmed"] == 1, ~np.isnat(records["x5"])
    sick = case & ill
    grave = sick & (records["severe"] == 1)
    groups = (grave, sick & ~grave, ~case)
    mean = {
        name: [float(np.nanmean(records[name][rows])) for rows in groups]
        for name in ("x4", "x6", "x7", "x8", "x9", "x10", "x13")
    }
    for rises in ("x4", "x6", "x9", "x10", "x13"):
        assert mean[rises][0] > mean[rises][1], rises
    assert mean["x8"][0] < mean["x8"][1] < mean["x8"][2]
    assert mean["x7"][1] < mean["x7"][2]
    assert 0.06 < grave.sum() / sick.sum() < 0.2  # Guan et al.: 16% of those in hospital
    assert np.mean(records["x6"][sick] >= 37.3) == pytest.approx(0.887, abs=0.04)
    assert np.median(records["x4"][case]) == pytest.approx(47, abs=3)


def test_links_are_true(outbreak: Outbreak, records: dict[str, Any]) -> None:
    row = {x0: n for n, x0 in enumerate(records["x0"])}
    person, region = records["person"], records["region"]
    linked = np.flatnonzero((records["link_case"] != "") & (person >= 0))
    assert len(linked) > 500
    for n in linked:
        other = row[records["link_case"][n]]
        assert person[other] == outbreak.infector[person[n]]
        assert outbreak.traced[person[n]]
        assert records["x14"][n] == (NEAR if region[other] == region[n] else ELSEWHERE)
    outside = (records["x14"] == OUTSIDE) & (person >= 0)
    assert outside.sum() > 100
    assert (outbreak.infector[person[outside]] < 0).all()
    assert (records["x14"][linked] == ELSEWHERE).sum() > 5  # chains cross regions


# ---------------------------------------------------------------- what offices make of them


def cleaned(folder: Path, site: str) -> Table:
    """A site's file after the recipe and the contract's check."""
    sites = yaml.safe_load((folder / "sites.yaml").read_text("utf-8"))
    declared = TableSchema.model_validate(yaml.safe_load((folder / "schema.yaml").read_text("utf-8")))
    steps = Recipe.model_validate(yaml.safe_load((folder / "recipe.yaml").read_text("utf-8")))
    spec = SourceSpec(**sites[site])
    frame = Prepared(steps).cleaned(open_source(spec, declared, folder, Engine()))
    return checked(known_columns(frame, spec)).to_table()


def exported(folder: Path, site: str) -> pd.DataFrame:
    """A site's file as it is."""
    return pd.read_csv(folder / f"{site}.csv", dtype=str, encoding="gb18030" if site == "jiangsu" else "utf-8")


@pytest.mark.parametrize("site", [region.name for region in SMALL.regions])
def test_the_recipe_gives_back_the_truth(folder: Path, records: dict[str, Any], site: str) -> None:
    table = cleaned(folder, site)
    place = [region.name for region in SMALL.regions].index(site)
    true = {name: values[records["region"] == place] for name, values in records.items()}
    order = {x0: n for n, x0 in enumerate(true["x0"])}
    rows = np.array([order[x0] for x0 in table["x0"]])
    assert len(set(rows)) == len(rows)
    assert len(rows) == 700 or (site == "anhui" and 600 < len(rows) < 700)
    for name in ("x1", "x2", "x3", "x4", "x7", "x8", "x9", "x10", "x11", "x12", "x13", "x14", "confirmed", "severe"):
        assert np.allclose(table[name], true[name][rows], equal_nan=True, atol=1e-9), name
    assert np.allclose(table["x6"], true["x6"][rows], equal_nan=True, atol=0.01)
    assert np.array_equal(table["x5"], true["x5"][rows], equal_nan=True)
    cities = np.array(SMALL.city_names(), object)
    assert (table["city"] == cities[true["city"][rows]]).all()
    late = table["report_date"] != true["report_date"][rows]
    assert late.any() == (site == "anhui")  # what no recipe can mend: late is late
    if site == "zhejiang":
        assert table.dropped["duplicate rows"] > 3
        assert table.dropped["superseded rows"] > 5
        assert len(exported(folder, site)) == len(table) + sum(table.dropped.values())


def test_offices_differ(folder: Path) -> None:
    raw = {region.name: exported(folder, region.name) for region in SMALL.regions}
    assert "报告日期" in raw["jiangsu"].columns
    assert set(raw["jiangsu"]["性别"]) == {"男", "女"}
    assert raw["zhejiang"]["report_date"].str.match(r"\d\d/\d\d/\d{4}$").all()
    assert {"M", "F", "0", "1"} == set(raw["anhui"]["x3"])  # the code list changed on the way
    assert raw["anhui"]["x6"].astype(float).mean() > 90


def test_truth_is_written(tmp_path: Path) -> None:
    outbreak = write(tmp_path, 7, dataclasses.replace(SMALL, days=26))
    people = pd.read_csv(tmp_path / "truth/infections.csv")
    assert (people["infector"].to_numpy() == outbreak.infector).all()
    links = pd.read_csv(tmp_path / "truth/links.csv")
    assert len(links) > 5
    assert (links["infector_region"] != links["case_region"]).all()
    of = people.dropna(subset="x0").set_index("x0")["person"]
    assert (people["infector"].to_numpy()[of[links["case"]]] == of[links["infector"]].to_numpy()).all()
    daily = pd.read_csv(tmp_path / "truth/daily.csv")
    assert daily["reported"].sum() == outbreak.daily().sum()
    assert len(daily) == 26 * 4


def test_the_same_arguments_write_the_same_bytes(tmp_path: Path) -> None:
    digests = []
    for name in ("one", "two"):
        write(tmp_path / name, 3, dataclasses.replace(SMALL, days=24), rows=200, extra=3)
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        digests.append([(p.name, hashlib.sha256(p.read_bytes()).hexdigest()) for p in files])
    assert digests[0] == digests[1]
    assert len(pd.read_csv(tmp_path / "one/shanghai.csv")) == 200
    assert "x17" in schema(3)["columns"]


def test_clean_offices_need_no_recipe(tmp_path: Path) -> None:
    write(tmp_path, 3, dataclasses.replace(SMALL, days=24), rows=100, dirty=False)
    declared = TableSchema.model_validate(schema())
    for region in SMALL.regions[1:3]:
        spec = SourceSpec(path=f"{region.name}.csv")
        assert len(checked(known_columns(open_source(spec, declared, tmp_path, Engine()), spec)).to_table()) == 100


def test_the_recipe_is_one(folder: Path) -> None:
    assert yaml.safe_load((folder / "recipe.yaml").read_text("utf-8")) == recipe()


def test_confirmed_can_be_learned_and_is_not_given_away(records: dict[str, Any]) -> None:
    names = ("x1", "x2", "x3", "x4", "x6", "x7", "x8", "x9", "x10", "x11", "x12", "x13", "x14")
    table = np.stack([np.nan_to_num(records[name], nan=-1) for name in names], axis=1)
    table = (table - table.mean(axis=0)) / table.std(axis=0)
    known, later = np.arange(len(table)) % 5 > 0, np.arange(len(table)) % 5 == 0
    for target, low, high in (("confirmed", 0.8, 0.95), ("severe", 0.8, 0.97)):
        model = LogisticRegression().fit(table[known], records[target][known])
        area = roc_auc_score(records[target][later], model.predict_proba(table[later])[:, 1])
        assert low < area < high, target
    assert all(roc_auc_score(records["confirmed"], table[:, n]) < 0.9 for n in range(len(names)))
