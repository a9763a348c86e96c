"""A recipe made ready: its steps in order, grouped into stages that can be fitted together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from atoll.contract.errors import PlanError
from atoll.contract.plan import Recipe
from atoll.contract.schema import TableSchema
from atoll.contract.settings import Options, validate
from atoll.contract.wire import Json
from atoll.data import steps as _registered
from atoll.data.engine import Engine
from atoll.data.frame import Frame
from atoll.data.step import STEPS, Fitted, Found, Need, Step
from atoll.data.table import Table

__all__ = ["STEPS", "Prepared", "texts"]
Classes = frozenset[str]
assert _registered  # noqa: S101  (imported so that the steps register)


class Prepared:
    """A recipe's steps.

    A stage's statistics are those of the table before its first step that waits for any, so
    it ends before a step that needs columns which that step, or one after it, may change.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.clean = [_declared(one, "clean", number) for number, one in enumerate(recipe.clean)]
        self.steps = [_declared(one, "steps", number) for number, one in enumerate(recipe.steps)]

    @property
    def first_fitted(self) -> int:
        """The number of the first step that waits for statistics (or of steps, if none does)."""
        return min((number for number, step in enumerate(self.steps) if step.needs()), default=len(self.steps))

    @property
    def ties(self) -> tuple[str, ...]:
        """Names of the steps that make one row of several."""
        return tuple(step.step for step in [*self.clean, *self.steps] if not step.by_row)

    @property
    def anonymises(self) -> bool:
        """Does a step make the table anonymous?"""
        return any(step.step == "anonymise" for step in self.steps)

    def drops(self) -> tuple[str, ...]:
        """The reasons for which rows may be left out, in order, each once."""
        return tuple(dict.fromkeys(reason for step in [*self.clean, *self.steps] for reason in step.drops()))

    def reads(self) -> tuple[str, ...] | None:
        """Columns of the source, besides the contract's, that cleaning uses; None: all."""
        names: list[str] = []
        for step in self.clean:
            if (more := step.reads()) is None:
                return None
            names += more
        return tuple(dict.fromkeys(names))

    def stages(self) -> list[list[int]]:
        """Step numbers by stage: all statistics of one stage are fetched before it is fitted."""
        stages: list[list[int]] = [[]]
        waiting: set[str] = set()
        changed = False
        for number, step in enumerate(self.steps):
            needed = {name for need in step.needs() for name in need.columns}
            for name, value in (option for need in step.needs() for option in need.options):
                if name in ("by", "target"):
                    needed |= {value} if isinstance(value, str) else {str(column) for column in value}
            if needed and (changed or waiting & needed):
                stages.append([])
                waiting, changed = set(), False
            stages[-1].append(number)
            changed |= bool(waiting) and not needed
            waiting |= needed
        return [stage for stage in stages if stage]

    def needs(self, stage: Sequence[int]) -> dict[Need, list[Need]]:
        """What to ask for a stage: each merged need, with the steps' own needs that it answers."""
        asked: dict[tuple[str, Any], list[Need]] = {}
        for number in stage:
            for need in self.steps[number].needs():
                asked.setdefault((need.program, need.options), []).append(need)
        return {
            Need(program, tuple(sorted({name for need in needs for name in need.columns})), options): needs
            for (program, options), needs in asked.items()
        }

    def fit(self, stage: Sequence[int], results: Mapping[Need, Mapping[str, Any]]) -> dict[str, Fitted]:
        """Fitted parameters of a stage's steps, by number, from the results of its merged needs."""
        found: Found = {own: results[need] for need, answered in self.needs(stage).items() for own in answered}
        return {str(number): self.steps[number].fit(found) for number in stage}

    def before(self, stage: Sequence[int], schema: TableSchema) -> TableSchema:
        """The schema of the table that a stage's statistics are taken of; *schema*: that before the stage."""
        for number in stage:
            if self.steps[number].needs():
                break
            schema = self.steps[number].after(schema)
        return schema

    def schema(self, schema: TableSchema, steps: Sequence[int] | None = None) -> TableSchema:
        """The schema after all (or the given) steps."""
        for number in range(len(self.steps)) if steps is None else steps:
            schema = self.steps[number].after(schema)
        return schema

    def seen(self, schema: TableSchema, view: Mapping[str, Fitted]) -> TableSchema:
        """The schema after what :meth:`prepare` does with *view*."""
        waits = (number for number, step in enumerate(self.steps) if step.needs() and str(number) not in view)
        return self.schema(schema, range(next(waits, len(self.steps))))

    def data_classes(
        self, schema: TableSchema, named: Callable[[str], Classes] = lambda _: frozenset(),
        source: Mapping[str, str] | None = None,
    ) -> tuple[dict[str, Classes], dict[str, Classes]]:  # fmt: skip
        """(by column, which kinds of data it is, or was at any step; by column that a step chooses rows by, which kinds
        it is there).

        schema: the contract. named: kinds of data that a column's name tells. source: where it was opened, its columns
        as it was opened, and what it calls each. A cell of a step's new or changed columns is what the columns are that
        its options name, or that it needs statistics of (all columns, where there are none). Two columns of one name,
        also one after the other, are one.
        """
        found = {name: column.data_classes | named(name) for name, column in schema.columns.items()}
        for name, theirs in (source or {}).items():
            found[name] = found.get(name, frozenset()) | named(name) | named(theirs)
        chosen: dict[str, Classes] = {}

        def kinds(names: Iterable[str]) -> Classes:
            return frozenset[str]().union(*(found.get(name) or named(name) for name in names))

        def choose(step: Step) -> None:
            names = step.chooses()
            for name in texts(step.model_dump(mode="json")) if names is None else names:
                chosen[name] = chosen.get(name, frozenset()) | kinds((name,))

        for step in self.clean:
            choose(step)
            moved = {into: kinds((into, *names)) for into, names in step.moves(list(found)).items()}
            found.update({into: classes | named(into) for into, classes in moved.items()})
        for step in self.steps:
            choose(step)
            after, needed = step.after(schema), {name for need in step.needs() for name in need.columns}
            used = {*texts(step.model_dump(mode="json")), *needed} & schema.columns.keys() or set(schema.columns)
            untouched = used - {*texts(step.model_dump(mode="json", exclude={"on", "by"})), *needed}
            touched = set[str]() if step.adds else used - untouched
            classes = kinds(used)
            for name, column in after.columns.items():
                if name in touched or (name not in untouched and schema.columns.get(name) != column):
                    found[name] = found.get(name, frozenset()) | classes | column.data_classes | named(name)
            schema = after
        return found, chosen

    def cleaned(self, frame: Frame) -> Frame:
        """A frame as it was read, after the cleaning steps."""
        for step in self.clean:
            frame = step.apply(frame, {})
        return frame

    def prepare(self, frame: Frame, view: Mapping[str, Fitted], first: int = 0) -> Frame:
        """The frame after every step from *first* up to one that needs fitting and is not in *view*.

        view: fitted parameters by step number (as text, since they travel as JSON).
        """
        for number, step in enumerate(self.steps[first:], first):
            if step.needs() and str(number) not in view:
                break
            frame = step.apply(frame, view.get(str(number), {}))
        return frame

    def apply(self, table: Table, view: Mapping[str, Fitted]) -> Table:
        """:meth:`prepare` for a table in memory."""
        return self.prepare(Frame.of(table, Engine()), view).to_table() if self.steps else table


def texts(value: Json) -> Iterator[str]:
    """Every text in a JSON value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in [*value, *value.values()] if isinstance(value, dict) else value:
            yield from texts(one)


def _declared(declared: Options, phase: str, number: int) -> Step:
    """A recipe's step, checked; raises PlanError."""
    name = str(declared.get("step"))
    known = sorted(name for name, cls in STEPS.items() if cls.cleans == (phase == "clean"))
    if name not in known:
        hint = f"known steps: {', '.join(known)}"
        if name in STEPS:
            hint = f"it belongs into the recipe's list {'steps' if phase == 'clean' else 'clean'!r}"
        raise PlanError(
            "recipe.unknown-step", f"the recipe's step {number + 1} is unknown in {phase!r}", field=name, remedy=hint
        )
    return validate(STEPS[name], dict(declared), f"recipe {phase} {number + 1}")
