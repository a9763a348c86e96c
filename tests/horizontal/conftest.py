"""Hospitals that differ, and what a test of an algorithm needs to be written a second time in plain numpy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from atoll.contract.program import Cohort, build
from atoll.contract.rounds import Task, TaskId
from atoll.data.table import Table

Rows = NDArray[np.int64]
COLUMNS = {"u": {"range": [-4, 4]}, "v": {"range": [0, 10]}}
TARGETS: dict[str, dict[str, Any]] = {
    "logistic": {"dtype": "integer", "values": [0, 1], "role": "label"},
    "linear": {"range": [-1, 1], "role": "label"},
}


class Hospitals:
    """Three sites whose labels depend on their features in other ways, and (generalised) linear regression on them.

    Weights are [intercept, slopes of u and v in [-1, 1]]: the intercept is the layer "head". unlike: the sites' losses
    are curved in other ways too, so that local steps lead away from the optimum.
    """

    def __init__(
        self, federation: Any, family: str = "logistic", sizes: tuple[int, ...] = (40, 25, 33), *, unlike: bool = False
    ) -> None:
        random = np.random.default_rng(4)
        self.family, self.tables = family, dict[str, Table]()
        self.x, self.y = dict[str, NDArray[np.float64]](), dict[str, NDArray[np.float64]]()
        for i, n in enumerate(sizes):
            spread = 5 / (1 + i * unlike)
            name, u, v = f"s{i}", random.uniform(-4, 4, n), random.uniform(5 - spread, 5 + spread, n)
            x = np.column_stack([np.ones(n), u / 4, (v - 5) / 5])
            eta = x @ [2.0 * i - 2, 1.5, 1 - i]
            y = (random.random(n) < 1 / (1 + np.exp(-eta))).astype(float) if family == "logistic" else np.tanh(eta)
            self.tables[name] = federation.table({"u": u, "v": v, "y": y}, {**COLUMNS, "y": TARGETS[family]})
            self.x[name], self.y[name] = x, y
        self.share = {name: len(self.y[name]) / sum(sizes) for name in self.tables}

    def params(self, **more: Any) -> dict[str, Any]:
        return {"family": self.family, "features": ["u", "v"], "target": "y", **more}

    def train(self, drive: Any, program: str, params: dict[str, Any], **options: Any) -> Any:
        cohort = Cohort(tuple(self.tables), self.tables["s0"].schema)
        return drive(build(program, params).coordinate(cohort), self.tables, **options)

    @staticmethod
    def task(site: str, number: int, arrays: dict[str, Any]) -> Task:
        """A task as ``drive`` makes it."""
        return Task(TaskId("0" * 32, number, 0, "reply", site), arrays, (number, *site.encode()))

    # -- written a second time

    def gradient(self, site: str, w: Any, rows: Any = slice(None)) -> NDArray[np.float64]:
        x, y = self.x[site][rows], self.y[site][rows]
        mean = x @ w if self.family == "linear" else 1 / (1 + np.exp(-x @ w))
        return x.T @ (mean - y) / len(y)

    def hessian(self, site: str, w: Any, rows: Any = slice(None)) -> NDArray[np.float64]:
        x = self.x[site][rows]
        p = 1 / (1 + np.exp(-x @ w))
        weight = np.ones(len(x)) if self.family == "linear" else p * (1 - p)
        return (x * weight[:, None]).T @ x / len(x)

    def loss(self, site: str, w: Any) -> float:
        eta, y = self.x[site] @ w, self.y[site]
        each = (eta - y) ** 2 / 2 if self.family == "linear" else np.logaddexp(0, eta) - y * eta
        return float(each.mean())

    def batches(self, site: str, number: int, size: int, epochs: int = 1, part: int = 0) -> list[Rows]:
        """Rows of the mini-batches of round *number*, in the order that the plan's seed gives."""
        shuffler = np.random.Generator(np.random.Philox(np.random.SeedSequence((number, *site.encode()))))
        for _ in range(part):
            shuffler = np.random.Generator(np.random.Philox(shuffler.integers(2**63)))
        n = len(self.y[site])
        orders = [shuffler.permutation(n) for _ in range(epochs)]
        return [batch for order in orders for batch in np.split(order, range(size, n, size))]

    def sgd(
        self, site: str, w: Any, batches: Iterable[Rows], rate: float, still: Sequence[int] = (), drawn: Any = None
    ) -> Any:
        """Plain SGD; weights *still* do not move. drawn: what is added to the gradient at w."""
        w = np.array(w, float)
        for rows in batches:
            step = rate * (self.gradient(site, w, rows) + (0 if drawn is None else drawn(w)))
            step[list(still)] = 0
            w = w - step
        return w

    def optimum(self, weighting: str = "rows") -> Any:
        """Of linear regression, by all rows alike or by all sites alike."""
        share = {site: self.share[site] if weighting == "rows" else 1 for site in self.tables}
        curvature = sum(share[site] * self.hessian(site, np.zeros(3)) for site in self.tables)
        return -np.linalg.solve(curvature, sum(share[site] * self.gradient(site, np.zeros(3)) for site in self.tables))

    def mean(self, changes: dict[str, Any]) -> Any:
        """By rows."""
        return sum(self.share[site] * change for site, change in changes.items())


@pytest.fixture
def hospitals(federation: Any) -> Callable[..., Hospitals]:
    """``hospitals(family)``: see :class:`Hospitals`."""
    return lambda *arguments, **options: Hospitals(federation, *arguments, **options)
