"""Programs that only benchmarks use."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from pydantic import Field

from atoll.contract.program import Cohort, ProgramParams, SiteView, handler, program
from atoll.contract.rounds import Reply, Round, Steps, Sum, Task, count, real
from atoll.contract.wire import Array


@program("bench.noop", needs={"sum"}, offers={"bounded", "resolution", "bounded-weight"})
class NoOp:
    """Rounds that send and compute next to nothing."""

    class Params(ProgramParams):
        """rounds: how many."""

        rounds: int = Field(default=1, ge=1)

    def __init__(self, params: Params) -> None:
        self.params = params

    def coordinate(self, cohort: Cohort, start: Mapping[str, Array] | None = None) -> Steps:
        """Returns {"total": the number of replies}."""
        total = 0
        for _ in range(self.params.rounds):
            summed = yield Round("one", Sum(), {"one": count(bound=1)})
            total += int(summed["one"])
        return {"total": total}

    @handler("one")
    def one(self, site: SiteView, task: Task) -> Reply:
        """At the site: the number one."""
        return {"one": 1}


@program("bench.vector", needs={"sum"}, offers={"bounded", "resolution", "bounded-weight"})
class Vector:
    """One Sum of a long vector."""

    class Params(ProgramParams):
        """size: float64 elements."""

        size: int = Field(ge=1)

    def __init__(self, params: Params) -> None:
        self.params = params

    def coordinate(self, cohort: Cohort, start: Mapping[str, Array] | None = None) -> Steps:
        """Returns {"right": 1.0 if every element of the sum is the number of sites}."""
        summed = yield Round("ones", Sum(), {"x": real(self.params.size, bound=1, step=1e-6)})
        x = summed["x"]
        return {"right": float(x.min() == x.max() == len(cohort.sites))}

    @handler("ones")
    def ones(self, site: SiteView, task: Task) -> Reply:
        """At the site: a vector of ones."""
        return {"x": np.ones(self.params.size)}
