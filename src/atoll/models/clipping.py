"""Clipped sums of per-example gradients, which DP-SGD is made of.

Clipping each example's gradient needs its norm. A dense or convolutional layer's gradient of one example is a
sum over places t of outer products, Σ_t g_t a_tᵀ, of what came into the layer and of the loss's gradient by what went
out; so one backward pass over *activations* gives every norm: by ‖a‖·‖g‖ where there is one place, from the Gram
matrices of a and g where there are few places, and else from the outer products themselves. Weights' own gradients
are formed once, from the already scaled g. Of a table of embeddings, only the few rows that an example looks up are
formed. Networks with other layers, or frozen ones, fall back to ``torch.func``.

Sources: Goodfellow 2015, Efficient Per-Example Gradient Computations; Li et al. 2022, Large Language Models Can Be
Strong Differentially Private Learners, §4 (ghost clipping); Bu et al. 2023, Differentially Private Optimization on
Large Model at Small Cost, §3 (book-keeping).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

SLACK = 1 + 1e-5
"""Norms in float32 are off by less than this factor: clipped gradients keep to the norm for certain."""
Clipped = tuple[NDArray[np.float64], int, float]
"""(Σ of clipped gradients, [num_weights]; how many were clipped; Σ of losses)."""


def known(net: nn.Module, learned: Sequence[nn.Parameter]) -> bool:
    """Whether every weight is learned, and of one layer alone, which :func:`by_layers` knows."""
    layers = _weighted(net)
    held = [id(p) for layer in layers for p in layer.parameters(recurse=False)]
    return len(held) == len(set(held)) == len(learned) and all(map(_plain, layers))


def by_layers(
    net: nn.Module, learned: Sequence[nn.Parameter], losses_of: Callable[[], Tensor], clip: float
) -> Clipped | None:
    """Of the losses, [num_rows], that *losses_of* finds by calling *net*. None where a layer is used twice, whose
    gradients have cross terms, and where a row overflows: then :func:`by_func` does it."""
    with recorded(net) as calls:
        losses = losses_of()
    if len(calls) != len({id(layer) for layer, _, _ in calls}):
        return None
    slopes = torch.autograd.grad(losses.sum(), [out for _, _, out in calls])
    with torch.no_grad():
        layers = {
            id(layer): _Table(layer, ins, g) if isinstance(layer, nn.Embedding) else _Layer(layer, ins, g)
            for (layer, ins, _), g in zip(calls, slopes, strict=True)
        }
        norms = torch.stack([layer.squares for layer in layers.values()]).sum(0).sqrt()
        if not norms.isfinite().all():
            return None
        factor = clip / (norms * SLACK).clamp(min=clip)
        parts = {id(p): s for layer in layers.values() for p, s in layer.sums(factor)}
        sums = flat([parts.get(id(p), torch.zeros_like(p)) for p in learned])
    return sums, int((norms > clip).sum()), float(losses.detach().sum())


def by_func(
    loss_of: Callable[..., Tensor], weights: Mapping[str, Tensor], wanted: Tensor, inputs: Sequence[Tensor], clip: float
) -> Clipped:
    """Of *loss_of* (weights by name, one label, one row's inputs), by ``torch.func``. A row whose gradient overflows
    counts as nothing: a failure would tell of it."""
    each = torch.func.vmap(torch.func.grad_and_value(loss_of), (None, 0, *[0] * len(inputs)), randomness="error")
    gradients, losses = each(weights, wanted, *inputs)
    found = torch.cat([g.flatten(1) for g in gradients.values()], 1)
    norms = found.norm(dim=1)
    lost = ~norms.isfinite()
    found[lost], norms = 0, torch.where(lost, torch.inf, norms)
    factor = clip / (norms * SLACK).clamp(min=clip)
    return (factor @ found).double().cpu().numpy(), int((norms > clip).sum()), float(losses.sum())


def _weighted(net: nn.Module) -> list[nn.Module]:
    """Layers that have weights of their own."""
    return [layer for layer in net.modules() if next(layer.parameters(recurse=False), None) is not None]


def _plain(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Conv2d):
        return layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    if isinstance(layer, nn.Embedding):
        return layer.max_norm is None and layer.padding_idx is None and not layer.scale_grad_by_freq
    return isinstance(layer, nn.Linear)


class _Table:
    """Embeddings' gradients of every example, as :class:`_Layer`: of the rows that it looks up; others' are 0."""

    def __init__(self, layer: nn.Embedding, ins: Tensor, slopes: Tensor) -> None:
        self.layer, size, flat = layer, layer.num_embeddings, (-1, layer.embedding_dim)
        places = ins.reshape(len(ins), -1)
        looked_up: Any = places + size * torch.arange(len(ins)).to(places)[:, None]
        found, where = looked_up.unique(return_inverse=True)
        self.example, self.row = found // size, found % size
        self.each = slopes.new_zeros(len(found), flat[1]).index_add_(0, where.flatten(), slopes.reshape(flat))
        self.squares = slopes.new_zeros(len(ins)).index_add_(0, self.example, self.each.square().sum(1))

    def sums(self, factor: Tensor) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """See :meth:`_Layer.sums`."""
        weight: Any = self.layer.weight
        yield weight, torch.zeros_like(weight).index_add_(0, self.row, self.each * factor[self.example][:, None])


class _Layer:
    """One layer's gradients of every example, as far as they must be formed. ins: what came in; slopes: the
    loss's gradient by what went out."""

    def __init__(self, layer: nn.Module, ins: Tensor, slopes: Tensor) -> None:
        if isinstance(layer, nn.Conv2d):
            a, g = _windows(layer, ins), slopes.flatten(2).transpose(1, 2)
        else:
            a, g = (t.reshape(len(t), -1, t.shape[-1]) for t in (ins, slopes))
        self.layer, self.a, self.g = layer, a, g  # [num_rows, places, inputs], [num_rows, places, outputs]
        self.each: Tensor | None = None
        places, size = a.shape[1], a.shape[2] * g.shape[2]
        if places == 1:
            self.squares = a.square().sum((1, 2)) * g.square().sum((1, 2))
        elif 2 * places**2 <= size:
            self.squares = (torch.bmm(a, a.transpose(1, 2)) * torch.bmm(g, g.transpose(1, 2))).sum((1, 2))
        else:
            self.each = torch.bmm(g.transpose(1, 2), a).flatten(1)
            self.squares = self.each.square().sum(1)
        self.offsets = g.sum(1) if layer.bias is not None else None
        if self.offsets is not None:
            self.squares = self.squares + self.offsets.square().sum(1)

    def sums(self, factor: Tensor) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each parameter with its examples' gradients, each times its *factor*, added up."""
        weight: Any = self.layer.weight
        if self.each is not None:
            found = factor @ self.each
        else:
            found = (self.g * factor[:, None, None]).flatten(0, 1).T @ self.a.flatten(0, 1)
        if isinstance(self.layer, nn.Conv2d):
            outputs, inputs, *kernel = weight.shape
            yield weight, found.reshape(outputs, *kernel, inputs).permute(0, 3, 1, 2)
        else:
            yield weight, found.reshape(weight.shape)
        if self.offsets is not None:
            bias: Any = self.layer.bias
            yield bias, factor @ self.offsets


def _windows(layer: nn.Conv2d, ins: Tensor) -> Tensor:
    """What the kernel sees at every place, [num_rows, places, kernel height · kernel width · inputs]: as F.unfold, in
    another order, by views and one copy, several times as fast."""
    padding: Any = layer.padding
    found = F.pad(ins.permute(0, 2, 3, 1), (0, 0, padding[1], padding[1], padding[0], padding[0]))
    for axis, (size, spread, step) in enumerate(zip(layer.kernel_size, layer.dilation, layer.stride, strict=True), 1):
        found = found.unfold(axis, spread * (size - 1) + 1, step)[..., ::spread]
    num_rows, height, width, inputs = found.shape[:4]
    if inputs == 1:  # whole rows of pixels at a time
        return found.permute(0, 3, 4, 5, 1, 2).reshape(num_rows, -1, height * width).transpose(1, 2)
    return found.permute(0, 1, 2, 4, 5, 3).reshape(num_rows, height * width, -1)


@contextmanager
def recorded(net: nn.Module) -> Iterator[list[tuple[nn.Module, Tensor, Tensor]]]:
    """(layer, what came in, what went out) of every layer with weights, as they are called. The graph begins at
    the first layer's output: neither weights nor inputs are differentiated by."""
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []

    def note(layer: nn.Module, ins: tuple[Tensor, ...], out: Tensor) -> None:
        if not out.requires_grad:
            out.requires_grad_()
        calls.append((layer, ins[0].detach(), out))

    hooks = [
        m.register_forward_hook(note) for m in net.modules() if next(m.parameters(recurse=False), None) is not None
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def flat(gradients: Any) -> NDArray[np.float64]:
    """Tensors, layer after layer, as one float64 vector."""
    found: NDArray[np.float64] = torch.cat([g.reshape(-1) for g in gradients]).double().cpu().numpy()
    return found
