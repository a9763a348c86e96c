"""How sites' changes become one: the plan's ``aggregate``, and the port of rules that withstand bad ones.

A *rule* makes one change of many. The mean needs only sums, so that every protection applies; the others need every
site's own change (``plain``), or, with ``groups``, the means of groups of sites drawn anew each round: then each group
is a sum that the plan's protection makes, single changes stay hidden, and one bad site spoils its group's mean only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator

from atoll.contract.errors import PlanError
from atoll.contract.wire import Array

MEAN = "mean"


@dataclass(frozen=True, slots=True)
class Combined:
    """values: the one change, by name. trust: how much of each update is in it, [num_updates], sums to 1 at most."""

    values: dict[str, Array]
    trust: NDArray[np.float64]


class Rule(Protocol):
    """One way to make one update of many; found by its registration under ``name``."""

    name: str

    def least(self, choice: Aggregation) -> int:
        """Fewest updates for which it keeps what it promises against ``choice.attackers`` bad ones."""

    def combine(
        self, updates: Mapping[str, Array], weights: NDArray[np.float64], choice: Aggregation, root: int | None
    ) -> Combined:
        """updates: by name, [num_updates, ...], each update's mean; "weights" is the model's change, [num_updates,
        size], by which they are judged. weights: what each site, or group, says it weighs, [num_updates]: not to be
        trusted. root: the place of the update that is trusted, if the plan names one."""


RULES: dict[str, Rule] = {}


def register(rule: Rule) -> None:
    """Make a rule known by its name."""
    RULES[rule.name] = rule


class Aggregation(BaseModel):
    """rule: "mean", or one that withstands bad sites. attackers: how many it must withstand (of groups, the bad
    groups). groups: so many sums of groups of sites instead of every site's own change. root: the site that is trusted,
    where the rule needs one. options: the rule's own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rule: str = MEAN
    attackers: int = Field(default=0, ge=0)
    groups: int | None = Field(default=None, ge=2)
    root: str = ""
    options: dict[str, Any] = Field(default_factory=dict)

    @field_validator("rule")
    @classmethod
    def _known(cls, rule: str) -> str:
        if rule != MEAN and rule not in RULES:
            raise ValueError(f"there is no rule {rule!r}; known: {', '.join(sorted([MEAN, *RULES]))}")
        return rule

    @property
    def single(self) -> bool:
        """Does it need every site's own update?"""
        return self.rule != MEAN and self.groups is None

    def combine(
        self, updates: Mapping[str, Array], weights: NDArray[np.float64], names: Sequence[str] = ()
    ) -> Combined:
        """One of many (see :class:`Rule`). names: the sites, where they are known; raises PlanError where fewer updates
        came than the rule needs, or not that of the root."""
        rule, root = RULES[self.rule], None
        if len(weights) < (least := rule.least(self)):
            raise PlanError(
                "plan.too-few-updates", f"{self.rule} against {self.attackers} needs {least} updates, and has "
                f"{len(weights)}", field="params.aggregate", remedy="ask more sites, or name fewer attackers",
            )  # fmt: skip
        if self.root:
            if self.root not in names:
                raise PlanError("plan.no-root", f"{self.root!r} is trusted, and did not answer",
                                field="params.aggregate.root", remedy="name a site that takes part")  # fmt: skip
            root = list(names).index(self.root)
        return rule.combine(updates, weights, self, root)
