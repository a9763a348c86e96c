"""PyTorch networks behind the model port: flat weights, losses, gradients and predictions."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from atoll.contract.errors import PlanError
from atoll.contract.program import TableView
from atoll.contract.schema import TableSchema
from atoll.contract.wire import Array, Json
from atoll.models import clipping
from atoll.models.allocation import keep_freed
from atoll.models.device import device
from atoll.models.linear import Scale
from atoll.models.lora import LowRank, adapt, inside, merged, summed
from atoll.models.model import Examples, Floats, Goal, ModelTask, Settings, by_row

torch.set_num_threads(1)  # as BLAS: the same bits everywhere, and sites of one process work side by side
keep_freed()
AT_ONCE = 1 << 17
"""Input values in one piece of a batch whose gradients are clipped: activations stay near the cache."""
FORMED = 1 << 24
"""Values of whole gradients, one an example, that ``torch.func`` forms at once."""
DRAWING = threading.RLock()
"""PyTorch's generator, from which layers draw as they are made, is the whole process's."""
NORMALISATIONS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


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
        self.device = device()
        with DRAWING, memory():
            self.net: Any = self.built().to(self.device)  # Joined, unless a kind builds it otherwise
        learnable = {name for name, p in self.net.named_parameters() if p.requires_grad}
        fixed = self._freeze()
        if settings.base is not None and settings.base.adapters is not None:
            adapt(self.net, settings.base.adapters, learnable)
        self._summed = summed(self.net)
        self._still = [m.eval() for n, m in self.net.named_modules() if f"{n}.running_mean" in fixed]
        learned = {n: p for n, p in self.net.named_parameters() if p.requires_grad}
        followed = {n: b for n, b in self._followers().items() if n not in fixed}
        self.layers, size = {}, 0
        for name, values in (*learned.items(), *followed.items()):
            self.layers[name] = slice(size, size := size + values.numel())
        self.running = slice(sum(p.numel() for p in learned.values()), size)
        self._flat, self._slopes = (torch.zeros(size, device=self.device) for _ in range(2))
        for name, where in self.layers.items():
            held = learned[name] if name in learned else followed[name]
            held.data = self._flat[where].view(held.shape)
        self._learned = [(p, self._slopes[self.layers[n]].view(p.shape)) for n, p in learned.items()]
        self._learning: bool | None = None
        self.weights = np.zeros(size) if weights is None else np.asarray(weights, np.float64)
        if self.weights.shape != (size,):
            raise PlanError("model.shape", "the weights do not fit the model", field="weights")

    @classmethod
    def of(cls, spec: Settings, schema: TableSchema) -> Self:
        """Unfitted; raises PlanError when a column is absent or of the wrong kind."""
        return cls(spec, schema)

    # -- what a kind gives

    def built(self) -> nn.Module:
        """The network: :meth:`encoder` and a head."""
        return Joined(*self.encoder(), self.goal.outputs)

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

    def raw(self, table: TableView) -> dict[str, Tensor]:
        """What an exported network takes, by name, each [num_rows, …]: where a kind can scale them by tensor operations
        alone, the table's own columns; else what :meth:`tensors` gives."""
        return {f"input_{i}": tensor for i, tensor in enumerate(self.tensors(self.inputs(table)))}

    def scaled(self, *raw: Tensor) -> tuple[Tensor, ...]:
        """What the network takes, of :meth:`raw`."""
        return raw

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

    @cached_property
    def normalisations(self) -> tuple[str, ...]:
        """Batch, instance, layer, group and RMS normalisations that have weights, or follow the data."""
        found = [name for name, module in self.net.named_modules() if isinstance(module, NORMALISATIONS)]
        return tuple(name for name in found if any(layer.startswith(name + ".") for layer in self.layers))

    def initial(self, seed: int) -> Floats:
        """He et al. 2015: N(0, 2 / fan-in) for weights, ones for scales, zero for offsets; by numpy's Philox."""
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed)))
        parts = []
        for name, parameter in (*self.net.named_parameters(), *self.net.named_buffers()):
            shape = tuple(parameter.shape)
            if name not in self.layers:
                continue
            if name.endswith(".up") and isinstance(self.net.get_submodule(name.rpartition(".")[0]), LowRank):
                parts.append(np.zeros(math.prod(shape)))  # it adds nothing yet
            elif len(shape) > 1:
                parts.append(random.normal(0, math.sqrt(2 / math.prod(shape[1:])), math.prod(shape)))
            else:
                parts.append(np.full(shape, 0.0 if name.endswith(("bias", "mean")) else 1.0))
        return self._based(np.concatenate(parts).astype(np.float32).astype(np.float64))

    def _based(self, weights: Floats) -> Floats:
        """*weights*, with those of the installed base in every layer that it has; a head of another size stays new."""
        if self.settings.base is None:
            return weights
        found, held = self.settings.base.read(), self._held()
        shared = [name for name in held if name in found and not name.startswith("head.")]
        odd = [name for name in shared if found[name].shape != held[name].shape]
        if self.settings.base.adapters is None and (odd or not shared):  # with them all of it has been looked at
            raise unfit((odd or [*held])[0])
        for name in self.layers:
            if name in found and found[name].shape == held[name].shape:
                weights[self.layers[name]] = found[name].ravel()
        return weights

    def _freeze(self) -> set[str]:
        """Give the base's frozen layers its weights, once and for all, and say which: they are not among the weights
        then, and their normalisations go by the base's running means. With adapters all but their heads are frozen."""
        base = self.settings.base
        if base is None or not (base.frozen or base.adapters):
            return set()
        found, held = base.read(), {**dict(self.net.named_parameters()), **self._followers()}
        if base.adapters is None:
            fixed = {name for name in held if inside(name, base.frozen)}
            odd = [layer for layer in base.frozen if not any(inside(name, (layer,)) for name in fixed)]
        else:
            ever = {name for name, p in self.net.named_parameters() if not p.requires_grad}  # alike everywhere
            fixed, odd = {name for name in held if name not in ever and not inside(name, base.adapters.heads)}, []
        odd += [name for name in held if name in fixed and (name not in found or found[name].shape != held[name].shape)]
        if odd:
            raise unfit(odd[0])
        for name in fixed:
            held[name].data.copy_(torch.from_numpy(found[name].copy()))
            held[name].requires_grad_(False)
        return fixed

    def _followers(self) -> dict[str, Tensor]:
        """What follows the data: normalisations' running means and variances."""
        return {n: b for n, b in self.net.named_buffers() if n.endswith(("running_mean", "running_var"))}

    def _baseless(self) -> Settings:
        return self.settings.model_copy(update={"base": None})

    def _held(self) -> dict[str, Tensor]:
        return {**dict(self.net.named_parameters()), **dict(self.net.named_buffers())}

    def with_weights(self, weights: Floats) -> Self:
        """The same network with other weights; raises PlanError when there are more or fewer."""
        return type(self)(self.settings, self.schema, weights)

    def whole(self) -> Self:
        """The same network with all of its weights among them: it needs no base, and its adapters are merged."""
        made = type(self)(self._baseless(), self.schema)
        self.load(self.weights)
        return made.with_weights(np.concatenate([merged(self.net, n).cpu().numpy().ravel() for n in made.layers]))

    def spec(self) -> dict[str, Json]:
        """Its settings."""
        found: dict[str, Json] = self.settings.model_dump(mode="json")
        return found

    def arrays(self) -> dict[str, Array]:
        """The weights by layer, float32, each in its own shape."""
        held, weights = self._held(), self.weights.astype(np.float32)
        return {name: weights[where].reshape(held[name].shape) for name, where in self.layers.items()}

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
                out = self.net(*self.placed(tuple(array[rows] for array in inputs)))
                parts.append(self.linked(out.double()).cpu().numpy())
        found: Floats = np.concatenate(parts)
        return found[:, 0] if self.goal.outputs == 1 else found

    def linked(self, out: Tensor) -> Tensor:
        """Of outputs [num_rows, outputs]: a probability, one for each class, or values in the targets' units."""
        if self.task == "classes":
            return out.softmax(1)
        if self.task == "binary":
            return out.sigmoid()
        middle, half = (torch.from_numpy(values).to(out) for values in (self.goal.middle, self.goal.half))
        return middle + half * out

    def loss_and_gradient(self, weights: Floats, batch: Examples) -> tuple[float, Floats]:
        """Mean loss over *batch* and its gradient."""
        return self.descend(weights, batch, lambda: self.losses(batch).mean())

    def descended(self, weights: Floats, batches: Iterable[Examples], rate: float) -> tuple[Floats, list[float]]:
        """See the port."""
        self.load(weights, learning=True)
        self._mode(training=True)
        self._learning, losses = None, []  # gradients are fresh ones, which the next load puts back
        for batch in batches:
            for parameter, _ in self._learned:
                parameter.grad = None
            with memory():
                loss = self.losses(batch).mean()
                loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
            with torch.no_grad():
                for parameter, _ in self._learned:
                    if parameter.grad is not None:
                        parameter.sub_(parameter.grad.mul_(rate))
        return self._flat.cpu().numpy().copy(), torch.stack(losses).tolist() if losses else []

    @property
    def represents(self) -> bool:
        """See the port; another's network may have no layer called "head"."""
        return any(name == "head" for name, _ in self.net.named_children())

    def contrastive(
        self, weights: Floats, batch: Examples, anchor: Floats, previous: Floats, *, strength: float, temperature: float
    ) -> tuple[float, Floats]:
        """See the port: a row's representation is what comes into the head; likeness is the cosine."""
        tensors, held = self.placed(batch.inputs), []
        for other in (anchor, previous):
            self.load(other)
            self.net.eval()
            with torch.no_grad(), memory():
                held.append(self.represented(tensors)[0])

        def loss() -> Tensor:
            found, out = self.represented(tensors)
            like, unlike = (F.cosine_similarity(found, one) for one in held)
            return (
                self.losses_of(out, self.wanted(batch.labels)) + strength * F.softplus((unlike - like) / temperature)
            ).mean()

        return self.descend(weights, batch, loss)

    def clipped_gradient_sum(self, weights: Floats, batch: Examples, clip_norm_l2: float) -> tuple[Floats, int, float]:
        """See the port, and ``models/clipping.py``."""
        by_row(self)
        total, clipped, loss = np.zeros(len(self.weights)), 0, 0.0
        self.load(weights)
        self.net.eval()  # nothing is left to chance: noise hides a row, and not what dropout hides of it
        with memory():
            for found in self._clipped(batch, clip_norm_l2):
                total += found[0]
                clipped += found[1]
                loss += found[2]
        return total, clipped, loss

    # -- within

    def placed(self, inputs: tuple[Array, ...]) -> tuple[Tensor, ...]:
        """:meth:`tensors`, where the network is."""
        return tuple(tensor.to(self.device) for tensor in self.tensors(inputs))

    def load(self, weights: Floats, *, learning: bool = False) -> None:
        """Put *weights* into the network; *learning*: they are to be differentiated by."""
        self._flat.copy_(torch.from_numpy(np.require(weights, np.float32, "W")))
        if self._learning != learning:
            for parameter, slope in self._learned:
                parameter.requires_grad_(learning)
                parameter.grad = slope if learning else None
            self._learning = learning

    def _mode(self, *, training: bool) -> None:
        if self.net.training != training:
            self.net.train(training)
            for layer in self._still:
                layer.eval()

    def descend(self, weights: Floats, batch: Examples, loss_of: Callable[[], Tensor]) -> tuple[float, Floats]:
        """The loss that *loss_of* finds at *weights*, and its gradient."""
        self.load(weights, learning=True)
        follows = self.running.stop > self.running.start
        self._mode(training=len(batch) > 1 or not follows)  # one row has no spread: it is normalised by the running one
        self._slopes.zero_()
        with memory():
            loss = loss_of()
            loss.backward()  # type: ignore[no-untyped-call]
        if follows:
            before = torch.from_numpy(np.asarray(weights, np.float32)).to(self.device)[self.running]
            torch.sub(before, self._flat[self.running], out=self._slopes[self.running])
        return float(loss.detach()), self._slopes.cpu().numpy().copy()

    def represented(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """(what comes into the head, [num_rows, width]; what the network gives, [num_rows, outputs])."""
        seen: list[Tensor] = []
        hook = self.net.get_submodule("head").register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        try:
            out = self.net(*tensors)
        finally:
            hook.remove()
        return seen[0].flatten(1), out

    def losses(self, batch: Examples) -> Tensor:
        """Each example's log loss, or half squared error in units of half the target's range, [num_rows]."""
        return self.losses_of(self.net(*self.placed(batch.inputs)), self.wanted(batch.labels))

    def wanted(self, labels: Floats) -> Tensor:
        """Labels as the loss takes them: classes as places or probabilities, values scaled to [-1, 1]."""
        if self.task == "classes" and labels.ndim == 1:
            return torch.from_numpy(labels.astype(np.int64)).to(self.device)
        scaled = (labels.reshape(len(labels), -1) - self.goal.middle) / self.goal.half
        return torch.from_numpy(scaled.astype(np.float32)).to(self.device)

    def losses_of(self, out: Tensor, wanted: Tensor) -> Tensor:
        """Of outputs [num_rows, outputs], [num_rows]."""
        if self.task == "classes":
            return F.cross_entropy(out, wanted, reduction="none")
        if self.task == "binary":
            return F.binary_cross_entropy_with_logits(out, wanted, reduction="none").mean(1)
        return (out - wanted).square().mean(1) / 2

    @cached_property
    def _known(self) -> bool:
        """Whether rows' gradients can be clipped layer by layer."""
        return clipping.known(self.net, [p for p, _ in self._learned])

    def _clipped(self, batch: Examples, clip: float) -> Iterator[clipping.Clipped]:
        learned = [p for p, _ in self._learned]
        for rows in pieces(batch.inputs):
            part = batch.take(rows)
            found = clipping.by_layers(self.net, learned, partial(self.losses, part), clip) if self._known else None
            if found is not None:
                yield found
                continue
            for few in pieces(part.inputs, max(1, FORMED // (len(self.weights) + self._summed))):
                yield self._clipped_whole(part.take(few), clip)

    def _clipped_whole(self, batch: Examples, clip: float) -> clipping.Clipped:
        weights = {name: p.detach() for name, p in self.net.named_parameters() if name in self.layers}

        def loss_of(weights: dict[str, Tensor], y: Tensor, *x: Tensor) -> Tensor:
            out = torch.func.functional_call(self.net, weights, tuple(v[None] for v in x))
            return self.losses_of(out, y[None])[0]

        with sdpa_kernel(SDPBackend.MATH):  # the only one that PyTorch does for many rows at once
            return clipping.by_func(loss_of, weights, self.wanted(batch.labels), self.placed(batch.inputs), clip)


def unfit(layer: str) -> PlanError:
    """The one error for a base that has not the network's layers."""
    return PlanError(
        "model.base-unfit", "the installed base is of another network", field="model.base",
        remedy=f"give the network the shape of its base: layer {layer}",
    )  # fmt: skip


def raw_features(table: TableView, names: tuple[str, ...]) -> Tensor:
    """Columns in their own units, float64 [num_rows, num_features]."""
    return torch.from_numpy(np.column_stack([np.asarray(table[name], np.float64) for name in names]))


def rescaled(raw: Tensor, scale: Scale) -> Tensor:
    """:func:`raw_features` in [-1, 1], float32."""
    return ((raw - torch.from_numpy(scale.middle)) / torch.from_numpy(scale.half)).float()


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


def pieces(inputs: tuple[Array, ...], most: int | None = None) -> Iterator[slice]:
    """Slices of rows whose inputs are about AT_ONCE values, *most* rows or fewer."""
    num_rows = len(inputs[0])
    wide = sum(math.prod(array.shape[1:]) for array in inputs)
    step = max(1, min(AT_ONCE // max(wide, 1), most or AT_ONCE))
    for start in range(0, num_rows, step):
        yield slice(start, start + step)
