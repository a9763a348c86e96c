"""The physical limit: FedAvg's local steps in plain PyTorch, with nothing around them. way: "processes", one a core
with one thread each, weights and sums in shared memory; or "threads", one process whose operations use all cores."""

from __future__ import annotations

import multiprocessing
from typing import Any

import numpy as np
import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from benchmarks.contenders.digits import Task, accuracy, asked, dealt, images, network, tell, train


def work(worker: int, workers: int, task: Task, shared: Any, sums: Any, barrier: Any) -> None:
    """One process' sites of every round."""
    data, net = images(task), network(task)
    rows = dealt(task, len(data["y_train"]))
    y = torch.from_numpy(data["y_train"].astype(np.int64))
    random = np.random.default_rng(task["seed"] + 1)
    for number in range(task["rounds"]):
        drawn = np.sort(random.choice(task["sites"], task["per_round"], replace=False))
        sums[worker].zero_()
        for site in drawn[worker::workers].tolist():
            vector_to_parameters(shared.clone(), net.parameters())
            own = rows[site]
            train(net, task, data["x_train"][own], y[own], (task["seed"], number, site))
            sums[worker] += parameters_to_vector(net.parameters()).detach()
        barrier.wait()
        if worker == 0:
            shared.copy_(sums.sum(0) / len(drawn))
        barrier.wait()


def main() -> None:
    """Train, and tell the accuracy."""
    task = asked()
    workers = task["cores"] if task["way"] == "processes" else 1
    torch.set_num_threads(1 if workers > 1 else task["cores"])
    net = network(task)
    shared = parameters_to_vector(net.parameters()).detach().clone()
    sums = torch.zeros(workers, len(shared))
    for one in (shared, sums):
        one.share_memory_()  # type: ignore[no-untyped-call]
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(workers)
    others = [context.Process(target=work, args=(i, workers, task, shared, sums, barrier)) for i in range(1, workers)]
    for other in others:
        other.start()
    work(0, workers, task, shared, sums, barrier)
    for other in others:
        other.join()
    vector_to_parameters(shared, net.parameters())
    tell(accuracy=accuracy(net, images(task)))
