"""Flower's simulation (flwr[simulation]), by its message API and its FedAvg, an actor a core."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import numpy as np
import torch

from benchmarks.contenders.digits import accuracy, asked, dealt, images, network, tell, train

flwr: Any = importlib.import_module("flwr")
apps: Any = importlib.import_module("flwr.app")
clients: Any = importlib.import_module("flwr.clientapp")
servers: Any = importlib.import_module("flwr.serverapp")
strategies: Any = importlib.import_module("flwr.serverapp.strategy")
simulation: Any = importlib.import_module("flwr.simulation")
TASK = asked()


@cache
def held() -> Any:
    """What an actor loads once: images, rows by site, labels, network."""
    torch.set_num_threads(1)
    data = images(TASK)
    return data, dealt(TASK, len(data["y_train"])), torch.from_numpy(data["y_train"].astype(np.int64)), network(TASK)


def trained(message: Any, context: Any) -> Any:
    """A site's round."""
    data, rows, y, net = held()
    site, number = int(context.node_config["partition-id"]), int(message.content["config"]["server-round"])
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    own = rows[site]
    loss = train(net, TASK, data["x_train"][own], y[own], (TASK["seed"], number, site))
    metrics = apps.MetricRecord({"loss": loss, "num-examples": len(own)})
    content = apps.RecordDict({"arrays": apps.ArrayRecord(net.state_dict()), "metrics": metrics})
    return apps.Message(content=content, reply_to=message)


def main() -> None:
    """Train, and tell the accuracy."""
    task = TASK
    client, server = clients.ClientApp(), servers.ServerApp()
    client.train()(trained)
    found: dict[str, Any] = {}

    @server.main()  # type: ignore[untyped-decorator]
    def run(grid: Any, context: Any) -> None:
        share = task["per_round"] / task["sites"]
        strategy = strategies.FedAvg(fraction_train=share, fraction_evaluate=0.0, min_available_nodes=task["sites"])
        first = apps.ArrayRecord(network(task).state_dict())
        found["arrays"] = strategy.start(grid=grid, initial_arrays=first, num_rounds=task["rounds"]).arrays

    simulation.run_simulation(
        server_app=server, client_app=client, num_supernodes=task["sites"],
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0},
                        "init_args": {"num_cpus": task["cores"], "include_dashboard": False}},
    )  # fmt: skip
    net = network(task)
    net.load_state_dict(found["arrays"].to_torch_state_dict())
    tell(accuracy=accuracy(net, images(task)))
