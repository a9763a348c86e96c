"""A network at many sites' weights at once, by ``torch.func`` (see ``models/batched.py``).

Source: Horace He & Richard Zou 2021, functorch: JAX-like composable function transforms for PyTorch.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from atoll.models.batched import Learn, shares
from atoll.models.model import Examples, Floats
from atoll.models.network import Network, memory

DRAWS = (nn.modules.dropout._DropoutNd, nn.RReLU)


def vmapped(network: Network, rows: Examples) -> Learn | None:
    """See :func:`atoll.models.batched.batched`: tried on *rows* at two sites."""
    if any(isinstance(module, DRAWS) for module in network.net.modules()):
        return None
    made = Vmapped(network)
    twice = Examples(tuple(np.stack([array, array]) for array in rows.inputs), np.stack([rows.labels, rows.labels]))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # PyTorch says so where it would go site by site
            made(np.stack([network.weights, network.weights]).astype(network.dtype), twice, np.full(2, len(rows)))
    except (RuntimeError, NotImplementedError, Warning):
        return None
    return made


class Vmapped:
    """One network, many weights (see :data:`atoll.models.batched.Learn`)."""

    def __init__(self, network: Network) -> None:
        self._network = network
        named = dict(network.net.named_parameters())
        self._shapes = {name: tuple(named[name].shape) for name in network.layers}
        self._places: dict[str, Tensor] = {}
        self._flat, self._slopes = torch.empty(0), torch.empty(0)

    def __call__(self, weights: NDArray[Any], batch: Examples, rows: NDArray[np.int64]) -> tuple[Floats, NDArray[Any]]:
        network, (sites, size) = self._network, batch.labels.shape[:2]
        self._make_room(sites)
        self._flat.copy_(torch.from_numpy(weights))
        tensors = network.placed(tuple(array.reshape(-1, *array.shape[2:]) for array in batch.inputs))
        inputs = tuple(tensor.view(sites, size, *tensor.shape[1:]) for tensor in tensors)
        wanted = network.wanted(batch.labels.reshape(sites * size, *batch.labels.shape[2:]))
        share = torch.from_numpy(shares(rows, size).astype(np.float32)).to(network.device)
        network.net.train()
        with memory():
            losses = torch.vmap(self._loss)(self._places, wanted.view(sites, size, *wanted.shape[1:]), share, *inputs)
            gradients = torch.autograd.grad(losses.sum(), list(self._places.values()))
        for where, gradient in zip(network.layers.values(), gradients, strict=True):
            self._slopes[:, where] = gradient.reshape(sites, -1)
        return losses.detach().double().cpu().numpy(), self._slopes.cpu().numpy()

    def _loss(self, weights: dict[str, Tensor], wanted: Tensor, share: Tensor, *inputs: Tensor) -> Tensor:
        out = torch.func.functional_call(self._network.net, weights, inputs)
        return (self._network.losses_of(out, wanted) * share).sum()

    def _make_room(self, sites: int) -> None:
        """For weights and gradients, [sites, num_weights] each; ``_places`` are the layers in the weights."""
        if len(self._flat) == sites:
            return
        network = self._network
        self._flat, self._slopes = (torch.zeros(sites, len(network.weights), device=network.device) for _ in "wg")
        for name, where in network.layers.items():
            self._places[name] = self._flat[:, where].view(sites, *self._shapes[name]).detach().requires_grad_(True)
