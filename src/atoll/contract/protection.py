"""Protections: how a Sum is made. The plan's choice, never the program's.

A protection is sans-IO, as programs are. Its coordinator half is a generator that turns
one Round into exchanges with sites and finally returns the sum; the driver merely
carries them. Its site half turns a handler's checked, bounded reply into what leaves.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from atoll.contract.capabilities import Capabilities
from atoll.contract.errors import PlanError
from atoll.contract.rounds import Field, Round, Summed
from atoll.contract.wire import Array


class Received(Protocol):
    """A verified reply, perhaps spooled to disk."""

    def array(self, name: str) -> Array:
        """One whole array (read-only)."""

    def pieces(self, name: str) -> Iterator[tuple[int, Array]]:
        """One array in flat pieces: (offset in elements, piece), so that it need not fit in memory."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request to *sites* within a round. step "reply" runs the program's handler."""

    step: str
    sites: tuple[str, ...]
    fields: Mapping[str, Field]
    send: Mapping[str, Any] = field(default_factory=dict)


Replies = Mapping[str, Received]
"""Verified replies by site, in cohort order; sites that dropped out are absent."""


class Protection(Protocol):
    """One way to make a Sum; found by its registration under ``name``."""

    name: str
    capabilities: Capabilities
    reveals: bool
    """Does the coordinator see each site's share? Then the site's gate applies disclosure control to it."""

    def combine(self, asked: Round, sites: Sequence[str]) -> Generator[Exchange, Replies, Summed]:
        """Coordinator half: yields exchanges, is sent the replies, returns the sum."""

    def protect(self, step: str, arrays: dict[str, Array], fields: Mapping[str, Field]) -> dict[str, Array]:
        """Site half: what leaves instead of *arrays* (declared *fields*, checked and clipped)."""


PROTECTIONS: dict[str, Protection] = {}


def register(protection: Protection) -> None:
    """Make a protection known by its name."""
    PROTECTIONS[protection.name] = protection


def find(name: str) -> Protection:
    """The protection *name*; raises PlanError when it is unknown or was left out."""
    if not name:
        raise PlanError(
            "plan.no-protection",
            "the plan names no protection",
            field="protection",
            remedy=f"write one of: {', '.join(sorted(PROTECTIONS))}",
        )
    if name not in PROTECTIONS:
        raise PlanError(
            "plan.unknown-protection",
            f"there is no protection {name!r}",
            field="protection",
            remedy=f"known: {', '.join(sorted(PROTECTIONS))}",
        )
    return PROTECTIONS[name]
