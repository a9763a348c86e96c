"""A task between a site's checks and its gate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from atoll.contract.program import Program
from atoll.contract.protection import Protection
from atoll.contract.rounds import Reply
from atoll.contract.wire import Array, Message
from atoll.runtime.egress import Cost, Request
from atoll.runtime.opened import Opened
from atoll.runtime.party import Own


@dataclass(frozen=True, slots=True)
class Job:
    """A task that asks for a handler's reply, as far as it was checked. sent: the round's arrays; told: as far as the
    plan lets them be. question: their digest, with what else is asked. state: the program's, before it."""

    opened: Opened
    program: Program
    message: Message
    sent: Mapping[str, Array]
    told: Mapping[str, Array]
    question: str
    protection: Protection
    party: Own
    state: dict[str, Array]


@dataclass(frozen=True, slots=True)
class Done:
    """A reply, before the gate: what it is judged as, what it costs, and the program's state (None: as it was)."""

    asked: Request
    reply: Reply
    cost: Cost
    state: Mapping[str, Array] | None = None
