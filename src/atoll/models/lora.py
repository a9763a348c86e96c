"""Low-rank adapters: a network that the sites already have is fine-tuned by few weights, and only they travel.

To a frozen matrix W is added a product of two thin ones: the network computes with W + α / r · B A, A [r, inputs]
random and B [outputs, r] zero at the start, so that the start is the base. Adapters are PyTorch parametrizations:
whatever reads a layer's weight gets the sum, fused attention (``nn.MultiheadAttention``) too, and any network can have
them.

Sources: Hu et al. 2022, LoRA: Low-Rank Adaptation of Large Language Models (ICLR), §4.1; Dettmers et al. 2023, QLoRA:
Efficient Finetuning of Quantized LLMs (NeurIPS), §4 (adapters on all linear layers, not on attention's alone).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from atoll.contract.errors import PlanError
from atoll.models.installed import Adapters

ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
"""Matrices of ``nn.MultiheadAttention``'s own; its output projection is a linear layer in it."""


class LowRank(nn.Module):
    """A matrix [outputs, inputs] with an adapter beside it."""

    def __init__(self, matrix: Tensor, adapters: Adapters) -> None:
        super().__init__()
        (outputs, inputs), rank = matrix.shape, adapters.rank
        self.share = adapters.alpha / rank
        self.down = nn.Parameter(torch.zeros(rank, inputs, device=matrix.device))
        self.up = nn.Parameter(torch.zeros(outputs, rank, device=matrix.device))

    def forward(self, matrix: Tensor) -> Tensor:
        """W + α / r · B A."""
        return matrix + self.share * (self.up @ self.down)


def matrices(net: nn.Module, learned: Container[str]) -> Iterator[tuple[str, nn.Module, str]]:
    """(layer, the same as a module, the name of its matrix) of all that adapters can be given to: a matrix that is also
    another layer's could not be merged. learned: names of parameters, without those that nobody learns."""
    times = Counter(id(matrix) for layer in net.modules() for matrix in layer.parameters(recurse=False))
    for name, layer in net.named_modules():
        names = ("weight",) if isinstance(layer, nn.Linear) else ()
        for own in ATTENTION if isinstance(layer, nn.MultiheadAttention) else names:
            if f"{name}.{own}" in learned and times[id(getattr(layer, own))] == 1:
                yield name, layer, own


def inside(name: str, layers: tuple[str, ...]) -> bool:
    """Whether *name* is one of *layers*, or in one."""
    return any(name == layer or name.startswith(f"{layer}.") for layer in layers)


def adapt(net: nn.Module, adapters: Adapters, learned: Container[str]) -> None:
    """Give the layers of *net* that *adapters* names, and that would be *learned*, one each. Raises PlanError
    "model.no-layer" for a name that no layer has."""
    names = [name for name, _ in net.named_parameters()]
    if unknown := [head for head in adapters.heads if not any(inside(name, (head,)) for name in names)]:
        raise PlanError(
            "model.no-layer", f"the network has no layer {unknown[0]!r} to be learned whole",
            field="model.base.adapters.heads",
            remedy=f"name layers of the network, such as {names[-1].rpartition('.')[0]!r}, or none: heads: []",
        )  # fmt: skip
    eligible = [found for found in matrices(net, learned) if not inside(found[0], adapters.heads)]
    for pattern in adapters.layers:
        if not any(fnmatchcase(name, pattern) for name, _, _ in eligible):
            raise PlanError(
                "model.no-layer", f"no linear layer of the network is named {pattern!r}",
                field="model.base.adapters.layers",
                remedy=f"its linear layers: {', '.join([name for name, _, _ in eligible][:8]) or 'none'}",
            )  # fmt: skip
    for name, layer, matrix in eligible:
        if any(fnmatchcase(name, pattern) for pattern in adapters.layers):
            parametrize.register_parametrization(layer, matrix, LowRank(getattr(layer, matrix), adapters))


def summed(net: nn.Module) -> int:
    """Values in the matrices that have adapters."""
    found = [layer for layer in net.modules() if isinstance(layer, parametrize.ParametrizationList)]
    return sum(layer.original.numel() for layer in found)


def merged(net: nn.Module, name: str) -> Tensor:
    """The parameter or buffer of that name, with its adapter where it has one."""
    layer, _, own = name.rpartition(".")
    found: Tensor = getattr(net.get_submodule(layer), own)
    return found.detach()
