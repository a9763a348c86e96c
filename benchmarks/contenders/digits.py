"""What all contenders of ``benchmarks/simulation.py`` have alike: images, sites, network, steps, score.

Needs numpy and PyTorch only: the peers run in environments of their own. A contender's ``main()`` finds its task in
the environment variable SIMULATION_TASK, as JSON, and prints one line of JSON at the end.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

Task = dict[str, Any]
"""data: MNIST's file. sites, per_round, rounds, seed. channels, hidden: of the network. batch_size, epochs, rate."""


class ChannelsLast(nn.Module):
    """As in ``atoll.models.cnn``: the same values in an order in which a CPU finds maxima several times as fast."""

    def forward(self, x: Tensor) -> Tensor:
        """The same values."""
        return x.contiguous(memory_format=torch.channels_last)


def network(task: Task) -> nn.Sequential:
    """Layer by layer that of ``atoll.models.cnn``, from He's weights."""
    torch.manual_seed(task["seed"])
    layers: list[nn.Module] = []
    depth, side = 1, 28
    for channels in task["channels"]:
        layers += [nn.Conv2d(depth, channels, 3, padding=1), ChannelsLast(), nn.MaxPool2d(2), nn.ReLU()]
        depth, side = channels, side // 2
    layers += [nn.Flatten(), nn.Linear(depth * side * side, task["hidden"]), nn.ReLU(), nn.Linear(task["hidden"], 10)]
    for layer in layers:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


def images(task: Task) -> dict[str, NDArray[Any]]:
    """x_train, y_train, x_test, y_test."""
    with np.load(task["data"]) as arrays:
        return dict(arrays)


def dealt(task: Task, many: int) -> NDArray[np.int64]:
    """Rows of each site, [sites, many / sites]: equally many, dealt at random."""
    return np.random.default_rng(task["seed"]).permutation(many).reshape(task["sites"], -1)


def pixels(images: NDArray[np.uint8]) -> Tensor:
    """[n, 1, 28, 28] in [-2, 2], as in ``atoll.models.images``."""
    return torch.from_numpy(images).float().mul_(4 / 255).sub_(2)[:, None]


def batches(task: Task, rows: int, seed: tuple[int, ...]) -> Iterator[Tensor]:
    """Mini-batches of a site's round."""
    random = np.random.default_rng(seed)
    for _ in range(task["epochs"]):
        order = torch.from_numpy(random.permutation(rows))
        yield from torch.split(order, task["batch_size"])


def train(net: nn.Module, task: Task, x: NDArray[np.uint8], y: Tensor, seed: tuple[int, ...]) -> float:
    """A site's round of SGD, in place; the mean loss on the way."""
    optimizer, raw = torch.optim.SGD(net.parameters(), lr=task["rate"]), torch.from_numpy(x)
    total, steps = 0.0, 0
    for rows in batches(task, len(y), seed):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(pixels(raw[rows].numpy())), y[rows])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        total, steps = total + float(loss.detach()), steps + 1
    return total / max(steps, 1)


def accuracy(net: nn.Module, data: dict[str, NDArray[Any]]) -> float:
    """On the test images."""
    with torch.no_grad():
        found = net(pixels(data["x_test"])).argmax(1).numpy()
    return float((found == data["y_test"]).mean())


def asked() -> Task:
    """The task."""
    task: Task = json.loads(os.environ["SIMULATION_TASK"])
    return task


def tell(**found: Any) -> None:
    """The one line that the benchmark reads."""
    print("RESULT " + json.dumps(found), flush=True)
