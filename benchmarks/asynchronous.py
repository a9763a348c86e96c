"""Time to an accuracy on MNIST in virtual time where some sites are slow: synchronous, semi-synchronous, asynchronous.

Ten sites whose share of each digit is drawn by Dirichlet's distribution, α = 1 (benchmarks/mnist.py), ten steps of 64
images a round, a perceptron with 64 hidden units, real learning; only the clock is virtual. Two fleets: one site ten
times slower than the other nine; and speeds from a log-normal distribution (standard deviation 1 of their logarithm),
drawn anew for each seed. A step takes 0.1 s at speed 1; links carry 100 Mbit/s, 25 ms each way. Methods: FedAvg, which
waits for all; FedAvg by ``schedule.effort_min`` (slow sites take fewer steps) and ``schedule.within_s`` (they are left
out when late); FedBuff (Nguyen et al. 2022, whose paper claims 3.3 times less time than synchronous learning) and
FedAsync. Each has the best of its settings on 3,000 training images that no site has, and another partition than those
that are then measured. Accuracy is of 3,000 test images, after every step of the coordinator. Data: $ATOLL_DATA or
../shared/data.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from atoll.contract.plan import Plan
from atoll.contract.rounds import Checkpoint, Steps
from atoll.data.table import Table
from atoll.models.model import Predictor, make
from atoll.runtime.catalogue import load_installed
from atoll.runtime.fleet import Fleet
from atoll.runtime.simulated import Simulation
from atoll.runtime.simulation import Engine
from atoll.runtime.study import study
from atoll.runtime.virtual_time import Virtual
from atoll.runtime.work import Work
from atoll.runtime.workers import opened
from benchmarks.mnist import SCHEMA, digits, dirichlet, of, validation
from benchmarks.table import Row, main

SEED, SEEDS = 0, 3
ALPHA, TARGET = 1.0, 0.93
STEP_S, MOST_S = 0.1, 1200.0
"""What takes longer counts as so long."""
PARAMS = {"target": "digit", "model": {"kind": "mlp", "image": "image", "hidden": [64]}, "local_steps": 10,
          "batch_size": 64, "checkpoint_every": 1}  # fmt: skip
LINK = {"down": "100 Mbit/s", "up": "100 Mbit/s", "latency": "25 ms"}
FLEETS: dict[str, dict[str, Any]] = {
    "one of ten 10× slower": {"quick": {**LINK, "count": 9}, "slow": {**LINK, "speed": 0.1}},
    "log-normal speeds": {"site": {**LINK, "count": 10, "speed": {"median": 1, "spread": 1.0}}},
}
RATES = ({"learning_rate": 0.2}, {"learning_rate": 0.5})
METHODS: dict[str, tuple[str, dict[str, Any], tuple[dict[str, Any], ...]]] = {
    "fedavg, synchronous": ("fedavg", {}, RATES),
    "fedavg, effort_min 0.1": ("fedavg", {"effort_min": 0.1}, RATES),
    "fedavg, within_s 3": ("fedavg", {"within_s": 3.0}, RATES),
    "fedbuff": ("fedbuff", {}, (*RATES, {"learning_rate": 0.5, "buffer": 3}, {"learning_rate": 0.2, "buffer": 3})),
    "fedasync": ("fedasync", {}, RATES),
}


def fleet_of(kind: str, names: tuple[str, ...], seed: int) -> Fleet:
    """The fleet's sites under these *names*."""
    return Fleet.from_json({"seed": seed, "sites": FLEETS[kind]}).of(names)


def watched(steps: Steps, model: Predictor, judge: Table, target: float, clock: Virtual, best: list[float]) -> Steps:
    """*steps* until the model of a checkpoint reaches *target* on the images of *judge*, or time is up."""
    value: Any = None
    while True:
        try:
            item = steps.send(value)
        except StopIteration as stop:
            return stop.value
        if isinstance(item, Checkpoint):
            right = model.with_weights(item.state["weights"]).predict(judge).argmax(1) == judge["digit"]
            best.append(float(right.mean()))
            if best[-1] >= target or clock.now > MOST_S:
                return {}
        value = yield item


def seconds_to(
    name: str, params: Mapping[str, Any], schedule: Mapping[str, Any], kind: str, seed: int, judge: Table, target: float
) -> tuple[float, int]:
    """(virtual seconds until *target* is reached, at most MOST_S; coordinator steps)."""
    tables = dirichlet(ALPHA, seed)
    plan = Plan.from_json({
        "name": "mnist", "schema": SCHEMA.model_dump(mode="json"), "program": f"horizontal.{name}",
        "params": {**PARAMS, "rounds": 5000, **params}, "protection": "plain", "cohort": {"min_sites": 5},
        "schedule": dict(schedule), "run": {"evaluate": False, "seed": seed},
    })  # fmt: skip
    sites = tuple(tables)
    clock, best = Virtual(fleet_of(kind, sites, seed), plan.run.deadline_s, STEP_S), list[float]()
    rows = np.array([float(len(table)) for table in tables.values()])
    answers = Engine(plan, opened(plan, tables, Path()))
    run = Simulation(plan, sites, answers, work=Work(rows, STEP_S), clock=clock)
    model = make({**PARAMS["model"], "target": "digit"}, SCHEMA)  # type: ignore[dict-item]
    run.run(watched(study(plan, sites), model, judge, target, clock, best))
    return (min(clock.now, MOST_S) if best[-1] >= target else MOST_S), len(best)


def measure(quick: bool) -> list[Row]:
    """All of it."""
    load_installed()
    data, held, rows = digits(), validation(), []
    tried_on = of(data["x_train"][held], data["y_train"][held])
    test = of(data["x_test"], data["y_test"])
    target, seeds = (0.8, 1) if quick else (TARGET, SEEDS)
    synchronous: dict[str, float] = {}
    for kind, (method, (name, schedule, grid)) in product(FLEETS, METHODS.items()):
        some = grid[:1] if quick else grid
        tried = [seconds_to(name, own, schedule, kind, 1000, tried_on, target)[0] for own in some]
        best = some[int(np.argmin(tried))]
        found = [seconds_to(name, best, schedule, kind, seed, test, target) for seed in range(seeds)]
        middle = math.exp(np.mean([math.log(seconds) for seconds, _ in found]))
        first = synchronous.setdefault(kind, middle)
        told = ", ".join(f"{seconds:.0f} s in {steps} steps" for seconds, steps in found)
        settings = ", ".join(f"{key} {value}" for key, value in best.items())
        note = f"{first / middle:.2f} times as fast as synchronous; by seed: {told}; {settings}"
        rows.append(Row(f"{kind}, {100 * target:.0f} %, {method}", middle, "virtual s", first, note=note))
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


if __name__ == "__main__":
    main("asynchronous", ("numpy", "torch"), measure, SEED)
