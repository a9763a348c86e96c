"""FedRep: a site first fits its head to the shared body, then improves the body under that head.

Source: Collins et al. 2021, Exploiting Shared Representations for Personalized Federated Learning (ICML), Algorithm 1.
Unlike in FedPer, many steps are spent on the head, which is small, for every few on the body.

Parties: sites and coordinator. Messages: as in FedPer. What the coordinator learns: as in FedPer. Dropout: as in
FedPer. Cost: as in FedPer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from atoll.contract.program import program
from atoll.contract.wire import Array
from atoll.horizontal.federated import OFFERS, State
from atoll.horizontal.fedper import FedPer, FedPerParams
from atoll.horizontal.local import Local, Trained


class FedRepParams(FedPerParams):
    """head_epochs: passes over a site's rows in which only the personal layers learn; local_epochs (or local_steps) are
    the body's."""

    head_epochs: int = Field(default=10, ge=1)


@program("horizontal.fedrep", needs={"sum"}, offers=OFFERS)
class FedRep(FedPer):
    """FedPer whose sites fit their head before they change the body."""

    Params = FedRepParams

    def local(self, at: Local, sent: State) -> Mapping[str, Any]:
        """The head by head_epochs under the body that was sent; then the body by a round of SGD under that head."""
        start, own = self.whole(at, sent), self.stays(at.model)
        done = at.sgd(self._headed(at, start).weights, fixed=own)
        at.site.state["own"] = done.weights[own]
        return {"weights": done.weights - start, "loss": done.loss}

    def mine(self, at: Local, sent: State) -> Array:
        """The final body, and the head fitted to it."""
        return self._headed(at, self.whole(at, sent)).weights

    def _headed(self, at: Local, start: Array) -> Trained:
        return at.sgd(start, steps=at.passes(self.params.head_epochs), fixed=~self.stays(at.model), part=1)
