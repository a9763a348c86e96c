"""Six emergency offices' messages, leave-one-event-out: what five offices learn, scored on an event none has seen.

``federated`` is the example's plan under its default protection; ``pooled`` the same learner with all five offices'
messages in one place; ``local`` with each office's own, of which the mean and the best (known only afterwards) are
shown; ``tf-idf`` is pooled logistic regression on TF-IDF of words, as scikit-learn makes both by default. All see
their messages equally often; nothing is chosen by the event that is left out. Data: $ATOLL_DATA or ../shared/data.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from atoll.contract.plan import Plan
from atoll.data.site_data import SiteData
from atoll.data.table import Table, concatenate
from atoll.models.model import from_spec
from atoll.runtime.sandbox import read_sites
from atoll.statistics.scores import binary_metrics
from benchmarks.learning import learn
from benchmarks.table import Row, main

SEED = 7
EXAMPLE = Path(__file__).parents[1] / "examples" / "crisis-text"
DATA = Path(os.environ.get("ATOLL_DATA", Path(__file__).parents[2] / "shared" / "data"))
LABEL = "on_topic"
Score = dict[str, float]
"""Accuracy and AUC."""


def planned(rounds: int | None, sites: int) -> Plan:
    """The example's plan with all rows for training; of one site, without protection."""
    content = Plan.load(EXAMPLE / "plan.yaml").to_json()
    content["run"] |= {"seed": SEED, "holdout": 0.0, "evaluate": False, "deadline_s": 600}
    content["cohort"] = {"min_sites": sites, "on_dropout": "fail"}
    content["params"] |= {} if rounds is None else {"rounds": rounds}
    return Plan.from_json({**content, **({"protection": "plain"} if sites == 1 else {})})


def offices() -> dict[str, Table]:
    """Each office's messages, read as its site would."""
    plan = planned(None, 1)
    with tempfile.TemporaryDirectory() as folder:
        made = [sys.executable, str(EXAMPLE / "prepare.py"), folder, "--data", str(DATA)]
        subprocess.run(made, check=True)
        sources = read_sites(Path(folder) / "sites.yaml")
        return {name: SiteData.read(spec, plan, Path(folder), name).parts({})[0] for name, spec in sources.items()}


def learned(tables: dict[str, Table], rounds: int | None) -> tuple[Any, dict[str, Any]]:
    """(the model of a run over *tables*, its result.json)."""
    plan = planned(rounds, len(tables))
    found = learn(plan, tables)
    return from_spec(found.result["model"]["spec"], plan.table, found.arrays), found.result


def scored(probability: Any, table: Table) -> Score:
    """Of predicted probabilities."""
    found = binary_metrics(table[LABEL], np.asarray(probability))
    return {"accuracy": found["accuracy"], "auc": found["auc"]}


def tf_idf(rest: Table, test: Table) -> Score:
    """Logistic regression on TF-IDF."""
    words = TfidfVectorizer()
    fitted = LogisticRegression(max_iter=1000).fit(words.fit_transform(rest["tweet"]), rest[LABEL])
    return scored(fitted.predict_proba(words.transform(test["tweet"]))[:, 1], test)


def measure(quick: bool) -> list[Row]:
    """Every event left out once; with --quick one of them, and few rounds."""
    tables, rounds = offices(), 2 if quick else None
    alone = {name: learned({name: table}, rounds)[0] for name, table in tables.items()}
    found: list[Row] = []
    kinds: dict[str, list[Score]] = {}
    for out in [*tables][-1:] if quick else tables:
        test, rest = tables[out], {name: table for name, table in tables.items() if name != out}
        start = time.perf_counter()
        model, result = learned(rest, rounds)
        taken = time.perf_counter() - start
        together = concatenate(list(rest.values()))
        local = [scored(alone[name].predict(test), test) for name in rest]
        scores = {
            "federated": scored(model.predict(test), test),
            "pooled": scored(learned({"pooled": together}, rounds)[0].predict(test), test),
            "local, mean of five": {name: float(np.mean([s[name] for s in local])) for name in ("accuracy", "auc")},
            "local, best of five": {name: max(s[name] for s in local) for name in ("accuracy", "auc")},
            "tf-idf": tf_idf(together, test),
        }
        sent = result["wire"]["from_sites_bytes"] / len(rest) / 1e6
        for kind, score in scores.items():
            note = f"{result['protection']}, {sent:.1f} MB from an office, {taken:.0f} s" if kind == "federated" else ""
            found.append(row(f"{out} left out, {kind}", score, scores["pooled"], note))
            kinds.setdefault(kind, []).append(score)
            print(found[-1], file=sys.stderr, flush=True)
    mean = {kind: {n: float(np.mean([s[n] for s in each])) for n in each[0]} for kind, each in kinds.items()}
    return [*found, *(row(f"mean over events, {kind}", score, mean["pooled"], "") for kind, score in mean.items())]


def row(name: str, score: Score, pooled: Score, note: str) -> Row:
    """Accuracy in per cent; the peer is pooled learning."""
    told = f"AUC {score['auc']:.3f}" + (f"; {note}" if note else "")
    return Row(name, 100 * score["accuracy"], "% right", 100 * pooled["accuracy"], note=told)


if __name__ == "__main__":
    main("crisis_text", ("numpy", "torch", "scikit-learn"), measure, SEED)
