"""Fusion: networks for tables, series, images and texts, joined to one; a row, or a site, may lack some of them.

Each part is a model of its own kind without its head. What it makes of a row is brought to a common width, and a row's
representation is the mean over the parts that it has:

    h = Σ mᵢ · relu(Wᵢ zᵢ + bᵢ) / max(Σ mᵢ, 1),  mᵢ = 1 where part i is there, else 0

so that what is missing is left out, and not taken for zeros: it moves neither a prediction nor a gradient, and a part
learns only from rows that have it. A row without any part is represented by zeros: the head's offset, which is what is
known of a row of which nothing is known.

A part is missing where any cell that it reads is (of a series with ``gaps: mark``: where all are). Of images, whose
cells are never empty, a black one is missing where the schema allows missing cells. A site that lacks a modality has
empty cells, or black images, in its columns.

Sources: Ngiam et al. 2011, Multimodal Deep Learning (ICML), §3 (one representation above a network for each modality);
Wu & Goodman 2018, Multimodal Generative Models for Scalable Weakly-Supervised Learning (NeurIPS), §2 (a modality that
is missing drops out of the combination, with no value in its place).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor, nn

from atoll.contract.errors import PlanError
from atoll.contract.program import TableView
from atoll.contract.schema import TableSchema
from atoll.contract.wire import Array, Json
from atoll.models import model as port
from atoll.models.images import absent
from atoll.models.model import Floats, make, model
from atoll.models.network import Joined, Network
from atoll.models.rows import Rows

Mask = NDArray[np.bool_]
EPOCH = np.datetime64(0, "D")


class FusionSpec(port.Settings):
    """parts: models of any kind of network, each with its kind's settings, without a target. width: of the
    representation that they share."""

    kind: Literal["fusion"] = "fusion"
    parts: tuple[dict[str, Json], ...] = Field(min_length=1, max_length=16)
    width: int = Field(default=32, ge=1, le=4096)

    @model_validator(mode="after")
    def _no_targets(self) -> Self:
        if any("target" in part for part in self.parts):
            raise ValueError("the target is a parameter of the program, not of a part")
        return self


class Joint(nn.Module):
    """Encoders, each brought to *width*, and their mean over those that a row has."""

    def __init__(self, encoders: Sequence[tuple[nn.Module, int]], width: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(encoder for encoder, _ in encoders)
        self.into = nn.ModuleList(nn.Linear(inner, width) for _, inner in encoders)

    def forward(self, *given: Tensor) -> Tensor:
        """For each part, whether it is there, [num_rows], and its inputs → [num_rows, width]."""
        total, number = torch.zeros(()), torch.zeros(())
        for encoder, into, (there, *inputs) in zip(self.parts, self.into, apart(given), strict=True):
            found = torch.relu(into(encoder(*inputs)))
            total = total + torch.where(there[:, None], found, 0.0)
            number = number + there.float()
        return total / number.clamp(min=1)[:, None]


def apart(given: Sequence[Any]) -> Iterator[list[Any]]:
    """Each part's arrays, or tensors: they begin with the only ones that are a truth for each row."""
    found: list[Any] = []
    for values in given:
        if values.ndim == 1 and values.dtype == (torch.bool if isinstance(values, Tensor) else np.bool_):
            if found:
                yield found
            found = []
        found.append(values)
    yield found


def filled(table: TableView, only: Mask | None = None) -> tuple[Rows, list[Mask]]:
    """A table without missing cells, which are filled up with what does not matter, since their rows are masked; and
    where cells were missing, of each column as it is asked for. only: rows to fill; None: all."""
    gaps: list[Mask] = []

    def column(name: str) -> NDArray[Any]:
        cells, kind = table[name], table.schema.columns[name].dtype
        filler: Any = {"image": 255, "text": "", "date": EPOCH, "datetime": EPOCH}.get(kind, 0.0)
        if kind == "image":
            lacks = absent(table, name)
        elif kind == "text":
            lacks = np.array([cell is None for cell in cells], bool)
        else:
            lacks = np.isnat(cells) if cells.dtype.kind == "M" else np.isnan(cells)
        gaps.append(lacks)
        where = lacks if only is None else lacks & only
        if where.any():
            cells = cells.copy()
            cells[where] = filler
        return cells

    return Rows(table.schema, len(table), column), gaps


@model
class Fusion(Network):
    """See the module's docstring."""

    Spec: ClassVar[type[FusionSpec]] = FusionSpec
    settings: FusionSpec

    def encoder(self) -> tuple[nn.Module, int]:
        """All parts' encoders (of another package's network, all of it). Raises PlanError for a part that is no
        network, or whose rows are mixed: what stands for a missing one would then count."""
        s = self.settings
        self.parts = [_part({**part, "target": s.target}, self.schema) for part in s.parts]
        nets = [part.net for part in self.parts]
        encoders = [(n.encoder, n.head.in_features) if isinstance(n, Joined) else (n, self.goal.outputs) for n in nets]
        return Joint(encoders, s.width), s.width

    def initial(self, seed: int) -> Floats:
        """As every network's, with each part's encoder as the part begins."""
        found = super().initial(seed)
        for number, part in enumerate(self.parts):
            begun, prefix = part.initial(seed + number), "encoder." if isinstance(part.net, Joined) else ""
            for name, where in part.layers.items():
                if (layer := f"encoder.parts.{number}.{name.removeprefix(prefix)}") in self.layers:
                    found[self.layers[layer]] = begun[where]
        return found if self.settings.base is None else self._based(found)

    def _baseless(self) -> port.Settings:
        parts = tuple({**part, "base": None} for part in self.settings.parts)
        return self.settings.model_copy(update={"base": None, "parts": parts})

    @cached_property
    def _known(self) -> bool:
        return super()._known and all(part._known for part in self.parts)

    def inputs(self, table: TableView) -> tuple[Array, ...]:
        """For each part where it is there, bool [num_rows], and its inputs."""
        found: list[Array] = []
        for part in self.parts:
            view, gaps = filled(table)
            given = part.inputs(view)
            lacks = np.logical_or.reduce(gaps)
            if getattr(part.settings, "gaps", "") == "mark":  # its network is told of single gaps
                lacks = np.logical_and.reduce(gaps)
                given = part.inputs(filled(table, lacks)[0])
            found += [~lacks, *given]
        return tuple(found)

    def tensors(self, inputs: tuple[Array, ...]) -> tuple[Tensor, ...]:
        """The same, as the parts' networks take them."""
        found: list[Tensor] = []
        for part, (there, *given) in zip(self.parts, apart(inputs), strict=True):
            found += [torch.from_numpy(np.ascontiguousarray(there)), *part.tensors(tuple(given))]
        return tuple(found)


def _part(spec: Mapping[str, Json], schema: TableSchema) -> Network:
    made = make(spec, schema)
    if isinstance(made, Network) and not isinstance(made, Fusion) and made.running.stop == made.running.start:
        return made
    raise PlanError(
        "model.bad-part", f"a model of kind {spec.get('kind')!r} cannot be part of a fusion, as it is set",
        field="model.parts", remedy="use networks, no fusion among them, with norm: group or none",
    )  # fmt: skip
