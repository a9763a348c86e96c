"""pfl-research's simulation (pfl), by its FederatedAveraging: a process a core under torchrun, which is its own way to
use several."""

from __future__ import annotations

import importlib
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.contenders.digits import Task, accuracy, asked, dealt, images, network, pixels, tell

pytorch: Any = importlib.import_module("pfl.model.pytorch")
algorithm: Any = importlib.import_module("pfl.algorithm.federated_averaging")
params: Any = importlib.import_module("pfl.algorithm.base")
simulate: Any = importlib.import_module("pfl.aggregate.simulate")
datasets: Any = importlib.import_module("pfl.data.federated_dataset")
dataset: Any = importlib.import_module("pfl.data.dataset")
sampling: Any = importlib.import_module("pfl.data.sampling")
hyper: Any = importlib.import_module("pfl.hyperparam")
metrics: Any = importlib.import_module("pfl.metrics")
weighting: Any = importlib.import_module("pfl.aggregate.weighting")


class Digits(nn.Module):
    """The network as pfl takes it."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.net = network(task)

    def loss(self, x: Tensor, y: Tensor, eval: bool = False) -> Tensor:
        """Mean log loss."""
        return F.cross_entropy(self.net(pixels(x.numpy())), y)

    def metrics(self, x: Tensor, y: Tensor, eval: bool = False) -> dict[str, Any]:
        """Asked for by the interface."""
        with torch.no_grad():
            return {"loss": metrics.Weighted(float(self.loss(x, y)) * len(y), len(y))}


def main() -> None:
    """Train, and tell the accuracy."""
    task = asked()
    torch.set_num_threads(1 if int(os.environ.get("WORLD_SIZE", 1)) > 1 else task["cores"])
    data, model = images(task), Digits(task)
    rows, y = dealt(task, len(data["y_train"])), data["y_train"].astype(np.int64)
    random = np.random.default_rng(task["seed"])

    def site(name: int) -> Any:
        own = random.permutation(rows[name])  # it takes batches in the order of the data
        return dataset.Dataset([torch.from_numpy(data["x_train"][own]), torch.from_numpy(y[own])], user_id=name)

    sampler = sampling.get_user_sampler("random", list(range(task["sites"])))
    sites = datasets.FederatedDataset(site, sampler)
    wrapped = pytorch.PyTorchModel(model, torch.optim.SGD, torch.optim.SGD(model.parameters(), lr=1.0))
    steps = hyper.NNTrainHyperParams(
        local_num_epochs=task["epochs"], local_learning_rate=task["rate"], local_batch_size=task["batch_size"]
    )
    rounds = params.NNAlgorithmParams(
        central_num_iterations=task["rounds"], evaluation_frequency=task["rounds"] + 1,
        train_cohort_size=task["per_round"], val_cohort_size=0,
    )  # fmt: skip
    backend = simulate.SimulatedBackend(
        training_data=sites, val_data=None, postprocessors=[weighting.WeightByDatapoints()]
    )
    algorithm.FederatedAveraging().run(
        algorithm_params=rounds, backend=backend, model=wrapped, model_train_params=steps, model_eval_params=None
    )
    if int(os.environ.get("RANK", 0)) == 0:
        tell(accuracy=accuracy(model.net, data))


if __name__ == "__main__":
    main()
