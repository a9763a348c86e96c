"""A model of XGBoost's, read from its JSON, as a model of trees.

Margins are the same but for XGBoost's adding in float32, and every row comes to the same leaf. Codes of categories are
found by the categories' names where the file has them. The file is not trusted: it is checked before trees are made,
and refused if they could not be held: boosters other than gbtree, several values in a leaf, objectives without a link
here, trees of more than 12 levels. All trees are taken, as ``Booster.predict`` takes them.

Source: https://xgboost.readthedocs.io/en/stable/tutorials/saving_model.html, "JSON Schema"; XGBoost 1.7 to 3.2.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.contract.errors import PlanError
from atoll.contract.schema import TableSchema
from atoll.contract.settings import validate
from atoll.models.model import Floats, Goal
from atoll.models.trees import COVER, DEFAULT, FEATURE, GAIN, LEAF, MOST_CODES, THRESHOLD, Trees, TreesSpec
from atoll.models.xgboost_json import LINKS, base_margin

MOST_BYTES = 256 << 20
"""Of a file that is read."""
DEEPEST, MOST_TREES = 12, 2000


def from_json(content: bytes, schema: TableSchema, target: str) -> tuple[Trees, str]:
    """(the model, the objective by which XGBoost made it) of a JSON file of XGBoost's.

    schema: of the table that the model is applied to; its columns have the names of the model's features. target: the
    column that it tells. Raises PlanError: "import.too-large", "import.ubjson", "import.malformed",
    "import.unsupported", "import.unfit", and those of a model of trees.
    """
    learner = _read(content)
    objective = str(_of(_of(learner, "objective", dict), "name", str))
    if objective not in LINKS:
        raise unsupported(f"its objective {objective!r} has no link here", "train with one of " + ", ".join(LINKS))
    param, booster = _of(learner, "learner_model_param", dict), _of(learner, "gradient_booster", dict)
    if booster.get("name") != "gbtree":
        raise unsupported("its booster is not gbtree", "train with booster=gbtree")
    if _number(param.get("num_target", "1")) > 1:
        raise unsupported("it tells several targets", "train one model for each target")
    gbtree = _of(booster, "model", dict)
    outputs = max(1, _number(param.get("num_class", "0")))
    link = _link(objective, outputs, schema, target)
    features, renamed = _features(learner, gbtree, schema)
    told = _of(gbtree, "trees", list)
    info = _integers(gbtree, "tree_info", len(told))
    if not told or ((info < 0) | (info >= outputs)).any():
        raise malformed("tree_info")
    if np.bincount(info).max() > MOST_TREES:
        raise unsupported(f"it has more than {MOST_TREES} trees", "train fewer: booster[:n] keeps the first")
    trees = [_shape(tree, len(features), renamed) for tree in told]
    of_output = [np.flatnonzero(info == output).tolist() for output in range(outputs)]
    spec = {
        "kind": "trees", "features": features, "categorical": [features[i] for i in renamed], "target": target,
        "link": link, "num_trees": max(map(len, of_output)), "max_depth": max(1, *(tree.depth for tree in trees)),
    }  # fmt: skip
    made = Trees.of(validate(TreesSpec, spec, "model"), schema)  # which bounds the size of what follows
    words = np.array(made.words)
    for output, numbers in enumerate(of_output):
        for i, number in enumerate(numbers):
            trees[number].fill(words[i * outputs + output], renamed)
    return made.with_weights(np.concatenate([_base(param, objective, outputs), words.ravel()])), objective


def _link(objective: str, outputs: int, schema: TableSchema, target: str) -> str:
    goal, link = Goal.of(schema, (target,)), LINKS[objective]
    classes = outputs if link == "softmax" else 1
    if (link == "softmax") != (goal.task == "classes") or (goal.outputs, outputs) != (classes, classes):
        raise unfit(target, "it does not tell what the target's values are", "name the column that it was trained on")
    return "probability" if link == "identity" and goal.task == "binary" else link


def too_large() -> PlanError:
    """The one error for a file of more than MOST_BYTES."""
    return PlanError(
        "import.too-large", "the file is larger than any model of ours", field="model",
        remedy=f"at most {MOST_BYTES >> 20} MiB are read",
    )  # fmt: skip


def malformed(field: str) -> PlanError:
    """The one error for what XGBoost would not have written."""
    return PlanError(
        "import.malformed", "the file is not a model as XGBoost writes it in JSON", field=field,
        remedy='write it again: booster.save_model("model.json")',
    )  # fmt: skip


def unsupported(what: str, remedy: str) -> PlanError:
    """The one error for models of other sorts."""
    return PlanError("import.unsupported", f"the model cannot be taken over: {what}", field="model", remedy=remedy)


def unfit(field: str, what: str, remedy: str) -> PlanError:
    """The one error for a model and a schema that do not go together."""
    return PlanError("import.unfit", f"the model does not fit the schema: {what}", field=field, remedy=remedy)


def _read(content: bytes) -> Mapping[str, Any]:
    """The file's "learner"."""
    if len(content) > MOST_BYTES:
        raise too_large()
    begun = content[:1] == b"{" and content[1:64].lstrip()[:1] not in (b'"', b"}")
    if begun or content[:4] in (b"binf", b"bs64"):
        raise PlanError(
            "import.ubjson", "the file is not JSON, but XGBoost's binary format", field="model",
            remedy='write it as JSON: booster.save_model("model.json")',
        )  # fmt: skip
    try:
        told = json.loads(content)
    except (ValueError, RecursionError):
        raise malformed("model") from None
    learner = told.get("learner") if isinstance(told, dict) else None
    if not isinstance(learner, dict):
        raise malformed("learner")
    return learner


def _of(holder: Mapping[str, Any], name: str, kind: type) -> Any:
    value = holder.get(name)
    if not isinstance(value, kind):
        raise malformed(name)
    return value


def _number(value: object) -> int:
    """XGBoost writes its parameters as texts."""
    if not isinstance(value, str | int) or not str(value).isdecimal() or len(str(value)) > 9:
        raise malformed("learner_model_param")
    return int(value)


def _integers(holder: Mapping[str, Any], name: str, size: int | None = None) -> NDArray[np.int64]:
    found = _of(holder, name, list)
    if not all(type(value) in (int, bool) and abs(value) < 2**53 for value in found):
        raise malformed(name)
    if size is not None and len(found) != size:
        raise malformed(name)
    return np.array(found, np.int64)


def _reals(found: Sequence[Any], name: str, size: int) -> Floats:
    """As the float32 that they are; finite."""
    if len(found) != size or not all(type(value) in (int, float) and abs(value) < 3.5e38 for value in found):
        raise malformed(name)
    with np.errstate(over="ignore"):
        values = np.array(found, np.float64).astype(np.float32).astype(np.float64)
    if not np.isfinite(values).all():
        raise malformed(name)
    return values


def _base(param: Mapping[str, Any], objective: str, outputs: int) -> Floats:
    """Base margins, [outputs]: of one base score for all, or one for each."""
    text = _of(param, "base_score", str)
    try:
        scores = [float(part) for part in text.strip("[]").split(",")]
    except ValueError:
        raise malformed("base_score") from None
    if len(scores) not in (1, outputs) or (LINKS[objective] == "logistic" and not 0 < scores[0] < 1):
        raise malformed("base_score")
    margins = np.array([base_margin(objective, score) for score in scores], np.float64)
    if not np.isfinite(margins).all():
        raise malformed("base_score")
    return np.broadcast_to(margins, outputs)


Renamed = Mapping[int, "Codes"]
"""By feature that is of categories."""


@dataclass(frozen=True, slots=True)
class Codes:
    """places: XGBoost's code of a category → ours, of those that the schema knows. every: the bits of all of ours."""

    places: Mapping[int, int]
    every: int

    def mask(self, codes: Sequence[int]) -> int:
        """Bits of those."""
        return sum({1 << self.places[code] for code in codes if code in self.places})


@dataclass(frozen=True, slots=True)
class Shape:
    """A tree as it was read. ids: its nodes that can be reached; heap: their places in a complete tree; the others by
    node, [num_nodes]; sets: of categorical splits."""

    ids: NDArray[np.int64]
    heap: NDArray[np.int64]
    depth: int
    feature: NDArray[np.int64]
    words: Floats
    sets: Mapping[int, list[int]]

    def fill(self, words: Floats, renamed: Renamed) -> None:
        """Write it into *words*, [num_nodes, 5], of a complete tree that is not in use."""
        words[self.heap] = self.words[self.ids]
        for place, node in zip(self.heap.tolist()[::-1], self.ids.tolist()[::-1], strict=True):  # upwards
            if node not in self.sets:
                continue
            codes = renamed[int(self.feature[node])]
            mask = codes.mask(self.sets[node])
            words[place, THRESHOLD] = mask or codes.every
            if not mask:  # all codes that there are go left: said with the sides changed
                words[place, DEFAULT] = 1 - words[place, DEFAULT]
                _swap(words, place)


def _swap(words: Floats, place: int) -> None:
    """Change the two sides below a node."""
    left, right = [2 * place + 1], [2 * place + 2]
    while left[0] < len(words):
        words[left], words[right] = words[right], words[left]
        left, right = ([2 * i + side for i in level for side in (1, 2)] for level in (left, right))


def _shape(tree: object, num_features: int, renamed: Renamed) -> Shape:
    """One tree, checked: its nodes are there, each is below one other, and none is too deep."""
    if not isinstance(tree, dict):
        raise malformed("trees")
    if _number(_of(tree, "tree_param", dict).get("size_leaf_vector", "1")) > 1:
        raise unsupported("its leaves hold several values", "train with multi_strategy=one_output_per_tree")
    left = _integers(tree, "left_children")
    size = len(left)
    right, feature, default, kinds = (
        _integers(tree, name, size) for name in ("right_children", "split_indices", "default_left", "split_type")
    )
    words = np.zeros((size, 5))
    words[:, FEATURE] = np.where(left >= 0, feature, LEAF)
    for word, name in ((THRESHOLD, "split_conditions"), (GAIN, "loss_changes"), (COVER, "sum_hessian")):
        told = _of(tree, name, list)
        if word == THRESHOLD and len(told) == size:  # those of sets of codes mean nothing, and may be NaN
            told = [0.0 if kind == 1 else value for kind, value in zip(kinds.tolist(), told, strict=True)]
        words[:, word] = _reals(told, name, size)
    words[:, DEFAULT] = (left >= 0) & (default != 0)
    words[:, GAIN] *= left >= 0
    np.maximum(words[:, COVER], 0, out=words[:, COVER])
    level, place = np.zeros(1, np.int64), np.zeros(1, np.int64)
    ids: list[NDArray[np.int64]] = []
    heap: list[NDArray[np.int64]] = []
    reached = np.zeros(size, bool)
    while len(level):
        if ((level < 0) | (level >= size)).any() or reached[level].any() or len(np.unique(level)) < len(level):
            raise malformed("left_children")
        if len(ids) > DEEPEST:
            raise unsupported(f"a tree has more than {DEEPEST} levels", f"train with max_depth of at most {DEEPEST}")
        if ((left[level] < -1) | ((left[level] == -1) != (right[level] == -1))).any():
            raise malformed("right_children")
        reached[level] = True
        ids.append(level)
        heap.append(place)
        level, place = level[left[level] >= 0], place[left[level] >= 0]
        level, place = np.append(left[level], right[level]), np.append(2 * place + 1, 2 * place + 2)
    nodes = np.concatenate(ids)
    splits = nodes[left[nodes] >= 0]
    if ((feature[splits] < 0) | (feature[splits] >= num_features)).any():
        raise malformed("split_indices")
    if ((kinds[splits] == 1) != np.isin(feature[splits], list(renamed))).any():
        raise malformed("split_type")
    sets = _sets(tree)
    if not set(splits[kinds[splits] == 1].tolist()) <= set(sets):
        raise malformed("categories")
    by_set = {node: sets[node] for node in splits[kinds[splits] == 1].tolist()}
    return Shape(nodes, np.concatenate(heap), len(ids) - 1, feature, words, by_set)


def _sets(tree: Mapping[str, Any]) -> dict[int, list[int]]:
    """By node of a categorical split, the codes that go right."""
    codes, nodes = _integers(tree, "categories"), _integers(tree, "categories_nodes")
    starts, sizes = (_integers(tree, f"categories_{name}", len(nodes)) for name in ("segments", "sizes"))
    if ((starts < 0) | (sizes < 0) | (starts + sizes > len(codes))).any():
        raise malformed("categories")
    each = zip(nodes.tolist(), starts.tolist(), (starts + sizes).tolist(), strict=True)
    return {node: codes[a:b].tolist() for node, a, b in each}


def _features(
    learner: Mapping[str, Any], gbtree: Mapping[str, Any], schema: TableSchema
) -> tuple[list[str], dict[int, Codes]]:
    """Names of the features, and what the codes of those of categories are here."""
    names = learner.get("feature_names") or []
    if not isinstance(names, list):
        raise malformed("feature_names")
    kinds = learner.get("feature_types") or ["float"] * len(names)
    if not names:
        raise unsupported(
            "it does not name its features", "train it on a DataFrame, or set booster.feature_names and save it again"
        )
    listed = gbtree.get("cats", {})
    encoded = (listed.get("enc") if isinstance(listed, dict) else None) or [None] * len(names)
    if not all(isinstance(one, list) and len(one) == len(names) for one in (names, kinds, encoded)):
        raise malformed("feature_names")
    if not all(isinstance(name, str) for name in names):
        raise malformed("feature_names")
    renamed: dict[int, Codes] = {}
    for i, (name, kind, one) in enumerate(zip(names, kinds, encoded, strict=True)):
        column = schema.columns.get(name)
        if column is None or column.role == "ignore":
            raise unfit(name, f"there is no column {name!r}", "name the schema's columns as the model does")
        values = column.values or ()
        if kind == "c" and not 0 < len(values) <= MOST_CODES:
            raise unfit(name, f"{name!r} has no list of at most {MOST_CODES} values", "list its values in the schema")
        if kind == "c":
            renamed[i] = Codes(_renamed(one, values), (1 << len(values)) - 1)
        elif not column.numeric:
            raise unfit(name, f"{name!r} is not a number", "train it with enable_categorical")
    return names, renamed


def _renamed(encoded: Any, values: Sequence[Any]) -> dict[int, int]:
    """XGBoost's code → ours: by the categories' names where the file has them, else by place."""
    if not (isinstance(encoded, dict) and encoded.get("values")):
        return {code: code for code in range(len(values))}
    named: list[Any] = _integers(encoded, "values").tolist()
    if "offsets" in encoded:
        ends = _integers(encoded, "offsets")
        if not len(ends) or ends[0] != 0 or (np.diff(ends) < 0).any() or ends[-1] != len(named):
            raise malformed("cats")
        whole = bytes(byte & 0xFF for byte in named)
        named = [whole[a:b].decode("utf-8", "replace") for a, b in pairwise(ends)]
    place = {value: i for i, value in enumerate(values)}
    return {code: place[name] for code, name in enumerate(named) if name in place}
