"""The contract's names for columns that sites call differently."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import chain
from typing import Literal, Self

from pydantic import Field, model_validator

from atoll.contract.errors import SchemaError
from atoll.data.frame import ROW, Frame
from atoll.data.step import Fitted, Step, step
from atoll.data.steps.cells import Names


def _folded(name: str) -> str:
    """A name without width, case, spaces, '_' and '-'."""
    plain = unicodedata.normalize("NFKC", name).casefold()
    return "".join(c for c in plain if not c.isspace() and c not in "_-")


@step("rename", "clean")
class Rename(Step):
    """Give columns the contract's names: ``columns`` lists the names that sites use for each.

    match: "exact", or "loose": whatever the case, width, spaces, "_" and "-"; then also without being listed.
    """

    columns: Mapping[str, Names] = Field(default_factory=dict)
    match: Literal["exact", "loose"] = "exact"

    @model_validator(mode="after")
    def _each_alias_once(self) -> Self:
        aliases = [self._key(alias) for names in self.columns.values() for alias in names]
        if len(set(aliases)) < len(aliases):
            raise ValueError("a site's name is listed twice")
        return self

    def _key(self, name: str) -> str:
        return _folded(name) if self.match == "loose" else name

    def reads(self) -> tuple[str, ...] | None:
        if self.match == "loose":  # which names fold to one is known when they are seen
            return None
        return tuple(alias for aliases in self.columns.values() for alias in aliases)

    def moves(self, there: Iterable[str]) -> Mapping[str, tuple[str, ...]]:
        if self.match == "exact":
            return self.columns
        alike: dict[str, list[str]] = {}
        for name in there:
            alike.setdefault(self._key(name), []).append(name)
        listed = {**dict.fromkeys(chain(*alike.values()), ()), **self.columns}
        return {
            name: (*aliases, *chain(*(alike.get(key, ()) for key in {self._key(one) for one in (name, *aliases)})))
            for name, aliases in listed.items()
        }

    def apply(self, frame: Frame, fitted: Fitted) -> Frame:
        listed = {**(dict.fromkeys(frame.schema.columns, ()) if self.match == "loose" else {}), **self.columns}
        new = {}
        for name, aliases in listed.items():
            keys = {self._key(known) for known in (name, *aliases)}
            found = [column for column in frame.table.columns if column != ROW and self._key(column) in keys]
            if len(found) > 1:
                raise SchemaError(
                    "schema.two-names", f"the table has {len(found)} columns that are all called {name!r}", field=name,
                    remedy="remove all but one from the source",
                )  # fmt: skip
            if found and found[0] != name:
                new[name] = found[0]
        return replace(frame, table=frame.table.rename(new))
