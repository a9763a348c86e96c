"""A model of trees as ONNX: the same leaf for every row there and here.

"features", float64 [num_rows, num_features], has them in the order of the model's spec: NaN where a cell is missing, a
categorical one as the place in the schema's code list. They are compared as the trees compare them, in float32, and
leaves are added in float64 (in another order, so that the last digits may differ). A model with an exposure has that
as a second input, "exposure", float64 [num_rows].

Source: https://onnx.ai/onnx/operators/onnx_aionnxml_TreeEnsemble.html, version 5 (ONNX Runtime 1.20 and later).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from atoll.models.trees import FURTHEST, LEAF, Nodes, Trees

OPERATORS, TREES = 20, 5
"""Operator sets: ONNX's own, and that of its trees."""
LESS, MEMBER = 1, 6
"""How a node decides: below its threshold, or in its set."""
DEEPEST = 500.0
"""Beyond it, either way, a link changes no more."""


class Table(NamedTuple):
    """Splits, [num_splits], and leaves, [num_leaves], of all trees. A child's number is among the splits, or, where it
    is a leaf, among the leaves."""

    roots: NDArray[np.int64]
    feature: NDArray[np.int64]
    modes: NDArray[np.uint8]
    thresholds: NDArray[np.float64]
    children: NDArray[np.int64]
    """[2, num_splits]: where the answer is yes, and no."""
    at_leaf: NDArray[np.bool_]
    missing: NDArray[np.bool_]
    """Whether the answer is yes where the cell is missing."""
    members: NDArray[np.float64]
    """Of each split by a set, the places in it, from 1 on; and NaN."""
    targets: NDArray[np.int64]
    values: NDArray[np.float64]


def flat(nodes: Nodes, outputs: int) -> Table:
    """*nodes* without those that are not in use. A tree of one leaf gets a split that leads there in any case."""
    leaf, alone = nodes.feature == LEAF, nodes.feature[:, 0] == LEAF
    tree, node = np.nonzero(nodes.feature >= 0)
    number = np.zeros(leaf.shape, np.int64)  # among the splits, or the leaves
    number[tree, node], number[leaf] = np.arange(len(tree)), np.arange(leaf.sum())
    by_set = nodes.mask[tree, node] > 0
    left, right = 2 * node + 1, 2 * node + 2
    yes, no = np.where(by_set, right, left), np.where(by_set, left, right)
    children, at_leaf = (np.stack([of[tree, yes], of[tree, no]]) for of in (number, leaf))
    lone = number[alone, 0]
    roots = number[:, 0].copy()
    roots[alone] = len(tree) + np.arange(len(lone))
    masks = nodes.mask[tree, node][by_set].tolist()
    sets = [[place + 1.0 for place in range(mask.bit_length()) if mask >> place & 1] for mask in masks]
    zeros = np.zeros(len(lone))
    return Table(
        roots,
        np.concatenate([nodes.feature[tree, node], zeros]).astype(np.int64),
        np.concatenate([np.where(by_set, MEMBER, LESS), zeros + LESS]).astype(np.uint8),
        np.concatenate([nodes.threshold[tree, node].astype(np.float64), zeros]),
        np.concatenate([children, [lone, lone]], axis=1),
        np.concatenate([at_leaf, np.ones((2, len(lone)), bool)], axis=1),
        np.concatenate([nodes.default_left[tree, node] != by_set, zeros > 0]),
        np.array([word for one in sets for word in (*one, np.nan)]),
        np.nonzero(leaf)[0] % outputs,
        nodes.value[leaf],
    )


def graph(model: Trees) -> Any:
    """From a row's features to its prediction."""
    from onnx import TensorProto, helper, numpy_helper

    table, kinds = flat(model.nodes, model.outputs), model.categorical
    constants: dict[str, Any] = {
        "least": -FURTHEST, "most": FURTHEST, "zero": 0.0, "nan": np.nan, "kinds": kinds, "places": kinds.astype(float),
        "base": model.base,
    }  # fmt: skip
    tensors: dict[str, NDArray[Any]] = {
        "nodes_splits": table.thresholds, "nodes_modes": table.modes, "leaf_weights": table.values,
    }  # fmt: skip
    if len(table.members):
        tensors["membership_values"] = table.members
    trees = helper.make_node(
        "TreeEnsemble", ["seen"], ["sum"], domain="ai.onnx.ml", aggregate_function=1, post_transform=0,
        n_targets=model.outputs, tree_roots=table.roots.tolist(), nodes_featureids=table.feature.tolist(),
        nodes_truenodeids=table.children[0].tolist(), nodes_falsenodeids=table.children[1].tolist(),
        nodes_trueleafs=table.at_leaf[0].astype(int).tolist(), nodes_falseleafs=table.at_leaf[1].astype(int).tolist(),
        nodes_missing_value_tracks_true=table.missing.astype(int).tolist(), leaf_targetids=table.targets.tolist(),
        **{name: numpy_helper.from_array(value, name) for name, value in tensors.items()},
    )  # fmt: skip
    nodes = [
        # A cell is missing where it is NaN, or no place in the code list; others are as near as float32 comes.
        helper.make_node("Less", ["features", "zero"], ["negative"]),
        helper.make_node("And", ["negative", "kinds"], ["unknown"]),
        helper.make_node("IsNaN", ["features"], ["empty"]),
        helper.make_node("Or", ["unknown", "empty"], ["missing"]),
        helper.make_node("Clip", ["features", "least", "most"], ["within"]),
        helper.make_node("Cast", ["within"], ["single"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["single"], ["double"], to=TensorProto.DOUBLE),
        helper.make_node("Add", ["double", "places"], ["placed"]),
        helper.make_node("Where", ["missing", "nan", "placed"], ["seen"]),
        trees,
        helper.make_node("Add", ["sum", "base"], ["margins"]),
    ]
    several, found = model.settings.link in ("softmax", "shares"), _linked(model, constants)
    nodes += [helper.make_node(kind, takes, gives) for kind, takes, gives in found]
    inputs = [helper.make_tensor_value_info("features", TensorProto.DOUBLE, ["rows", len(kinds)])]
    if model.exposure:
        inputs.append(helper.make_tensor_value_info("exposure", TensorProto.DOUBLE, ["rows"]))
    shape: list[str | int | None] = ["rows", model.outputs] if several else ["rows"]
    made = helper.make_model(
        helper.make_graph(
            nodes, "trees",
            inputs,
            [helper.make_tensor_value_info("prediction", TensorProto.DOUBLE, shape)],
            [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", OPERATORS), helper.make_opsetid("ai.onnx.ml", TREES)],
        producer_name="atoll",
    )  # fmt: skip
    made.ir_version = 10
    return made


def _linked(model: Trees, constants: dict[str, Any]) -> list[tuple[str, list[str], list[str]]]:
    """The operators from "margins" to "prediction", as :func:`atoll.models.trees.linked`; their constants are added."""
    link = model.settings.link
    if link == "softmax":
        return [("Softmax", ["margins"], ["prediction"])]
    constants["last"] = np.array([1])
    if link == "shares":
        constants |= {"one": 1.0, "even": 1 / model.outputs}
        return [
            ("Relu", ["margins"], ["cut"]),
            ("ReduceSum", ["cut", "last"], ["total"]),
            ("Greater", ["total", "zero"], ["some"]),
            ("Where", ["some", "total", "one"], ["by"]),
            ("Div", ["cut", "by"], ["share"]),
            ("Where", ["some", "share", "even"], ["prediction"]),
        ]
    one = ("Squeeze", ["margins", "last"], ["margin"])
    if link == "identity":
        return [(one[0], one[1], ["prediction"])]
    if link == "logistic":
        constants |= {"low": -DEEPEST, "high": DEEPEST}
        return [one, ("Clip", ["margin", "low", "high"], ["held"]), ("Sigmoid", ["held"], ["prediction"])]
    if link == "exp":
        constants["high"] = DEEPEST
        exp = [one, ("Min", ["margin", "high"], ["held"])]
        if not model.exposure:
            return [*exp, ("Exp", ["held"], ["prediction"])]
        return [*exp, ("Exp", ["held"], ["rate"]), ("Mul", ["rate", "exposure"], ["prediction"])]
    if link == "probability":
        constants["high"] = 1.0
        return [one, ("Clip", ["margin", "zero", "high"], ["prediction"])]
    constants["half"] = 0.5
    return [one, ("Max", ["margin", "zero"], ["held"]), ("Pow", ["half", "held"], ["prediction"])]
