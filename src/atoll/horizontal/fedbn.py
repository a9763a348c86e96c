"""FedBN: normalisation layers stay at the sites, whose inputs look different (scanners, cities, sensors).

Source: Li et al. 2021, FedBN: Federated Learning on Non-IID Features via Local Batch Normalization (ICLR), Algorithm 1.
What stays are scales, offsets and the running means and variances.

Parties: sites and coordinator. Messages: as in FedPer, with normalisation layers for personal ones. What the
coordinator learns: as in FedPer. Dropout: as in FedPer. Cost: as in FedPer.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from atoll.contract.errors import PlanError
from atoll.contract.program import program
from atoll.horizontal.federated import OFFERS, FederatedParams
from atoll.horizontal.fedper import FedPer
from atoll.horizontal.local import layers_of
from atoll.models.model import Model


class FedBNParams(FederatedParams):
    """As FedAvg's."""


@program("horizontal.fedbn", needs={"sum"}, offers=OFFERS)
class FedBN(FedPer):
    """FedAvg whose sites keep their normalisation layers."""

    Params = FedBNParams

    def stays(self, model: Model) -> NDArray[np.bool_]:
        """The normalisation layers; raises PlanError where there are none."""
        if not model.normalisations:
            raise PlanError(
                "model.no-normalisation", "the model has no normalisation layer that could stay at a site",
                field="params.model", remedy="use a network with norm: batch, or horizontal.fedper",
            )  # fmt: skip
        return layers_of(model, model.normalisations)
