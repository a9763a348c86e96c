"""Bytes to an accuracy on MNIST: every way of compressing, by itself and together, against FedAvg in float32.

Ten sites with a tenth of the images each ("iid"), or with shares of each digit drawn by Dirichlet's distribution (α = 1
and 0.5); all of them in each of 60 rounds, twenty steps of 32 images a site; the perceptron with two hidden layers of
200 units of the FedAvg paper ("2NN", 199,210 weights); a learning rate of 0.5 that falls as 1 / (1 + t/10). Everything
runs through the whole runtime; bytes are those that the transport counted, both ways, headers, ledger entries and a
protection's own exchanges among them. The target is FedAvg's own accuracy, as the mean over its last five rounds, less
0.2 points; a way of compressing is there at the first round from which on the mean over five rounds keeps above it.
Accuracy is of the 3,000 test images that this copy of MNIST has. The limit: 5 % of the bytes that FedAvg in float32
under ``plain`` needs (published reductions are of 34–38 %). Data: $ATOLL_DATA or ../shared/data.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from atoll.contract.plan import Plan
from atoll.contract.wire import Array
from atoll.models.model import make
from atoll.runtime.catalogue import load_installed
from benchmarks.learning import learn
from benchmarks.mnist import SCHEMA, SITES, Tables, digits, dirichlet, of
from benchmarks.table import Row, main

SEED, ROUNDS, OVER = 0, 60, 5
POINTS = 0.002
MODEL = {"kind": "mlp", "image": "image", "hidden": [200, 200]}
PARAMS: dict[str, Any] = {
    "target": "digit", "model": MODEL, "local_steps": 20, "batch_size": 32, "learning_rate": 0.5, "decay": 0.1,
    "checkpoint_every": 1,
}  # fmt: skip
ZSTD = {"changes": True, "lossless": True}
FEW = {**ZSTD, "keep": 0.05, "bits": 4}
OWN = {"choose": "own", "keep": 0.03, "bits": 4, "lossless": True, "down": FEW}
MORE = {**OWN, "keep": 0.12, "down": {**FEW, "keep": 0.2}}
COMMON = {"keep": 0.15, "choose": "due", "bits": 4, "down": {**FEW, "keep": 0.07}}
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "FedAvg, float32": ("plain", {}),
    "float16 both ways": ("plain", {"compress": {"precision": "float16", "down": {"precision": "float16"}}}),
    "8 bits both ways": ("plain", {"clip": 0.5, "compress": {"bits": 8, "down": {"changes": True, "bits": 8}}}),
    "zstd of changes": ("plain", {"compress": {"lossless": True, "down": ZSTD}}),
    "own 3 %, 4 bits; down 5 %, 4 bits": ("plain", {"compress": OWN}),
    "own 12 %, 4 bits; down 20 %, 4 bits": ("plain", {"compress": MORE}),
    "rank 4; down 10 %, 4 bits": ("secagg", {"clip": 0.5, "compress": {"rank": 4, "down": {**FEW, "keep": 0.1}}}),
    "due 15 %, 4 bits; down 7 %, 4 bits": (
        "secagg", {"clip": 0.06, "weighting": "sites", "compress": COMMON},
    ),
}  # fmt: skip
BASE, BEST = "FedAvg, float32", ("own 12 %, 4 bits; down 20 %, 4 bits", "due 15 %, 4 bits; down 7 %, 4 bits")


@dataclass
class Course:
    """A run: accuracy after each round, and bytes until then, to the sites and from them."""

    accuracy: list[float] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)
    received: list[int] = field(default_factory=list)

    def smooth(self) -> Array:
        """The mean accuracy over five rounds, by the last of them."""
        return np.convolve(self.accuracy, np.ones(OVER) / OVER, "valid")

    def reached(self, target: float) -> int | None:
        """The first round from which on it keeps above *target*."""
        below = np.flatnonzero(self.smooth() < target)
        first = OVER - 1 + (int(below[-1]) + 1 if len(below) else 0)
        return first if first < len(self.accuracy) else None


def tables_of(partition: str) -> Tables:
    """Ten sites."""
    if partition != "iid":
        return dirichlet(float(partition), SEED)
    images, labels = digits()["x_train"], digits()["y_train"]
    parts = np.array_split(np.random.default_rng(SEED).permutation(len(labels)), SITES)
    return {f"site-{i:03d}": of(images[rows], labels[rows]) for i, rows in enumerate(parts)}


def course(work: tuple[str, str, int]) -> Course:
    """One way at one partition."""
    partition, way, rounds = work
    load_installed()
    protection, params = WAYS[way]
    made, found, data = make({**MODEL, "target": "digit"}, SCHEMA), Course(), digits()
    test = of(data["x_test"], data["y_test"])

    def watch(state: Mapping[str, Array], sent: int, received: int) -> None:
        right = made.with_weights(state["weights"]).predict(test).argmax(1) == test["digit"]
        found.accuracy.append(float(right.mean()))
        found.sent.append(sent)
        found.received.append(received)

    plan = Plan.from_json({
        "name": "mnist", "schema": SCHEMA.model_dump(mode="json"), "program": "horizontal.fedavg",
        "params": {**PARAMS, **params, "rounds": rounds + 1}, "protection": protection, "cohort": {"min_sites": 3},
        "run": {"evaluate": False, "seed": SEED},
    })  # fmt: skip
    learn(plan, tables_of(partition), watch)
    return found


def rows_of(partition: str, found: Mapping[str, Course]) -> list[Row]:
    """The table of one partition."""
    base, rows = found[BASE], list[Row]()
    target = float(base.smooth()[-1]) - POINTS
    begin = base.reached(target)
    whole = math.nan if begin is None else (base.sent[begin] + base.received[begin]) / 1e6
    for way, one in found.items():
        there, last = one.reached(target), 100 * float(one.smooth()[-1])
        note = f"{WAYS[way][0]}; in the end {last:.2f} % ({last - 100 * float(base.smooth()[-1]):+.2f})"
        if there is None:
            rows.append(Row(f"{partition}: {way}", math.inf, "MB", whole, note=f"{note}; target not reached"))
            continue
        sent, received = one.sent[there] / 1e6, one.received[there] / 1e6
        less = 100 * (1 - (sent + received) / whole)
        note += f"; round {there + 1}; {sent:.1f} MB out, {received:.1f} MB back; {less:.1f} % less"
        limit = 0.05 * whole if way in BEST else None
        rows.append(Row(f"{partition}: {way}", sent + received, "MB", whole, limit, note))
    return rows


def measure(quick: bool) -> list[Row]:
    """All of it."""
    few = (BASE, "own 3 %, 4 bits; down 5 %, 4 bits", *BEST)
    ways = {"0.5": tuple(WAYS), "1": few, "iid": few}
    if quick:
        ways = {"iid": (BASE, BEST[0])}
    work = [(partition, way, 6 if quick else ROUNDS) for partition, some in ways.items() for way in some]
    rows, found = list[Row](), dict[str, dict[str, Course]]()
    with ProcessPoolExecutor(1 if quick else 2) as pool:
        for (partition, way, _), one in zip(work, pool.map(course, work), strict=True):
            found.setdefault(partition, {})[way] = one
            print(
                partition, way, f"{one.accuracy[-1]:.4f}", one.sent[-1], one.received[-1], file=sys.stderr, flush=True
            )
    for partition, ones in found.items():
        rows += rows_of(partition, ones)
    return rows


if __name__ == "__main__":
    main("compression", ("numpy", "torch", "pyarrow"), measure, SEED)
