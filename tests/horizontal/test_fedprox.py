"""FedProx: its paper's algorithm written a second time, and FedAvg where the proximal term is nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from atoll.contract.program import Cohort, build
from atoll.contract.rounds import Task, TaskId
from atoll.data.table import Table

COLUMNS = {"x": {"range": [-1, 1]}, "y": {"range": [-20, 20], "role": "label"}}


def sites(federation: Any) -> dict[str, Table]:
    random, tables = np.random.default_rng(8), {}
    for i, n in enumerate((30, 12, 50)):
        x = random.uniform(-1, 1, n)
        tables[f"s{i}"] = federation.table({"x": x, "y": (3 * i - 2) * x + i}, COLUMNS)
    return tables


def train(drive: Any, program: str, tables: dict[str, Table], **more: Any) -> np.ndarray:
    params = {"family": "linear", "target": "y", "features": ["x"], "rounds": 5, "local_epochs": 3, **more}
    steps = build(program, params).coordinate(Cohort(tuple(tables), tables["s0"].schema))
    return drive(steps, tables).result["model"].weights  # type: ignore[no-any-return]


@pytest.mark.parametrize("mu", [0.05, 1.0, 4.0])
def test_it_is_the_papers_algorithm(federation: Any, drive: Any, mu: float) -> None:
    """Algorithm 2, with Σ n_k/n in place of uniform sampling, in plain numpy."""
    tables, w, rate = sites(federation), np.zeros(2), 0.1
    for number in range(5):
        mean, rows = np.zeros(2), 0
        for name, table in tables.items():
            x, y, local = np.column_stack([np.ones(len(table)), table["x"]]), table["y"], w.copy()
            shuffler = Task(TaskId("0" * 32, number, 0, "reply", name), {}, (number, *name.encode())).shuffler()
            for _ in range(3):
                for batch in np.split(order := shuffler.permutation(len(y)), range(16, len(order), 16)):
                    slope = x[batch].T @ (x[batch] @ local - y[batch]) / len(batch)
                    local = local - rate * (slope + mu * (local - w))
            mean, rows = mean + len(y) * local, rows + len(y)
        w = mean / rows
    found = train(drive, "horizontal.fedprox", tables, proximal=mu, batch_size=16, learning_rate=rate)
    assert np.allclose(found, w, rtol=0, atol=1e-12)


def test_without_the_term_it_is_fedavg(federation: Any, drive: Any) -> None:
    tables = sites(federation)
    found = train(drive, "horizontal.fedprox", tables, proximal=0.0)
    assert found.tobytes() == train(drive, "horizontal.fedavg", tables).tobytes()


def test_the_stronger_the_term_the_less_a_site_moves(federation: Any, drive: Any) -> None:
    tables = sites(federation)
    moved = [np.linalg.norm(train(drive, "horizontal.fedprox", tables, rounds=1, proximal=mu)) for mu in (0, 1, 5)]
    assert moved[0] > moved[1] > moved[2] > 0
