"""Score a trained model on the messages of an event that no office had: accuracy and AUC.

python examples/crisis-text/score.py RESULT/model DATA/OFFICE.csv
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np

from atoll.models import estimator
from atoll.statistics.scores import binary_metrics


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("model", type=Path)
    arguments.add_argument("test", type=Path)
    given = arguments.parse_args()
    with given.test.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    labels = np.array([float(row["on_topic"]) for row in rows])
    messages = np.array([row["tweet"] for row in rows], object)
    found = binary_metrics(labels, estimator.load(given.model).predict_proba({"tweet": messages})[:, 1])
    print(f"{len(labels)} messages: accuracy {found['accuracy']:.3f}, AUC {found['auc']:.3f}")


if __name__ == "__main__":
    main()
