"""The heart-disease example on the real files of four hospitals, against a pooled fit that shares no code with it.

pandas reads the files, the documented split is written again here, cells are imputed with the
means of the pooled training rows, and statsmodels fits the logistic regression.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
import yaml
from scipy.stats import ks_2samp
from sklearn import metrics as sk

from atoll.contract.plan import Plan
from atoll.data.sources import SourceSpec

HEART = Path(__file__).parents[2] / "examples" / "heart"
NAMES = ["age", "sex", "cp", "trestbps", "chol", "fbs", "restecg", "thalach", "exang", "oldpeak", "slope", "ca", "thal"]
FILES = {"cleveland": "cleveland", "hungary": "hungarian", "switzerland": "switzerland", "va": "va"}
FEATURES = NAMES[:10]
IMPUTED = ["trestbps", "chol", "fbs", "restecg", "thalach", "exang", "oldpeak"]


def hospital(folder: Path, site: str) -> pd.DataFrame:
    path = folder / "heart-disease-uci" / f"processed.{FILES[site]}.data"
    frame = pd.read_csv(path, header=None, names=[*NAMES, "num"], na_values="?").astype(float)
    frame[["chol", "trestbps"]] = frame[["chol", "trestbps"]].replace(0, np.nan)  # nobody lives with 0
    frame["disease"] = (frame["num"] > 0).astype(int)
    frame["held_out"] = False
    key = int.from_bytes(hashlib.sha256(f"atoll split\0{7}\0{site}".encode()).digest()[:16], "little")
    random = np.random.Generator(np.random.Philox(key=key))
    for label in (0, 1):
        rows = np.flatnonzero(frame["disease"].to_numpy() == label)
        chosen = random.permutation(rows)[: round(len(rows) / 3)]
        frame.loc[chosen, "held_out"] = True
    return frame


@pytest.fixture(scope="module")
def pooled(atoll_data: Path) -> dict[str, Any]:
    """The pooled study: training and held-out rows by site, imputed, and the reference fit."""
    frames = {site: hospital(atoll_data, site) for site in FILES}
    training = pd.concat([frame[~frame["held_out"]] for frame in frames.values()])
    means = training[IMPUTED].mean()
    frames = {site: frame.fillna(means.to_dict()) for site, frame in frames.items()}
    training = pd.concat([frame[~frame["held_out"]] for frame in frames.values()])
    x = sm.add_constant(training[FEATURES].to_numpy())
    fit = sm.Logit(training["disease"].to_numpy(), x).fit(disp=0, method="newton", tol=1e-14, maxiter=100)
    scores = {
        site: fit.predict(sm.add_constant(frame.loc[frame["held_out"], FEATURES].to_numpy(), has_constant="add"))
        for site, frame in frames.items()
    }
    labels = {site: frame.loc[frame["held_out"], "disease"].to_numpy() for site, frame in frames.items()}
    return {"means": means, "rows": len(training), "fit": fit, "scores": scores, "labels": labels}


def run(federation: Any, folder: Path, order: list[str]) -> dict[str, Any]:
    specs = yaml.safe_load((HEART / "sites.yaml").read_text())
    sources = {site: SourceSpec(**specs[site]) for site in order}
    return federation.run(Plan.load(HEART / "plan.yaml"), sources, base=folder / "heart-disease-uci")


@pytest.fixture
def outcome(federation: Any, atoll_data: Path) -> dict[str, Any]:
    return run(federation, atoll_data, list(FILES))


def test_the_study_equals_the_pooled_one(outcome: dict[str, Any], pooled: dict[str, Any]) -> None:
    assert outcome["fitted"]["1"] == pytest.approx(pooled["means"].to_dict(), rel=1e-12)
    fit, result = pooled["fit"], outcome["result"]
    assert result["rows"] == pooled["rows"] == 613
    assert [row["name"] for row in result["table"]] == ["intercept", *FEATURES]
    for row, value, error, p in zip(result["table"], fit.params, fit.bse, fit.pvalues, strict=True):
        assert row["coefficient"] == pytest.approx(value, abs=1e-8)
        assert row["std_error"] == pytest.approx(error, rel=1e-7)
        assert row["p_value"] == pytest.approx(p, rel=1e-5)
    assert result["iterations"] <= 10


def test_its_evaluation_equals_scikit_learns(outcome: dict[str, Any], pooled: dict[str, Any]) -> None:
    y = np.concatenate(list(pooled["labels"].values()))
    p = np.concatenate(list(pooled["scores"].values()))
    got = outcome["evaluation"]["pooled"]
    assert abs(got["auc"] - sk.roc_auc_score(y, p)) <= got["auc_error"] < 1e-3
    assert got["accuracy"] == pytest.approx(sk.accuracy_score(y, p >= 0.5), rel=1e-12)
    assert got["f1"] == pytest.approx(sk.f1_score(y, p >= 0.5), rel=1e-12)
    assert got["log_loss"] == pytest.approx(sk.log_loss(y, p), rel=1e-7)
    assert list(outcome["evaluation"]["own"]) == list(FILES)
    for site, own in outcome["evaluation"]["own"].items():
        y, p = pooled["labels"][site], pooled["scores"][site]
        assert own["rows"] == len(y)
        assert own["auc"] == pytest.approx(sk.roc_auc_score(y, p), rel=1e-12)
        assert own["ks"] == pytest.approx(ks_2samp(p[y == 1], p[y == 0]).statistic, rel=1e-12)
        assert own["brier"] == pytest.approx(np.mean((p - y) ** 2), rel=1e-7)


def test_its_ledgers_hold_and_nothing_was_clipped(federation: Any, outcome: dict[str, Any]) -> None:
    ledgers = federation.ledgers()
    assert all(not ledger.unacknowledged for ledger in ledgers.values())
    bodies = federation.releases()
    assert len(bodies) == 4 * (4 * (1 + 1 + outcome["result"]["iterations"] + 1) + 1)  # a sum has four exchanges
    assert {body["protection"] for body in bodies if body["reduce"] == "sum"} == {"secagg"}
    assert all(body["clipped"] in (0, None) for body in bodies)  # None: the site's own secret


def test_the_order_of_hospitals_changes_no_more_than_rounding(
    federation: Any, outcome: dict[str, Any], atoll_data: Path
) -> None:
    again = run(federation, atoll_data, list(FILES))
    assert again["result"]["table"] == outcome["result"]["table"]  # the same order: the same bits
    turned = run(federation, atoll_data, list(reversed(FILES)))
    for one, other in zip(turned["result"]["table"], outcome["result"]["table"], strict=True):
        assert one["coefficient"] == pytest.approx(other["coefficient"], rel=1e-9)
