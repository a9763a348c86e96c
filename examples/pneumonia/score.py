"""Score a trained model on images that no hospital had: accuracy and AUC on the official test images.

    python examples/pneumonia/score.py RESULT/model DATA/test.npz

The model is read from its open format: model.json says what it is, model.safetensors holds the numbers.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from atoll.models import estimator
from atoll.statistics.scores import binary_metrics


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("model", type=Path)
    arguments.add_argument("test", type=Path)
    given = arguments.parse_args()
    with np.load(given.test) as data:
        images, labels = data["image"], data["pneumonia"].astype(np.float64)
    found = binary_metrics(labels, estimator.load(given.model).predict_proba({"image": images})[:, 1])
    print(f"{len(labels)} test images: accuracy {found['accuracy']:.3f}, AUC {found['auc']:.3f}")


if __name__ == "__main__":
    main()
