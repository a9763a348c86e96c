"""The crisis-text example: offices are the file's events, and five of them learn for the sixth."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from atoll.contract.plan import Plan
from atoll.runtime.sandbox import read_sites, run_sandbox

pytest.importorskip("torch")
EXAMPLE = Path(__file__).parents[2] / "examples" / "crisis-text"


@pytest.fixture(scope="module")
def folder(atoll_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six offices' files, and sites without Queensland."""
    out = tmp_path_factory.mktemp("crisis")
    made = [sys.executable, str(EXAMPLE / "prepare.py"), str(out), "--data", str(atoll_data)]
    subprocess.run([*made, "--without", "queensland"], check=True)
    return out


def test_every_event_is_an_office(folder: Path, atoll_data: Path) -> None:
    """Counted a second time by pandas; ids are text, and no cell is a missing one."""
    whole = pd.read_csv(
        atoll_data / "crisislex" / "crisislex_t6_ontopic_offtopic.csv.gz",
        dtype={"tweet_id": str},
        keep_default_na=False,
    )
    assert whole["tweet_id"].str.fullmatch(r"\d+").all()
    wanted = sorted((len(rows), int((rows["label"] == "on-topic").sum())) for _, rows in whole.groupby("event"))
    offices = {path.stem: pd.read_csv(path, keep_default_na=False) for path in folder.glob("*.csv")}
    assert sorted((len(rows), int(rows["on_topic"].sum())) for rows in offices.values()) == wanted
    assert sorted(pd.concat(offices.values())["tweet"]) == sorted(whole["tweet"])
    named = yaml.safe_load((folder / "sites.yaml").read_text())
    assert list(named) == ["sandy", "alberta", "boston", "oklahoma", "texas"]


@pytest.mark.slow
def test_five_offices_learn_for_the_sixth(folder: Path, tmp_path: Path) -> None:
    """Of 1,000 messages each, in 4 rounds, under the default protection: better than chance, by far."""
    sources = read_sites(folder / "sites.yaml")
    for name in (*sources, "queensland"):
        rows = pd.read_csv(folder / f"{name}.csv", keep_default_na=False)
        rows[::10].to_csv(tmp_path / f"{name}.csv", index=False)
    plan = Plan.load(EXAMPLE / "plan.yaml")
    plan = plan.model_copy(update={"params": {**plan.params, "rounds": 4}})
    result, _ = run_sandbox(plan, sources, tmp_path, tmp_path / "out")
    assert result["protection"] == "secagg"
    assert result["metrics"]["federated"]["auc"] > 0.75
    scoring = [sys.executable, str(EXAMPLE / "score.py"), str(tmp_path / "out" / "model")]
    told = subprocess.run(
        [*scoring, str(tmp_path / "queensland.csv")], check=True, capture_output=True, text=True
    ).stdout
    assert told.startswith("1004 messages: accuracy 0.")
    assert float(told.split("AUC ")[1]) > 0.75
