"""Capabilities: what parts of a plan need and offer, so that illegal combinations are
refused before any data is read, all conflicts listed at once.

A program, a protection (and later a compression, a robust rule …) each declare the
tags they *need* from the others and the tags they *offer*. A plan is legal when every
need is offered. No part knows another part by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from atoll.contract.errors import PlanError

MEANING = {
    "sum": "rounds that need only the sum over sites",
    "gather": "rounds in which the coordinator sees every site's reply",
    "stream": "rounds in which replies are used one by one as they arrive",
    "ready": "rounds in which sites say that they are ready, and nothing else",
    "bounded": "a declared bound on every value a site sends",
    "resolution": "a declared resolution of every value a site sends",
    "bounded-weight": "a declared bound on every site's weight",
}
REMEDY = {
    "gather": "choose another protection or program for this plan: plain lets the coordinator see single replies; or "
    "leave out the parameters that look at them (docs/plan.md says which)"
}


@dataclass(frozen=True, slots=True)
class Capabilities:
    """``name`` as shown to people; ``needs`` and ``offers`` are keys of MEANING."""

    name: str
    needs: frozenset[str] = frozenset()
    offers: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if unknown := (self.needs | self.offers) - set(MEANING):
            raise PlanError("capability.unknown", f"{self.name} declares unknown capabilities {sorted(unknown)}")


def conflicts(parts: Sequence[Capabilities]) -> list[PlanError]:
    """Every need of one part that no *other* part offers."""
    problems = []
    for part in parts:
        offered = frozenset().union(*(other.offers for other in parts if other is not part))
        others = " + ".join(other.name for other in parts if other is not part)
        for tag in sorted(part.needs - offered):
            problems.append(
                PlanError(
                    "plan.illegal-combination",
                    f"{part.name} needs {MEANING[tag]}, which {others} does not offer",
                    field=tag,
                    remedy=REMEDY.get(tag, "choose another protection or program for this plan"),
                )
            )
    return problems
