"""Score a trained model on images that no hospital had: accuracy and AUC on the official test images.

    python examples/pneumonia/score.py RESULT/model DATA/test.npz

The model is read from its open format: model.json says what it is, weights.npz holds the numbers.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from atoll.contract.plan import Plan
from atoll.data.table import Table
from atoll.models.model import from_spec
from atoll.statistics.scores import binary_metrics


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("model", type=Path)
    arguments.add_argument("test", type=Path)
    given = arguments.parse_args()
    schema = Plan.load(Path(__file__).parent / "plan.yaml").table
    with np.load(given.test) as data:
        table = Table(schema, {"image": data["image"], "pneumonia": data["pneumonia"].astype(np.float64)})
    card = json.loads((given.model / "model.json").read_text(encoding="utf-8"))
    with np.load(given.model / "weights.npz") as arrays:
        model = from_spec(card["model"]["spec"], schema, dict(arrays))
    found = binary_metrics(table["pneumonia"], model.predict(table))
    print(f"{len(table)} test images: accuracy {found['accuracy']:.3f}, AUC {found['auc']:.3f}")


if __name__ == "__main__":
    main()
