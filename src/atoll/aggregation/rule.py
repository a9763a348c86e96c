"""How sites' changes become one: the plan's ``aggregate``, and what a rule that withstands bad ones is made of.

A *rule* makes one change of many. The mean needs only sums, so that every protection applies; the others need every
site's own change (``plain``), or, with ``groups``, the means of groups of sites drawn anew each round: then each group
is a sum that the plan's protection makes, single changes stay hidden, and one bad site spoils its group's mean only.

Rules count every site alike: what a site says it weighs is not asked, so that a claim of any number of rows has no
influence. Each array of an update (the weights' change, the loss, an algorithm's extras) is combined by itself, so that
a change that looks right does not carry others that are not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from atoll.contract.errors import PlanError
from atoll.contract.updates import Update
from atoll.contract.wire import Array

MEAN = "mean"
Floats = NDArray[np.float64]


class Options(BaseModel):
    """A rule's own options: none."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


@dataclass(frozen=True, slots=True)
class Asked:
    """What the plan asks of a rule. attackers: to withstand; root: the place of the update that is trusted."""

    attackers: int
    options: Any
    root: int | None = None


@dataclass(frozen=True, slots=True)
class Rule:
    """One way to make one change of many; found by its registration.

    combine: (changes [num_updates, size], what is asked) → (one change [size], how much of each update is in it
    [num_updates], at least 0 and 1 in sum at most). least: fewest updates for which it keeps what it promises, by the
    number of attackers. rooted: does it need a trusted site?
    """

    name: str
    combine: Callable[[Floats, Asked], tuple[Floats, Floats]]
    least: Callable[[int], int]
    options: type[Options] = Options
    rooted: bool = False


RULES: dict[str, Rule] = {}


def register(rule: Rule) -> None:
    """Make a rule known by its name."""
    RULES[rule.name] = rule


@dataclass(frozen=True, slots=True)
class Combined:
    """values: the one change, by name. trust: how much of each update is in the weights' change, [num_updates], sums
    to 1 at most."""

    values: dict[str, Array]
    trust: Floats


def sound(update: Update) -> bool | None:
    """Can it be averaged? Not where nobody has rows (False), nor where it is no update at all (None): a reply may hold
    NaN, which in other programs is a metric of no rows."""
    if not update.weight >= 0 or not all(np.isfinite(value).all() for value in update.values.values()):
        return None
    return update.weight > 0


def means(updates: Sequence[Update], bounds: Mapping[str, float]) -> tuple[dict[str, Floats], list[bool]]:
    """(each update's means by name, [num_updates, ...], within *bounds*; which ones went beyond them). A weight near 0
    makes any mean of what is itself within bounds."""
    found, beyond = dict[str, Floats](), np.zeros(len(updates), bool)
    with np.errstate(over="ignore"):
        for name, bound in bounds.items():
            each = np.array([np.asarray(update.values[name], np.float64) / update.weight for update in updates])
            found[name] = np.clip(each, -bound, bound)
            beyond |= (np.abs(each) > bound * (1 + 1e-6)).any(axis=tuple(range(1, each.ndim)))
    return found, beyond.tolist()


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

    @model_validator(mode="after")
    def _fitting(self) -> Self:
        if self.rule == MEAN:
            if self.attackers or self.groups or self.root or self.options:
                raise ValueError("the mean withstands nobody: name a rule, or leave out what belongs to one")
            return self
        rule = RULES[self.rule]
        rule.options.model_validate(self.options)
        if rule.rooted != bool(self.root):
            raise ValueError(f"{rule.name} {'needs the name of a trusted site' if rule.rooted else 'trusts no site'}")
        if self.groups is not None and rule.rooted:
            raise ValueError(f"{rule.name} must see the trusted site's own change: not that of groups")
        if self.groups is not None and self.groups < self.least:
            raise ValueError(f"{rule.name} against {self.attackers} bad groups needs {self.least} groups")
        return self

    @property
    def single(self) -> bool:
        """Does it need every site's own update?"""
        return self.rule != MEAN and self.groups is None

    @property
    def least(self) -> int:
        """Fewest updates for which the rule keeps what it promises."""
        return 1 if self.rule == MEAN else RULES[self.rule].least(self.attackers)

    def check_cohort(self, sites: Sequence[str], drawn: int | None, min_sites: int) -> None:
        """Raise PlanError where rounds of *sites* (none: not known yet), or of so many *drawn* of them, cannot keep
        what the rule promises. min_sites: fewest in a sum."""
        if self.rule == MEAN:
            return
        asked = drawn or len(sites)
        if asked and asked < (self.groups or 0) * min_sites:
            raise PlanError(
                "plan.too-few-updates", f"{asked} sites do not make {self.groups} groups of {min_sites}, the fewest in "
                "a sum", field="params.aggregate.groups", remedy="make fewer groups, or ask more sites",
            )  # fmt: skip
        if asked and asked < self.least:
            raise self._too_few(asked)
        if self.root and (drawn is not None or (sites and self.root not in sites)):
            raise PlanError(
                "plan.no-root", f"{self.root!r} is trusted, and is not in every round", field="params.aggregate.root",
                remedy="name a site of the cohort, and leave out sites_per_round",
            )  # fmt: skip

    def combine(self, updates: Mapping[str, Array], names: Sequence[str]) -> Combined:
        """One of many. updates: by name, [num_updates, ...]; "weights" is the model's change. names: whose they are;
        raises PlanError where fewer updates came than the rule needs, or not that of the root."""
        if len(names) < self.least:
            raise self._too_few(len(names))
        if self.root and self.root not in names:
            raise PlanError("plan.no-root", f"{self.root!r} is trusted, and did not answer",
                            field="params.aggregate.root", remedy="bring the site back, and resume")  # fmt: skip
        rule, root = RULES[self.rule], list(names).index(self.root) if self.root else None
        asked, trust = Asked(self.attackers, rule.options.model_validate(self.options), root), np.zeros(len(names))
        values = {}
        with np.errstate(over="ignore", invalid="ignore"):
            for name, found in updates.items():
                flat = np.asarray(found, np.float64).reshape(len(names), -1)
                one, shares = rule.combine(flat, asked)
                values[name] = one.reshape(found.shape[1:])
                trust = shares if name == "weights" else trust
        return Combined(values, trust)

    def _too_few(self, number: int) -> PlanError:
        return PlanError(
            "plan.too-few-updates",
            f"{self.rule} against {self.attackers} attackers needs {self.least} updates, and gets {number}",
            field="params.aggregate", remedy="ask more sites, or name fewer attackers",
        )  # fmt: skip
