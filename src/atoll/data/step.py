"""What a recipe's steps are: one file each, found by their registration.

A step of the list ``clean`` makes a site's table keep the data contract, before it is checked: it gets
cells as they were read (text, where the format has no types) and does not change the schema. A step
of the list ``steps`` works on the checked table and says what the schema is afterwards. Its
parameters may be fitted on *federated* statistics: it says which it needs, the runtime fetches them, in
as few rounds as possible, calls ``fit``, and sends what was fitted to the sites, where ``apply``
uses it. ``fit`` and ``after`` run at both ends and see no rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict

from atoll.contract.errors import PlanError
from atoll.contract.schema import Column, TableSchema
from atoll.contract.wire import Json
from atoll.data.frame import Frame

Fitted = Mapping[str, Json]
Found = Mapping["Need", Mapping[str, Any]]
"""Results of the programs that were asked for, by what was asked for."""


@dataclass(frozen=True)
class Need:
    """A statistics program that a step's ``fit`` wants the result of, over *columns* of the table before it.

    Needs of one stage with the same program and options are answered together, by one run over
    all their columns. options: (name, value) pairs of further parameters.
    """

    program: str
    columns: tuple[str, ...]
    options: tuple[tuple[str, Json], ...] = ()


class Step(BaseModel):
    """One step with its options; frozen. Subclasses say what they do in their docstring's first line."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)

    step: str
    cleans: ClassVar[bool] = False
    adds: ClassVar[bool] = False
    """Does it leave every cell as it is, and only make new columns?"""

    @property
    def by_row(self) -> bool:
        """Does one row of the source change one row at most? Else no noise hides a row."""
        return True

    def reads(self) -> tuple[str, ...] | None:
        """Columns of the source, besides the contract's, that a cleaning step uses where they are there; None: it
        looks at them all."""
        return ()

    def needs(self) -> tuple[Need, ...]:
        """What ``fit`` wants (() for none)."""
        return ()

    def fit(self, found: Found) -> Fitted:
        """Parameters from what was found; raises PlanError when it is not enough."""
        return {}

    def drops(self) -> tuple[str, ...]:
        """The reasons for which rows may be left out; each is counted in the report."""
        return ()

    def chooses(self) -> tuple[str, ...] | None:
        """Columns by whose cells rows are left out or merged; None: all that its options name."""
        return None if self.drops() else ()

    def moves(self, there: Iterable[str]) -> Mapping[str, tuple[str, ...]]:
        """Of a cleaning step: columns that get cells of others, and of which. there: all columns known of."""
        return {}

    def after(self, schema: TableSchema) -> TableSchema:
        """The table's schema after this step; raises PlanError if a column is not there."""
        return schema

    def apply(self, frame: Frame, fitted: Fitted) -> Frame:
        """The frame after this step. May not look at anything but its arguments."""
        raise NotImplementedError


STEPS: dict[str, type[Step]] = {}
S = TypeVar("S", bound=type[Step])


def step(name: str, phase: Literal["clean", "steps"] = "steps") -> Callable[[S], S]:
    """Register a step for the recipe's list *phase*."""

    def register(cls: S) -> S:
        cls.cleans = phase == "clean"
        STEPS[name] = cls
        return cls

    return register


def column_of(schema: TableSchema, name: str, *dtypes: str) -> Column:
    """A column that the table really holds, of one of *dtypes* (default: any); raises PlanError for others."""
    if name not in schema.columns or schema.columns[name].role == "ignore":
        raise PlanError("recipe.no-column", f"the recipe names a column {name!r} that is not there", field=name)
    column = schema.columns[name]
    if dtypes and column.dtype not in dtypes:
        if set(dtypes) == {"real", "integer"}:
            raise PlanError("recipe.not-numeric", f"{name!r} is not numeric", field=name, remedy="leave the column out")
        raise PlanError(
            "recipe.wrong-type", f"{name!r} is {column.dtype}, and the step takes {' or '.join(dtypes)}", field=name,
            remedy="leave the column out, or change its dtype in the schema",
        )  # fmt: skip
    return column


def numeric_of(schema: TableSchema, name: str) -> Column:
    """A numeric column; raises PlanError for any other."""
    return column_of(schema, name, "real", "integer")


def free_name(schema: TableSchema, name: str, *replaced: str) -> str:
    """*name*, if no column other than *replaced* is called so; raises PlanError."""
    if name.startswith("__") or (name in schema.columns and name not in replaced):
        raise PlanError(
            "recipe.column-exists", f"there is a column {name!r} already", field=name,
            remedy="choose another name for into",
        )  # fmt: skip
    return name
