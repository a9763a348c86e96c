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
from collections.abc import Callable, Iterator
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
from atoll.models.model import Examples, Floats, Goal, ModelTask, Settings

torch.set_num_threads(1)  # as BLAS: the same bits everywhere, and sites of one process work side by side
AT_ONCE = 1 << 17
"""Input values in one piece of a batch whose gradients are clipped: activations stay near the cache."""
SLACK = 1 + 1e-5
"""Norms in float32 are off by less than this factor: clipped gradients keep to the norm for certain."""


class Joined(nn.Module):
    """An encoder and a linear head. What the encoder gives is the row's representation, [num_rows, width]."""

    def __init__(self, encoder: nn.Module, width: int, outputs: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(width, outputs)

    def forward(self, *inputs: Tensor) -> Tensor:
        """[num_rows, outputs]."""
        out: Tensor = self.head(self.encoder(*inputs))
        return out


class Network:
    """An encoder, and a head with the log-odds of a binary target, of each class, or targets scaled to [-1, 1].

    A kind derives from it, and gives ``encoder``, ``inputs`` and ``tensors``. Its weights, and the running means of
    its normalisations behind them, stand in one tensor that the layers look into, so that loading them is one copy.
    """

    Spec: ClassVar[type[Settings]]

    def __init__(self, settings: Settings, schema: TableSchema, weights: Floats | None = None) -> None:
        self.settings, self.schema, self.goal = settings, schema, Goal.of(schema, settings.targets)
        self.net = Joined(*self.encoder(), self.goal.outputs)
        learned = {n: p for n, p in self.net.named_parameters() if p.requires_grad}
        followed = {n: b for n, b in self.net.named_buffers() if b.is_floating_point()}
        self.layers, size = {}, 0
        for name, values in (*learned.items(), *followed.items()):
            self.layers[name] = slice(size, size := size + values.numel())
        self.running = slice(sum(p.numel() for p in learned.values()), size)
        self._flat, self._slopes = torch.zeros(size), torch.zeros(size)
        for name, where in self.layers.items():
            held = learned[name] if name in learned else followed[name]
            held.data = self._flat[where].view(held.shape)
        self._learned = [(p, self._slopes[self.layers[n]].view(p.shape)) for n, p in learned.items()]
        self.weights = np.zeros(size) if weights is None else np.asarray(weights, np.float64)
        if self.weights.shape != (size,):
            raise PlanError("model.shape", "the weights do not fit the model", field="weights")

    @classmethod
    def of(cls, spec: Settings, schema: TableSchema) -> Self:
        """Unfitted; raises PlanError when a column is absent or of the wrong kind."""
        return cls(spec, schema)

    # -- what a kind gives

    def encoder(self) -> tuple[nn.Module, int]:
        """What maps :meth:`tensors` to [num_rows, width], and the width. Parameters that do not require a gradient
        are not among the weights. Under differential privacy no layer may mix rows (batch normalisation)."""
        raise NotImplementedError

    def inputs(self, table: TableView) -> tuple[Array, ...]:
        """Its inputs as the table has them, each [num_rows, …]."""
        raise NotImplementedError

    def tensors(self, inputs: tuple[Array, ...]) -> tuple[Tensor, ...]:
        """Its inputs as float32 tensors, scaled by what is public."""
        raise NotImplementedError

    # -- the port

    dtype: ClassVar[np.dtype[np.float32]] = np.dtype(np.float32)

    @property
    def targets(self) -> tuple[str, ...]:
        """The label columns."""
        return self.settings.targets

    @property
    def task(self) -> ModelTask:
        """By the targets' columns: see :meth:`Goal.of`."""
        return self.goal.task

    def initial(self, seed: int) -> Floats:
        """He et al. 2015: N(0, 2 / fan-in) for weights, ones for scales, zero for offsets; by numpy's Philox."""
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed)))
        parts = []
        for name, parameter in (*self.net.named_parameters(), *self.net.named_buffers()):
            shape = tuple(parameter.shape)
            if name not in self.layers:
                continue
            if len(shape) > 1:
                parts.append(random.normal(0, math.sqrt(2 / math.prod(shape[1:])), math.prod(shape)))
            else:
                parts.append(np.full(shape, 0.0 if name.endswith(("bias", "mean")) else 1.0))
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
        return Examples(self.inputs(table), self.goal.labels(table, self.targets))

    def predict(self, table: TableView) -> Floats:
        """Predicted probabilities, or values, of every row, [num_rows] or [num_rows, outputs]."""
        self.load(self.weights)
        inputs, parts = self.inputs(table), [np.empty((0, self.goal.outputs))]
        self.net.eval()
        with torch.no_grad(), memory():
            for rows in pieces(inputs):
                out = self.net(*self.tensors(tuple(array[rows] for array in inputs))).double()
                if self.task == "classes":
                    out = out.softmax(1)
                parts.append(out.sigmoid().numpy() if self.task == "binary" else out.numpy())
        found: Floats = np.concatenate(parts)
        if self.task == "regression":
            found = self.goal.middle + self.goal.half * found
        return found[:, 0] if self.goal.outputs == 1 else found

    def loss_and_gradient(self, weights: Floats, batch: Examples) -> tuple[float, Floats]:
        """Mean loss over *batch* and its gradient."""
        return self.descend(weights, batch, lambda: self.losses(batch).mean())

    def clipped_gradient_sum(self, weights: Floats, batch: Examples, clip_norm_l2: float) -> tuple[Floats, int, float]:
        """See the port, and the module's docstring."""
        if self.running.stop > self.running.start:
            raise PlanError(
                "model.mixes-rows", "a batch normalisation mixes rows: no row has a gradient of its own",
                field="model.norm", remedy="use norm: group",
            )  # fmt: skip
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
        self._flat.copy_(torch.from_numpy(np.asarray(weights, np.float32)))
        for parameter, slope in self._learned:
            parameter.requires_grad_(learning)
            parameter.grad = slope if learning else None

    def descend(self, weights: Floats, batch: Examples, loss_of: Callable[[], Tensor]) -> tuple[float, Floats]:
        """The loss that *loss_of* finds at *weights*, and its gradient."""
        self.load(weights, learning=True)
        self.net.train()
        self._slopes.zero_()
        with memory():
            loss = loss_of()
            loss.backward()  # type: ignore[no-untyped-call]
        if self.running.stop > self.running.start:
            before = torch.from_numpy(np.asarray(weights, np.float32))[self.running]
            torch.sub(before, self._flat[self.running], out=self._slopes[self.running])
        return float(loss.detach()), self._slopes.numpy().copy()

    def losses(self, batch: Examples) -> Tensor:
        """Each example's log loss, or half squared error in units of half the target's range, [num_rows]."""
        return self.losses_of(self.net(*self.tensors(batch.inputs)), self.wanted(batch.labels))

    def wanted(self, labels: Floats) -> Tensor:
        """Labels as the loss takes them: classes as places or probabilities, values scaled to [-1, 1]."""
        if self.task == "classes" and labels.ndim == 1:
            return torch.from_numpy(labels.astype(np.int64))
        scaled = (labels.reshape(len(labels), -1) - self.goal.middle) / self.goal.half
        return torch.from_numpy(scaled.astype(np.float32))

    def losses_of(self, out: Tensor, wanted: Tensor) -> Tensor:
        """Of outputs [num_rows, outputs], [num_rows]."""
        if self.task == "classes":
            return F.cross_entropy(out, wanted, reduction="none")
        if self.task == "binary":
            return F.binary_cross_entropy_with_logits(out, wanted, reduction="none").mean(1)
        return (out - wanted).square().mean(1) / 2

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
            sums = flat([parts.get(id(p), torch.zeros_like(p)) for p, _ in self._learned])
        return sums, int((norms > clip).sum()), float(losses.detach().sum())

    def _by_func(self, batch: Examples, clip: float) -> tuple[Floats, int, float]:
        weights = {name: p.detach() for name, p in self.net.named_parameters() if name in self.layers}
        wanted = self.wanted(batch.labels)

        def loss(weights: dict[str, Tensor], y: Tensor, *x: Tensor) -> Tensor:
            out = torch.func.functional_call(self.net, weights, tuple(v[None] for v in x))
            return self.losses_of(out, y[None])[0]

        tensors = self.tensors(batch.inputs)
        each = torch.func.vmap(torch.func.grad_and_value(loss), (None, 0, *[0] * len(tensors)), randomness="error")
        gradients, losses = each(weights, wanted, *tensors)
        found = torch.cat([g.flatten(1) for g in gradients.values()], 1)
        norms = found.norm(dim=1)
        lost = ~norms.isfinite()
        found[lost], norms = 0, torch.where(lost, torch.inf, norms)
        factor = clip / (norms * SLACK).clamp(min=clip)
        return (factor @ found).double().numpy(), int((norms > clip).sum()), float(losses.sum())


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


@contextmanager
def memory() -> Iterator[None]:
    """PyTorch's ways of saying that there is not enough memory, as MemoryError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise MemoryError from None
    except RuntimeError as error:
        if "allocate memory" in str(error):
            raise MemoryError from None
        raise


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
