"""Rounds of low-rank changes: each layer's change travels as two factors, each a sum, so every protection applies.

Source: Vogels, Karimireddy & Jaggi 2019, PowerSGD (NeurIPS), Algorithm 1: P = Σ Mᵢ Q, made orthonormal, then
Q = Σ Mᵢᵀ P; what a site's factors do not hold it adds to its next change (see ``compression/lowrank.py``).
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.compression.link import Link
from atoll.compression.lowrank import LowRank
from atoll.contract.errors import ProtocolError
from atoll.contract.program import Cohort, SiteView, handler
from atoll.contract.rounds import Field as Declared
from atoll.contract.rounds import Reply, Round, Sum, Task
from atoll.contract.schema import TableSchema
from atoll.contract.sensitivity import Norms, touches
from atoll.contract.updates import Update
from atoll.contract.wire import Array
from atoll.horizontal.local import Local
from atoll.models.model import Model

State = dict[str, Array]
Collecting = Generator[Any, Any, tuple[Update, tuple[str, ...]]]
THIN = 2.0**-25
"""Resolution of a low-rank factor, of the largest that it can be: it fits a ring of 32 bits for some sixty sites."""


class Factored:
    """What learners of the family do where their plan's ``compress`` says a rank. params: theirs."""

    params: Any
    link: Link
    _matrices: tuple[Model, LowRank] | None = None

    def model(self, schema: Any) -> Model:
        raise NotImplementedError

    def _moving(self, model: Model) -> NDArray[np.int64]:
        raise NotImplementedError

    def _most(self, schema: TableSchema) -> float:
        raise NotImplementedError

    def _fields_of(
        self, shapes: Mapping[str, tuple[tuple[int, ...], float]], most: float, model: Model, exact: bool
    ) -> dict[str, Declared]:
        raise NotImplementedError

    # -- at the coordinator

    def _factored(self, cohort: Cohort, fields: Mapping[str, Declared], sent: State) -> Collecting:
        """A round of low-rank changes: the sum of P, then that of Q, of the sites that are in the first."""
        p, model, link = self.params, self.model(cohort.schema), self.link
        factors, names = self._low_rank(model), tuple(name for name in fields if name != "weight")
        begin = {**sent, "right": link.right}
        first = yield Round("train", Sum(), fields, begin, link.apart, draw=p.sites_per_round, paced=True)
        update = Update.from_sum(first, names)
        mean = update.values["weights"] / max(update.weight, 1e-12)
        ends = sum(factors.lefts)
        left = factors.orthonormal(mean[:ends], factors.lefts)
        shapes, most = {"right": ((sum(factors.rights),), p.clip * factors.longest[1])}, self._most(cohort.schema)
        wanted = self._fields_of(shapes, most, model, cohort.exact)
        asked, among = first.cohort or first.sites, first.cohort is not None
        second = yield Round("train_right", Sum(), wanted, {"left": left}, sites=asked, among=among)
        right = second["right"] / max(float(second["weight"]), 1e-12)
        link.right = factors.orthonormal(right, factors.rights)
        change = factors.joined(left, right, mean[ends:])
        return Update({**update.values, "weights": change * update.weight}, update.weight), second.sites

    def _factors(self, model: Model) -> LowRank | None:
        """How its weights that travel are parts of matrices, where the plan says a rank."""
        rank = self.params.compress.rank
        if rank is not None and (self._matrices is None or self._matrices[0] is not model):
            shapes = {name: array.shape for name, array in model.arrays().items() if name in model.layers}
            self._matrices = (model, LowRank.of(shapes, model.layers, self._moving(model), rank))
        return self._matrices[1] if self._matrices else None

    def _low_rank(self, model: Model) -> LowRank:
        """As :meth:`_factors`; raises ProtocolError where the plan says none."""
        if (found := self._factors(model)) is None:
            raise ProtocolError("task.order", "the plan has no low-rank rounds", field="train_right",
                                remedy="the coordinator does not keep the plan: do not go on with it")  # fmt: skip
        return found

    # -- at a site

    def _left(self, at: Local, change: Array) -> Array:
        """What of a site's *change* leaves first: Mᵢ Q, and what is in no matrix; the rest is kept."""
        factors, clip = self._low_rank(at.model), self.params.clip
        sent: Array = factors.left(np.clip(change, -clip, clip), at.task.take("right", (sum(factors.rights),)))
        change[factors.dense] -= sent[sum(factors.lefts) :]
        self.params.compress.kept(change, at.site.state, at.model.dtype)
        return sent

    def _counts(self, site: SiteView, weight: float) -> None:
        """The second sum counts a site as the first did."""
        if self.params.compress.rank is not None:
            site.state["counts"] = np.array(weight)

    def _right(self, schema: TableSchema, sent: Mapping[str, Array]) -> Mapping[str, Norms]:
        factors, most = self._low_rank(self.model(schema)), self._most(schema)
        each = touches(sum(factors.rights), self.params.clip * factors.longest[1]) * most
        return {"right": each, "weight": touches(1, most)}

    @handler("train_right", site=_right)
    def train_right(self, site: SiteView, task: Task) -> Reply:
        """At the site: how far its last change lies in each of the directions that all sites' changes have most of."""
        model, p = self.model(site.table.schema), self.params
        factors, state = self._low_rank(model), site.state
        if "counts" not in state:
            raise ProtocolError("task.order", "Q is asked for after P", field="train_right",
                                remedy="the coordinator does not keep the protocol: do not go on with it")  # fmt: skip
        left, weight = task.take("left", (sum(factors.lefts),)), float(state.pop("counts"))
        if not weight:
            return {"right": np.zeros(sum(factors.rights)), "weight": 0.0}
        kept = state["residual"].astype(np.float64)
        change = np.clip(kept, -p.clip, p.clip)
        right, rest = factors.right(change, left)
        rest += kept - change
        rest[factors.dense] = kept[factors.dense]
        state["residual"] = rest.astype(model.dtype)
        bound = p.clip * factors.longest[1]
        return {"right": np.clip(right, -bound, bound) * weight, "weight": weight}
