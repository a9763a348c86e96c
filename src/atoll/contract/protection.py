"""Protections: how a Sum is made. The plan's choice, never the program's.

A protection is sans-IO, as programs are. Its coordinator half is a generator that turns
one Round into exchanges with sites and finally returns the sum; the driver merely
carries them. Its site half answers each exchange; in step "reply" it turns a handler's
checked, bounded reply into what leaves. What a site must remember from one exchange to
the next is saved with the release that led to it.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict
from pydantic import Field as Option

from atoll.contract.capabilities import Capabilities
from atoll.contract.errors import PlanError
from atoll.contract.rounds import Field, Round, Summed
from atoll.contract.wire import Array

REPLY = "reply"
"""The step in which the program's handler answers; every protection has exactly one."""


class Choice(BaseModel):
    """A plan's ``protection``: a name alone, or with options.

    sum: the protection's name. adversary: "curious" (a coordinator that follows the protocol and looks), or "active"
    (one that does not: a higher threshold). key_holder: the site that can decrypt (default: the first by name).
    key_bits: of its Paillier modulus.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    sum: str = ""
    adversary: Literal["curious", "active"] = "curious"
    key_holder: str = ""
    key_bits: int = Option(default=3072, ge=2048, le=8192, multiple_of=16)


@dataclass(frozen=True, slots=True)
class Terms:
    """What all parties agree on before a round; it enters every key's label and every signature.

    roster: the run's public identity keys (raw) by site, ordered by name. agreed: digest of the run's plan and
    roster: a site that was told another plan makes other keys, and is in no sum. cohort: the sites among whose
    replies the sum is made, ordered by name: all of the roster, where a round is not one of some. attempt:
    how often the coordinator began the round anew. min_sites: fewest whose sum the plan accepts. question: digest of
    what the program asks in this round, the same of every site: else one site's reply could be added to known ones.
    """

    run: str
    round: int
    attempt: int
    roster: Mapping[str, bytes]
    agreed: str
    min_sites: int
    choice: Choice
    question: str = ""
    some: tuple[str, ...] | None = None

    @property
    def cohort(self) -> tuple[str, ...]:
        """See above."""
        return tuple(self.roster) if self.some is None else self.some

    def label(self, *parts: str | int) -> tuple[str | int, ...]:
        """Names one purpose within this attempt at this round of this cohort, and its question, of this run by this
        plan among this roster."""
        some = () if self.some is None else ("of", str(len(self.some)), *self.some)
        return (self.run, self.agreed, self.round, self.attempt, self.question, *some, *parts)


class Received(Protocol):
    """A verified reply, perhaps spooled to disk."""

    def array(self, name: str) -> Array:
        """One whole array (read-only)."""

    def pieces(self, name: str) -> Iterator[tuple[int, Array]]:
        """One array in flat pieces: (offset in elements, piece), so that it need not fit in memory."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request to *sites* within a round. send: to all of them; send_to: extras for single sites.

    Fields are what must come back. Step "reply" runs the program's handler, and carries the round's own arrays.
    """

    step: str
    sites: tuple[str, ...]
    fields: Mapping[str, Field]
    send: Mapping[str, Any] = field(default_factory=dict)
    send_to: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


OWN = "protection: "
"""Marks, in a task's message, the arrays of an exchange; the others are the round's."""


def parted(arrays: Mapping[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
    """A task's arrays as (those of the round, those of the exchange)."""
    own = {name.removeprefix(OWN): value for name, value in arrays.items() if name.startswith(OWN)}
    return {name: value for name, value in arrays.items() if not name.startswith(OWN)}, own


Replies = Mapping[str, Received]
"""Verified replies by site, in cohort order; sites that dropped out are absent."""


class SessionKey(Protocol):
    """A site's key for one run (see ``crypto.session``)."""

    public: bytes

    def pair(self, other: bytes, *purpose: str | int | bytes) -> bytes: ...

    def seal(self, receiver: bytes, about: bytes, data: bytes) -> bytes: ...

    def unseal(self, sender: bytes, about: bytes, sealed: bytes) -> bytes: ...


class Party(Protocol):
    """What the site half of a protection may use."""

    @property
    def name(self) -> str: ...

    @property
    def terms(self) -> Terms: ...

    @property
    def session(self) -> SessionKey: ...

    @property
    def sent(self) -> Mapping[str, Array]:
        """The arrays that came with the exchange: untrusted."""

    @property
    def state(self) -> dict[str, Array]:
        """What this protection remembers in this run; saved with the release that it leads to."""

    def sign(self, data: bytes) -> bytes:
        """By the site's identity. Callers prefix a context of their own."""

    def commit(self, survivors: Sequence[str]) -> None:
        """Bind the site to one set of sites whose sum may be told of what it last replied. Raises PolicyError where
        they are too few for its policy, and DisclosureError where the same was told of nearly the same sites."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What one Sum costs one site: seconds of one core, bytes sent and got, and round trips."""

    seconds: float
    bytes: int
    trips: int


class Protection(Protocol):
    """One way to make a Sum; found by its registration under ``name``."""

    name: str
    reveals: bool
    """Does the coordinator see each site's share? Then the site's gate applies disclosure control to it."""
    attempts: bool
    """Has it several exchanges? Then a coordinator that lost its place begins the round as a new attempt."""

    @property
    def capabilities(self) -> Capabilities:
        """What it needs and offers; raises PlanError where an optional package that it needs is missing."""

    def combine(
        self, asked: Round, sites: Sequence[str], terms: Terms, sessions: Mapping[str, bytes]
    ) -> Generator[Exchange, Replies, Summed]:
        """Coordinator half: yields exchanges, is sent the replies, returns the sum. sessions: the sites' signed
        session keys."""

    def answer(self, step: str, party: Party, reply: dict[str, Array], fields: Mapping[str, Field]) -> dict[str, Array]:
        """Site half: what leaves in *step*. reply: in step "reply", what the handler answered to the round's
        *fields*, checked and clipped; else empty."""

    def estimate(self, fields: Mapping[str, Field], num_sites: int, choice: Choice) -> Estimate:
        """About what a Sum of *fields* over *num_sites* costs, by speeds measured here and now."""


PROTECTIONS: dict[str, Protection] = {}


def register(protection: Protection) -> None:
    """Make a protection known by its name."""
    PROTECTIONS[protection.name] = protection


def find(name: str) -> Protection:
    """The protection *name*; raises PlanError when it is unknown."""
    if name not in PROTECTIONS:
        raise PlanError(
            "plan.unknown-protection",
            f"there is no protection {name!r}",
            field="protection",
            remedy=f"known: {', '.join(sorted(PROTECTIONS))}",
        )
    return PROTECTIONS[name]
