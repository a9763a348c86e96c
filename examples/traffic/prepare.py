"""Make four districts' road authorities out of a week of Los Angeles loop detectors, each with the tables of its own.

    python examples/traffic/prepare.py OUT [--data DIR]

DIR is the folder that has los_speed.csv.gz and los_adj.csv.gz, or has them in traffic-los-loop/ (default: $ATOLL_DATA).
OUT gets NAME.parquet for each district, and sites.yaml. Districts are clusters of the road network: spectral clustering
(Ng, Jordan & Weiss 2002; assigned by pivoted QR, Damle, Minden & Ying 2019), which draws nothing at random.

A row is one sensor at one moment: its last twelve readings (an hour), the mean of its neighbours' within the district,
the time of day, and the speed in 15, 30 and 60 minutes. Rows of the last fifth of the week are the test
(``run.holdout_by`` in the plan); those of the hour before, whose speeds to come are in the test, are left out.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from numpy.typing import NDArray
from scipy.linalg import qr

Floats = NDArray[np.float64]
DISTRICTS = ("district-1", "district-2", "district-3", "district-4")
START, EVERY = np.datetime64("2012-03-01T00:00", "us"), np.timedelta64(5, "m")
STEPS, AHEAD, TEST = 12, {"speed_15": 3, "speed_30": 6, "speed_60": 12}, 0.2
"""Readings in a window; targets, and how many readings ahead; share of the week."""
FAINT = 1e-3
"""Added between all sensors, so that the network hangs together."""


def districts(near: Floats, number: int) -> NDArray[np.int64]:
    """The cluster of each sensor, [num_sensors], by how *near* each is to each, symmetric."""
    near = near + FAINT
    root = 1 / np.sqrt(near.sum(1))
    vectors = np.linalg.eigh(root[:, None] * near * root)[1][:, -number:]
    chosen = qr(vectors.T, pivoting=True, mode="r")[1][:number]
    left, _, right = np.linalg.svd(vectors[chosen].T)
    return np.abs(vectors @ (left @ right)).argmax(1)


def around(near: Floats) -> Floats:
    """Weights that make the mean of each sensor's neighbours; of one without any, of itself."""
    weights = near - np.diag(np.diag(near))
    weights[weights.sum(1) == 0] += np.eye(len(near))[weights.sum(1) == 0]
    return weights / weights.sum(1, keepdims=True)


def rows(speed: Floats, near: Floats, sensors: NDArray[Any]) -> pa.Table:
    """All rows of a district. speed: [moments, sensors of it]."""
    moments = np.arange(STEPS - 1, len(speed) - max(AHEAD.values()))
    border = int((1 - TEST) * len(speed))
    moments = moments[(moments + max(AHEAD.values()) < border) | (moments >= border)]
    angle = 2 * np.pi * (moments % 288) / 288
    each = speed.shape[1]
    columns = {
        "time": np.repeat(START + moments * EVERY, each),
        "sensor": np.tile(sensors, len(moments)),
        "day_sin": np.repeat(np.sin(angle), each),
        "day_cos": np.repeat(np.cos(angle), each),
    }
    for name, values in (("speed", speed), ("near", speed @ around(near).T)):
        for n in range(STEPS):
            columns[f"{name}_lag{n}" if n else name] = values[moments - n].ravel()
    return pa.table(columns | {name: speed[moments + n].ravel() for name, n in AHEAD.items()})


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("out", type=Path)
    arguments.add_argument("--data", type=Path, default=Path(os.environ.get("ATOLL_DATA", ".")))
    given = arguments.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    found = [f for f in (given.data, given.data / "traffic-los-loop") if (f / "los_speed.csv.gz").is_file()]
    if not found:
        arguments.error(f"there is no los_speed.csv.gz in {given.data}: name its folder with --data")
    near = np.loadtxt(found[0] / "los_adj.csv.gz", delimiter=",")
    sensors = np.loadtxt(found[0] / "los_speed.csv.gz", delimiter=",", max_rows=1, dtype=str)
    speed = np.loadtxt(found[0] / "los_speed.csv.gz", delimiter=",", skiprows=1)
    cluster = districts(near, len(DISTRICTS))
    for i, name in enumerate(DISTRICTS):
        own = cluster == i
        pq.write_table(rows(speed[:, own], near[np.ix_(own, own)], sensors[own]), given.out / f"{name}.parquet")
    sites = {name: {"path": f"{name}.parquet"} for name in DISTRICTS}
    (given.out / "sites.yaml").write_text(yaml.safe_dump(sites, sort_keys=False), encoding="utf-8")


if __name__ == "__main__":
    main()
