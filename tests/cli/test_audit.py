"""atoll audit, atoll site audit, and the policy that asks for it: attacks on what really leaves the sites."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

pytest.importorskip("torch")

from atoll.cli.audit_plan import Options, audit_plan
from atoll.cli.audit_reading import reading_of
from atoll.cli.main import app
from atoll.contract.errors import AtollError
from atoll.contract.plan import Plan
from atoll.contract.schema import Column, TableSchema
from atoll.contract.wire import Message
from atoll.crypto.identity import Identity, verify
from atoll.data.site_data import SiteData
from atoll.data.table import Table
from atoll.ledger.verify import verify_file
from atoll.runtime.home import SiteHome
from atoll.runtime.rehearsal import Rows, rehearse
from atoll.runtime.site import Site
from atoll.runtime.study import check_plan, settled

FEATURES = {"age": (20, 90), "chol": (50, 700), "thalach": (40, 230), "oldpeak": (-5, 10)}
COLUMNS = {
    **{name: {"range": list(ends)} for name, ends in FEATURES.items()},
    "day": {"range": [0, 400]},
    "ill": {"dtype": "integer", "values": [0, 1], "role": "label"},
}
PRIVACY = {"unit": "record", "epsilon": 8, "delta": 1e-5, "mechanism": "discrete_gaussian"}
PARAMS: dict[str, dict[str, Any]] = {
    "horizontal.fedavg": {"rounds": 2, "learning_rate": 0.1},
    "horizontal.dpsgd": {"rounds": 2, "expected_rows": 90, "sampling_rate": 0.5},
    "horizontal.glm": {},
}
QUICK = Options(batches=(1,), samples=15, membership=False)


def patients(number: int, seed: int) -> dict[str, np.ndarray]:
    """As the heart data are: four measurements, and a disease that follows from them."""
    random = np.random.default_rng(seed)
    x = random.random((number, len(FEATURES)))
    low, high = np.array(list(FEATURES.values())).T
    ill = (x.sum(1) + 0.5 * random.standard_normal(number) > len(FEATURES) / 2).astype(float)
    day = random.uniform(0, 400, number).round(3)
    return {**dict(zip(FEATURES, (low + x * (high - low)).T.round(3), strict=True)), "day": day, "ill": ill}


def plan_of(program: str = "horizontal.fedavg", protection: str = "plain", **more: Any) -> Plan:
    params = {"target": "ill", "family": "logistic", "features": list(FEATURES), **PARAMS.get(program, {})}
    return Plan.from_json({
        "atoll": 1, "name": "heart", "schema": {"name": "t", "columns": COLUMNS}, "program": program,
        "params": params | more.pop("params", {}), "protection": protection, "cohort": {"min_sites": 2},
        "run": {"seed": 3, "holdout": 0.25}, **more,
    })  # fmt: skip


def sites_of(plan: Plan, number: int = 3, rows: int = 40) -> dict[str, SiteData]:
    tables = {f"s{i}": Table(plan.table, patients(rows, seed=i)) for i in range(number)}
    return {site: SiteData.of(table, plan, site) for site, table in tables.items()}


def audited(plan: Plan, options: Options = QUICK, number: int = 3) -> dict[str, Any]:
    found = audit_plan(plan, sites_of(plan, number), options, lambda _: None).found
    return dict(json.loads(json.dumps(found, allow_nan=False)))


def rate(found: Mapping[str, Any], view: str) -> float:
    return float(max(leak["leak_rate"] for leak in found["batches"][0]["views"][view]))


# ---------------------------------------------------------------- what leaks


@pytest.mark.parametrize("program", PARAMS)
def test_single_rows_leak_from_plain_replies(program: str) -> None:
    found = audited(plan_of(program))
    assert found["leak_rate"] == rate(found, "single replies") == 1.0
    assert found["attacked"] == found["reconstructed"] == 15
    assert found["batches"][0]["no_gradient"]["leak_rate"] == 0.0
    assert found["batches"][0]["interval"][0] > 0.75


@pytest.mark.parametrize("program", PARAMS)
def test_nothing_leaks_from_masked_replies_nor_from_the_sum_of_three(program: str) -> None:
    found = audited(plan_of(program, "secagg"))
    assert rate(found, "single replies") == rate(found, "sum of 3 sites") == found["leak_rate"] == 0.0


RELATIONS: dict[str, dict[str, Any]] = {
    "fedprox": {}, "scaffold": {}, "feddyn": {}, "fednova": {"local_steps": 3}, "fedadam": {"sites_per_round": 2},
    "ditto": {}, "apfl": {}, "perfedavg": {}, "weighted": {}, "shapley": {"method": "leave_one_out"},
    "online": {"time": "day", "start": 300, "every": 5}, "dpftrl": {"expected_rows": 90, "rounds": 8},
}  # fmt: skip
QUICKLY = ("scaffold", "fednova", "perfedavg", "weighted", "online", "dpftrl")
EACH = [name if name in QUICKLY else pytest.param(name, marks=pytest.mark.slow) for name in RELATIONS]


@pytest.mark.parametrize(
    "name", [name if name == "scaffold" else pytest.param(name, marks=pytest.mark.slow) for name in RELATIONS]
)
def test_single_rows_leak_from_fedavgs_relations_too(name: str) -> None:
    """The rows that a site takes are known to the auditor, and its reply is read as their gradient."""
    asked = {"learning_rate": 0.1, "rounds": 2, **RELATIONS[name]}
    found = audited(plan_of(f"horizontal.{name}", params=asked), Options(batches=(1,), samples=6, membership=False))
    assert (found["leak_rate"], found["attacked"]) == (1.0, 6)
    assert found["batches"][0]["no_gradient"]["leak_rate"] == 0.0


@pytest.mark.parametrize("name", EACH)
def test_a_reply_is_read_as_the_mean_gradient_of_the_rows_that_were_taken(name: str) -> None:
    """At the weights that were sent; FedNova's three steps of a low rate are hardly elsewhere."""
    more = {"perfedavg": {"adapt_rate": 1e-6}, "dpftrl": {"clip_norm_l2": 100}}.get(name, {})
    asked = {"learning_rate": 0.01, "rounds": 2, **RELATIONS[name], **more}
    plan = settled(plan_of(f"horizontal.{name}", params=asked))
    program = check_plan(plan)
    reading = reading_of(plan, program, plan.table, noised=False)
    changes, steps, rows = reading.step(5, 30, asked.get("local_steps", 1))
    run = plan.run.model_copy(update={"min_group_size": 1})
    plan = plan.model_copy(update={"run": run, "params": {**plan.params, **changes}})
    first = rehearse(plan, sites_of(plan), reading.handler)
    tables, places, keys = {}, {}, {}
    for i in range(3):
        size, places[f"s{i}"], keys[f"s{i}"] = reading.drawn(plan, first, f"s{i}", 30, rows * steps)
        tables[f"s{i}"] = reading.dressed(Table(plan.table, patients(size, seed=i)))
    data = {site: Rows(table) for site, table in tables.items()}
    seen = rehearse(plan, data, reading.handler, first.before, keys)
    model, start = program.model(plan.table), np.asarray(seen.sent["weights"], float)
    for site, table in tables.items():
        found = reading.gradient(seen.replies[site], rows * steps, steps)
        wanted = model.loss_and_gradient(start, model.examples(table).take(places[site]))[1]
        assert len(places[site]) == rows * steps
        assert np.allclose(found, wanted, atol=3e-3), name
        assert np.abs(wanted).max() > 0.03


@pytest.mark.slow
def test_a_stream_of_a_column_of_times_is_read_in_its_first_period() -> None:
    asked = {"learning_rate": 0.1, "expected_rows": 90, "rounds": 4, "time": "day"}
    found = audited(plan_of("horizontal.dpftrl", params=asked), Options(batches=(1,), samples=6, membership=False))
    assert (found["leak_rate"], found["attacked"]) == (1.0, 6)


@pytest.mark.parametrize(
    ("program", "more", "code", "told"),
    [
        ("fedbuff", {}, "audit.not-training", "horizontal.scaffold"),
        ("ifca", {}, "audit.not-training", "horizontal.fedavg"),
        ("fedper", {}, "audit.not-read", "leave it out"),
        ("fedavg", {"freeze": ["slopes"]}, "audit.not-read", "leave it out"),
        ("fedavg", {"compress": {"keep": 0.5}}, "audit.not-read", "leave it out"),
        ("fedavg", {"compress": {"down": {"bits": 8}}}, "audit.not-read", "leave it out"),
        ("fedavg", {"aggregate": {"rule": "median", "groups": 2}}, "audit.not-read", "leave it out"),
    ],
)
def test_what_no_attack_reads_is_refused_and_what_is_read_is_told(
    program: str, more: dict[str, Any], code: str, told: str
) -> None:
    """That no attack got anything of it would say nothing."""
    plan = plan_of(f"horizontal.{program}", params={"rounds": 2, **more})
    with pytest.raises(AtollError) as error:
        audit_plan(plan, {}, QUICK, lambda _: None)
    assert error.value.code == code
    assert told in error.value.remedy and "fedbuff" not in error.value.remedy


def test_a_ciphertext_is_attacked_as_the_bytes_it_is() -> None:
    plan = plan_of(protection="paillier").model_copy()
    small = plan.model_copy(update={"protection": plan.protection.model_copy(update={"key_bits": 2048})})
    found = audited(small, Options(batches=(1,), samples=2, membership=False), number=2)
    assert found["leak_rate"] == 0.0
    assert any("each learns the other's" in note for note in found["notes"])


@pytest.mark.parametrize("protection", ["plain", "secagg"])
def test_nothing_leaks_through_noise_whose_size_is_as_claimed(protection: str) -> None:
    plan = plan_of("horizontal.dpsgd", protection, privacy=PRIVACY, params={"sampling_rate": 1.0, "rounds": 1})
    found = audited(plan, Options(batches=(4,), samples=48, membership=False))
    assert found["leak_rate"] == 0.0
    assert found["dp"]["holds"] and found["dp"]["epsilon_at_least"] <= found["dp"]["claimed_of_release"] <= 8


def test_noise_that_is_too_small_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lower bound can fail: a gate that adds a hundredth of the noise is told from its claim."""
    from atoll.privacy.dp.release import Noise

    fitted = Noise.fitted

    def less(self: Noise, *args: Any) -> Any:
        fields, scales = fitted(self, *args)
        return fields, {name: scale / 100 for name, scale in scales.items()}

    monkeypatch.setattr(Noise, "fitted", less)
    plan = plan_of("horizontal.dpsgd", privacy={**PRIVACY, "epsilon": 1}, params={"sampling_rate": 1.0, "rounds": 1})
    found = audited(plan, Options(batches=(1,), samples=45, membership=False))
    assert not found["dp"]["holds"] and found["dp"]["two_worlds"] > 1


def test_more_local_steps_are_attacked_as_one_batch() -> None:
    found = audited(plan_of(), Options(batches=(2,), samples=12, local_steps=3, membership=False))
    (batch,) = found["batches"]
    assert (batch["local_steps"], batch["attacked"], batch["leak_rate"]) == (3, 18, 0.0)


def test_the_same_seed_attacks_the_same_rows() -> None:
    plan = plan_of()
    options = Options(batches=(8,), samples=24, membership=False)
    assert audited(plan, options) == audited(plan, options)


def test_membership_is_tested_on_the_model_that_the_plan_gives() -> None:
    found = audited(plan_of("horizontal.glm", "secagg"), Options(batches=(8,), samples=8))
    assert (found["membership"]["members"], found["membership"]["others"]) == (90, 30)
    for attack in found["membership"]["attacks"].values():
        assert 0.3 < attack["auc"] < 0.8  # a fit of five weights to 90 rows hardly remembers them


def test_statistics_are_not_audited() -> None:
    plan = Plan.from_json({**plan_of().to_json(), "program": "statistics.describe", "params": {"columns": ["age"]}})
    with pytest.raises(AtollError) as error:
        audit_plan(plan, {}, QUICK, lambda _: None)
    assert error.value.code == "audit.not-training"


# ---------------------------------------------------------------- the commands


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A plan file, three sites' tables, and a SITES.yaml."""
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan_of().to_json(), sort_keys=False))
    for i in range(3):
        table = patients(40, seed=i)
        rows = np.column_stack(list(table.values())).tolist()
        lines = [",".join(table), *(",".join(format(x, "g") for x in row) for row in rows)]
        (tmp_path / f"s{i}.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "sites.yaml").write_text(yaml.safe_dump({f"s{i}": {"path": f"s{i}.csv"} for i in range(3)}))
    return tmp_path


def call(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "200", "NO_COLOR": "1"})


def test_the_command_writes_what_it_found(study: Path) -> None:
    out = study / "out"
    options = ("--data", study, "--out", out, "--batch", "1", "--samples", "9", "--no-membership")
    done = call("audit", study / "plan.yaml", *options)
    assert done.exit_code == 0, done.output
    assert "100.0%" in done.output and "rows that the sites hold out" in done.output.lower()
    found = json.loads((out / "audit.json").read_text())
    assert found["plan_hash"] == plan_of().hash and found["leak_rate"] == 1.0
    page = (out / "audit.html").read_text()
    assert "100.0% leaked" in page and not re.search(r"<script|https?://", page)


def test_a_limit_is_an_error(study: Path) -> None:
    options = ("--data", study, "--out", study / "out", "--batch", "1", "--samples", "3", "--no-membership")
    done = call("audit", study / "plan.yaml", *options, "--max-leak-rate", "0.5")
    assert isinstance(done.exception, AtollError) and done.exception.code == "audit.leaks"
    assert (study / "out" / "audit.json").is_file()


# ---------------------------------------------------------------- the policy


def home_of(folder: Path, policy: Mapping[str, Any]) -> SiteHome:
    """A site's folder, as ``atoll site init`` leaves it, less what only the network needs."""
    folder.mkdir()
    identity = Identity.generate("north")
    identity.save(folder / "identity.key")
    (folder / "ca.pem").write_text("")
    source = {"path": str(folder.parent / "s0.csv")}
    config = {"name": "north", "address": "-", "coordinator_key": "00" * 32, "datasets": {"default": source}}
    (folder / "site.yaml").write_text(yaml.safe_dump(config))
    (folder / "policy.yaml").write_text(yaml.safe_dump(dict(policy)))
    return SiteHome(folder)


def opened(home: SiteHome, plan: Plan, run: str) -> Message:
    """The site's answer to the announcement of a run."""
    journal = home.journal()
    roster = {"north": home.identity.public.hex(), **{f"s{i}": f"{i}" * 64 for i in (1, 2)}}
    site = Site(home.identity, journal, home.policy, home.data, bytes(32))
    answer = site.handle(
        Message("open", {"id": run, "run": run, "plan": plan.to_json(), "roster": roster}), lambda _: None
    )
    journal.close()
    return answer


@pytest.mark.parametrize(("protection", "good"), [("secagg", True), ("plain", False)])
def test_a_policy_lets_training_begin_only_after_a_good_audit(study: Path, protection: str, good: bool) -> None:
    plan = plan_of(protection=protection)
    (study / "plan.yaml").write_text(yaml.safe_dump(plan.to_json(), sort_keys=False))
    policy = {"approval": "automatic", "roster": "automatic", "protections": ["*"], "audit": {"max_leak_rate": 0.0}}
    home = home_of(study / "north", policy)
    before = opened(home, plan, "a" * 32)
    assert (before.meta["code"], before.meta["remedy"]) == (
        "policy.audit", "the site's operator runs: atoll site audit PLAN",
    )  # fmt: skip
    options = ("--out", study / "out", "--batch", "1", "--samples", "4", "--no-membership")
    done = call("site", "audit", study / "plan.yaml", "--home", home.folder, *options)
    assert (done.exception is None) is good, done.output
    after = opened(home, plan, "b" * 32)
    assert after.kind == ("opened" if good else "failure"), after.meta
    other = opened(home, plan.model_copy(update={"name": "another"}), "c" * 32)
    assert other.meta["code"] == "policy.audit"
    journal = home.journal()
    journal.export(study / "north.jsonl")
    journal.close()
    (entry,) = [e for e in verify_file(study / "north.jsonl", verify).entries if e["kind"] == "audited"]
    assert entry["body"]["plan"] == plan.hash and entry["body"]["attacked"] == 4
    assert entry["body"]["leak_rate"] == (0.0 if good else 1.0)


def test_statistics_need_no_audit(study: Path) -> None:
    policy = {"approval": "automatic", "roster": "automatic", "audit": {}}
    told = {**plan_of().to_json(), "program": "statistics.describe", "params": {"columns": ["age"]},
            "protection": "secagg"}  # fmt: skip
    assert opened(home_of(study / "north", policy), Plan.from_json(told), "a" * 32).kind == "opened"


# ---------------------------------------------------------------- images


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "protection", "leaks"),
    [("fedavg", "plain", True), ("fedavg", "secagg", False), ("fedper", "plain", True)],
)
def test_images_are_shown_beside_their_reconstructions(program: str, protection: str, leaks: bool) -> None:
    columns = {"image": {"dtype": "image", "shape": [16, 16]}, "ill": COLUMNS["ill"]}
    schema = TableSchema(name="t", columns={name: Column(**column) for name, column in columns.items()})
    content = plan_of(protection=protection).to_json() | {
        "schema": schema.model_dump(mode="json"), "program": f"horizontal.{program}",
        "params": {"target": "ill", "model": {"kind": "cnn", "image": "image", "channels": [12], "hidden": 48},
                   "rounds": 1, "local_steps": 2, "learning_rate": 0.05},
    }  # fmt: skip
    plan = Plan.from_json(content)
    data = {}
    for i in range(3):
        random = np.random.default_rng(i)
        image = blobs(80, random)
        labels = (image.mean((1, 2)) > np.median(image.mean((1, 2)))).astype(float)
        data[f"s{i}"] = SiteData.of(Table(plan.table, {"image": image, "ill": labels}), plan, f"s{i}")
    made = audit_plan(plan, data, Options(batches=(1,), samples=6, steps=60, membership=False), lambda _: None)
    assert (rate(made.found, "single replies") > 0.5) is leaks
    ((title, png),) = made.sheets
    assert title == "batch 1" and png.startswith(b"\x89PNG")


def blobs(number: int, random: np.random.Generator, size: int = 16) -> np.ndarray:
    """Images of three soft spots each, uint8 [number, size, size]."""
    grid = np.arange(size) / (size - 1)
    image = np.zeros((number, size, size))
    for _ in range(3):
        x, y, width, light = random.random((4, number, 1, 1))
        near = (grid[:, None] - y) ** 2 + (grid - x) ** 2
        image += (0.3 + light) * np.exp(-near / (2 * (0.08 + 0.15 * width) ** 2))
    return (image.clip(0, 1) * 255).astype(np.uint8)
