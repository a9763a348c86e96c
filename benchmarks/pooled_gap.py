"""How far a federation's accuracy is from that of the same training on pooled data: a CNN on chest X-rays.

The hospitals are those of examples/pneumonia: two, three or five of them, whose shares of the sick differ and whose
scanners have a contrast and a brightness each. Both ways take equally many passes, in steps of about 32 images all
hospitals together: the pooled way is SGD, the federated one FedAvg with four steps of 32 / N images a hospital in a
round. Of both, the weights are those after the pass that is best on validation images, a tenth of the hospitals' own
(as MedMNIST's authors choose theirs). Ten seeds, each of which begins both ways with the same weights. Accuracy is of
the official test images, which no scanner changed, and of another tenth of the hospitals' own. The program runs without
the runtime around it. Data: $ATOLL_DATA or ../shared/data.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from atoll.contract.plan import Plan
from atoll.data.table import Table, concatenate
from atoll.models.model import Predictor, make
from benchmarks.learning import driving, interval
from benchmarks.table import Row, main

SEED, SEEDS = 0, 10
PASSES, HELD = 6, 0.2
BATCH, LOCAL_STEPS = 32, 4
RATE = 0.1
"""Chosen among 0.05, 0.1 and 0.2, for both ways, by validation images of three hospitals and other seeds."""
HOSPITALS = (2, 3, 5)
LIMIT = 0.5
"""Points; published gaps are 0.7 to 0.8."""
EXAMPLE = Path(__file__).parents[1] / "examples" / "pneumonia"
DATA = Path(os.environ.get("ATOLL_DATA", Path(__file__).parents[2] / "shared" / "data")) / "pneumonia-mnist"

Tables = dict[str, Table]
Work = tuple[str, int, int, int]
"""Way ("pooled" or "federated"), hospitals, seed, passes."""


@cache
def prepared() -> tuple[Plan, Any, dict[str, Any]]:
    """(the example's plan, what its prepare.py has, the images)."""
    spec = importlib.util.spec_from_file_location("prepare", EXAMPLE / "prepare.py")
    if spec is None or spec.loader is None:
        raise FileNotFoundError(EXAMPLE / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with np.load(DATA / module.FILE) as arrays:
        return Plan.load(EXAMPLE / "plan.yaml"), module, dict(arrays)


def table(images: Any, labels: Any, held: Any = None) -> Table:
    """Of X-rays and diagnoses, as the example's plan has them."""
    return Table(prepared()[0].table, {"image": images, "pneumonia": labels.astype(np.float64)}, held)


def hospitals(number: int, seed: int) -> Tables:
    """The example's, with other images held out for each *seed*."""
    _, module, data = prepared()
    images = np.concatenate([data["train_images"], data["val_images"]])
    labels = np.concatenate([data["train_labels"], data["val_labels"]])[:, 0]
    random, found = np.random.default_rng((SEED, seed)), {}
    names = list(module.SCANNERS)[:number]
    for name, rows in zip(names, module.split(labels, number), strict=True):
        held = random.permutation(len(rows)) < HELD * len(rows)
        found[name] = table(module.scanned(images[rows], *module.SCANNERS[name]), labels[rows], held)
    return found


def accuracy(model: Predictor, test: Table) -> float:
    """In per cent."""
    return 100 * float(((model.predict(test) >= 0.5) == (test["pneumonia"] == 1)).mean())


def trained(work: Work) -> tuple[float, float]:
    """(accuracy on the official test images, on the hospitals' own test images)."""
    way, number, seed, passes = work
    plan, _, data = prepared()
    tables = hospitals(number, seed)
    whole = concatenate([*tables.values()])
    rows, held = (len(part) for part in whole.parts())
    own = [whole.parts()[1].rows(np.arange(held) % 2 == part) for part in range(2)]
    if way == "pooled":
        tables, settings, in_pass = {"pooled": whole}, {"batch_size": BATCH}, 1
    else:
        size = BATCH // number
        in_pass = round(rows / (number * size * LOCAL_STEPS))
        settings = {"batch_size": size, "local_steps": LOCAL_STEPS}
    learner = {"target": "pneumonia", "model": plan.params["model"], "learning_rate": RATE, **settings}
    learner |= {"rounds": passes * in_pass, "checkpoint_every": in_pass}
    untrained = make({**plan.params["model"], "target": "pneumonia"}, plan.table)
    after = [untrained.with_weights(s["weights"]) for s in driving("horizontal.fedavg", learner, tables, seed)]
    best = max(after, key=lambda model: accuracy(model, own[0]))
    official = table(data["test_images"], data["test_labels"][:, 0])
    return accuracy(best, official), accuracy(best, own[1])


def gaps(number: int, pooled: Sequence[tuple[float, float]], federated: Sequence[tuple[float, float]]) -> list[Row]:
    """Pooled less federated, of each of the two test sets."""
    rows = []
    for place, where in enumerate(("official test images", "hospitals' own test images")):
        ways = [np.array([one[place] for one in way]) for way in (pooled, federated)]
        gap, half = interval(ways[0] - ways[1])
        each = ", ".join(
            f"{name} {way.mean():.2f} (sd {way.std(ddof=1):.2f})"
            for name, way in zip(("pooled", "federated"), ways, strict=True)
        )
        note = f"95 % CI {gap - half:.2f} to {gap + half:.2f}, {len(ways[0])} paired seeds; {each} % right"
        rows.append(Row(f"{number} hospitals, {where}", gap, "points", limit=LIMIT, note=note))
    return rows


def measure(quick: bool) -> list[Row]:
    """All of it."""
    sizes, seeds, passes = ((2,), 2, 1) if quick else (HOSPITALS, SEEDS, PASSES)
    rows = []
    with ProcessPoolExecutor(2) as pool:
        for number in sizes:
            each = {way: [(way, number, seed, passes) for seed in range(seeds)] for way in ("pooled", "federated")}
            pooled, federated = ([*pool.map(trained, work)] for work in each.values())
            rows += gaps(number, pooled, federated)
            print(rows[-2:], file=sys.stderr, flush=True)
    return rows


if __name__ == "__main__":
    main("pooled_gap", ("numpy", "torch", "scipy"), measure, SEED)
