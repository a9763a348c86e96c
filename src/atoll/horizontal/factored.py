"""Rounds of low-rank changes: each layer's change travels as two factors, each a sum, so every protection applies.

Source: Vogels, Karimireddy & Jaggi 2019, PowerSGD (NeurIPS), Algorithm 1: P = Σ Mᵢ Q, made orthonormal, then
Q = Σ Mᵢᵀ P; what a site's factors do not hold it adds to its next change (see ``compression/lowrank.py``).
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

import numpy as np

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
from atoll.horizontal.payload import Payload

State = dict[str, Array]
Collecting = Generator[Any, Any, tuple[Update, tuple[str, ...]]]


class Factored:
    """What learners of the family do where their plan's ``compress`` says a rank. params: theirs."""

    params: Any
    link: Link

    def payload(self, schema: TableSchema) -> Payload:
        raise NotImplementedError

    # -- at the coordinator

    def _factored(self, cohort: Cohort, fields: Mapping[str, Declared], sent: State) -> Collecting:
        """A round of low-rank changes: the sum of P, then that of Q, of the sites that are in the first."""
        p, link, payload = self.params, self.link, self.payload(cohort.schema)
        factors, names = self._low_rank(payload), tuple(name for name in fields if name != "weight")
        begin = {**sent, "right": link.right}
        first = yield Round("train", Sum(), fields, begin, link.apart, draw=p.sites_per_round, paced=True)
        update = Update.from_sum(first, names)
        mean = update.values["weights"] / max(update.weight, 1e-12)
        ends = sum(factors.lefts)
        left = factors.orthonormal(mean[:ends], factors.lefts)
        wanted = payload.fields_of({"right": ((sum(factors.rights),), p.clip * factors.longest[1])}, cohort.exact)
        asked, among = first.cohort or first.sites, first.cohort is not None
        second = yield Round("train_right", Sum(), wanted, {"left": left}, sites=asked, among=among)
        right = second["right"] / max(float(second["weight"]), 1e-12)
        link.right = factors.orthonormal(right, factors.rights)
        change = factors.joined(left, right, mean[ends:])
        return Update({**update.values, "weights": change * update.weight}, update.weight), second.sites

    def _low_rank(self, payload: Payload) -> LowRank:
        """Its factors; raises ProtocolError where the plan says no rank."""
        if payload.factors is None:
            raise ProtocolError("task.order", "the plan has no low-rank rounds", field="train_right",
                                remedy="the coordinator does not keep the plan: do not go on with it")  # fmt: skip
        return payload.factors

    # -- at a site

    def _left(self, at: Local, change: Array) -> Array:
        """What of a site's *change* leaves first: Mᵢ Q, and what is in no matrix; the rest is kept."""
        factors, clip = self._low_rank(self.payload(at.site.table.schema)), self.params.clip
        sent: Array = factors.left(np.clip(change, -clip, clip), at.task.take("right", (sum(factors.rights),)))
        change[factors.dense] -= sent[sum(factors.lefts) :]
        self.params.compress.kept(change, at.site.state, at.model.dtype)
        return sent

    def _counts(self, site: SiteView, weight: float) -> None:
        """The second sum counts a site as the first did."""
        if self.params.compress.rank is not None:
            site.state["counts"] = np.array(weight)

    def _right(self, schema: TableSchema, sent: Mapping[str, Array]) -> Mapping[str, Norms]:
        payload = self.payload(schema)
        factors, most = self._low_rank(payload), payload.most
        each = touches(sum(factors.rights), self.params.clip * factors.longest[1]) * most
        return {"right": each, "weight": touches(1, most)}

    @handler("train_right", site=_right)
    def train_right(self, site: SiteView, task: Task) -> Reply:
        """At the site: how far its last change lies in each of the directions that all sites' changes have most of."""
        p, payload, state = self.params, self.payload(site.table.schema), site.state
        factors = self._low_rank(payload)
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
        state["residual"] = rest.astype(payload.model.dtype)
        bound = p.clip * factors.longest[1]
        return {"right": np.clip(right, -bound, bound) * weight, "weight": weight}
