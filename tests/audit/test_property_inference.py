"""A site's update tells its share of ill people; one with enough noise does not."""

from __future__ import annotations

import numpy as np
import pytest

from atoll.audit.property_inference import infer_property, shadow_updates, with_share
from atoll.contract.errors import PlanError


def logistic_gradient(x: np.ndarray, y: np.ndarray, noise: float, random: np.random.Generator) -> np.ndarray:
    return x.T @ (0.5 - y) / len(y) + random.normal(0, noise, x.shape[1])


@pytest.mark.parametrize(("noise", "low", "high"), [(0.0, 0.95, 1.0), (3.0, 0.3, 0.7)])
def test_share_of_labels_from_updates(noise: float, low: float, high: float) -> None:
    random = np.random.default_rng(0)
    y = random.integers(0, 2, 2000).astype(float)
    x = np.column_stack([np.ones(2000), random.normal(size=(2000, 9)) + 0.5 * y[:, None]])
    updates = []
    for half in (slice(0, 1000), slice(1000, 2000)):
        own_x, own_y = x[half], y[half]

        def update(rows: np.ndarray, own_x: np.ndarray = own_x, own_y: np.ndarray = own_y) -> np.ndarray:
            return logistic_gradient(own_x[rows], own_y[rows], noise, random)

        updates.append(shadow_updates(update, own_y, (0.4, 0.6), 100, 200, seed=1))
    (shadows, has), (observed, truth) = updates
    assert low <= infer_property(shadows, has, observed, truth) <= high


def test_shares_are_exact() -> None:
    y = np.arange(100) % 2.0
    rows = with_share(y, 0.3, 50, np.random.default_rng(0))
    assert y[rows].sum() == 15
    with pytest.raises(PlanError) as caught:
        with_share(np.ones(10), 0.5, 5, np.random.default_rng(0))
    assert caught.value.code == "audit.one-kind"
