"""A user's own network by its import name: what it is given, who lets it be imported, and what it may not be."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from atoll.cli.main import app
from atoll.contract.errors import AtollError, PlanError, PolicyError, SchemaError
from atoll.contract.plan import Plan
from atoll.contract.schema import Column, TableSchema
from atoll.contract.wire import Message
from atoll.data.sources import SourceSpec
from atoll.data.table import Table
from atoll.models.allowed import allow, asked_in
from atoll.models.model import from_spec, make
from atoll.runtime.home import CoordinatorConfig, CoordinatorHome
from atoll.runtime.policy import Policy
from atoll.runtime.sandbox import run_sandbox
from atoll.runtime.study import check_plan

torch = pytest.importorskip("torch")

from torch.nn import functional as F  # noqa: E402

NETS = """
import pathlib
import torch
from torch import nn

pathlib.Path(__file__).with_name("imported").touch()

class Plain(nn.Module):
    def __init__(self, width=3, outputs=1):
        super().__init__()
        self.inner, self.out = nn.Linear(2, width), nn.Linear(width, outputs)
    def forward(self, x):
        return self.out(torch.tanh(self.inner(x)))

class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.out = nn.Conv2d(1, 2, 3), nn.LazyLinear(1)
    def forward(self, image, x):
        return self.out(torch.cat([self.image(image).mean((2, 3)), x], 1))

class Frozen(Plain):
    def __init__(self):
        super().__init__()
        self.inner.requires_grad_(False)
        self.register_buffer("shift", torch.arange(2.0))
        self.norm = nn.BatchNorm1d(3)
    def forward(self, x):
        return self.out(self.norm(self.inner(x + self.shift)))

class Mixing(Plain):
    def forward(self, x):
        return super().forward(x - x.mean(0))

class Greedy(Plain):
    def forward(self, x):
        if x.min() < -0.99:
            torch.empty(1 << 60)
        return super().forward(x)

class Broken(nn.Module):
    def __init__(self):
        raise KeyError("secret")

def function():
    return Plain()
"""
SCHEMA = TableSchema(
    name="test",
    columns={
        "a": Column(range=(0, 4)),
        "b": Column(range=(-10, 10)),
        "image": Column(dtype="image", shape=(6, 5)),
        "y": Column(dtype="integer", values=(0, 1), role="label"),
        "c": Column(dtype="text", values=("x", "y", "z"), role="label"),
    },
)


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a package of the test's own, installed and not yet allowed."""
    name = f"nets_{tmp_path.name.replace('-', '_')}"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text(NETS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("atoll.models.allowed._NAMES", set())
    importlib.invalidate_caches()
    yield name
    sys.modules.pop(name, None)


def imported(tmp_path: Path, name: str) -> bool:
    return (tmp_path / name / "imported").exists()


def table_of(n: int = 20, seed: int = 0) -> Table:
    random = np.random.default_rng(seed)
    a, b = random.uniform(0.1, 4, n), random.uniform(-9, 10, n)
    columns = {"a": a, "b": b, "image": random.integers(0, 256, (n, 6, 5), np.uint8), "y": (a + b > 2).astype(float)}
    return Table(SCHEMA, {**columns, "c": np.array(["x", "y", "z", "x"] * (n // 4), object)})


def spec(name: str, **more: Any) -> dict[str, Any]:
    return {"kind": "module", "name": name, "target": "y", "features": ["a", "b"], **more}


def made(name: str, **more: Any) -> Any:
    allow([name])
    return make(spec(name, **more), SCHEMA)


def test_it_is_given_features_in_scale_and_learned_as_it_is(nets: str) -> None:
    table = table_of()
    model = made(f"{nets}:Plain", arguments={"width": 5})
    assert list(model.layers) == ["inner.weight", "inner.bias", "out.weight", "out.bias"]
    weights, batch = model.initial(3), model.examples(table)
    twin = sys.modules[nets].Plain(5)
    torch.nn.utils.vector_to_parameters(torch.from_numpy(weights).float(), twin.parameters())
    x = torch.tensor(np.column_stack([table["a"] / 2 - 1, table["b"] / 10])).float()
    loss = F.binary_cross_entropy_with_logits(twin(x)[:, 0], torch.from_numpy(table["y"]).float())
    loss.backward()
    wanted = torch.nn.utils.parameters_to_vector([p.grad for p in twin.parameters()]).numpy()
    found = model.loss_and_gradient(weights, batch)
    assert found[0] == pytest.approx(float(loss.detach()), rel=1e-6)
    assert np.allclose(found[1], wanted, atol=1e-6)
    fitted = model.with_weights(weights)
    assert np.allclose(fitted.predict(table), twin(x).sigmoid()[:, 0].detach().numpy(), atol=1e-6)
    again = from_spec(fitted.spec(), SCHEMA, fitted.arrays())
    assert again.predict(table).tobytes() == fitted.predict(table).tobytes()


def test_it_begins_as_it_makes_itself_by_the_plans_seed(nets: str) -> None:
    model = made(f"{nets}:Plain")
    torch.manual_seed(4)
    wanted = torch.nn.utils.parameters_to_vector(sys.modules[nets].Plain().parameters()).detach().numpy()
    before = torch.random.get_rng_state()
    assert np.array_equal(model.initial(4), wanted.astype(np.float64))
    assert not np.array_equal(model.initial(5), model.initial(4))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_what_needs_no_gradient_stays_alike_everywhere(nets: str) -> None:
    table = table_of()
    model = made(f"{nets}:Frozen")
    assert list(model.layers) == [
        "out.weight", "out.bias", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var",
    ]  # fmt: skip
    weights = model.initial(1)
    assert weights[model.layers["norm.running_var"]].tolist() == [1, 1, 1]
    other = made(f"{nets}:Frozen")
    assert other.with_weights(weights).predict(table).tobytes() == model.with_weights(weights).predict(table).tobytes()
    assert model.net.shift.tolist() == [0, 1]
    with pytest.raises(PlanError) as caught:
        model.clipped_gradient_sum(weights, model.examples(table), 1.0)
    assert caught.value.code == "model.mixes-rows"


def test_images_and_features_together(nets: str) -> None:
    table = table_of()
    model = made(f"{nets}:Both", image="image")
    fitted = model.with_weights(model.initial(0))
    net = sys.modules[nets].Both()
    net(torch.zeros(1, 1, 6, 5), torch.zeros(1, 2))
    torch.nn.utils.vector_to_parameters(torch.from_numpy(fitted.weights).float(), net.parameters())
    images = torch.from_numpy(table["image"]).float()[:, None] * (4 / 255) - 2
    x = torch.tensor(np.column_stack([table["a"] / 2 - 1, table["b"] / 10])).float()
    assert np.allclose(fitted.predict(table), net(images, x).sigmoid()[:, 0].detach().numpy(), atol=1e-6)
    classes = made(f"{nets}:Plain", arguments={"outputs": 3}, target="c")
    assert classes.predict(table).shape == (20, 3)
    table["a"][2] = np.nan
    with pytest.raises(SchemaError):
        model.examples(table)


def test_a_rows_gradient_is_of_that_row_alone_whatever_the_network_does(nets: str) -> None:
    """Differential privacy rests on it: this one takes a batch's mean off every row."""
    table = table_of()
    model = made(f"{nets}:Mixing")
    weights, batch = model.initial(0), model.examples(table)
    whole, _, _ = model.clipped_gradient_sum(weights, batch, 1e6)
    alone = sum(model.clipped_gradient_sum(weights, batch.take(slice(i, i + 1)), 1e6)[0] for i in range(20))
    assert np.allclose(whole, alone, atol=1e-5)


def test_a_name_that_is_not_allowed_is_never_imported(nets: str, tmp_path: Path) -> None:
    allow([f"{nets}:Other", f"{nets}:*", "*"])
    with pytest.raises(PolicyError) as caught:
        make(spec(f"{nets}:Plain"), SCHEMA)
    assert (caught.value.code, caught.value.field) == ("model.not-allowed", f"{nets}:Plain")
    assert "policy.yaml" in caught.value.remedy
    assert not imported(tmp_path, nets)
    made(f"{nets}:Plain")
    assert imported(tmp_path, nets)


@pytest.mark.parametrize("name", ["os.system", "os:system()", ":x", "a b:c", "nets:a.b", ""])
def test_malformed_names_are_refused(name: str) -> None:
    with pytest.raises(PlanError):
        make(spec(name), SCHEMA)


@pytest.mark.parametrize(
    ("name", "more", "code"),
    [
        ("Gone", {}, "model.no-module"),
        ("function", {}, "model.bad-module"),
        ("nn", {}, "model.bad-module"),
        ("Broken", {}, "model.bad-module"),
        ("Plain", {"arguments": {"widht": 3}}, "model.bad-module"),
        ("Plain", {"arguments": {"outputs": 2}}, "model.bad-module"),
        ("Plain", {"features": ["a"]}, "model.bad-module"),
        ("Plain", {"features": ["a", "c"]}, "plan.bad-column"),
        ("Plain", {"image": "a"}, "plan.bad-column"),
        ("Plain", {"features": []}, "plan.bad-value"),
        ("Plain", {"target": "c"}, "model.bad-module"),
    ],
)
def test_networks_that_do_not_fit_are_refused_without_data(nets: str, name: str, more: Any, code: str) -> None:
    with pytest.raises(AtollError) as caught:
        made(f"{nets}:{name}", **more)
    assert caught.value.code == code
    assert "secret" not in str(caught.value)


def test_a_package_that_is_not_installed_is_told() -> None:
    with pytest.raises(PlanError) as caught:
        made("no_such_package.nets:Net")
    assert (caught.value.code, caught.value.remedy) == ("model.no-module", "install its package at every party")


def test_a_plan_tells_what_it_asks_for() -> None:
    params = {"model": {"kind": "fusion", "parts": [spec("a.b:C"), {"kind": "cnn"}]}, "models": {"s": spec("d:E")}}
    assert list(asked_in(params)) == ["a.b:C", "d:E"]


# ---------------------------------------------------------------- in a federation


def planned(federation: Any, name: str, tables: dict[str, Table], **more: Any) -> Plan:
    model = {key: value for key, value in spec(name).items() if key != "target"}
    params = {"target": "y", "model": model, "rounds": 3, "batch_size": 8}
    plan: Plan = federation.plan("horizontal.fedavg", params, tables, run={"holdout": 0.25}, **more)
    return plan


def test_a_federation_learns_it_and_a_plan_needs_it_allowed(federation: Any, nets: str, tmp_path: Path) -> None:
    tables = {f"s{i}": table_of(40, i) for i in range(3)}
    plan = planned(federation, f"{nets}:Plain", tables)
    with pytest.raises(PolicyError) as caught:
        check_plan(plan)
    assert caught.value.code == "model.not-allowed"
    assert not imported(tmp_path, nets)
    allow([f"{nets}:Plain"])
    outcome = federation.run(plan, tables)
    assert outcome["evaluation"]["pooled"]["auc"] > 0.5


def test_a_site_does_not_import_what_a_coordinator_wishes(federation: Any, nets: str, tmp_path: Path) -> None:
    """It is refused before the study is put before the operator, by a name that leaves the site with no message."""
    tables = {f"s{i}": table_of(40, i) for i in range(2)}
    honest = federation.plan("horizontal.fedavg", {"target": "y", "family": "logistic", "features": ["a"]}, tables)
    wished = planned(federation, f"{nets}:Plain", tables)
    answers: list[Message] = []

    def wrap(name: str, endpoint: Any) -> Any:
        def tempted(message: Message, progress: Any) -> Message:
            if message.kind == "open" and not answers:
                meta = {**message.meta, "plan": wished.to_json(), "run": "f" * 32}
                answers.append(endpoint(replace(message, meta=meta), progress))
            return endpoint(message, progress)

        return tempted

    federation.run(honest, tables, wrap=wrap)
    assert (answers[0].kind, answers[0].meta["code"]) == ("failure", "model.not-allowed")
    assert not imported(tmp_path, nets)


def test_a_site_that_runs_out_of_memory_drops_out_and_the_rest_go_on(federation: Any, nets: str) -> None:
    tables = {f"s{i}": table_of(40, i) for i in range(3)}
    tables["s1"]["b"][5:20] = -10.0  # here the network asks for 4 EiB
    allow([f"{nets}:Greedy"])
    plan = planned(federation, f"{nets}:Greedy", tables, cohort={"min_sites": 2, "on_dropout": "continue"})
    outcome = federation.run(plan, tables)
    assert len(outcome["result"]["history"]) == 3
    dropped = [event for event in federation.events if "dropout" in event]
    assert {event["dropout"] for event in dropped} == {"s1"}
    assert "not enough memory" in federation.journals["s1"].run(federation.run_id)[2]


def test_the_policy_lists_names(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text('models: ["package.nets:Net"]\n')
    assert Policy.load(path).models == ("package.nets:Net",)
    assert Policy().models == ()


def test_whose_plan_it_is_decides_at_the_command_line(federation: Any, nets: str, tmp_path: Path) -> None:
    """The coordinator's configuration is asked before the plan is built; one's own check takes the plan at its word."""
    plan = planned(federation, f"{nets}:Plain", {"s0": table_of()})
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(plan.to_json()))
    home = CoordinatorHome.create(tmp_path / "coordinator", CoordinatorConfig(models=("other.nets:Net",)))
    submitted = CliRunner().invoke(app, ["coordinator", "submit", str(path), "--home", str(home.folder)])
    assert isinstance(submitted.exception, PolicyError)
    assert submitted.exception.code == "model.not-allowed"
    assert not imported(tmp_path, nets)
    checked = CliRunner().invoke(app, ["check", str(path)])
    assert checked.exit_code == 0, checked.output
    assert imported(tmp_path, nets)


@pytest.mark.slow
def test_parties_of_their_own_learn_it_bit_by_bit_alike(federation: Any, nets: str, tmp_path: Path) -> None:
    tables = {f"s{i}": table_of(40, i) for i in range(3)}
    sources = {}
    for name, table in tables.items():
        np.savez(tmp_path / f"{name}.npz", **{n: table[n] for n in ("a", "b", "image", "y")}, c=table["c"].astype(str))
        sources[name] = SourceSpec(path=f"{name}.npz")
    plan = planned(federation, f"{nets}:Plain", tables, cohort={"min_sites": 3})
    for transport in ("local", "grpc"):
        (tmp_path / transport).mkdir()
        run_sandbox(plan, sources, tmp_path, tmp_path / transport, transport)  # type: ignore[arg-type]
    numbers = [tmp_path / transport / "model" / "model.safetensors" for transport in ("local", "grpc")]
    assert numbers[0].read_bytes() == numbers[1].read_bytes()
