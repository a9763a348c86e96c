"""A coordinator that lies: weights made so that each neuron of the first fully connected layer counts a bin.

Every row of the layer measures the same thing (the mean of its inputs, in units of its spread over public
data), with thresholds at quantiles of public data; so two neighbouring neurons differ by the samples between their
thresholds, and where that is one sample, the difference of their gradients is that sample. Shapes, types and
bounds are those of any honest round: a site cannot see it. Recovery is ``linear_layer.factorise``, unchanged.

Source: Fowl et al. 2022, Robbing the Fed: Directly Obtaining Private Data in Federated Learning with Modified Models,
Section 3 (here in the model's own layer, nothing is added).
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from atoll.audit.network import Layers, features

HEAD = 1e-3
"""Weights of the layer behind: equal for all neurons, and so small that every sample's residual stays near ½."""


def imprint(model: nn.Module, layers: Layers, public: Tensor) -> nn.Module:
    """A copy of *model* with the weights that the coordinator sends. public: inputs of the network, [num_rows, ...]."""
    made = copy.deepcopy(model)
    linear, head = made.get_submodule(layers.linear), made.get_submodule(layers.head or layers.linear)
    if not isinstance(linear, nn.Linear) or not isinstance(head, nn.Linear) or layers.head is None:
        return made
    with torch.no_grad():
        known = features(model, layers.linear, public)
        direction = torch.full((known.shape[1],), 1 / known.shape[1])
        measured = known @ direction
        spread = measured.std().clamp(min=1e-12)
        cuts = torch.quantile(measured / spread, torch.arange(linear.out_features) / linear.out_features)
        cuts[0] = -1.0 if layers.convolutional else float(cuts[0]) - 10
        linear.weight.copy_((direction / spread).expand_as(linear.weight))
        linear.bias.copy_(-cuts)
        head.weight.zero_()
        head.weight[-1] = HEAD
        head.bias.zero_()
    return made
