"""The peer of benchmarks.dp_sgd, run in an environment of its own: steps of DP-SGD by Opacus.

Reads one line of JSON, {"case", "mode", "batch", "steps"}, answers with one, the seconds of each step; and so on.
It imports nothing of Atoll. Data are random: their values do not matter to the time.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
import warnings
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

NUM_FEATURES = 100


def network(case: str) -> Any:
    """The same layers as Atoll's: logistic regression, or the CNN for images of 28 × 28."""
    if case == "linear":
        return nn.Linear(NUM_FEATURES, 1)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(),
        nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 1),
    )  # fmt: skip


def prepared(case: str, mode: str, batch: int) -> Any:
    """A function that does one step, with Opacus's hooks, its ghost clipping, or none at all ("plain")."""
    torch.manual_seed(0)
    shape = (batch, NUM_FEATURES) if case == "linear" else (batch, 1, 28, 28)
    x, y = torch.rand(shape) * 2 - 1, (torch.rand(batch, 1) < 0.5).float()
    net, loss_of = network(case), nn.BCEWithLogitsLoss()
    optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.01)
    if mode != "plain":
        made = importlib.import_module("opacus").PrivacyEngine().make_private(
            module=net, optimizer=optimizer, criterion=loss_of, noise_multiplier=1.0, max_grad_norm=1.0,
            data_loader=DataLoader(TensorDataset(x, y), batch_size=batch), poisson_sampling=False,
            grad_sample_mode=mode,
        )  # fmt: skip
        net, optimizer = made[:2]
        loss_of = made[2] if mode == "ghost" else loss_of

    def step() -> None:
        optimizer.zero_grad()
        loss_of(net(x), y).backward()
        optimizer.step()

    return step


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    steps: dict[tuple[str, str, int], Any] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        key = (asked["case"], asked["mode"], asked["batch"])
        if key not in steps:
            steps[key] = prepared(*key)
        times = []
        for _ in range(asked["steps"]):
            began = time.perf_counter()
            steps[key]()
            times.append(time.perf_counter() - began)
        print(json.dumps(times), flush=True)


if __name__ == "__main__":
    main()
