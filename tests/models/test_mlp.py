"""The perceptron: of features or of an image's pixels, and of nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from atoll.contract.errors import AtollError
from atoll.contract.schema import Column, TableSchema
from atoll.data.table import Table
from atoll.models.model import make

SCHEMA = TableSchema(
    name="digits",
    columns={
        "image": Column(dtype="image", shape=(2, 3)),
        "a": Column(range=(0, 4)),
        "digit": Column(dtype="integer", values=(0, 1, 2), role="label"),
    },
)
SPEC: dict[str, Any] = {"kind": "mlp", "image": "image", "hidden": [4], "target": "digit"}


def test_pixels_from_0_to_1_pass_through_the_layers() -> None:
    """Written a second time: softmax(B · relu(A · pixels / 255 + a) + b)."""
    random = np.random.default_rng(5)
    images = random.integers(0, 256, (7, 2, 3), dtype=np.uint8)
    table = Table(SCHEMA, {"image": images, "a": np.zeros(7), "digit": np.zeros(7)})
    model = make(SPEC, SCHEMA)
    weights = random.normal(0, 1, model.weights.size)
    first, a, second, b = np.split(weights, np.cumsum([4 * 6, 4, 3 * 4]))
    hidden = np.maximum(images.reshape(7, 6) / 255 @ first.reshape(4, 6).T + a, 0)
    scores = np.exp(hidden @ second.reshape(3, 4).T + b)
    wanted = scores / scores.sum(1, keepdims=True)
    assert np.allclose(model.with_weights(weights).predict(table), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "code"),
    [({"features": ["a"]}, "plan.bad-value"), ({"image": None}, "plan.bad-value"), ({"image": "a"}, "plan.bad-column")],
)
def test_it_is_of_features_or_of_an_image(change: dict[str, Any], code: str) -> None:
    with pytest.raises(AtollError) as refused:
        make({**SPEC, **change}, SCHEMA)
    assert refused.value.code == code
