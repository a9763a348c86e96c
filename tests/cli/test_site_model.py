"""``atoll site model``: a site's engineers take the site's own model out of its journal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner, Result

from atoll.cli.main import app
from atoll.contract.errors import AtollError
from atoll.crypto.identity import Identity
from atoll.models import stored


def home_of(folder: Path, journal: Path) -> Path:
    """A site's folder with *journal*, less what only the network needs."""
    folder.mkdir()
    Identity.generate("s1").save(folder / "identity.key")
    (folder / "ca.pem").write_text("")
    (folder / "site.yaml").write_text(yaml.safe_dump({"name": "s1", "address": "-", "coordinator_key": "00" * 32}))
    (folder / "policy.yaml").write_text("{}")
    shutil.copy(journal, folder / "journal.db")
    return folder


def finished(federation: Any, program: str, folder: Path, **more: Any) -> tuple[Path, Any]:
    """(a site's folder after a run, the site's own weights)."""
    random = np.random.default_rng(2)
    columns = {"x": {"range": [-9, 9]}, "y": {"dtype": "integer", "values": [0, 1], "role": "label"}}
    tables = {}
    for i in range(3):
        x = random.normal(i, 1, 30)
        tables[f"s{i}"] = federation.table({"x": x, "y": (x > random.normal(1, 1, 30)) * 1.0}, columns)
    params = {"target": "y", "rounds": 2, **({"family": "logistic", "features": ["x"]} | more)}
    federation.run(federation.plan(program, params, tables, run={"holdout": 0.3, "seed": 1}), tables)
    own = federation.journals["s1"].personal(federation.run_id).arrays.get("weights")
    federation.journals["s1"].close()
    return home_of(folder / "s1", federation.home / "s1.db"), own


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "400"})


@pytest.mark.parametrize("network", [False, True])
def test_a_sites_own_model_is_written_as_every_model_is(federation: Any, tmp_path: Path, network: bool) -> None:
    more: dict[str, Any] = {}
    if network:
        pytest.importorskip("torch")
        more = {"family": None, "features": [], "model": {"kind": "mlp", "features": ["x"], "hidden": [3]}}
    home, own = finished(federation, "horizontal.ditto", tmp_path, **more)
    done = call("site", "model", federation.run_id[:8], "--out", tmp_path / "own", "--home", home)
    assert done.exit_code == 0, done.output
    assert f"run {federation.run_id}" in done.output
    model, schema, about = stored.load(tmp_path / "own")
    assert model.weights.tobytes() == own.tobytes()
    assert (about["run"], about["model"]["site"], set(schema.columns)) == (federation.run_id, "s1", {"x", "y"})
    assert "trained together by 3 sites" in (tmp_path / "own" / "README.md").read_text()
    json.dumps(about, allow_nan=False)


@pytest.mark.parametrize(
    ("program", "run", "code"),
    [("horizontal.fedavg", "", "site.no-personal-model"), ("horizontal.ditto", "nothing", "run.unknown")],
)
def test_there_may_be_none(federation: Any, tmp_path: Path, program: str, run: str, code: str) -> None:
    home, _ = finished(federation, program, tmp_path)
    done = call("site", "model", run, "--out", tmp_path / "own", "--home", home)
    assert isinstance(done.exception, AtollError) and done.exception.code == code
    assert not (tmp_path / "own").exists()
