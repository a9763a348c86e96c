"""Images as numbers, against plain numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from atoll.contract.errors import PlanError
from atoll.contract.plan import Recipe
from atoll.contract.schema import Column, TableSchema
from atoll.data.recipe import Prepared

FEATURES = {"step": "image_features", "column": "scan"}


def site(table_of: Any, images: np.ndarray) -> Any:
    return table_of({"scan": images}, {"scan": {"dtype": "image", "shape": list(images.shape[1:])}})


def test_brightness_and_layout(table_of: Any, prepare: Any) -> None:
    images = np.random.default_rng(1).integers(0, 256, (7, 12, 9)).astype(np.uint8)
    made = prepare([{**FEATURES, "blocks": 3}], {"one": site(table_of, images)})["one"]
    flat = images.reshape(7, -1).astype(float)
    assert np.allclose(made["scan_mean"], flat.mean(axis=1))
    assert np.allclose(made["scan_std"], flat.std(axis=1))
    assert np.allclose(made["scan_q50"], np.median(flat, axis=1))
    assert np.allclose(made["scan_block_2_1"], images[:, 8:12, 3:6].mean(axis=(1, 2)))
    edges = np.column_stack([made[f"scan_edge_{d}"] for d in range(8)])
    assert np.allclose(edges.sum(axis=1), 1)
    assert "scan" not in made.columns


def test_colours_and_directions(table_of: Any, prepare: Any) -> None:
    images = np.zeros((3, 8, 8, 3), np.uint8)
    images[0, :, :, 1] = 100  # green all over: no edges
    images[1] += (np.arange(8, dtype=np.uint8) * 20)[None, :, None]  # brighter to the right
    images[2] += (np.arange(8, dtype=np.uint8) * 20)[:, None, None]  # brighter downwards
    made = prepare([{**FEATURES, "directions": 4, "keep": True}], {"one": site(table_of, images)})["one"]
    assert made["scan_mean"][0] == pytest.approx(58.7)
    edges = np.column_stack([made[f"scan_edge_{d}"] for d in range(4)])
    assert np.allclose(edges, [[0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0]])
    assert np.array_equal(made["scan"], images)


def test_none_and_tiny(table_of: Any, prepare: Any) -> None:
    for images in (np.zeros((0, 4, 4), np.uint8), np.full((2, 1, 1), 255, np.uint8)):
        made = prepare([FEATURES], {"one": site(table_of, images)})["one"]
        assert len(made) == len(images)
        assert made.schema.columns["scan_std"].bounds() == (0, 127.5)


def test_only_images() -> None:
    schema = TableSchema(name="t", columns={"scan": Column(range=(0, 1))})
    with pytest.raises(PlanError) as caught:
        Prepared(Recipe(steps=(FEATURES,))).schema(schema)
    assert caught.value.code == "recipe.wrong-type"
