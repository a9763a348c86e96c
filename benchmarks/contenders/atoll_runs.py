"""Atoll itself: way "local" is the whole runtime in one process, with wire, journals and ledgers; "simulated" drives
the same plan against simulated sites in a process a core."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.contract.plan import Plan
from atoll.contract.schema import Column, TableSchema
from atoll.contract.wire import Array
from atoll.data.table import Table
from atoll.models.model import from_spec
from atoll.runtime.catalogue import load_installed
from atoll.runtime.simulated import Simulation
from atoll.runtime.study import settled
from atoll.runtime.work import Work
from atoll.runtime.workers import Workers
from benchmarks.contenders.digits import Task, asked, dealt, images, tell
from benchmarks.learning import learn

SCHEMA = TableSchema(
    name="mnist", max_rows=60_000,
    columns={
        "image": Column(dtype="image", shape=(28, 28)),
        "digit": Column(dtype="integer", values=tuple(range(10)), role="label"),
    },
)  # fmt: skip


def planned(task: Task) -> Plan:
    """The task as a plan."""
    model = {"kind": "cnn", "image": "image", "channels": task["channels"], "hidden": task["hidden"]}
    params = {"target": "digit", "model": model, "rounds": task["rounds"], "sites_per_round": task["per_round"]}
    params |= {"local_epochs": task["epochs"], "batch_size": task["batch_size"], "learning_rate": task["rate"]}
    return Plan.from_json({
        "name": "mnist", "schema": SCHEMA.model_dump(mode="json"), "program": "horizontal.fedavg", "params": params,
        "protection": "plain", "cohort": {"min_sites": 1}, "run": {"evaluate": False, "seed": task["seed"]},
    })  # fmt: skip


def simulated(plan: Plan, tables: Callable[[], dict[str, Table]], cores: int) -> dict[str, Array]:
    """The arrays of the model that the same plan leads to at simulated sites."""
    plan = settled(plan)
    answers = Workers(plan, cores)
    try:
        made = tables()
        answers.open(made)
        rows = np.array([len(table) for table in made.values()], float)
        run = Simulation(plan, tuple(made), answers, work=Work(rows))
        run.run()
        return run.result()[1]
    finally:
        answers.close()


def main() -> None:
    """Train, and tell the accuracy."""
    task = asked()
    load_installed()
    plan, data = planned(task), dict[str, NDArray[Any]]()

    def tables() -> dict[str, Table]:
        data.update(images(task))
        labels = data["y_train"].astype(np.float64)
        return {
            f"site-{i:03d}": Table(SCHEMA, {"image": data["x_train"][own], "digit": labels[own]})
            for i, own in enumerate(dealt(task, len(labels)))
        }

    arrays = learn(plan, tables()).arrays if task["way"] == "local" else simulated(plan, tables, task["cores"])
    model = from_spec({"target": "digit", **plan.params["model"]}, SCHEMA, arrays)
    found = model.predict(Table(SCHEMA, {"image": data["x_test"], "digit": data["y_test"].astype(np.float64)}))
    tell(accuracy=float((found.argmax(1) == data["y_test"]).mean()))
