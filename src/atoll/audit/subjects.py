"""Atoll's own models as subjects of an audit: the same weights, and the scaling of their inputs to differentiate."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from atoll.audit.audit import Subject
from atoll.audit.leak import Criterion
from atoll.audit.view import Batch
from atoll.contract.errors import PlanError
from atoll.contract.program import TableView
from atoll.models.cnn import ChannelsLast, Cnn
from atoll.models.images import FAINT
from atoll.models.linear import LinearModel
from atoll.models.model import Model


def pixels(images: NDArray[np.uint8]) -> Tensor:
    """uint8 [num_rows, height, width(, channels)] → [0, 1], [num_rows, channels, height, width]."""
    unit = torch.from_numpy(np.ascontiguousarray(images)).float() / 255
    return unit[:, None] if unit.ndim == 3 else unit.permute(0, 3, 1, 2).contiguous()


def cnn_subject(
    model: Cnn, weights: NDArray[np.float64], public: NDArray[np.uint8], criterion: Criterion | None = None
) -> Subject:
    """*model* with *weights* [num_weights], and public images as its table has them."""
    if model.goal.outputs != 1 or model.settings.norm == "batch":
        raise PlanError(
            "audit.no-subject", "attacks know networks of one output, none of whose layers mixes rows", field="model",
            remedy="audit a plan with a binary target or one value, and without batch normalisation",
        )  # fmt: skip
    encoder, width = model.encoder()
    for name, layer in list(encoder.named_children()):
        if isinstance(layer, ChannelsLast):  # an order in memory that torch.func.vmap does not know
            encoder.set_submodule(name, nn.Identity())
    net = nn.Sequential(*encoder.children(), nn.Linear(width, 1))
    nn.utils.vector_to_parameters(torch.from_numpy(np.asarray(weights, np.float32)), net.parameters())
    standardise = bool(model.settings.standardise)

    def scale(unit: Tensor) -> Tensor:
        inputs = unit * 4 - 2
        if standardise:
            spread, middle = torch.std_mean(inputs, (-3, -2, -1), correction=0, keepdim=True)
            inputs = (inputs - middle) / (spread + FAINT)
        return inputs

    return Subject(net, pixels(public), scale, criterion or Criterion())


def linear_subject(model: LinearModel, public: NDArray[np.float64], tolerance: float = 0.01) -> Subject:
    """A logistic *model*. public: raw features [num_rows, num_features]; attacked inputs are to be scaled by
    :func:`scaled_rows`. tolerance: of a match, as a share of each feature's range."""
    layer = nn.Linear(len(model.features), 1)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(model.weights[None, 1:]))
        layer.bias.copy_(torch.from_numpy(model.weights[:1]))
    return Subject(nn.Sequential(layer), scaled_rows(model, public), tolerance=2 * tolerance)


def scaled_rows(model: LinearModel, rows: NDArray[np.float64]) -> Tensor:
    """Raw features [num_rows, num_features] → [−1, 1] by the schema's ranges, as the model takes them."""
    return torch.from_numpy(model.design(rows)[:, 1:]).float()


def subject_of(model: Model, weights: NDArray[np.float64], public: NDArray[Any]) -> Subject:
    """Any model that can be attacked, with *weights*. public: its inputs as the table has them. Raises PlanError."""
    if isinstance(model, Cnn):
        return cnn_subject(model, weights, public)
    if isinstance(model, LinearModel):
        return linear_subject(model.with_weights(weights), public)
    raise PlanError(
        "audit.no-subject", "no attack knows this kind of model", field="model.kind",
        remedy="audit a plan with a linear model or a cnn",
    )  # fmt: skip


def inputs_of(model: Model, table: TableView) -> NDArray[Any]:
    """The model's inputs as the table has them: uint8 images, or features [num_rows, num_features]."""
    if isinstance(model, LinearModel):
        return np.column_stack([table[name] for name in model.features])
    return model.inputs(table)[0] if isinstance(model, Cnn) else np.empty(0)


def batch_of(model: Model, inputs: NDArray[Any], labels: NDArray[np.float64]) -> Batch:
    """Rows as the attacks compare them. inputs: as the table has them, [num_rows, ...]."""
    rows = scaled_rows(model, inputs) if isinstance(model, LinearModel) else pixels(inputs)
    return rows, torch.from_numpy(np.asarray(labels, np.float64)).float()


def in_order(model: Model, vector: NDArray[np.float64]) -> NDArray[np.float64]:
    """A gradient by Atoll's flat weights in the order of the subject's parameters: a linear model's offset is last."""
    return np.append(vector[1:], vector[0]) if isinstance(model, LinearModel) else vector
