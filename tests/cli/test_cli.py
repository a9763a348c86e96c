"""The command line on one machine: demo, run, check, programs, ledger, help, as people start it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tests import forked
from typer.main import get_command
from typer.testing import CliRunner

from atoll.cli.main import app
from atoll.contract.plan import Plan
from atoll.models import stored

EXAMPLES = Path(__file__).parents[2] / "examples"
ENVIRONMENT = forked.ENVIRONMENT
KEYS = {"study", "program", "plan_hash", "transport", "protection", "seed", "rounds", "seconds", "sites", "wire",
        "metrics", "privacy"}  # fmt: skip
BINARY = {"auc", "accuracy", "log_loss"}


def atoll(*arguments: str | Path, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    """``python -m atoll`` with *arguments*; it must exit with *code*, and never with a traceback."""
    if not environment:
        done = forked.run(*arguments)
    else:  # it may say what is imported, so it is an interpreter's of its own
        command = [sys.executable, "-m", "atoll", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env={**ENVIRONMENT, **environment}, check=False)
    told = f"atoll {' '.join(map(str, arguments))} → {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert done.returncode == code, told
    assert "Traceback" not in done.stdout + done.stderr, told
    return done


def check_result(out: Path, sites: set[str], transport: str) -> dict[str, Any]:
    """A binary model's result in *out* has everything it should have; returns it."""
    result = json.loads((out / "result.json").read_text())
    assert set(result) >= KEYS
    assert result["transport"] == transport and result["protection"] == result["privacy"]["protection"] == "secagg"
    assert len(result["plan_hash"]) == 64 and result["rounds"] > 3 and result["seconds"] > 0
    assert set(result["sites"]) == sites and all(site["rows"] > 0 for site in result["sites"].values())
    assert result["wire"]["to_sites_bytes"] > 0 < result["wire"]["from_sites_bytes"]
    metrics = result["metrics"]
    assert set(metrics["federated"]) >= BINARY <= set(metrics["pooled"])
    assert set(metrics["per_site"]) == sites
    for found in metrics["per_site"].values():
        assert set(found) >= {"federated", "local"} and set(found["federated"]) >= BINARY
        assert not found["local"] or set(found["local"]) >= BINARY
    for name in BINARY:  # Newton's method on sums is Newton's method on the pooled rows
        assert metrics["federated"][name] == pytest.approx(metrics["pooled"][name], rel=1e-9)
    assert (out / "report.html").is_file()
    model = json.loads((out / "model" / "model.json").read_text())
    assert model["plan_hash"] == result["plan_hash"]
    fitted, _, _ = stored.load(out / "model")
    assert len(fitted.weights) == 1 + len(model["model"]["spec"]["features"])
    assert {path.stem for path in (out / "ledger").iterdir()} == {"coordinator", *sites}
    return dict(result)


# ---------------------------------------------------------------- demo, run


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(result folder, what was printed) of a demo."""
    out = tmp_path_factory.mktemp("demo") / "result"
    return out, atoll("demo", "--out", out).stdout


def test_demo(demo: tuple[Path, str]) -> None:
    out, told = demo
    result = check_result(out, {"north", "harbour", "university"}, "local")
    assert result["metrics"]["federated"]["auc"] > 0.9
    for part in (
        "patients",
        "statistics of",
        "coefficient of",
        "What left each hospital",
        "ledgers verified",
        str(out),
    ):
        assert part in told, part
    told = atoll("check", out / "model.plan.yaml", "--data", out).stdout
    assert told.count("keeps the contract") == 3 and "nothing blocks this plan" in told


def test_ledgers_verify_until_one_byte_is_changed(demo: tuple[Path, str], tmp_path: Path) -> None:
    files = sorted((demo[0] / "ledger").glob("*.jsonl"))
    assert "intact" in atoll("ledger", "verify", *files).stdout
    shown = json.loads(atoll("ledger", "verify", "--json", *files).stdout)
    assert shown["intact"] is True and shown["broken"] == []
    assert {led["party"]: led["unacknowledged"] for led in shown["ledgers"]} == {path.stem: [] for path in files}
    generator = np.random.default_rng(5)
    broken = []
    for path in files:
        content = bytearray(path.read_bytes())
        place = int(generator.integers(len(content)))
        line = content[:place].count(b"\n") + 1
        content[place] ^= 1
        (tmp_path / path.name).write_bytes(content)
        broken.append((path.name, line))
    told = atoll("ledger", "verify", *(tmp_path / path.name for path in files), code=1).stderr
    for name, line in broken:
        assert f"broken {name}, line {line}: " in told, (name, line, told)
    one, *others = files
    told = atoll("ledger", "verify", tmp_path / one.name, *others, code=1).stderr
    assert told.count("broken") == 1 and f"broken {one.name}, line " in told
    cut = tmp_path / "north.jsonl"
    cut.write_bytes(b"".join((demo[0] / "ledger" / "north.jsonl").read_bytes().splitlines(keepends=True)[:-4]))
    others = [path for path in files if path.stem != "north"]
    assert "north.jsonl, line " in atoll("ledger", "verify", cut, *others, code=1).stderr


@pytest.fixture(scope="module")
def heart(atoll_data: Path) -> Path:
    """The heart study's real tables."""
    folder = atoll_data / "heart-disease-uci"
    if not folder.is_dir():
        pytest.skip(f"no heart-disease data: {folder} is not there")
    return folder


def run_heart(data: Path, out: Path, transport: str) -> dict[str, Any]:
    """The example study on real data; returns its result."""
    plan = EXAMPLES / "heart" / "plan.yaml"
    done = atoll("run", plan, "--data", data, "--transport", transport, "--out", out, "--json")
    result = check_result(out, {"cleveland", "hungary", "switzerland", "va"}, transport)
    assert json.loads(done.stdout) == result, "stdout is JSON, and nothing else"
    return result


@pytest.fixture(scope="module")
def heart_result(heart: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """(folder, result) of the heart study in one process."""
    out = tmp_path_factory.mktemp("heart") / "out"
    return out, run_heart(heart, out, "local")


def test_heart(heart_result: tuple[Path, dict[str, Any]]) -> None:
    _, result = heart_result
    rows = {"cleveland": 303, "hungary": 294, "switzerland": 123, "va": 200}
    assert {name: site["rows"] for name, site in result["sites"].items()} == rows
    assert result["study"] == "heart-disease" and result["seed"] == 7
    assert result["metrics"]["federated"]["auc"] > 0.85


@pytest.mark.slow
def test_heart_is_the_same_with_a_process_per_party(
    heart: Path, heart_result: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    local_out, local = heart_result
    result = run_heart(heart, tmp_path, "grpc")
    assert {key for key in result if result[key] != local[key]} == {"run", "transport", "seconds"}
    numbers = "model/model.safetensors"
    assert (tmp_path / numbers).read_bytes() == (local_out / numbers).read_bytes()
    shown = json.loads(atoll("ledger", "verify", "--json", *sorted((tmp_path / "ledger").iterdir())).stdout)
    assert shown["intact"] is True and not any(ledger["unacknowledged"] for ledger in shown["ledgers"])
    assert all('"closed"' in path.read_text().splitlines()[-1] for path in (tmp_path / "ledger").iterdir())


# ---------------------------------------------------------------- a small study to be broken in many ways

SITES = ("east", "south", "west")
PLAN: dict[str, Any] = {
    "atoll": 1,
    "name": "small",
    "schema": "schema.yaml",
    "program": "horizontal.glm",
    "params": {"family": "logistic", "target": "ill", "features": ["age", "dose"], "l2": 0.1},
    "protection": "plain",
    "run": {"holdout": 0.25},
}
COLUMNS: dict[str, Any] = {
    "age": {"dtype": "real", "range": [0, 120], "unit": "year"},
    "dose": {"dtype": "real", "range": [0, 10], "unit": "mg"},
    "ill": {"dtype": "integer", "values": [0, 1], "role": "label"},
}


class Study:
    """A plan, a schema and three tables in a folder; each part can be replaced."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        generator = np.random.default_rng(2)
        for site in SITES:
            age, dose = generator.uniform(20, 90, 60).round(1), generator.uniform(0, 10, 60).round(2)
            ill = (generator.random(60) < 1 / (1 + np.exp(-(age - 55) / 20 - (dose - 5) / 3))).astype(int)
            self.table(site, {"age": age, "dose": dose, "ill": ill})
        self.plan()
        self.sites(*SITES)

    def table(self, site: str, columns: Mapping[str, Any]) -> None:
        rows = zip(*columns.values(), strict=True)
        lines = [",".join(columns), *(",".join(str(cell) for cell in row) for row in rows)]
        (self.folder / f"{site}.csv").write_text("\n".join([*lines, ""]))

    def columns(self, site: str) -> dict[str, list[str]]:
        head, *lines = (self.folder / f"{site}.csv").read_text().splitlines()
        cells = zip(*(line.split(",") for line in lines), strict=True)
        return {name: list(column) for name, column in zip(head.split(","), cells, strict=True)}

    def plan(self, columns: Mapping[str, Any] = COLUMNS, **changes: Any) -> None:
        """PLAN with *changes*; one whose value is None is left out."""
        content = {key: value for key, value in {**PLAN, **changes}.items() if value is not None}
        (self.folder / "plan.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        schema = {"name": "small", "max_rows": 1000, "columns": dict(columns)}
        (self.folder / "schema.yaml").write_text(yaml.safe_dump(schema, sort_keys=False))

    def sites(self, *names: str) -> None:
        (self.folder / "sites.yaml").write_text(yaml.safe_dump({name: {"path": f"{name}.csv"} for name in names}))

    def check(self, *arguments: str, code: int = 1, **environment: str) -> str:
        """What ``atoll check`` says (stderr and stdout)."""
        plan = self.folder / "plan.yaml"
        done = atoll("check", plan, "--data", self.folder, *arguments, code=code, **environment)
        return done.stderr + done.stdout

    def run(self, *arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
        """``atoll run`` into the folder's out/."""
        plan, out = self.folder / "plan.yaml", self.folder / "out"
        return atoll("run", plan, "--data", self.folder, "--out", out, *arguments, code=code)


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """A sound study, to be broken."""
    return Study(tmp_path)


def test_check_finds_nothing_in_a_good_plan(study: Study) -> None:
    found = json.loads(study.check("--json", code=0))
    assert found["problems"] == [] and found["warnings"] == []
    assert found["sites"] == {site: {"rows": 60, "ok": True, "dropped": {}} for site in SITES}
    assert found["plan"] == "small" and len(found["plan_hash"]) == 64


def test_check_lists_every_unknown_key_and_wrong_value(study: Study) -> None:
    study.plan(protecton="plain", protection=None, cohort={"minsites": 2}, run={"holdout": 1.5}, name="Not a name")
    told = study.check()
    for part in ("unknown key 'protecton'", "did you mean 'protection'?", "'cohort.minsites'",
                 "did you mean 'min_sites'?", "run.holdout", "name:", "4 problems"):  # fmt: skip
        assert part in told, f"{part} is not in {told}"


def test_check_lists_problems_of_plan_cohort_and_tables(study: Study) -> None:
    study.plan(program="horizontal.gml", protection="plane", cohort={"min_sites": 9},
               recipe={"steps": [{"step": "impute", "columns": ["weight"], "with": "mean"}]})  # fmt: skip
    study.table("south", {**study.columns("south"), "age": [417.25, "x", *study.columns("south")["age"][2:]]})
    told = study.check()
    for part in ("no program 'horizontal.gml'", "did you mean 'horizontal.glm'?", "no protection 'plane'", "'weight'",
                 "demands 9 sites, and 3 are there", "site south", "column 'age': 1 of 60 cells are not numbers",
                 "column 'age': 1 of 60 cells are outside [0, 120] year"):  # fmt: skip
        assert part in told, f"{part} is not in {told}"
    assert told.count("keeps the contract") == 2 and told.count(" blocked ") == 1 and "417.25" not in told


PLUGIN = '''
"""A program of somebody else's, found by its entry point."""

from atoll.contract.program import ProgramParams, handler, program
from atoll.contract.rounds import Round, Sum, count


@program("outside.demanding", needs={"sum", "bounded-weight"})
class Demanding:
    """Needs what no protection in this plan offers."""

    class Params(ProgramParams):
        pass

    def __init__(self, params):
        self.params = params

    def coordinate(self, cohort, start=None):
        total = yield Round("rows", Sum(), {"n": count()})
        return {"rows": int(total["n"])}

    @handler("rows")
    def rows(self, site, task):
        return {"n": len(site.table)}
'''


def test_check_refuses_illegal_combinations(study: Study) -> None:
    installed = study.folder / "installed"
    (installed / "outside-1.dist-info").mkdir(parents=True)
    (installed / "outside_programs.py").write_text(PLUGIN)
    (installed / "outside-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1\n")
    entry = "[atoll.programs]\ndemanding = outside_programs\n"
    (installed / "outside-1.dist-info" / "entry_points.txt").write_text(entry)
    path = {"PYTHONPATH": os.pathsep.join([str(installed), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}
    study.plan(program="outside.demanding", params={})
    told = study.check(**path)
    assert "plan.illegal-combination" in told and "choose another protection or program" in told
    assert (
        "outside.demanding needs a declared bound on every site's weight, which protection 'plain' does not offer"
        in told
    )
    assert "outside.demanding@1" in atoll("programs", **path).stdout


def test_missing_files(study: Study) -> None:
    assert "there is no plan file" in atoll("check", study.folder / "none.yaml", code=1).stderr
    (study.folder / "west.csv").unlink()
    told = study.check()
    assert "site west" in told and "no readable file west.csv" in told and "check the site's source" in told
    (study.folder / "schema.yaml").unlink()
    assert "there is no schema file" in study.check()


def test_missing_and_additional_columns(study: Study) -> None:
    east, south, west = (study.columns(site) for site in SITES)
    study.table("south", {"age": south["age"], "dose": south["dose"]})
    study.table("east", {"agee": east["age"], "dose": east["dose"], "ill": east["ill"]})
    study.table("west", {**west, "postcode": ["1"] * 60})
    told = study.check()
    for part in ("site east", "column 'age' is missing; did the table rename it to 'agee'?", "add or rename the column",
                 "site south", "column 'ill' is missing", "site west", "column 'postcode' is not in the schema",
                 "role: ignore"):  # fmt: skip
        assert part in told, f"{part} is not in {told}"


def test_sites_that_are_not_enough(study: Study) -> None:
    study.sites("east")
    told = study.check()
    assert "the plan demands 3 sites, and 1 are there" in told and "lower min_sites" in told
    study.plan(cohort={"min_sites": 1})
    assert "1 sites" in study.run().stdout
    study.plan(cohort={"min_sites": 4})
    study.sites(*SITES)
    told = study.run(code=1).stderr
    assert "the plan demands 4 sites, and 3 are there" in told
    (study.folder / "sites.yaml").unlink()
    told = study.run(code=1).stderr
    assert "no SITES.yaml was given" in told and "--sites SITES.yaml" in told


def test_constant_label(study: Study) -> None:
    for site in SITES[:2]:
        study.table(site, {**study.columns(site), "ill": ["1"] * 60})
    assert "nothing blocks this plan" in study.check(code=0), "the third site knows both"
    study.table("west", {**study.columns("west"), "ill": ["1"] * 60})
    told = study.check()
    assert "'ill' has the same value in every row of the cohort" in told and "choose another target" in told
    told = study.run(code=1).stderr
    assert "schema.constant-label" in told and "'ill'" in told and "choose another target" in told


def test_label_absent_at_one_site(study: Study) -> None:
    south = study.columns("south")
    study.table("south", {**south, "ill": [""] * 60})
    told = study.check()
    assert "site south" in told and "column 'ill': every label is missing" in told and "check the label column" in told
    told = study.run(code=1).stderr
    assert "site south" in told and "schema.no-labels" in told and "ill" in told


def test_seed_and_errors_for_machines(study: Study) -> None:
    found = json.loads(study.run("--seed", "4", "--json").stdout)
    plan = Plan.load(study.folder / "plan.yaml")
    assert found["seed"] == 4 and plan.run.seed == 0
    assert (
        found["plan_hash"] == plan.model_copy(update={"run": plan.run.model_copy(update={"seed": 4})}).hash != plan.hash
    )
    done = study.run("--seed", "-1", "--json", code=1)
    shown = json.loads(done.stdout)
    assert shown["error"] == "PlanError" and shown["field"] == "run.seed" and "run.seed" in done.stderr


# ---------------------------------------------------------------- protection and privacy


def test_check_estimates_every_protection(study: Study) -> None:
    found = json.loads(study.check("--json", code=0))["protections"]
    assert {cost["protection"] for cost in found} == {"plain", "secagg", "paillier", "ckks"}
    able = [cost for cost in found if not cost["refused"]]
    assert {"plain", "secagg", "paillier"} <= {cost["protection"] for cost in able} and able == found[: len(able)]
    assert all(cost["seconds"] > 0 < cost["bytes"] for cost in able)
    assert [cost["seconds"] for cost in able] == sorted(cost["seconds"] for cost in able)
    size = {cost["protection"]: cost["bytes"] for cost in able}
    assert size["plain"] < size["secagg"] < size["paillier"]
    told = study.check(code=0)
    assert "estimates for 3 sites" in told and told.count("recommended") == 1 and told.count("chosen") == 1


@pytest.mark.parametrize(
    ("privacy", "told"),
    [
        ({"unit": "record", "epsilon": 0, "delta": 1e-6}, "privacy.epsilon"),
        ({"epsilon": 1, "delta": 1e-6}, "privacy.unit"),
        ({"unit": "record", "epsilon": 1, "delta": 0}, "delta may be 0 only with laplace or geometric noise"),
        ({"unit": "record", "epsilon": 1, "delta": 1e-6, "colluding": 3}, "nobody's noise is sure to stay secret"),
    ],
)
def test_check_refuses_a_promise_that_cannot_be_kept(study: Study, privacy: dict[str, Any], told: str) -> None:
    study.plan(privacy=privacy, protection="secagg")
    assert told in study.check()


def test_a_private_run_says_so_everywhere(study: Study) -> None:
    study.plan(privacy={"unit": "record", "epsilon": 5, "delta": 0.01}, protection="secagg")
    result = json.loads(study.run("--json").stdout)
    privacy = result["privacy"]
    assert privacy["noised"] and privacy["survivors"] == 3 and privacy["unit"] == "record"
    assert 4.9 < privacy["spent"] <= privacy["epsilon"] == 5
    assert privacy["warnings"] == []  # how many rows there are is not told under privacy
    assert "the coordinator saw only the sum of 3 sites" in privacy["statement"]
    page = (study.folder / "out" / "report.html").read_text()
    assert page.index("The numbers on this page carry noise") < page.index("<main")
    assert json.loads((study.folder / "out" / "model" / "model.json").read_text())["privacy"] == privacy


# ---------------------------------------------------------------- programs, help


def test_programs_one_line_each() -> None:
    lines = atoll("programs").stdout.splitlines()
    shown = json.loads(atoll("programs", "--json").stdout)
    assert {line.split("@")[0] for line in lines} == set(shown)
    assert {"horizontal.fedavg", "horizontal.glm", "statistics.describe", "statistics.evaluation"} <= set(shown)
    for line in lines:
        name, text = line.split("@")[0], line.split("  ", 1)[1]
        assert text == shown[name]["summary"] and text.endswith(".") and text.strip()


def commands(command: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every (sub)command's path."""
    inner = getattr(command, "commands", {})
    return [path, *(deeper for name, one in inner.items() for deeper in commands(one, (*path, name)))]


def test_help() -> None:
    assert "demo" in atoll("--help").stdout
    found = commands(get_command(app))
    assert {("coordinator", "up"), ("site", "init"), ("ledger", "verify"), ("demo",), ("check",), ("run",)} <= set(
        found
    )
    for path in found:
        shown = CliRunner().invoke(app, [*path, "--help"], env=ENVIRONMENT)
        assert shown.exit_code == 0 and "Usage:" in shown.output, path
        assert len(shown.output.splitlines()) > 3, path


@pytest.mark.parametrize(
    "wrong", [["nonsense"], ["run"], ["run", "plan.yaml", "--transport", "pigeon"], ["site", "approve"]]
)
def test_wrong_usage(wrong: list[str]) -> None:
    shown = CliRunner().invoke(app, wrong, env=ENVIRONMENT)
    assert shown.exit_code == 2 and "Usage:" in shown.output


def test_homes_that_are_not_there_or_there_already(tmp_path: Path) -> None:
    assert "run `atoll site init` first" in atoll("site", "status", "--home", tmp_path / "none", code=1).stderr
    atoll("coordinator", "init", "--home", tmp_path / "home")
    private = [path for path in (tmp_path / "home").iterdir() if path.suffix == ".key"]
    assert private and all(path.stat().st_mode & 0o077 == 0 for path in private)
    told = atoll("coordinator", "init", "--home", tmp_path / "home", code=1).stderr
    assert "home.exists" in told and "choose another folder" in told
    assert "run.unknown" in atoll("coordinator", "cancel", "00", "--home", tmp_path / "home", code=1).stderr
