"""What coordinators are given under noise does not break them, and fixed point keeps the digits of what is exact."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest

from atoll.contract.fields import Field
from atoll.contract.rounds import Sum
from atoll.privacy.fixed_point import width_of

from .examples import (
    EXAMPLES,
    OF_SITES,
    Noise,
    _learner,
    every_example,
    played,
    tables_of,
)


def gaussian(seed: int, times: float) -> Noise:
    random = np.random.default_rng(seed)

    def add(field: Field, total: Any, l2: float) -> Any:
        noisy = np.asarray(total, np.float64) + random.normal(0, times * l2, np.shape(total)) * (l2 > 0)
        if np.dtype(field.dtype).kind in "iu":
            return np.maximum(np.rint(noisy), 0).astype(np.int64)
        return noisy

    return add


@pytest.mark.parametrize("times", [3.0, 1000.0])
@pytest.mark.parametrize(("name", "params", "missing"), [*EXAMPLES, *OF_SITES])
def test_noise_breaks_no_coordinator(
    federation: Any, name: str, params: dict[str, Any], missing: bool, times: float
) -> None:
    tables = tables_of(federation, missing)
    _, quiet = played(name, params, tables, exact=False)
    zeros: Noise = lambda field, total, l2: np.zeros_like(total)  # noqa: E731
    _, dry = played(name, params, tables, exact=False, noise=zeros)
    for seed in range(4):
        result, rounds = played(name, params, tables, exact=False, noise=gaussian(seed, times))
        assert result
        asked = [(item.program, item.name) for item in rounds]
        assert asked == [(item.program, item.name) for item in quiet] == [(item.program, item.name) for item in dry]


def _weights(found: Any) -> Any:
    return found["model"].weights


# what is compared, and how far noise of three times a record's norm may move it, of 60,000 rows
CLOSE: list[tuple[str, dict[str, Any], Callable[[Any], Any], float]] = [
    ("statistics.describe", {"columns": ["a"]}, lambda r: [r["columns"]["a"][k] for k in ("mean", "std")], 0.01),
    (
        "statistics.quantiles",
        {"columns": ["a"], "error": 1e-3, "bins": 32},
        lambda r: r["quantiles"]["columns"]["a"]["values"][1:-1],
        0.2,
    ),
    (
        "statistics.frequency",
        {"columns": ["a", "kind"]},
        lambda r: np.concatenate([c["counts"] for c in r["frequency"]["columns"].values()]) / 6e4,
        0.001,
    ),
    (
        "statistics.crosstab",
        {"pairs": [["binary", "kind"]]},
        lambda r: np.array(r["crosstab"]["tables"][0]["counts"]) / 6e4,
        0.001,
    ),
    (
        "statistics.psi",
        {"columns": ["a", "kind"], "between": "periods", "date": "seen", "cut": "2021-01-01"},
        lambda r: [c["psi"] for c in r["psi"]["columns"].values()],
        0.01,
    ),
    ("statistics.correlation", {"columns": ["a", "b", "value"]}, lambda r: r["correlation"]["matrix"], 0.02),
    (
        "statistics.correlation",
        {"columns": ["a", "b", "value"], "method": "spearman", "bins": 256},
        lambda r: r["correlation"]["matrix"],
        0.03,
    ),
    (
        "statistics.vif",
        {"columns": ["a", "b", "value"]},
        lambda r: [c["vif"] for c in r["vif"]["columns"].values()],
        0.5,
    ),
    ("statistics.pca", {"columns": ["a", "b", "value"]}, lambda r: r["pca"]["eigenvalues"], 0.05),
    (
        "statistics.group_by",
        {"by": ["kind"], "columns": ["a"]},
        lambda r: [g["columns"]["a"]["mean"] for g in r["group_by"]["groups"][:3]],
        0.01,
    ),
    ("statistics.anova", {"column": "value", "by": "binary"}, lambda r: r["anova"]["eta_squared"], 0.01),
    ("statistics.ttest", {"column": "value", "by": "binary"}, lambda r: r["ttest"]["difference"], 0.2),
    (
        "statistics.ttest",
        {"column": "a", "mean": 0.5},
        lambda r: [r["ttest"][k] for k in ("difference", "cohens_d")],
        0.01,
    ),
    (
        "statistics.woe",
        {"target": "binary", "features": ["a", "kind"]},
        lambda r: [f["iv"] for f in r["woe"]["features"].values()],
        0.02,
    ),
    (
        "statistics.survival",
        {"duration": "count", "event": "binary"},
        lambda r: r["survival"]["curves"]["all"]["survival"][:20],
        0.02,
    ),
    ("statistics.quality", {}, lambda r: r["quality"]["score"], 0.02),
    ("horizontal.glm", _learner("logistic", "binary"), _weights, 0.02),
    ("horizontal.glm", _learner("linear", "value"), _weights, 0.3),
    ("horizontal.glm", _learner("poisson", "count"), _weights, 0.02),
]


@pytest.mark.parametrize(("name", "params", "of", "tolerance"), CLOSE, ids=[f"{i}-{c[0]}" for i, c in enumerate(CLOSE)])
def test_of_many_rows_noise_changes_little(
    federation: Any, name: str, params: dict[str, Any], of: Callable[[Any], Any], tolerance: float
) -> None:
    tables = tables_of(federation, missing=False, sizes=(20_000, 30_000, 10_000))
    exact, _ = played(name, params, tables, exact=True, smallest=1)
    for times in (0.0, 3.0):
        noisy, _ = played(name, params, tables, exact=False, noise=gaussian(1, times))
        off = np.abs(np.array(of(exact), np.float64) - np.array(of(noisy), np.float64)).max()
        print(name, times, off, tolerance)
        assert off <= tolerance


# ---------------------------------------------------------------- fixed point


@pytest.mark.parametrize("exact", [True, False])
@every_example
def test_the_sum_of_a_hundred_sites_of_a_hundred_million_rows_fits_a_ring(
    federation: Any, name: str, params: dict[str, Any], missing: bool, exact: bool
) -> None:
    """With noise (and so with room for it), in one of 64 bits."""
    tables = tables_of(federation, missing, max_rows=100_000_000)
    for item in played(name, params, tables, exact)[1]:
        if isinstance(item.reduce, Sum):
            for told, declared in item.reply.items():
                assert width_of(told, declared, 100) <= (128 if exact else 64)
                assert declared.bound is not None and declared.step
                assert 200 * declared.bound / declared.step < (2.0**126 if exact else 2.0**63)


@every_example
def test_fixed_point_keeps_the_digits(federation: Any, name: str, params: dict[str, Any], missing: bool) -> None:
    """Sums of ten sites, each rounded to the step that a schema of ten million rows leads to."""
    tables = tables_of(federation, missing, sizes=(400, 150, 700))
    exact, _ = played(name, params, tables, exact=True, smallest=1)

    def rounded(declared: Field, total: Any, _: float) -> Any:
        step = 10 * (declared.step or 0)
        return np.rint(total / step) * step if np.dtype(declared.dtype).kind == "f" else total

    found, _ = played(name, params, tables, exact=True, noise=rounded, smallest=1)
    other = dict(numbers(found))
    for path, value in numbers(exact):
        if not math.isnan(value) and not path.startswith(("/history", "/iterations")):
            assert other[path] == pytest.approx(value, rel=1e-9, abs=1e-10), path


def numbers(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a result, by where it stands."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from numbers(inner, f"{path}/{key}")
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from numbers(inner, f"{path}/{i}")
    elif isinstance(value, np.ndarray):
        yield from numbers(value.tolist(), path)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, float(value)
