"""A site's policy: a file the *site* owns and enforces; the coordinator cannot lift it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from atoll.contract.disclosure import TOP, Rule
from atoll.contract.errors import AtollError, PolicyError, refuse_all
from atoll.contract.plan import Plan
from atoll.contract.program import REGISTRY
from atoll.contract.settings import read_yaml, validate
from atoll.data.recipe import Prepared, texts
from atoll.data.table import not_readable
from atoll.runtime.budget import Budget

Shareable = Literal["rows", "metrics", "quality", "risk"]
DataClass = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,31}$")]
KEPT = "_withheld"
"""The class of columns that a policy withholds by name."""


class AuditRule(BaseModel):
    """Before a site trains by a plan, ``atoll site audit`` must have got at most this share of the rows attacked."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_leak_rate: float = Field(default=0.0, ge=0, le=1)


def audited(plan_hash: str) -> str:
    """Under which name a journal keeps the result of a plan's audit."""
    return f"audited {plan_hash}"


class Policy(BaseModel):
    """What a site lets happen to its data. The defaults allow as little as is useful.

    programs: names that may run here, optionally ``name@version``; ``*`` matches any text.
    purposes: values of the plan's *purpose*. protections: how a Sum may be made; ``plain``
    lets the coordinator see this site's own share and must be written to be allowed.
    min_group_size: fewest people behind any released count of people, or cell of a table.
    dominant_people, dominant_share: a cell is withheld where so few people make more than that
    share of its total. repeats: "refuse" an exact query that was asked before over rows that
    differ by fewer than min_group_size (or, under a protection, over a cohort that differs by one site).
    min_sites: fewest sites in a cohort (with two, each learns the other's share of a sum).
    share: own values that may leave un-summed. withhold: data classes (of the schema's columns) that no program may
    read, nor what a recipe makes of them; withhold_columns: the same by the columns' names (``*`` matches any text),
    whatever the schema says of them. approval: "manual" asks the operator
    about every study; roster: "manual" asks about every new identity in a cohort. max_message_bytes: larger tasks and
    releases are refused. modules: further Python modules whose programs may be loaded. models: networks of other
    packages that plans may name (``package.nets:Net``); no pattern. budgets: what a data set may cost
    (see :class:`atoll.runtime.budget.Budget`), by its name or ``*``. audit: what a plan's audit at this site must
    have shown before training (None: none is needed).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    programs: tuple[str, ...] = ("statistics.*", "horizontal.*", "trees.*")
    purposes: tuple[str, ...] = ("research",)
    protections: tuple[str, ...] = ("secagg", "paillier", "ckks")
    min_group_size: int = Field(default=5, ge=1)
    dominant_people: int = Field(default=2, ge=1, le=TOP)
    dominant_share: float = Field(default=0.85, gt=0, le=1)
    repeats: Literal["refuse", "allow"] = "refuse"
    min_sites: int = Field(default=3, ge=1)
    share: tuple[Shareable, ...] = ()
    withhold: tuple[DataClass, ...] = ()
    withhold_columns: tuple[str, ...] = ()
    approval: Literal["manual", "automatic"] = "manual"
    roster: Literal["manual", "automatic"] = "manual"
    max_message_bytes: int = Field(default=2 << 30, gt=0)
    modules: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    budgets: dict[str, Budget] = Field(default_factory=lambda: {"*": Budget()})
    audit: AuditRule | None = None

    def budget(self, dataset: str) -> Budget:
        """Of one data set: its own, else that of ``*``, else the default."""
        return self.budgets.get(dataset) or self.budgets.get("*") or Budget()

    def rule(self) -> Rule:
        """What the gate withholds."""
        return Rule(self.min_group_size, self.dominant_people, self.dominant_share)

    @staticmethod
    def load(path: Path) -> Policy:
        """Read a policy file; raises PlanError listing unknown keys and wrong values."""
        return validate(Policy, read_yaml(path, "policy"), "policy")

    @staticmethod
    def sandbox() -> Policy:
        """For trials on one's own data in one's own process: everything is allowed."""
        return Policy(
            programs=("*",), purposes=("*",), protections=("*",), min_group_size=1, min_sites=1,
            dominant_share=1.0, repeats="allow",
            share=("rows", "metrics", "quality", "risk"), approval="automatic",
            roster="automatic", budgets={"*": Budget(epsilon=None, delta=None, exact_releases=None)},
        )  # fmt: skip

    def check_plan(self, plan: Plan, num_sites: int, version: str | None = None) -> None:
        """Raise PolicyError listing everything in *plan* that this policy forbids, for a cohort of *num_sites*
        (and whether *version* of its program may run, where it is given)."""
        problems: list[AtollError] = []
        if not self._allows(self.purposes, plan.purpose):
            problems.append(_refused("policy.purpose", f"purpose {plan.purpose!r} is not allowed", "purposes"))
        if not self._allows(self.protections, plan.protection.sum):
            problems.append(
                _refused("policy.protection", f"protection {plan.protection.sum!r} is not allowed", "protections")
            )
        if num_sites < self.min_sites:
            problems.append(_refused("policy.min-sites", "the cohort has too few sites", "min_sites"))
        if plan.run.min_group_size < self.min_group_size:
            problems.append(_refused("policy.min-group-size", "the plan would report smaller groups", "min_group_size"))
        try:
            self.check_withheld(plan)
        except PolicyError as error:
            problems.append(error)
        try:
            if version is not None:
                self.check_program(plan.program, version)
        except PolicyError as error:
            problems.append(error)
        refuse_all(PolicyError, "policy.refused", problems)

    def withheld(self, plan: Plan, source: Mapping[str, str] | None = None) -> dict[str, str]:
        """Columns of *plan*'s table, from first to last step of its recipe, that no program may read, and which kind of
        data each is; *source*: as :meth:`check_withheld` says."""
        return self._withheld(plan, source)[0]

    def check_withheld(self, plan: Plan, source: Mapping[str, str] | None = None) -> dict[str, str]:
        """:meth:`withheld`. Raises PolicyError where the plan's parameters name one of them, or rows are chosen, merged
        or held out by one.

        source: where it was opened, its columns, and what it calls each. Only then is all known that cleaning
        renames: call this again before anything leaves the site.
        """
        kept, chosen = self._withheld(plan, source)
        asked = set(texts(plan.params))
        problems: list[AtollError] = [not_readable(name, kind) for name, kind in kept.items() if name in asked]
        if plan.run.holdout_by in kept:
            chosen[plan.run.holdout_by] = kept[plan.run.holdout_by]
        problems += [not_readable(name, kind, "rows would be chosen by it") for name, kind in chosen.items()]
        refuse_all(PolicyError, "policy.refused", problems)
        return kept

    def _withheld(self, plan: Plan, source: Mapping[str, str] | None) -> tuple[dict[str, str], dict[str, str]]:
        """(all withheld columns, those that steps choose rows by), and which kind of data each is."""
        if not (self.withhold or self.withhold_columns):
            return {}, {}

        def named(name: str) -> frozenset[str]:
            return frozenset({KEPT} if self._allows(self.withhold_columns, name) else ())

        found = Prepared(plan.recipe).data_classes(plan.table, named, source)
        kept, chosen = (
            {name: _kinds(told) for name, kinds in classes.items() if (told := kinds & {*self.withhold, KEPT})}
            for classes in found
        )
        return kept, chosen

    def check_audit(self, program: str, result: str) -> None:
        """Raise PolicyError unless the audit of a plan of *program*, as the journal keeps its *result*, is good enough
        for training."""
        trains = program.startswith(("horizontal.", "trees.")) or hasattr(REGISTRY.get(program), "model")
        if self.audit is None or not trains:
            return
        if not result or json.loads(result)["leak_rate"] > self.audit.max_leak_rate:
            raise PolicyError(
                "policy.audit", "the plan's audit leaks too much" if result else "the plan was not audited here",
                field="audit", remedy="the site's operator runs: atoll site audit PLAN",
            )  # fmt: skip

    def check_program(self, name: str, version: str) -> None:
        """Raise PolicyError unless program *name* in *version* may run here."""
        if not (self._allows(self.programs, name) or self._allows(self.programs, f"{name}@{version}")):
            raise _refused("policy.program", f"program {name}@{version} is not allowed", "programs")

    @staticmethod
    def _allows(patterns: tuple[str, ...], name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in patterns)


def _kinds(kinds: frozenset[str]) -> str:
    return " and ".join(sorted(kinds - {KEPT}) or ["withheld"]) + " data"


def _refused(code: str, message: str, key: str) -> PolicyError:
    return PolicyError(code, message, field=key, remedy=f"the site's operator decides: policy.yaml, {key!r}")
