"""Every federated algorithm on four hospitals' heart disease records, beside FLamby's published table.

The rows, columns and sizes of split are FLamby's Fed-Heart-Disease (du Terrail et al. 2022): slope, ca and thal left
out, then rows with a missing cell, chest pain and electrocardiogram as indicators; 740 patients, of whom 199, 172, 30
and 85 are for training. Here the split, stratified by label, is another for each of 30 seeds. Model: logistic
regression. Settings, and the method, are chosen for each seed by the macro accuracy (the mean of the four hospitals')
over folds of its *training* rows; test rows are looked at once. A method that gives each hospital a model of its own is
scored by that. ``pooled`` is the same learner with all training rows in one place, ``local`` with each hospital's own.
Data: $ATOLL_DATA or ../shared/data.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache
from itertools import product, repeat
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.contract.plan import Plan
from atoll.contract.program import REGISTRY
from atoll.data.site_data import SiteData
from atoll.data.table import Table, concatenate
from atoll.models.model import Model
from atoll.runtime.catalogue import load_installed
from atoll.runtime.sandbox import read_sites
from benchmarks.learning import driven, interval, learn
from benchmarks.table import Row, main

SEED, SEEDS, FOLDS = 0, 30, 3
EXAMPLE = Path(__file__).parents[1] / "examples" / "heart"
DATA = Path(os.environ.get("ATOLL_DATA", Path(__file__).parents[2] / "shared" / "data")) / "heart-disease-uci"
TEST_ROWS = {"cleveland": 104, "hungary": 89, "switzerland": 16, "va": 45}
PUBLISHED = {
    "pooled": (0.735, ".783 .764 .750 .644, pooled test .795"),
    "fedavg": (0.685, ".731 .719 .650 .640, pooled test .748"),
    "fedyogi": (0.731, ".760 .753 .738 .676, pooled test .779"),
    "cyclic": (0.718, "pooled test .785"),
}
"""FLamby's macro accuracy; and by hospital, in the order of TEST_ROWS."""
TARGET = "disease"
LEARNER = {"rounds": 20, "local_epochs": 2, "batch_size": 16}
RATES = ({"learning_rate": 0.1}, {"learning_rate": 0.5})
SERVER = tuple({"server_learning_rate": rate} for rate in (0.03, 0.1, 0.3))
ROWS = {"generated": 500, "distil_steps": 30}
GRIDS: dict[str, tuple[dict[str, Any], ...]] = {
    "fedavg": ({"weighting": "rows"}, {"weighting": "sites"}),
    "fedprox": ({"proximal": 0.1}, {"proximal": 1.0}),
    "scaffold": ({"weighting": "rows"}, {"weighting": "sites"}),
    "fednova": ({},),
    "feddyn": ({"alpha": 0.1}, {"alpha": 1.0}),
    "moon": ({"contrast": 1.0},),
    "fedavgm": ({"server_momentum": 0.5, "server_learning_rate": 0.5}, {"server_learning_rate": 0.1}),
    "fedadagrad": SERVER,
    "fedadam": SERVER,
    "fedyogi": SERVER,
    "cyclic": ({},),
    "feddf": (ROWS,),
    "fedmd": (ROWS,),
    "finetune": ({"tune_epochs": 5}, {"tune_epochs": 20}),
    "fedper": ({},),
    "fedrep": ({"head_epochs": 2},),
    "ditto": ({"pull": 0.1}, {"pull": 1.0}),
    "apfl": ({},),
    "perfedavg": ({"adapt_steps": 5, "adapt_rate": 0.1},),
    "ifca": ({"clusters": 2, "min_cluster": 1},),  # as in the paper: four hospitals are few
}
"""What is tried of each algorithm, each with both RATES."""
CHOSEN = ("chosen", "chosen, one model")
"""The best method over the folds; and of those that give all hospitals the same model."""
Tables = dict[str, Table]
Score = dict[str, float]
"""Accuracy by hospital, their mean "macro", and "pooled" of all test rows."""


@cache
def hospitals() -> Tables:
    """FLamby's 740 rows, by hospital."""
    base = Plan.load(EXAMPLE / "plan.yaml").to_json()
    for column, low, high in (("trestbps", 0, 250), ("chol", 0, 700)):  # FLamby takes a 0 for a value
        base["schema"]["columns"][column] |= {"range": [low, high], "null_values": []}
    threshold, impute = base["recipe"]["steps"]
    complete = {"step": "complete_rows", "columns": impute["columns"]}
    one_hot = {"step": "one_hot", "columns": ["cp", "restecg"], "drop_first": True}
    base["recipe"]["steps"] = [threshold, complete, one_hot]
    plan = Plan.from_json({**base, "run": {}})
    sites = read_sites(EXAMPLE / "sites.yaml")
    return {name: SiteData.read(spec, plan, DATA, name).base() for name, spec in sites.items()}


def marked(labels: NDArray[Any], size: int, random: np.random.Generator) -> NDArray[np.bool_]:
    """*size* of the rows, as near as can be the same share of both classes."""
    places = [random.permutation(np.flatnonzero(labels == label)) for label in (0, 1)]
    first = round(size * len(places[0]) / len(labels))
    found = np.zeros(len(labels), bool)
    found[places[0][:first]] = found[places[1][: size - first]] = True
    return found


def split(seed: int) -> Tables:
    """The hospitals with their test rows held out."""
    random, found = np.random.default_rng((SEED, seed)), {}
    for name, table in hospitals().items():
        found[name] = replace(table, held_out=marked(table[TARGET], TEST_ROWS[name], random))
    return found


def folds(tables: Tables, seed: int) -> Iterator[Tables]:
    """The training rows of *tables*, each time with another part of them held out."""
    random = np.random.default_rng((SEED, seed, 1))
    rows = {name: table.parts()[0] for name, table in tables.items()}
    numbers = {}
    for name, table in rows.items():
        order = np.lexsort((random.random(len(table)), table[TARGET]))
        numbers[name] = np.empty(len(table), int)
        numbers[name][order] = np.arange(len(table)) % FOLDS
    for fold in range(FOLDS):
        yield {name: replace(table, held_out=numbers[name] == fold) for name, table in rows.items()}


def scored(models: Mapping[str, Model], tables: Tables) -> Score:
    """Of each hospital's model on its held-out rows."""
    right = {}
    for name, table in tables.items():
        test = table.parts()[1]
        right[name] = (models[name].predict(test) >= 0.5) == (test[TARGET] == 1)
    found = {name: float(some.mean()) for name, some in right.items()}
    return {
        **found,
        "macro": float(np.mean([*found.values()])),
        "pooled": float(np.concatenate([*right.values()]).mean()),
    }


def params(method: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of *method*'s program, over FLamby's 13 features."""
    schema = next(iter(hospitals().values())).schema
    features = [name for name in schema.numeric_columns() if name not in (TARGET, "num")]
    linear = {"family": "logistic", "features": features}
    network = {"model": {"kind": "mlp", "features": features, "hidden": [16]}}
    return {"target": TARGET, **(network if method == "moon" else linear), **settings}


def fitted(method: str, settings: Mapping[str, Any], tables: Tables, seed: int) -> dict[str, Model]:
    """Each hospital's model. "pooled" and "local" are FedAvg with one site: plain SGD."""
    if method == "pooled":
        whole = {"pooled": concatenate([*tables.values()])}
        return dict.fromkeys(tables, driven("horizontal.fedavg", params(method, settings), whole, seed)[0])
    if method == "local":
        made = params(method, settings)
        return {name: driven("horizontal.fedavg", made, {name: table}, seed)[0] for name, table in tables.items()}
    return driven(f"horizontal.{method}", params(method, settings), tables, seed)[1]


def tuned(method: str, tables: Tables, seed: int) -> tuple[float, dict[str, Any]]:
    """(macro accuracy over the folds of the training rows, settings) of the best settings."""
    parts, found = [*folds(tables, seed)], []
    for own, rate in product(GRIDS.get(method, ({},)), RATES):
        settings = {**LEARNER, **own, **rate}
        scores = [scored(fitted(method, settings, part, seed), part)["macro"] for part in parts]
        found.append((float(np.mean(scores)), settings))
    return max(found, key=lambda one: one[0])


def measured(seed: int, methods: tuple[str, ...]) -> dict[str, Any]:
    """Of one split: each method's Score; and under CHOSEN that of the best method over the folds, and its name."""
    tables, found, folded = split(seed), dict[str, Score](), dict[str, float]()
    for method in (*methods, "pooled", "local"):
        folded[method], settings = tuned(method, tables, seed)
        found[method] = scored(fitted(method, settings, tables, seed), tables)
    whole = {"pooled": concatenate([*tables.values()])}
    exact = driven("horizontal.glm", params("glm", {}), whole, seed)[0]
    found["pooled, exact"] = scored(dict.fromkeys(tables, exact), tables)
    alike = [method for method in methods if not REGISTRY[f"horizontal.{method}"].personal]
    best = {name: max(among, key=lambda one: folded[one]) for name, among in zip(CHOSEN, (methods, alike), strict=True)}
    return {"scores": {**found, **{name: found[method] for name, method in best.items()}}, "chosen": best}


def masked(quick: bool) -> Row:
    """The whole runtime, sums masked and not: how far the weights are apart."""
    base, tables = Plan.load(EXAMPLE / "plan.yaml").to_json(), split(0)
    schema = next(iter(tables.values())).schema.model_dump(mode="json")
    settings = {**LEARNER, **RATES[0], "rounds": 2 if quick else 20}
    weights = []
    for protection in ("plain", "secagg"):
        own = {"program": "horizontal.fedavg", "params": params("fedavg", settings), "protection": protection}
        plan = Plan.from_json({**base, **own, "schema": schema, "recipe": {}})
        found = learn(plan, tables)
        weights.append(found.arrays["weights"])
    apart = float(np.abs(weights[1] - weights[0]).max())
    return Row("fedavg under secagg against plain", apart, "in a weight", limit=1e-6, note="by the whole runtime")


def table(found: list[dict[str, Any]], methods: tuple[str, ...]) -> list[Row]:
    """One row for each method, by macro accuracy; and the differences that must not be."""
    rows, macro = [], {}
    for method in ("pooled", "pooled, exact", "local", *methods, *CHOSEN):
        scores = [one["scores"][method] for one in found]
        macro[method] = np.array([one["macro"] for one in scores])
        means = {name: np.mean([one[name] for one in scores]) for name in scores[0]}
        note = " ".join(f"{means[name]:.3f}" for name in TEST_ROWS) + f", pooled test {means['pooled']:.3f}"
        note += f"; sd of macro {macro[method].std(ddof=1):.3f}"
        published = PUBLISHED.get(method)
        note += f" (FLamby: {published[1]})" if published else ""
        rows.append(Row(method, float(macro[method].mean()), "macro", published and published[0], note=note))
    for better, worse in (
        *product(CHOSEN[:1], ("pooled", "pooled, exact")),
        (CHOSEN[1], "pooled"),
        ("fedavg", "pooled"),
    ):
        gap, half = interval(100 * (macro[worse] - macro[better]))
        note = f"95 % CI {gap - half:.2f} to {gap + half:.2f}, {len(found)} paired splits"
        if better in CHOSEN and worse == "pooled":
            often = Counter(one["chosen"][better] for one in found)
            note += "; chosen: " + ", ".join(f"{name} {times}" for name, times in often.most_common())
        within = 0.0 if better == CHOSEN[0] else half
        rows.append(Row(f"{worse} − {better}", gap, "points macro", limit=within, note=note))
    return rows


def measure(quick: bool) -> list[Row]:
    """All of it."""
    load_installed()
    known = tuple(name for name in GRIDS if f"horizontal.{name}" in REGISTRY)
    methods, seeds = (("fedavg", "fedper"), 3) if quick else (known, SEEDS)
    found = []
    with ProcessPoolExecutor(2) as pool:
        for one in pool.map(measured, range(seeds), repeat(methods)):
            found.append(one)
            print(f"split {len(found)}: {one['chosen']}", file=sys.stderr, flush=True)
    return [*table(found, methods), masked(quick)]


if __name__ == "__main__":
    main("heart", ("numpy", "torch", "scipy"), measure, SEED)
