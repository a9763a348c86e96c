"""What a program asks for: a Round, the reduction it needs, and the fields it expects (see ``contract/fields.py``).

A program's coordinator half is a generator. It yields a :class:`Round` and is sent
the reduced result; it never sees a socket, a thread, a clock or a file:

    total = yield Round("moments", Sum(), {"x": real(bound=300 * rows, step=1e-6), "n": count(bound=rows)})
    mean = total["x"] / total["n"]

Also yielded: :class:`Together` (rounds at the same time), :class:`Metrics` (to be shown and stored) and
:class:`Checkpoint` (so that earlier reductions can be forgotten; it is sent ``None``).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from atoll.contract.errors import ProtocolError
from atoll.contract.fields import Field as Field
from atoll.contract.fields import count as count
from atoll.contract.fields import opaque as opaque
from atoll.contract.fields import real as real
from atoll.contract.fields import withheld as withheld
from atoll.contract.wire import Array, Json

# ---------------------------------------------------------------- reductions


@dataclass(frozen=True, slots=True)
class Sum:
    """The coordinator learns only the sum over the cohort, and who took part. lenient: where it fails, by a site that
    does not keep the protocol or by dropouts, it is of nobody (no arrays, no sites) instead of failing the run."""

    lenient: bool = False
    tag: Literal["sum"] = "sum"


@dataclass(frozen=True, slots=True)
class Gather:
    """The coordinator learns every site's reply. lenient: a site that fails, or whose reply is not what the round
    declares, is left out of it instead of failing the run, while others are enough; for who withstands bad sites."""

    lenient: bool = False
    tag: Literal["gather"] = "gather"


@dataclass(frozen=True, slots=True)
class Stream:
    """The coordinator is sent one reply: the next to arrive of all that are in flight.

    Each Stream round dispatches its task to ``sites`` (perhaps none) and then waits for
    one arrival, so a program keeps sites busy by re-dispatching to whoever just answered.
    Arrival order is stored, so that it can be replayed.
    """

    tag: Literal["stream"] = "stream"


@dataclass(frozen=True, slots=True)
class Ready:
    """The coordinator is told which site is ready next, and nothing else: a Stream whose replies have no fields.

    What the site computed stays in its state until a later round asks for it.
    """

    tag: Literal["ready"] = "ready"


Reduction = Sum | Gather | Stream | Ready


@dataclass(frozen=True, slots=True)
class Summed(Mapping[str, Array]):
    """Result of Sum: arrays by field name, and the sites whose replies are in it. behind: how many sites these stand
    for, where some are regions. cohort: the sites that it was to be among, where these were some of the run's."""

    arrays: dict[str, Array]
    sites: tuple[str, ...]
    behind: int = 0
    cohort: tuple[str, ...] | None = None

    @property
    def members(self) -> int:
        """How many sites are in it."""
        return self.behind or len(self.sites)

    def __getitem__(self, name: str) -> Array:
        return self.arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)


@dataclass(frozen=True, slots=True)
class Gathered(Mapping[str, Mapping[str, Array]]):
    """Result of Gather: each site's arrays. Sites that refused or dropped out are absent. broken: of those that a
    lenient one left out, the code of what was wrong."""

    replies: dict[str, dict[str, Array]]
    broken: dict[str, str] = field(default_factory=dict)

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that replied, in cohort order."""
        return tuple(self.replies)

    def __getitem__(self, site: str) -> Mapping[str, Array]:
        return self.replies[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self.replies)

    def __len__(self) -> int:
        return len(self.replies)


@dataclass(frozen=True, slots=True)
class Arrival:
    """Result of Stream, and of Ready (no values): one site's reply, and the round that asked for it."""

    site: str
    asked_round: int
    values: dict[str, Array]


Reduced = Summed | Gathered | Arrival

# ---------------------------------------------------------------- what is yielded


@dataclass(frozen=True, slots=True)
class Round:
    """One request to the cohort.

    name: the site handler's name.
    reduce: the reduction the program needs.
    reply: the fields every site must answer with, and no others.
    send: arrays (or scalars) broadcast to all sites; *send_to*: extras for single sites.
    sites: the subset asked (default: the whole cohort). among: its sum is one among these alone, as of a draw or a
    group, and no survivors of the whole cohort are waited for (the program's ``fewest`` says how few these may be).
    draw: so many of these, whom the plan's schedule chooses.
    paced: a slow site may do less in it, where the plan's schedule says so (it is sent its "effort" in (0, 1]).
    optional: a site whose policy withholds this is left out instead of failing the run.
    program, params, stage, view, schema: filled in by the runtime (who handles it, on which view of which schema).
    """

    name: str
    reduce: Reduction
    reply: Mapping[str, Field]
    send: Mapping[str, Any] = field(default_factory=dict)
    send_to: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    sites: tuple[str, ...] | None = None
    among: bool = False
    draw: int | None = None
    paced: bool = False
    optional: bool = False
    program: str = ""
    params: Mapping[str, Json] = field(default_factory=dict)
    stage: str = ""
    view: Mapping[str, Json] = field(default_factory=dict)
    schema: Any = None


APART = "apart: "
"""Marks, in ``send_to``, arrays in which sites may differ though they are asked the same: ways to one thing whose
digest is among what all are sent, and which a handler checks. They are no part of a round's question."""


def alike(sent: Mapping[str, Any]) -> dict[str, Any]:
    """What of a round's arrays all sites are sent alike."""
    return {name: value for name, value in sent.items() if not name.startswith(APART)}


@dataclass(frozen=True, slots=True)
class Together:
    """Rounds that are asked at the same time; answered by the tuple of their results, in the same order."""

    rounds: tuple[Round, ...]


@dataclass(frozen=True, slots=True)
class Metrics:
    """Numbers worth showing while the program runs: stored with the run, plotted in the report. Answered by whether
    the plan's schedule wants the program to come to its end now: its time or its traffic is used up; by None where
    rounds are only counted: then it goes on to its last round, whatever the numbers are."""

    step: int
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A state from which ``coordinate(cohort, start=state)`` can go on."""

    state: Mapping[str, Array]


Yielded = Round | Together | Metrics | Checkpoint
Steps = Generator[Yielded, Any, Any]

# ---------------------------------------------------------------- tasks


@dataclass(frozen=True, slots=True)
class TaskId:
    """Names one request to one site; it enters every ledger entry, signature and key label.

    run: 128-bit random hex. attempt: of the round, counted up when a round is asked anew.
    step: the protection's exchange within the round ("reply" for plain).
    """

    run: str
    round: int
    attempt: int
    step: str
    site: str

    def __str__(self) -> str:
        return f"{self.run}/{self.round}/{self.attempt}/{self.step}/{self.site}"

    def to_json(self) -> dict[str, Json]:
        return {"run": self.run, "round": self.round, "attempt": self.attempt, "step": self.step, "site": self.site}

    @staticmethod
    def from_json(meta: Mapping[str, Json]) -> TaskId:
        """From a message's meta; raises ProtocolError when a part is missing or of the wrong type."""
        match meta:
            case {"run": str(run), "round": int(n), "attempt": int(attempt), "step": str(step), "site": str(site)}:
                if type(n) is int and type(attempt) is int and n >= 0 and attempt >= 0:
                    return TaskId(run, n, attempt, step, site)
        raise ProtocolError("task.malformed", "a message does not say which task it belongs to")


class Secret(Protocol):
    """Random bytes that nobody outside the site can know."""

    def bytes(self, size: int) -> bytes: ...


def _no_secret(_: str) -> Secret:
    raise ProtocolError("task.no-secret", "this task has no secret randomness")


def not_taken(name: str) -> ProtocolError:
    """The one error for a task's array that is not what its handler takes."""
    return ProtocolError("task.array", "a task's array is not what the handler takes", field=name)


def taken(sent: Mapping[str, Array], name: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """What was sent under *name*: finite reals of exactly *shape*, as float64.

    A handler takes nothing else: an array of another shape would be broadcast, and a sum over
    rows become row by row. Raises ProtocolError.
    """
    array = sent.get(name)
    real = array is not None and array.dtype in (np.float64, np.float32)
    if array is None or not real or array.shape != shape or not np.isfinite(array).all():
        raise not_taken(name)
    return array.astype(np.float64, copy=False)


@dataclass(frozen=True, slots=True)
class Task:
    """One site's request, as its handler sees it. secret(label): random bytes for sampling in secret, one stream for
    each label; the same when the round is asked again."""

    id: TaskId
    arrays: Mapping[str, Array]
    seed: tuple[int, ...]
    secret: Callable[[str], Secret] = _no_secret

    def take(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
        """As :func:`taken`, of what was sent with the task."""
        return taken(self.arrays, name, shape)

    def shuffler(self) -> np.random.Generator:
        """Randomness for shuffling rows: a function of (plan seed, site, round) alone, so that
        every transport gives the same bits. Never for keys, masks or privacy noise."""
        return np.random.Generator(np.random.Philox(np.random.SeedSequence(self.seed)))


Reply = Mapping[str, Any]
"""What a handler returns: one value per declared field (arrays, or scalars)."""
