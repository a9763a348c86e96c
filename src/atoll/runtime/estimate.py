"""What a plan would cost a site under each protection, before anyone is asked to join.

The study is run dry to find its sums; each protection says what these cost. Round trips and transfers are reckoned
for the link that is named; computing, at this machine's speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from atoll.contract.capabilities import conflicts
from atoll.contract.errors import AtollError
from atoll.contract.plan import Plan
from atoll.contract.privacy import Privacy
from atoll.contract.program import build
from atoll.contract.protection import PROTECTIONS
from atoll.contract.rounds import Round, Sum
from atoll.runtime.noise import dry

LINK_BYTES_S = 100e6 / 8
TRIP_S = 0.01
LINK = "100 Mbit/s and 10 ms a round trip"


@dataclass(frozen=True, slots=True)
class Cost:
    """One protection for one plan. seconds, bytes: of one site; refused: why it cannot be."""

    protection: str
    seconds: float = 0.0
    bytes: int = 0
    refused: str = ""


def costs(plan: Plan, num_sites: int) -> list[Cost]:
    """Every protection's, cheapest first; those that cannot be, last."""
    noised = Privacy(unit="site", epsilon=1, delta=1e-6)  # then how many rounds there are does not depend on sums
    rounds, _ = dry(plan.model_copy(update={"privacy": noised}))
    if not rounds:  # a plan that may end early has no noise before its evaluation
        unscored = plan.run.model_copy(update={"evaluate": False})
        rounds, _ = dry(plan.model_copy(update={"privacy": noised, "run": unscored}))
    sums = [asked for asked in rounds if isinstance(asked.reduce, Sum)]
    found = [_cost(plan, name, sums, num_sites) for name in PROTECTIONS]
    return sorted(found, key=lambda cost: (bool(cost.refused), cost.seconds))


def recommended(found: Sequence[Cost]) -> str:
    """The quickest that hides a site's share; "" if none can."""
    hiding = [cost.protection for cost in found if not cost.refused and not PROTECTIONS[cost.protection].reveals]
    return hiding[0] if hiding else ""


def _cost(plan: Plan, name: str, sums: Sequence[Round], num_sites: int) -> Cost:
    protection, seconds, size = PROTECTIONS[name], 0.0, 0
    try:
        if problems := conflicts([build(plan.program, plan.params).capabilities, protection.capabilities]):
            raise problems[0]
        for asked in sums:
            one = protection.estimate(asked.reply, num_sites, plan.protection)
            seconds += one.seconds + one.trips * TRIP_S + one.bytes / LINK_BYTES_S
            size += one.bytes
    except AtollError as error:
        return Cost(name, refused=error.message)
    return Cost(name, seconds, size)
