"""Many sites' losses and gradients in one call are those of each site alone, whatever the padding holds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.contract.schema import Column, TableSchema
from atoll.models.batched import batched
from atoll.models.model import Examples, make

FEATURES = [f"f{i}" for i in range(6)]
TARGETS = {
    "digit": Column(dtype="integer", values=tuple(range(5)), role="label"),
    "sick": Column(dtype="integer", values=(0, 1), role="label"),
    "count": Column(dtype="integer", range=(0, 9), role="label"),
    "speed": Column(range=(-3, 3), role="label"),
}
SCHEMA = TableSchema(
    name="test", columns={**{name: Column(range=(-4, 4)) for name in FEATURES}, **TARGETS,
                          "image": Column(dtype="image", shape=(8, 8))},
)  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "linear": {"kind": "linear", "family": "linear", "features": FEATURES, "target": "speed"},
    "logistic": {"kind": "linear", "family": "logistic", "features": FEATURES, "target": "sick"},
    "poisson": {"kind": "linear", "family": "poisson", "features": FEATURES, "target": "count"},
    "mlp": {"kind": "mlp", "features": FEATURES, "hidden": [7, 5], "target": "sick"},
    "mlp of classes": {"kind": "mlp", "image": "image", "hidden": [9], "target": "digit"},
    "mlp with norms": {"kind": "mlp", "features": FEATURES, "hidden": [8], "norm": "group", "target": "speed"},
    "cnn": {"kind": "cnn", "image": "image", "channels": [4, 6], "hidden": 8, "target": "digit"},
    "cnn with norms": {"kind": "cnn", "image": "image", "channels": [4], "hidden": 8, "norm": "group",
                       "target": "digit"},
    "resnet": {"kind": "resnet", "image": "image", "widths": [4, 6], "target": "digit"},
    "gru": {"kind": "gru", "series": {"all": FEATURES}, "hidden": 4, "target": "sick"},
    "transformer": {"kind": "series_transformer", "series": {"all": FEATURES}, "target": "sick"},
}  # fmt: skip
FAR = {np.dtype(np.float64): 1e-12, np.dtype(np.float32): 1e-5}
"""Of the largest element of a gradient, or of 1."""


def examples(spec: dict[str, Any], rows: int, random: np.random.Generator) -> Examples:
    kind, made = spec["kind"], make(spec, SCHEMA)
    if "image" in spec:
        inputs = random.integers(0, 256, (rows, 8, 8)).astype(np.uint8)
        inputs = inputs.reshape(rows, -1) if kind == "mlp" else inputs
    else:
        shape = (6, 1) if "series" in spec else (7,) if kind == "linear" else (6,)
        inputs = random.uniform(-1, 1, (rows, *shape)).astype(made.dtype)
    high = {"digit": 5, "sick": 2, "count": 10, "speed": 3}[spec["target"]]
    return Examples((inputs,), random.integers(0, high, rows).astype(np.float64))


def padded(batches: list[Examples], size: int) -> Examples:
    """Behind a site's rows its last one is repeated."""
    places = [np.minimum(np.arange(size), len(batch) - 1) for batch in batches]
    each = [batch.take(rows) for batch, rows in zip(batches, places, strict=True)]
    return Examples((np.stack([batch.inputs[0] for batch in each]),), np.stack([batch.labels for batch in each]))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=6)
@given(seed=st.integers(0, 2**32 - 1), sizes=st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_they_are_what_each_site_computes_alone(kind: str, seed: int, sizes: list[int]) -> None:
    random, model = np.random.default_rng(seed), make(KINDS[kind], SCHEMA)
    learn = batched(model, examples(KINDS[kind], 2, random))
    assert learn is not None
    weights = model.initial(1) + random.normal(0, 0.1, (len(sizes), len(model.weights)))
    weights = weights.astype(model.dtype)
    batches = [examples(KINDS[kind], rows, random) for rows in sizes]
    losses, gradients = learn(weights, padded(batches, max(sizes)), np.array(sizes))
    for site, batch in enumerate(batches):
        loss, gradient = model.loss_and_gradient(weights[site], batch)
        assert losses[site] == pytest.approx(loss, rel=1e-5 if model.dtype == np.float32 else 1e-12, abs=1e-6)
        assert gradients.dtype == gradient.dtype
        assert np.abs(gradients[site] - gradient).max() <= FAR[model.dtype] * max(1, np.abs(gradient).max())


def test_fewer_sites_than_before_and_more() -> None:
    """Room is kept from call to call: it must not show."""
    random, model = np.random.default_rng(2), make(KINDS["mlp"], SCHEMA)
    learn = batched(model, examples(KINDS["mlp"], 2, random))
    assert learn is not None
    for sites in (3, 1, 4, 4):
        weights = random.normal(0, 1, (sites, len(model.weights))).astype(np.float32)
        batches = [examples(KINDS["mlp"], 4, random) for _ in range(sites)]
        _, gradients = learn(weights, padded(batches, 4), np.full(sites, 4))
        for site, batch in enumerate(batches):
            assert np.allclose(gradients[site], model.loss_and_gradient(weights[site], batch)[1], rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "spec",
    [
        {"kind": "mlp", "features": FEATURES, "hidden": [8], "norm": "batch", "target": "sick"},
        {"kind": "mlp", "features": FEATURES, "hidden": [4096, 8], "target": "sick"},
    ],
    ids=["mixes rows", "large"],
)
def test_models_that_cannot_or_need_not(spec: dict[str, Any]) -> None:
    assert batched(make(spec, SCHEMA), examples(spec, 2, np.random.default_rng(0))) is None
