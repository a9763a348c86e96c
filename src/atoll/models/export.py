"""A stored model as ONNX, for programs in other languages and runtimes: from a row's own columns to its prediction.

Scaling and link are in the graph. A linear model takes "features", float64 [num_rows, num_features]; so do a network
of features, in the order of its spec, and trees (see ``models/trees_onnx.py``); a network of images takes them by their
column's name, uint8 [num_rows, height, width(, channels)]; others take "input_0" and so on, what ``Network.inputs``
makes of a table (texts in full length, int64). Adapters are merged. The graph gives "prediction": a probability or
value of each row, [num_rows], or [num_rows, classes or targets].

Source: https://onnx.ai/onnx/intro/, operator set 20.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from atoll.contract.errors import PlanError
from atoll.contract.schema import TableSchema
from atoll.models import trees_onnx
from atoll.models.linear import LinearModel
from atoll.models.model import Predictor
from atoll.models.trees import Trees

OPERATORS = 20
LONG = " ".join(map(str, range(1 << 16)))


def to_onnx(model: Predictor, schema: TableSchema, path: Path) -> None:
    """Write *model* to *path*. Raises PlanError when what it needs is not installed."""
    try:
        import onnx

        if isinstance(model, Trees):
            made = trees_onnx.graph(model)
        else:
            made = linear(model) if isinstance(model, LinearModel) else network(model, schema)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("onnx", "onnxscript"):
            raise
        raise PlanError(
            "export.no-onnx", "ONNX export needs packages that are not installed here", field="format",
            remedy='pip install "atoll[onnx]"',
        ) from None  # fmt: skip
    onnx.checker.check_model(made)
    onnx.save_model(made, path)


def linear(model: LinearModel) -> Any:
    """Slopes and intercept in the columns' own units, then the inverse link, all in float64."""
    from onnx import TensorProto, helper, numpy_helper

    intercept, slopes = model.coefficients()
    last = {"logistic": "Sigmoid", "poisson": "Exp", "linear": "Identity"}[model.family]
    nodes = [
        helper.make_node("MatMul", ["features", "slopes"], ["product"]),
        helper.make_node("Add", ["product", "intercept"], ["sum"]),
        helper.make_node(last, ["sum"], ["prediction"]),
    ]
    constants = {"slopes": np.asarray(slopes, np.float64), "intercept": np.float64(intercept)}
    graph = helper.make_graph(
        nodes, "linear",
        [helper.make_tensor_value_info("features", TensorProto.DOUBLE, ["rows", len(slopes)])],
        [helper.make_tensor_value_info("prediction", TensorProto.DOUBLE, ["rows"])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )  # fmt: skip
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPERATORS)], producer_name="atoll")
    made.ir_version = 10
    return made


def network(model: Any, schema: TableSchema) -> Any:
    """Traced by PyTorch on rows that the schema allows."""
    import torch
    from torch import Tensor, nn

    from atoll.models.estimator import viewed

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model.net

        def forward(self, *raw: Tensor) -> Tensor:
            found: Tensor = model.linked(self.net(*model.scaled(*raw)))
            return found[:, 0] if found.shape[1] == 1 else found

    model = model.whole()
    model.load(model.weights)
    model.net.cpu()
    raw = model.raw(viewed(schema, examples(schema), 2))
    rows = torch.export.Dim("rows")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own, of its own parts
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        made = torch.onnx.export(
            Whole().eval(), tuple(raw.values()), dynamo=True, verbose=False, opset_version=OPERATORS,
            input_names=list(raw), output_names=["prediction"], dynamic_shapes=(({0: rows},) * len(raw),),
        )  # fmt: skip
    if made is None or not all(rows_are_free(one) for one in made.model_proto.graph.input):
        raise PlanError(
            "export.fixed-rows", "PyTorch made a graph that holds for one number of rows only", field="format",
            remedy="in the network's forward, take x.shape[0] for len(x), and no Python number of a tensor",
        )  # fmt: skip
    return made.model_proto


def rows_are_free(taken: Any) -> bool:
    """Whether an input of a graph has as many rows as one likes."""
    return bool(taken.type.tensor_type.shape.dim[0].dim_param)


def examples(schema: TableSchema) -> dict[str, Any]:
    """Two rows that keep to the schema: least values, first codes, black images, texts longer than any is read."""
    found: dict[str, Any] = {}
    for name, column in schema.columns.items():
        if column.dtype == "image":
            found[name] = np.zeros((2, *(column.shape or ())), np.uint8)
        elif column.numeric and (column.values or column.range):
            found[name] = np.full(2, column.bounds()[0])
        elif column.dtype in ("date", "datetime"):
            found[name] = np.zeros(2, "datetime64[D]")
        else:
            found[name] = np.array([str((column.values or (LONG,))[0])] * 2, object)
    return found
