"""A model of trees as XGBoost stores one, in JSON.

``xgboost.Booster().load_model(path)`` predicts as the model does: every row comes to the same leaf, since both compare
float32, and its margin is the same but for XGBoost's adding in float32. A categorical feature is one there, too: of a
DataFrame with pandas categories XGBoost 3.1 finds the codes by their names (where all of a model's are integers, or
ASCII texts, which is what it sorts rightly); of a matrix, or else, it takes their places in the schema's list. Only
3.1 and newer know a base margin for each class. Of a model with an exposure it predicts the rate; and what the model
does, given ``DMatrix(…, base_margin=np.log(exposure))``.

Source: https://xgboost.readthedocs.io/en/stable/tutorials/saving_model.html, "JSON Schema"; XGBoost 3.2.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from atoll.contract.errors import PlanError
from atoll.contract.schema import TableSchema
from atoll.contract.wire import Json
from atoll.models.model import Floats
from atoll.models.trees import COVER, DEFAULT, FEATURE, FURTHEST, GAIN, LEAF, MOST_CODES, THRESHOLD, UNUSED, Trees

VERSION = [3, 2, 0]
NO_PARENT = 2**31 - 1
LEAST = np.float32(1e-6)
"""XGBoost's least probability of a base score."""
LINKS = {
    "reg:squarederror": "identity", "reg:absoluteerror": "identity", "reg:pseudohubererror": "identity",
    "reg:quantileerror": "identity", "reg:logistic": "logistic", "binary:logistic": "logistic",
    "multi:softprob": "softmax", "multi:softmax": "softmax", "count:poisson": "exp", "reg:gamma": "exp",
    "reg:tweedie": "exp", "survival:cox": "exp",
}  # fmt: skip
"""By objective, what XGBoost makes of a margin."""
OBJECTIVES = {
    "identity": "reg:squarederror", "probability": "reg:squarederror", "logistic": "binary:logistic",
    "softmax": "multi:softprob", "exp": "count:poisson",
}  # fmt: skip
"""By link, the objective that is written where it is not known."""
NAMES = {
    "squared": "reg:squarederror", "logistic": "binary:logistic", "softmax": "multi:softprob",
    "poisson": "count:poisson", "quantile": "reg:quantileerror", "cox": "survival:cox",
}  # fmt: skip
"""Objectives here, as XGBoost calls them."""
SETTINGS: dict[str, Json] = {
    **{
        name: {"reg_loss_param": {"scale_pos_weight": "1"}}
        for name in ("reg:squarederror", "reg:logistic", "binary:logistic")
    },
    "count:poisson": {"poisson_regression_param": {"max_delta_step": "0.7"}},
    "reg:tweedie": {"tweedie_regression_param": {"tweedie_variance_power": "1.5"}},
    "reg:pseudohubererror": {"pseudo_huber_param": {"huber_slope": "1"}},
    "reg:quantileerror": {"quantile_loss_param": {"quantile_alpha": "[0.5]"}},
}  # fmt: skip
"""Of objectives that XGBoost does not read without: its defaults, which change no prediction."""


def to_json(model: Trees, schema: TableSchema, objective: str = "") -> bytes:
    """*model* as a file for XGBoost. objective: its name there or here, where it is known; it changes no prediction.
    Raises PlanError "export.no-objective" for a link that XGBoost does not have."""
    link, outputs = model.settings.link, model.outputs
    if link not in OBJECTIVES:
        raise PlanError(
            "export.no-objective", f"XGBoost has nothing that gives what the link {link!r} does", field="link",
            remedy="score with Atoll: atoll.models.estimator",
        )  # fmt: skip
    named = NAMES.get(objective, objective)
    objective = named if LINKS.get(named) == LINKS[OBJECTIVES[link]] else OBJECTIVES[link]
    trees = np.array(model.words)
    trees[:, :, [GAIN, COVER]] = _float32(trees[:, :, [GAIN, COVER]])
    scores = np.empty(outputs, np.float32)
    for output, margin in enumerate(model.base.tolist()):
        score = None if model.exposure else _score_of(objective, margin)  # a base_margin takes a base score's place
        scores[output] = _neutral(objective) if score is None else score
        if score is None:  # XGBoost would not get the margin back: it goes into the first tree's leaves
            first = trees[output]
            leaves = first[:, FEATURE] == LEAF
            first[leaves, THRESHOLD] = (first[leaves, THRESHOLD] + margin).astype(np.float32)
    features, categorical = model.settings.features, model.categorical
    gbtree: dict[str, Json] = {
        "gbtree_model_param": {"num_parallel_tree": "1", "num_trees": str(len(trees))},
        "iteration_indptr": list(range(0, len(trees) + 1, outputs)),
        "tree_info": [i % outputs for i in range(len(trees))],
        "trees": [_tree(i, words, categorical, len(features)) for i, words in enumerate(trees)],
    }
    if (cats := _cats(schema, features, categorical)) is not None:
        gbtree["cats"] = cats
    settings = SETTINGS.get(objective, {})
    if link == "softmax":
        settings = {"softmax_multiclass_param": {"num_class": str(outputs)}}
    plain = not any(set(name) & set("[]<") for name in features)  # XGBoost takes no others
    told = {
        "learner": {
            "attributes": {},
            "feature_names": list(features) if plain else [],
            "feature_types": ["c" if one else "float" for one in categorical.tolist()],
            "gradient_booster": {"model": gbtree, "name": "gbtree"},
            "learner_model_param": {
                # one number, where it is one: what is older than 3.1 reads no list
                "base_score": str(scores[0]) if len(set(scores)) == 1 else f"[{','.join(scores.astype(str))}]",
                "boost_from_average": "0",
                "num_class": str(outputs if link == "softmax" else 0),
                "num_feature": str(len(features)),
                "num_target": "1",
            },
            "objective": {"name": objective, **settings},
        },
        "version": VERSION,
    }
    return json.dumps(told, ensure_ascii=False, separators=(",", ":")).encode()


def base_margin(objective: str, score: float) -> np.float32:
    """The base margin that XGBoost makes of a base score, in float32 as it does."""
    held, link = np.float32(score), LINKS[objective]
    with np.errstate(all="ignore"):
        if link == "logistic":
            held = np.clip(held, LEAST, 1 - LEAST)
            return np.float32(-np.log(np.float32(1) / held - np.float32(1)))
        return np.float32(np.log(held)) if link == "exp" else held


def _neutral(objective: str) -> float:
    return {"logistic": 0.5, "exp": 1.0}.get(LINKS[objective], 0.0)


def _score_of(objective: str, margin: float) -> float | None:
    """The base score from which XGBoost gets *margin* back, as well as float32 can say it; None if there is none."""
    inverse: Callable[[float], np.float32] = {
        "logistic": lambda m: np.float32(1 / (1 + np.exp(-m))), "exp": lambda m: np.float32(np.exp(m)),
    }.get(LINKS[objective], np.float32)  # fmt: skip
    with np.errstate(all="ignore"):
        score = inverse(margin)
        for _ in range(8):  # so that what is read and written again is the same
            again = inverse(float(base_margin(objective, float(score))))
            if again == score:
                break
            score = again
    off = abs(float(base_margin(objective, float(score))) - margin)
    return float(score) if off <= 2.5e-7 * max(1.0, abs(margin)) else None


def _tree(number: int, words: Floats, categorical: NDArray[np.bool_], num_features: int) -> dict[str, Json]:
    """One tree, its nodes from top to bottom and left to right. words: [num_nodes, 5]."""
    used = np.flatnonzero(words[:, FEATURE] != UNUSED)
    node = words[used]
    place = np.full(2 * len(words) + 1, -1)
    place[used] = np.arange(len(used))
    feature = node[:, FEATURE].astype(np.int64)
    split = feature >= 0
    by_set = split & categorical[np.maximum(feature, 0)]
    left, right = (np.where(split, place[2 * used + side], -1) for side in (1, 2))
    codes = [[c for c in range(MOST_CODES) if int(mask) >> c & 1] for mask in node[by_set, THRESHOLD]]
    sizes = [len(going_right) for going_right in codes]
    return {
        "base_weights": _short(_expected(words)[used]),
        "categories": [code for going_right in codes for code in going_right],
        "categories_nodes": np.flatnonzero(by_set).tolist(),
        "categories_segments": (np.cumsum(sizes, dtype=int) - sizes).tolist(),
        "categories_sizes": sizes,
        "default_left": np.where(split, node[:, DEFAULT], 0).astype(int).tolist(),
        "id": number,
        "left_children": left.tolist(),
        "loss_changes": _short(np.where(split, node[:, GAIN], 0.0)),
        "parents": np.where(used > 0, place[(used - 1) // 2], NO_PARENT).tolist(),
        "right_children": right.tolist(),
        "split_conditions": _short(np.where(by_set, 0.0, node[:, THRESHOLD])),
        "split_indices": np.maximum(feature, 0).tolist(),
        "split_type": by_set.astype(int).tolist(),
        "sum_hessian": _short(node[:, COVER]),
        "tree_param": {
            "num_deleted": "0", "num_feature": str(num_features), "num_nodes": str(len(used)), "size_leaf_vector": "1",
        },
    }  # fmt: skip


def _short(values: Floats) -> list[float]:
    """As float32; those whose shortest text, as float64, is that of the float32."""
    return [float(text) for text in _float32(values).astype(str)]


def _float32(values: Floats) -> NDArray[np.float32]:
    return np.clip(values, -FURTHEST, FURTHEST).astype(np.float32)


def _expected(words: Floats) -> Floats:
    """Of each node the mean, by cover, of the leaves below it, [num_nodes]."""
    mean, cover = np.where(words[:, FEATURE] == LEAF, words[:, THRESHOLD], 0.0), words[:, COVER]
    inner = len(words) // 2
    while inner:  # from the last level but one up
        at = np.arange(inner // 2, inner)
        at = at[words[at, FEATURE] >= 0]
        left, right = cover[2 * at + 1], cover[2 * at + 2]
        share = np.where(left + right > 0, left / np.where(left + right > 0, left + right, 1), 0.5)
        mean[at] = share * mean[2 * at + 1] + (1 - share) * mean[2 * at + 2]
        inner //= 2
    return mean


def _cats(schema: TableSchema, features: Sequence[str], categorical: NDArray[np.bool_]) -> dict[str, Json] | None:
    """The code lists, by which XGBoost finds a DataFrame's categories; None where it could not."""
    encoded: list[Json] = []
    starts, order = [0], []
    for name, is_code in zip(features, categorical.tolist(), strict=True):
        values = (schema.columns[name].values or ()) if is_code else ()
        if all(isinstance(value, str) and value.isascii() for value in values):
            texts = [str(value).encode() for value in values]
            offsets = np.cumsum([0, *map(len, texts)]).tolist() if is_code else []
            encoded.append({"offsets": offsets, "values": list(b"".join(texts))})
        elif all(not isinstance(value, str) and float(value).is_integer() for value in values):
            encoded.append({"type": 15, "values": [int(value) for value in values]})
        else:
            return None
        starts.append(starts[-1] + len(values))
        order += sorted(range(len(values)), key=lambda i: values[i])
    return {"enc": encoded, "feature_segments": starts, "sorted_idx": order} if categorical.any() else None
