"""Contribution weights: FedAvg in which a site counts by its rows, their quality, and what was learned of them.

Each site finds its own weight, w = min(rows^volume · quality^quality · skill^accuracy, max_rows^volume), so that one
Sum of (w · change, w) is enough, under any protection. Quality is the score of ``statistics/quality.py`` that a site
can give itself: completeness, uniqueness, plausibility. Skill is by how much the model, as the site's own training left
it, knows more than a guess of rows that the site holds back from training: where labels are wrong, nothing can be
learned that holds for other rows, and the weight is small; where a site merely has other classes than most, it is not.

Parties: sites and coordinator. Messages: as in FedAvg. The coordinator learns the weighted mean change and the sum of
the weights in each round; under ``plain`` each site's weight too, which tells of its quality and skill. Threat model:
as in FedAvg; a site says itself what it weighs, but no more than max_rows^volume. Dropout: as in FedAvg. Cost: as in
FedAvg, and at a site one pass over its held-back rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from pydantic import Field, model_validator

from atoll.contract.program import SiteView, TableView, program
from atoll.contract.rounds import Task
from atoll.contract.schema import TableSchema
from atoll.contract.wire import Array
from atoll.horizontal.fedavg import FedAvg
from atoll.horizontal.federated import OFFERS, FederatedParams, State
from atoll.horizontal.local import Local
from atoll.horizontal.validation import Parts, skill
from atoll.statistics.own_quality import FLOOR, own_quality


class WeightedParams(FederatedParams):
    """volume, quality, accuracy: exponents of the three parts of a site's weight; 0: the part does not count.
    validation: share of a site's training rows that it judges by, and does not train on."""

    volume: float = Field(default=1.0, ge=0, le=2)
    quality: float = Field(default=1.0, ge=0, le=10)
    accuracy: float = Field(default=2.0, ge=0, le=10)
    validation: float = Field(default=0.2, gt=0, lt=1)

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.weighting != "rows":
            raise ValueError("volume says how rows count: 0 is every site alike; leave weighting out")
        return self


@dataclass(frozen=True, slots=True)
class Judged(Local):
    """A site in one round, and what it holds back. found: its skill, once it trained."""

    parts: Parts | None = None
    found: dict[str, float] = field(default_factory=dict)


@program("horizontal.weighted", needs={"sum"}, offers=OFFERS)
class Weighted(FedAvg):
    """FedAvg with weights from data volume, data quality and accuracy, which sites find themselves."""

    Params = WeightedParams

    def __init__(self, params: WeightedParams) -> None:
        super().__init__(params)
        self._seen: tuple[TableView, Parts, float] | None = None

    def local(self, at: Local, sent: State) -> Mapping[str, Any]:
        """FedAvg's round on the rows that are not held back; then the skill on those that are."""
        found = super().local(at, sent)
        if isinstance(at, Judged) and at.parts is not None and self.params.accuracy:
            trained = at.model.with_weights(np.asarray(sent["weights"] + found["weights"], np.float64))
            at.found["skill"] = skill(trained, at.parts.rows)
        return found

    def weight(self, at: Local, sent: State, means: Mapping[str, Array]) -> float:
        """rows^volume · quality^quality · skill^accuracy, each share FLOOR at the least."""
        p = self.params
        _, _, quality = self._about(at.site)
        known = max(at.found.get("skill", 0.0), FLOOR) if isinstance(at, Judged) and p.accuracy else 1.0
        found: float = len(at.examples) ** p.volume * quality**p.quality * known**p.accuracy
        return min(found, self._most(at.site.table.schema))

    def _most(self, schema: TableSchema) -> float:
        most: float = schema.max_rows**self.params.volume
        return most

    def _at(self, site: SiteView, task: Task) -> tuple[Local, State]:
        at, sent = super()._at(site, task)
        _, parts, _ = self._about(site)
        training = at.examples.take(parts.kept)
        return Judged(at.params, at.model, training, site, task, at.fixed, parts), sent

    def _about(self, site: SiteView) -> tuple[TableView, Parts, float]:
        """The site's rows, how they are parted, and their quality: found once."""
        if self._seen is None or self._seen[0] is not site.table:
            quality = own_quality(site.table) if self.params.quality else 1.0
            self._seen = site.table, Parts.of(site.table, site.name, self.params.validation), quality
        return self._seen
