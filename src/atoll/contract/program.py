"""Programs: one federated computation, both halves in one file, found by its name.

    @program("federated_mean", needs={"sum"}, offers={"bounded", "resolution"})
    class FederatedMean:
        class Params(ProgramParams):
            column: str

        def __init__(self, params): self.params = params

        def coordinate(self, cohort, start=None):        # generator: no I/O
            rows = cohort.schema.max_rows                # bounds are for what one site sends: a sum
            fields = {"x": real(bound=300 * rows, step=1e-6), "n": count(bound=rows)}
            total = yield Round("moments", Sum(), fields)
            return {"mean": float(total["x"] / total["n"])}

        @handler("moments")
        def moments(self, site, task):                   # runs at the site
            return {"x": site.table[self.params.column].sum(), "n": len(site.table)}

Programs compose with ``yield from OtherProgram(params).coordinate(cohort)``.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from atoll.contract.capabilities import Capabilities
from atoll.contract.disclosure import Cells
from atoll.contract.errors import PlanError, ProtocolError
from atoll.contract.mail import Mail
from atoll.contract.rounds import Reply, Round, Steps, Task, Together, Yielded
from atoll.contract.schema import TableSchema
from atoll.contract.sensitivity import Record
from atoll.contract.settings import validate
from atoll.contract.wire import Array, Json


class ProgramParams(BaseModel):
    """Base of every program's parameters: frozen, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TableView(Protocol):
    """A prepared table as a handler sees it. Numeric columns are float64, NaN where missing."""

    @property
    def schema(self) -> TableSchema:
        """The prepared table's schema."""

    @property
    def dropped(self) -> Mapping[str, int]:
        """Rows that preparation left out, by reason."""

    @property
    def achieved(self) -> Mapping[str, int]:
        """The "k" and "l" of the table's anonymity, where the recipe made it anonymous."""

    def __len__(self) -> int: ...

    def __getitem__(self, name: str) -> NDArray[Any]:
        """One column, [num_rows]; raises SchemaError if there is none of that name."""

    def codes(self, name: str) -> NDArray[np.int32]:
        """A column with a code list as indices into the schema's *values*, [num_rows], −1 where missing;
        raises SchemaError if the schema lists no values for it."""

    def batches(self, names: tuple[str, ...], size: int = 65_536) -> Iterator[NDArray[Any]]:
        """Numeric columns *names* as float64 matrices [≤ size, len(names)], in row order."""


class SiteView(Protocol):
    """What a handler may touch at its site: nothing else is reachable."""

    @property
    def name(self) -> str:
        """The site's name."""

    @property
    def table(self) -> TableView:
        """Training rows (all rows when nothing is held out)."""

    @property
    def holdout(self) -> TableView:
        """Rows kept for evaluation."""

    @property
    def state(self) -> dict[str, Array]:
        """Per-run state of this program, saved together with the release it led to."""

    @property
    def personal(self) -> dict[str, Array]:
        """The run's model as this site has it for itself ("weights"), where a program personalises it: shared by the
        run's programs, kept at the site when the run has ended, and never sent."""

    @property
    def mail(self) -> Mail:
        """Sealed envelopes to and from other sites of the run."""

    @property
    def min_group_size(self) -> int:
        """Fewest people behind a number of this site alone that others see; 1 where they see only sums."""

    def progress(self, done: float, total: float) -> None:
        """Tell that work goes on (it extends the deadline) and stop here if the run was cancelled."""

    def shares(self, what: str) -> bool:
        """Whether the site's policy lets its own value of *what* ("rows", "metrics") out un-summed."""


@dataclass(frozen=True, slots=True)
class Cohort:
    """The coordinator half's view of a run: who takes part, the prepared tables' schema, and the fewest
    people that the plan lets it report in one cell. exact: sums come without noise; else counts may be off,
    squares less than they should be, and matrices not positive definite: report what can be, and fail at nothing."""

    sites: tuple[str, ...]
    schema: TableSchema
    seed: int = 0
    min_group_size: int = 1
    exact: bool = True


class Program(Protocol):
    """What ``@program`` makes sure of."""

    name: str
    version: str
    capabilities: Capabilities
    calls: frozenset[str]
    parts: tuple[Program, ...]
    params: Any

    def coordinate(self, cohort: Cohort, start: Mapping[str, Array] | None = None) -> Steps: ...

    def fewest(self, num_sites: int) -> int:
        """Of a cohort of so many, the fewest among whom one of its sums is made; sites refuse a narrower one."""


@dataclass(frozen=True, slots=True)
class Handler:
    """A site handler as its own code declares it; a coordinator cannot ask for it in another way.

    reduce: the reduction its replies are meant for. groups: reply fields that count people, to
    each element of which the site's minimum group size applies: one that is too small stops the release.
    cells: tables of the reply whose single cells are withheld instead. record: by how much one record can
    change the reply; None where that is not bounded, so that no noise hides a record. site: the same for a whole
    site; None: by the fields' bounds. impersonal: its replies tell nothing of single rows, so that they may be asked
    for again over rows that differ by a few. period: the sent array that names the closed period (such as a day) that
    its replies are about: each period is a question of its own, and is answered again over the very same rows only.
    """

    answer: Callable[[Any, SiteView, Task], Reply]
    reduce: str
    groups: frozenset[str]
    cells: tuple[Cells, ...] = ()
    record: Record | None = None
    site: Record | None = None
    impersonal: bool = False
    period: str = ""


REGISTRY: dict[str, type[Any]] = {}
C = TypeVar("C", bound=type[Any])
H = TypeVar("H", bound=Callable[..., Any])


def relay(steps: Steps, stamp: Callable[[Round], Round]) -> Steps:
    """Run *steps*, passing every Round through *stamp* on its way out."""
    value: Any = None
    while True:
        try:
            item: Yielded = steps.send(value)
        except StopIteration as stop:
            return stop.value
        if isinstance(item, Together):
            item = Together(tuple(stamp(asked) for asked in item.rounds))
        value = yield stamp(item) if isinstance(item, Round) else item


def resumed(steps: Generator[Any, Any, Any], value: Any) -> tuple[bool, Any]:
    """Send a generator *value*: (False, what it yields), or (True, what it returns)."""
    try:
        return False, steps.send(value)
    except StopIteration as stop:
        return True, stop.value


def handler(
    name: str,
    *,
    reduce: Literal["sum", "gather", "stream", "ready"] = "sum",
    groups: tuple[str, ...] = (),
    cells: Cells | tuple[Cells, ...] = (),
    record: Record | None = None,
    site: Record | None = None,
    impersonal: bool = False,
    period: str = "",
) -> Callable[[H], H]:
    """Mark a method as the site's answer to rounds called *name* (see :class:`Handler`)."""

    tables = (cells,) if isinstance(cells, Cells) else cells

    def mark(method: H) -> H:
        declared = Handler(method, reduce, frozenset(groups), tables, record, site, impersonal, period)
        method.__dict__["__atoll_handler__"] = (name, declared)
        return method

    return mark


def program(
    name: str,
    *,
    version: str = "1",
    needs: set[str] | None = None,
    offers: set[str] | None = None,
    calls: set[str] | None = None,
) -> Callable[[C], C]:
    """Register a class as the program *name*.

    needs: reductions it yields ("sum", "gather", "stream", "ready") and anything else it requires of
    the protection; offers: what it guarantees ("bounded", "resolution", "bounded-weight").
    calls: programs it runs by ``yield from``; sites answer no others within a study of it. (One that knows
    before it runs which programs, with which parameters, lists them built as ``self.parts`` instead.)
    """

    def register(cls: C) -> C:
        parts = [part for base in reversed(cls.__mro__) for part in vars(base).values()]
        handlers = dict(part.__atoll_handler__ for part in parts if hasattr(part, "__atoll_handler__"))
        inner = cls.coordinate

        def coordinate(self: Any, cohort: Cohort, start: Mapping[str, Array] | None = None) -> Steps:
            params = self.params.model_dump(mode="json")

            def stamp(asked: Round) -> Round:
                return asked if asked.program else replace(asked, program=self.name, params=params)

            result = yield from relay(inner(self, cohort, start), stamp)
            return result

        coordinate.__doc__ = inner.__doc__
        cls.coordinate = coordinate
        cls.name, cls.version, cls.handlers, cls.calls = name, version, handlers, frozenset(calls or ())
        cls.parts = ()
        cls.declared = Capabilities(name, frozenset(needs or {"sum"}), frozenset(offers or ()))
        if not isinstance(getattr(cls, "capabilities", None), property):  # else they follow from the parameters
            cls.capabilities = cls.declared
        if not hasattr(cls, "fewest"):
            cls.fewest = _all_of_them
        known = REGISTRY.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise PlanError("program.duplicate", f"two programs are called {name}", field=name)
        REGISTRY[name] = cls
        return cls

    return register


def _all_of_them(self: Any, num_sites: int) -> int:  # noqa: ARG001
    return num_sites


def build(name: str, params: Mapping[str, Json]) -> Program:
    """The registered program *name* with validated *params*; raises PlanError otherwise."""
    if name not in REGISTRY:
        near = difflib.get_close_matches(name, REGISTRY, 1)
        hint = f"did you mean {near[0]!r}?" if near else "`atoll programs` lists them"
        raise PlanError("program.unknown", f"there is no program {name!r}", field="program", remedy=hint)
    cls = REGISTRY[name]
    return cast(Program, cls(validate(cls.Params, dict(params), "params")))


def handler_of(made: Program, name: str) -> Handler:
    """The site handler *name* of a program; raises ProtocolError if it has none."""
    try:
        return cast(Handler, cast(Any, made).handlers[name])
    except KeyError:
        raise ProtocolError("task.unknown-handler", f"{made.name} has no handler {name!r}", field=name) from None


def summary(cls: type[Any]) -> str:
    """First line of a program's docstring."""
    return (cls.__doc__ or "").strip().splitlines()[0] if cls.__doc__ else ""


__all__ = [
    "REGISTRY", "Cohort", "Generator", "Program", "ProgramParams", "SiteView", "TableView",
    "build", "handler", "handler_of", "program", "relay", "summary",
]  # fmt: skip
