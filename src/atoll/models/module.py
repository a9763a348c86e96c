"""A network of another package, by its import name: an ``nn.Module`` that every party has installed and allowed.

It is made with the spec's *arguments*, called with the images, the features, or both in this order, and gives
[num_rows, outputs]: the log-odds of a binary target, of each class, or values scaled to [-1, 1]. It begins with
the weights that it gives itself (PyTorch's generator seeded by the plan); parameters that need no gradient, and buffers
but a batch normalisation's, stay as they are. Code is never sent, and nothing is unpickled: see ``models/allowed.py``.
A layer that draws (dropout) draws from the process's generator, so that its runs are not repeated bit by bit.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from atoll.contract.errors import PlanError
from atoll.contract.program import TableView
from atoll.contract.wire import Array, Json
from atoll.models import model as port
from atoll.models.allowed import imported
from atoll.models.images import image_shape, images, pixels
from atoll.models.linear import Scale, scaled_features
from atoll.models.model import Floats, model
from atoll.models.network import DRAWING, Network, memory, raw_features, rescaled


class ModuleSpec(port.Settings):
    """name: "package.nets:Net". arguments: by name, for its constructor. image: a column, given as
    [num_rows, channels, height, width], scaled as a cnn's, *standardise* too. features: numeric columns, given as
    [num_rows, num_features] in [-1, 1]."""

    kind: Literal["module"] = "module"
    name: str = Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.]*:[A-Za-z_][A-Za-z0-9_]*$")
    arguments: dict[str, Json] = Field(default_factory=dict)
    image: str | None = None
    standardise: bool = False
    features: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _some_input(self) -> Self:
        if self.image is None and not self.features:
            raise ValueError("give image, features, or both")
        return self


@model
class Module(Network):
    """See the module's docstring."""

    Spec: ClassVar[type[ModuleSpec]] = ModuleSpec
    settings: ModuleSpec
    _known = False  # a row's gradient is then formed from that row alone, whatever the network does with a batch

    def built(self, seed: int = 0) -> nn.Module:
        """The network, made and tried on rows of zeros; raises PlanError when it cannot be what the plan needs."""
        s, rows = self.settings, []
        self.scale = Scale.of(self.schema, s.features)
        if s.image is not None:
            height, width, channels = image_shape(self.schema, s.image)
            rows.append(torch.zeros(2, channels, height, width))
        if s.features:
            rows.append(torch.zeros(2, len(s.features)))
        kind: Any = imported(s.name)
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise self._refused("it is not a class of torch.nn.Module")
        try:
            with DRAWING, torch.random.fork_rng(devices=[]), memory(), torch.no_grad():
                torch.manual_seed(seed)
                made = kind(**s.arguments).eval()
                shape = tuple(made(*rows).shape)
        except MemoryError:
            raise
        except Exception as error:  # whatever other people's code may raise
            raise self._refused(f"trying it on rows of zeros raised {type(error).__name__}") from error
        if shape != (2, self.goal.outputs):
            raise self._refused(f"of 2 rows it gives {shape}, and the target needs (2, {self.goal.outputs})")
        return made

    def _refused(self, why: str) -> PlanError:
        return PlanError(
            "model.bad-module", f"the network {self.settings.name!r} does not fit: {why}", field=self.settings.name,
            remedy="check its arguments, and what it is given and gives: docs/plan.md, model kinds",
        )  # fmt: skip

    def initial(self, seed: int) -> Floats:
        """As it makes itself, by PyTorch's generator with the plan's seed; adapters as every network's."""
        found, made = super().initial(seed), self.built(seed)
        for name, values in (*made.named_parameters(), *made.named_buffers()):
            if name in self.layers:
                found[self.layers[name]] = values.detach().double().numpy().ravel()
        return self._based(found)

    def inputs(self, table: TableView) -> tuple[Array, ...]:
        """Images, uint8, and features, float32 in [-1, 1]; raises SchemaError where cells are missing."""
        s = self.settings
        image = () if s.image is None else (images(table, s.image),)
        if not s.features:
            return image
        return (*image, scaled_features(table, s.features, self.scale))

    def tensors(self, inputs: tuple[Array, ...]) -> tuple[Tensor, ...]:
        """Images as the network takes them, features as they are."""
        found = [torch.from_numpy(np.ascontiguousarray(array)) for array in inputs]
        if self.settings.image is not None:
            found[0] = pixels(found[0], standardise=self.settings.standardise)
        return tuple(found)

    def raw(self, table: TableView) -> dict[str, Tensor]:
        """Images and features, as the table has them."""
        s = self.settings
        found = {} if s.image is None else {s.image: torch.from_numpy(np.ascontiguousarray(table[s.image]))}
        return {**found, "features": raw_features(table, s.features)} if s.features else found

    def scaled(self, *raw: Tensor) -> tuple[Tensor, ...]:
        """As :meth:`tensors`, of :meth:`raw`."""
        found = list(raw)
        if self.settings.image is not None:
            found[0] = pixels(found[0], standardise=self.settings.standardise)
        if self.settings.features:
            found[-1] = rescaled(found[-1], self.scale)
        return tuple(found)
