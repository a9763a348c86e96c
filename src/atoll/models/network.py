"""PyTorch networks behind the model port: flat weights, losses, and per-example gradients.

Clipping each example's gradient needs its norm. A dense or convolutional layer's gradient of one example is a
sum over places t of outer products, Σ_t g_t a_tᵀ, of what came into the layer and of the loss's gradient by what went
out; so one backward pass over *activations* gives every norm: by ‖a‖·‖g‖ where there is one place, from the Gram
matrices of a and g where there are few places, and else from the outer products themselves. Weights' own gradients
are formed once, from the already scaled g. Networks with other layers fall back to ``torch.func``.

Sources: Goodfellow 2015, Efficient Per-Example Gradient Computations; Li et al. 2022, Large Language Models Can Be
Strong Differentially Private Learners, §4 (ghost clipping); Bu et al. 2023, Differentially Private Optimization on
Large Model at Small Cost, §3 (book-keeping).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from atoll.contract.errors import PlanError
from atoll.contract.program import TableView
from atoll.contract.schema import TableSchema
from atoll.contract.wire import Array, Json
from atoll.models.linear import feature_bounds
from atoll.models.model import Examples, Floats, ModelTask, Settings, missing

torch.set_num_threads(1)  # as BLAS: the same bits everywhere, and sites of one process work side by side
AT_ONCE = 1 << 17
"""Input values in one piece of a batch whose gradients are clipped: activations stay near the cache."""
SLACK = 1 + 1e-5
"""Norms in float32 are off by less than this factor: clipped gradients keep to the norm for certain."""


class Network:
    """A network of one output: the log-odds of a binary target, or a real target scaled to [-1, 1].

    A kind derives from it, and gives ``module``, ``inputs`` and ``tensors``.
    """

    Spec: ClassVar[type[Settings]]

    def __init__(self, settings: Settings, schema: TableSchema, weights: Floats | None = None) -> None:
        low, high = feature_bounds(schema, settings.target)
        self.settings, self.schema = settings, schema
        self.middle, self.half = (0.0, 1.0) if (low, high) == (0, 1) else ((low + high) / 2, (high - low) / 2)
        self.task: ModelTask = "binary" if (low, high) == (0, 1) else "regression"
        self.net = self.module()
        self.shapes = [tuple(p.shape) for p in self.net.parameters()]
        size = sum(math.prod(shape) for shape in self.shapes)
        self.weights = np.zeros(size) if weights is None else np.asarray(weights, np.float64)
        if self.weights.shape != (size,):
            raise PlanError("model.shape", "the weights do not fit the model", field="weights")

    @classmethod
    def of(cls, spec: Settings, schema: TableSchema) -> Self:
        """Unfitted; raises PlanError when a column is absent or of the wrong kind."""
        return cls(spec, schema)

    # -- what a kind gives

    def module(self) -> nn.Module:
        """The network; it maps :meth:`tensors` to [num_rows, 1]. No layer may mix rows (batch normalisation)."""
        raise NotImplementedError

    def inputs(self, table: TableView) -> tuple[Array, ...]:
        """Its inputs as the table has them, each [num_rows, …]."""
        raise NotImplementedError

    def tensors(self, inputs: tuple[Array, ...]) -> tuple[Tensor, ...]:
        """Its inputs as float32 tensors, scaled by what is public."""
        raise NotImplementedError

    # -- the port

    @property
    def target(self) -> str:
        """The label's column."""
        return self.settings.target

    def initial(self, seed: int) -> Floats:
        """He et al. 2015: N(0, 2 / fan-in) for weights, ones for scales, zero for offsets; by numpy's Philox."""
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed)))
        parts = []
        for name, parameter in self.net.named_parameters():
            shape = tuple(parameter.shape)
            if len(shape) > 1:
                parts.append(random.normal(0, math.sqrt(2 / math.prod(shape[1:])), math.prod(shape)))
            else:
                parts.append(np.full(shape, 0.0 if name.endswith("bias") else 1.0))
        return np.concatenate(parts).astype(np.float32).astype(np.float64)

    def with_weights(self, weights: Floats) -> Self:
        """The same network with other weights; raises PlanError when there are more or fewer."""
        return type(self)(self.settings, self.schema, weights)

    def spec(self) -> dict[str, Json]:
        """Its settings."""
        found: dict[str, Json] = self.settings.model_dump(mode="json")
        return found

    def arrays(self) -> dict[str, Array]:
        """The weights, layer after layer."""
        return {"weights": self.weights}

    def examples(self, table: TableView) -> Examples:
        """Inputs and labels of all rows; raises SchemaError when a label is missing."""
        labels = np.asarray(table[self.target], np.float64)
        if np.isnan(labels).any():
            raise missing([self.target])
        return Examples(self.inputs(table), labels)

    def predict(self, table: TableView) -> Floats:
        """Predicted probability, or value, of every row, [num_rows]."""
        self.load(self.weights)
        inputs, parts = self.inputs(table), [np.empty(0)]
        with torch.no_grad():
            for rows in pieces(inputs):
                out = self.net(*self.tensors(tuple(array[rows] for array in inputs)))[:, 0].double().numpy()
                parts.append(1 / (1 + np.exp(-out)) if self.task == "binary" else self.middle + self.half * out)
        return np.concatenate(parts)

    def loss_and_gradient(self, weights: Floats, batch: Examples) -> tuple[float, Floats]:
        """Mean loss over *batch* and its gradient."""
        self.load(weights, learning=True)
        loss = self.losses(batch).mean()
        return float(loss.detach()), flat(torch.autograd.grad(loss, list(self.net.parameters())))

    def clipped_gradient_sum(self, weights: Floats, batch: Examples, clip_norm_l2: float) -> tuple[Floats, int, float]:
        """See the port, and the module's docstring."""
        total, clipped, loss = np.zeros(len(self.weights)), 0, 0.0
        self.load(weights)
        for rows in pieces(batch.inputs):
            found = (self._by_layers if self._known else self._by_func)(batch.take(rows), clip_norm_l2)
            total += found[0]
            clipped += found[1]
            loss += found[2]
        return total, clipped, loss

    # -- within

    def load(self, weights: Floats, *, learning: bool = False) -> None:
        """Put *weights* into the network; *learning*: they are to be differentiated by."""
        self.net.requires_grad_(learning)
        vector = torch.from_numpy(np.asarray(weights, np.float32))
        nn.utils.vector_to_parameters(vector, self.net.parameters())

    def losses(self, batch: Examples) -> Tensor:
        """Each example's log loss, or half squared error in units of half the target's range, [num_rows]."""
        out = self.net(*self.tensors(batch.inputs))[:, 0]
        wanted = torch.from_numpy(((batch.labels - self.middle) / self.half).astype(np.float32))
        return _losses(out, wanted, self.task)

    @cached_property
    def _known(self) -> bool:
        """Whether every weight is of a layer that clipping by layers knows."""
        return all(isinstance(m, nn.Linear) or (isinstance(m, nn.Conv2d) and _plain(m)) for m in _weighted(self.net))

    def _by_layers(self, batch: Examples, clip: float) -> tuple[Floats, int, float]:
        with recorded(self.net) as calls:
            losses = self.losses(batch)
        if len(calls) != len({id(layer) for layer, _, _ in calls}):  # a layer that is used twice has cross terms
            return self._by_func(batch, clip)
        slopes = torch.autograd.grad(losses.sum(), [out for _, _, out in calls])
        with torch.no_grad():
            layers = {id(c[0]): _Layer(c[0], c[1], g) for c, g in zip(calls, slopes, strict=True)}
            norms = torch.stack([layer.squares for layer in layers.values()]).sum(0).sqrt()
            if not norms.isfinite().all():  # a row that overflows counts as nothing: a failure would tell of it
                return self._by_func(batch, clip)
            factor = clip / (norms * SLACK).clamp(min=clip)
            parts = {id(p): s for layer in layers.values() for p, s in layer.sums(factor)}
            sums = flat([parts.get(id(p), torch.zeros_like(p)) for p in self.net.parameters()])
        return sums, int((norms > clip).sum()), float(losses.detach().sum())

    def _by_func(self, batch: Examples, clip: float) -> tuple[Floats, int, float]:
        weights = {name: p.detach() for name, p in self.net.named_parameters()}
        wanted = torch.from_numpy(((batch.labels - self.middle) / self.half).astype(np.float32))

        def loss(weights: dict[str, Tensor], y: Tensor, *x: Tensor) -> Tensor:
            out = torch.func.functional_call(self.net, weights, tuple(v[None] for v in x))
            return _losses(out[:, 0], y[None], self.task)[0]

        tensors = self.tensors(batch.inputs)
        each = torch.func.vmap(torch.func.grad_and_value(loss), (None, 0, *[0] * len(tensors)), randomness="error")
        gradients, losses = each(weights, wanted, *tensors)
        found = torch.cat([g.flatten(1) for g in gradients.values()], 1)
        norms = found.norm(dim=1)
        lost = ~norms.isfinite()
        found[lost], norms = 0, torch.where(lost, torch.inf, norms)
        factor = clip / (norms * SLACK).clamp(min=clip)
        return (factor @ found).double().numpy(), int((norms > clip).sum()), float(losses.sum())


def _losses(out: Tensor, wanted: Tensor, task: ModelTask) -> Tensor:
    if task == "binary":
        return F.binary_cross_entropy_with_logits(out, wanted, reduction="none")
    return (out - wanted).square() / 2


def _weighted(net: nn.Module) -> list[nn.Module]:
    """Layers that have weights of their own."""
    return [layer for layer in net.modules() if next(layer.parameters(recurse=False), None) is not None]


def _plain(layer: nn.Conv2d) -> bool:
    return layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


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


def pieces(inputs: tuple[Array, ...]) -> Iterator[slice]:
    """Slices of rows whose inputs are about AT_ONCE values."""
    num_rows = len(inputs[0])
    wide = sum(math.prod(array.shape[1:]) for array in inputs)
    step = max(1, AT_ONCE // max(wide, 1))
    for start in range(0, num_rows, step):
        yield slice(start, start + step)


def flat(gradients: Any) -> Floats:
    """Tensors, layer after layer, as one float64 vector."""
    found: Floats = torch.cat([g.reshape(-1) for g in gradients]).double().numpy()
    return found
