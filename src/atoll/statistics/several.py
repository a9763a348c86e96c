"""Several statistics in one study: one approval, one run, one report.

Parties: sites and coordinator. Messages: those of the statistics asked for, one after another. The
coordinator learns: what each of them says it learns. Threat model: as the plan's protection, and
each program's own. Dropout: a site that is lost is missing from the statistics after it. Cost: the sum of theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from atoll.contract.errors import PlanError
from atoll.contract.program import Cohort, Program, ProgramParams, build, program
from atoll.contract.rounds import Steps
from atoll.contract.wire import Array, Json


class Asked(BaseModel):
    """One statistic: its program and that program's parameters."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    program: str = Field(pattern=r"^statistics\.")
    params: dict[str, Json] = Field(default_factory=dict)


@program("statistics.several", needs={"sum"}, offers={"bounded", "resolution", "bounded-weight"})
class Several:
    """Several statistics programs, one after another, in one study."""

    class Params(ProgramParams):
        """ask: the programs and their parameters, each program once."""

        ask: tuple[Asked, ...] = Field(min_length=1)

    def __init__(self, params: Params) -> None:
        """Raises PlanError for unknown programs, those that need more than this one, and any named twice."""
        self.params = params
        self.parts: tuple[Program, ...] = tuple(build(one.program, one.params) for one in params.ask)
        for part in self.parts:
            twice = sum(other.name == part.name for other in self.parts) > 1
            if twice or part.name == "statistics.several" or part.capabilities.needs - {"sum"}:
                raise PlanError(
                    "plan.bad-value", f"{part.name} cannot be asked for here{' twice' if twice else ''}", field="ask",
                    remedy="give it a study of its own",
                )  # fmt: skip

    def coordinate(self, cohort: Cohort, start: Mapping[str, Array] | None = None) -> Steps:
        """Returns the results of all, in one mapping."""
        for part in self.parts[1:]:  # the first is checked by being started
            check = part.coordinate(cohort)
            next(check, None)
            check.close()
        found: dict[str, Any] = {}
        for part in self.parts:
            found |= yield from part.coordinate(cohort)
        return found
