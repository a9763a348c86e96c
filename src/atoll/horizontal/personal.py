"""Personalised learning's end: each site keeps a model of its own, which evaluation scores and nobody else sees."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from atoll.compression.link import Link
from atoll.contract.errors import PolicyError, ProtocolError
from atoll.contract.program import SiteView, handler
from atoll.contract.rounds import Reply, Round, Steps, Sum, Task, count
from atoll.contract.schema import TableSchema
from atoll.contract.sensitivity import Norms
from atoll.contract.wire import Array
from atoll.horizontal.factored import State
from atoll.horizontal.local import Local, diverged
from atoll.models.model import Model


class Personal:
    """What learners of the family do where sites end with models of their own. params: theirs."""

    params: Any
    link: Link
    personal: ClassVar[bool] = False

    def mine(self, at: Local, sent: State) -> Array:
        """A site's own weights [num_weights], when these were sent last."""
        raise NotImplementedError

    def _at(self, site: SiteView, task: Task) -> tuple[Local, State]:
        raise NotImplementedError

    def _told(self, model: Model, state: State, number: int) -> State:
        raise NotImplementedError

    def _personalised(self, model: Model, state: State, number: int) -> Steps:
        """At the coordinator: every site makes its own model of what it is told after *number* rounds."""
        if self.personal:
            sent = self._told(model, state, number)
            yield Round("personalise", Sum(), {"sites": count(bound=1)}, sent, self.link.apart)

    def _nothing(self, schema: TableSchema, sent: Mapping[str, Array]) -> Mapping[str, Norms]:
        return {"sites": Norms(0, 0)}

    @handler("personalise", record=_nothing, site=_nothing)
    def personalise(self, site: SiteView, task: Task) -> Reply:
        """At the site: it keeps a model of its own; what leaves is that it did."""
        at, sent = self._at(site, task)
        self._once_more(site)
        try:
            own = self.mine(at, sent) if len(at.examples) else None
        except ProtocolError as error:
            if error.code != diverged().code:
                raise
            own = None
        if own is None or not np.isfinite(own).all():  # what was sent is better than no model
            own = sent["weights"][: len(at.model.weights)]
        site.personal["weights"] = np.asarray(own, np.float64)
        return {"sites": 1}

    def _once_more(self, site: SiteView) -> None:
        """Raise PolicyError if the site made its model as often as the plan says: what it scores would tell of it."""
        asked, p = int(site.state.get("personalised", 0)), self.params
        if asked > ((p.rounds - 1) // p.evaluate_every if p.evaluate_every else 0):
            raise PolicyError(
                "policy.not-in-plan", "the plan does not lead to another personalised model", field="personalise",
                remedy="the coordinator does not keep the plan: do not go on with it",
            )  # fmt: skip
        site.state["personalised"] = np.array(asked + 1)
