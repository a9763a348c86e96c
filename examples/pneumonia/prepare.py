"""Make two to five hospitals out of PneumoniaMNIST: each with its own share of the sick, and a scanner of its own.

    python examples/pneumonia/prepare.py OUT [--data DIR] [--hospitals N]

DIR is the folder that has pneumoniamnist.npz, or has it in pneumonia-mnist/ (default: $ATOLL_DATA). OUT gets
NAME.npz for each hospital, of the training and validation images, sites.yaml, and test.npz, the official test images as
they are. Of N hospitals, number i of 1 … N has (N + 1 − i) parts of the normal and i parts of the pneumonia images;
its scanner has a contrast and a brightness of its own. Seed 0: the same files every time.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

FILE = "pneumoniamnist.npz"
SCANNERS = {"north": (1.0, 0), "south": (0.75, 25), "east": (1.2, -15), "west": (0.85, -30), "central": (1.1, 20)}
"""By hospital: contrast about the middle of the scale, and brightness."""


def split(labels: NDArray[Any], number: int) -> list[NDArray[Any]]:
    """Rows of each hospital, in random order."""
    random = np.random.default_rng(0)
    rows: list[list[NDArray[Any]]] = [[] for _ in range(number)]
    rising = np.arange(1, number + 1)
    for label, parts in ((0, rising[::-1]), (1, rising)):
        own = random.permutation(np.flatnonzero(labels == label))
        ends = np.round(np.cumsum(parts) / parts.sum() * len(own)).astype(int)
        for i, some in enumerate(np.split(own, ends[:-1])):
            rows[i].append(some)
    return [random.permutation(np.concatenate(both)) for both in rows]


def scanned(images: NDArray[np.uint8], contrast: float, brightness: float) -> NDArray[np.uint8]:
    """The images as another scanner would have taken them."""
    return np.clip(np.rint(127.5 + contrast * (images - 127.5) + brightness), 0, 255).astype(np.uint8)


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("out", type=Path)
    arguments.add_argument("--data", type=Path, default=Path(os.environ.get("ATOLL_DATA", ".")))
    arguments.add_argument("--hospitals", type=int, choices=range(2, 6), default=2, metavar="N")
    given = arguments.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    found = [folder / FILE for folder in (given.data, given.data / "pneumonia-mnist") if (folder / FILE).is_file()]
    if not found:
        arguments.error(f"there is no {FILE} in {given.data}: name its folder with --data")
    with np.load(found[0]) as data:
        images = np.concatenate([data["train_images"], data["val_images"]])
        labels = np.concatenate([data["train_labels"], data["val_labels"]])[:, 0]
        np.savez(given.out / "test.npz", image=data["test_images"], pneumonia=data["test_labels"][:, 0])
    names = list(SCANNERS)[: given.hospitals]
    for name, rows in zip(names, split(labels, given.hospitals), strict=True):
        np.savez(given.out / f"{name}.npz", image=scanned(images[rows], *SCANNERS[name]), pneumonia=labels[rows])
    sites = {name: {"path": f"{name}.npz"} for name in names}
    (given.out / "sites.yaml").write_text(yaml.safe_dump(sites, sort_keys=False), encoding="utf-8")


if __name__ == "__main__":
    main()
