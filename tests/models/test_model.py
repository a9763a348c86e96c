"""The model port: kinds are found by their file, settings are checked, and the core runs without PyTorch."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from atoll.contract.errors import PlanError
from atoll.contract.schema import Column, TableSchema
from atoll.models.linear import LinearModel
from atoll.models.model import Examples, LearnerParams, find, from_spec, make

SCHEMA = TableSchema(
    name="test", columns={"a": Column(range=(0, 4)), "y": Column(dtype="integer", values=(0, 1), role="label")}
)
LINEAR: dict[str, Any] = {"kind": "linear", "family": "logistic", "features": ["a"], "target": "y"}


def test_a_spec_makes_the_model_it_came_from() -> None:
    made = make(LINEAR, SCHEMA)
    assert isinstance(made, LinearModel)
    assert (made.spec(), made.task, made.target) == (LINEAR, "binary", "y")
    fitted = from_spec(made.spec(), SCHEMA, {"weights": np.array([1.0, 2.0])})
    assert fitted.weights.tolist() == [1, 2]
    assert fitted.arrays()["middle"].tolist() == [2]


@pytest.mark.parametrize("kind", ["forest", "", "os.path", "..linear", "model", "network"])
def test_unknown_kinds_are_refused(kind: str) -> None:
    with pytest.raises(PlanError) as caught:
        make({**LINEAR, "kind": kind}, SCHEMA)
    assert (caught.value.code, caught.value.field) == ("model.unknown", "model.kind")


@pytest.mark.parametrize("change", [{"famly": "logistic"}, {"family": "forest"}, {"features": 3}])
def test_malformed_settings_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(PlanError):
        make({**LINEAR, **change}, SCHEMA)


def test_weights_that_do_not_fit_are_refused() -> None:
    for arrays in ({}, {"weights": np.zeros(3)}):
        with pytest.raises(PlanError) as caught:
            from_spec(LINEAR, SCHEMA, arrays)
        assert caught.value.code == "model.shape"


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"family": "logistic"},
        {"features": ["a"]},
        {"family": "logistic", "features": ["a"], "model": {"kind": "cnn"}},
        {"model": {"kind": "cnn", "target": "y"}},
    ],
)
def test_a_learner_learns_exactly_one_model(params: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        LearnerParams(target="y", **params)


def test_examples_are_taken_together() -> None:
    rows = Examples((np.arange(10).reshape(5, 2), np.arange(5)), np.arange(5.0)).take(np.array([3, 1]))
    assert (rows.inputs[0].tolist(), rows.inputs[1].tolist(), rows.labels.tolist()) == (
        [[6, 7], [2, 3]],
        [3, 1],
        [3, 1],
    )


BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
from atoll.contract.errors import PlanError
from atoll.contract.plan import Plan
from atoll.runtime.catalogue import load_installed
from atoll.runtime.study import check_plan
load_installed()
import atoll.cli.main
assert not any(name.partition(".")[0] == "torch" for name in sys.modules)
plan = {"atoll": 1, "name": "test", "protection": "plain", "program": "horizontal.fedavg",
        "schema": {"name": "t", "columns": {"a": {"range": [0, 1]}, "i": {"dtype": "image", "shape": [8, 8]},
                   "y": {"dtype": "integer", "values": [0, 1]}}},
        "params": {"target": "y", "family": "logistic", "features": ["a"]}}
check_plan(Plan.from_json(plan))
try:
    check_plan(Plan.from_json({**plan, "params": {"target": "y", "model": {"kind": "cnn", "image": "i"}}}))
except PlanError as error:
    print(error.code, "|", error.remedy)
"""


def test_without_pytorch_all_else_works_and_networks_say_what_to_install() -> None:
    done = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == 'model.no-torch | pip install "atoll[torch]"', done.stderr


def test_a_kind_is_imported_when_it_is_asked_for() -> None:
    pytest.importorskip("torch")
    assert find("cnn").__module__ == "atoll.models.cnn"
