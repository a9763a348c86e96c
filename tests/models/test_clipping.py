"""Clipped sums by layers are those of every row's own gradient, as ``torch.func`` finds it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from atoll.models import clipping  # noqa: E402


class Words(nn.Module):
    """Words in, a word out; *tied*: one table for both."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, x: Any) -> Any:
        return self.head(self.table(x).mean(1))


@pytest.mark.parametrize("clip", [0.1, 1e6])
@pytest.mark.parametrize("tied", [False, True])
def test_a_parameter_of_two_layers_is_left_to_torch_func(tied: bool, clip: float) -> None:
    torch.manual_seed(0)
    net, x, y = Words(tied), torch.randint(0, 5, (4, 2)), torch.randint(0, 5, (4,))
    learned, weights = list(net.parameters()), {n: p.detach() for n, p in net.named_parameters()}

    def loss_of(weights: Any, label: Any, row: Any) -> Any:
        return F.cross_entropy(torch.func.functional_call(net, weights, (row[None],)), label[None])

    wanted = clipping.by_func(loss_of, weights, y, (x,), clip)
    found = clipping.by_layers(net, learned, lambda: F.cross_entropy(net(x), y, reduction="none"), clip)
    assert found is not None and clipping.known(net, learned) == (not tied)
    assert np.allclose(found[0], wanted[0], rtol=0, atol=1e-6) == (not tied), "what known() keeps away from by_layers"
    assert not clipping.known(net, learned[:-1])
