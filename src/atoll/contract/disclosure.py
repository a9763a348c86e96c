"""Disclosure control: which cells of a table may be told, and which are withheld.

The same rules at both ends. A site's gate applies them to its own cells where the
protection shows these to the coordinator; the coordinator half of a program applies them
to the cohort's totals before it reports them.

- *Minimum group size*: a cell that counts fewer than k people (and more than none) is withheld.
- *Dominance*, the (n, k)-rule: so is a cell where n people make more than a share of its total.
- *Complementary suppression*: where a line's total is known, what is withheld in that line must
  be at least two cells and k people, or subtracting would tell it: the line's smallest cells follow.

Source: Hundepool et al. 2012, Statistical Disclosure Control, §4.2 (sensitivity rules) and §4.4
(secondary suppression). Lines are treated one after another until none changes; that protects
every line by itself, and is not the linear programme that would bound each cell's range (ibid.).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.contract.errors import DisclosureError, ProtocolError

TOP = 3
"""The largest n of a dominance rule: so many contributions of a cell are looked at."""


@dataclass(frozen=True, slots=True)
class Rule:
    """min_group_size: fewest people behind a cell. dominant, share: no *dominant* people (up to TOP) may
    make more than *share* of a cell's total (1 switches that off)."""

    min_group_size: int = 1
    dominant: int = 1
    share: float = 1.0

    def dominates(self, top: NDArray[np.float64]) -> bool:
        """Whether so few people make more than the share of all cells together. top: [cells, TOP + 1]."""
        most = np.sort(top[:, :TOP], axis=None)[-self.dominant :].sum()
        return bool(most > self.share * top[:, TOP].sum())


@dataclass(frozen=True, slots=True)
class Cells:
    """A table of cells in a handler's reply, as its own code declares it.

    counts: the field that counts the people behind each cell, of any shape.
    values: fields whose leading axes are those of *counts*; they are withheld with their cell.
    withheld: the field (``withheld(shape)`` in the round), 1 where a cell is withheld. The gate fills
    it; the handler does not. lines: axes of *counts* along which the total is known to the reader.
    largest: what the handler also gives, for the gate alone (see :func:`largest`): never declared, never sent.
    """

    counts: str
    withheld: str
    values: tuple[str, ...] = ()
    lines: tuple[int, ...] = ()
    largest: str = ""

    def hidden(self, total: Mapping[str, NDArray[Any]], min_group_size: int) -> NDArray[np.bool_]:
        """Which cells of a cohort's *total* may not be reported: withheld by a site, too small, or their
        complement. Shape of *counts*. The coordinator half's use: ``cohort.min_group_size``."""
        mask = np.asarray(total[self.withheld]) > 0
        counts = np.asarray(total[self.counts])
        # A site that withheld left out two cells and k people of the line, so what it left out needs no complement.
        return suppress(np.where(mask, np.maximum(counts, min_group_size), counts), mask, min_group_size, self.lines)


def largest(values: NDArray[Any], cell: NDArray[np.integer[Any]] | None = None, size: int = 1) -> NDArray[np.float64]:
    """The largest magnitudes in each cell, and all of it: [size, TOP + 1], the last being Σ|x|.

    values: [num_rows], NaN counts for nothing. cell: which of the *size* cells each row is in,
    [num_rows] (negative: in none); None for all in one.
    """
    magnitude = np.abs(values)
    known = ~np.isnan(magnitude) if cell is None else ~np.isnan(magnitude) & (cell >= 0)
    magnitude = magnitude[known]
    place = np.zeros(len(magnitude), np.int64) if cell is None else cell[known]
    found = np.zeros((size, TOP + 1))
    if cell is None and len(magnitude) > TOP:
        found[0, :TOP] = np.sort(np.partition(magnitude, -TOP)[-TOP:])[::-1]
        found[0, TOP] = magnitude.sum()
        return found
    found[:, TOP] = np.bincount(place, magnitude, size)
    for rank in range(TOP):
        if not magnitude.any():
            break
        np.maximum.at(found[:, rank], place, magnitude)
        first = np.flatnonzero(magnitude == found[place, rank])
        magnitude[first[np.unique(place[first], return_index=True)[1]]] = 0  # one contribution a cell
    return found


def suppress(
    counts: NDArray[Any],
    mask: NDArray[np.bool_],
    min_group_size: int,
    lines: Sequence[int] = (),
    top: NDArray[np.float64] | None = None,
    rule: Rule = Rule(),
) -> NDArray[np.bool_]:
    """*mask* (cells withheld already), and the cells that are too small, and their complement along *lines*.

    top: each cell's :func:`largest`, [*counts.shape, TOP + 1]; then nobody may dominate the total of what is
    withheld in a line either, by *rule*: it can be had by subtracting.
    """
    hidden = mask | ((counts > 0) & (counts < min_group_size))
    changed = bool(hidden.any() and lines)
    while changed:
        changed = False
        for axis in lines:
            rows = np.moveaxis(counts, axis, -1).reshape(-1, counts.shape[axis])
            marks = np.moveaxis(hidden, axis, -1).reshape(rows.shape).copy()
            tops = None if top is None else np.moveaxis(top, axis, -2).reshape(*rows.shape, TOP + 1)
            for i in np.flatnonzero(marks.any(axis=1) & ~marks.all(axis=1)):
                # a line's total that few people dominate is told nowhere, so it cannot be subtracted from
                known = tops is not None and not rule.dominates(tops[i])
                for j in np.argsort(rows[i], kind="stable"):
                    people = rows[i][marks[i]]
                    told = tops is not None and known and rule.dominates(tops[i][marks[i]])
                    if (people > 0).sum() > 1 and people.sum() >= min_group_size and not told:
                        break
                    if rows[i][j] > 0 and not marks[i][j]:
                        marks[i][j] = changed = True
            shape = np.moveaxis(hidden, axis, -1).shape
            hidden = np.moveaxis(marks.reshape(shape), -1, axis)
    return hidden


def judged(reply: Mapping[str, Any], tables: Sequence[Cells], rule: Rule) -> dict[str, Any]:
    """A handler's reply with what *rule* withholds set to zero, marked, and without what is for the gate alone.

    A table whose counts are among an earlier one's values loses the cells that the earlier one does. Raises
    ProtocolError when a declared field is missing.
    """
    told, masks = dict(reply), list[tuple[Cells, NDArray[np.bool_]]]()
    for table in tables:
        try:
            counts = np.asarray(reply[table.counts])
            top = np.asarray(told.pop(table.largest)) if table.largest else None
            values = {name: np.array(told[name]) for name in table.values}
        except KeyError as error:
            raise ProtocolError(
                "reply.missing", "a handler left out what its cells are judged by", field=str(error.args[0])
            ) from None
        mask = np.zeros(counts.shape, bool)
        if top is not None:
            top = top.reshape(*counts.shape, TOP + 1)
            mask = (counts > 0) & (top[..., : rule.dominant].sum(axis=-1) > rule.share * top[..., TOP])
        for earlier, lost in masks:
            if table.counts in earlier.values:
                mask = mask | lost.reshape(*lost.shape, *[1] * (counts.ndim - lost.ndim))
        mask = suppress(counts, mask, rule.min_group_size, table.lines, top, rule)
        masks.append((table, mask))
        told[table.withheld] = mask.astype(np.uint8)
        if mask.any():
            told[table.counts] = np.where(mask, 0, counts)
            for name, array in values.items():
                array[mask] = 0
                told[name] = array
    return told


def check_groups(arrays: Mapping[str, NDArray[Any]], groups: frozenset[str], min_group_size: int) -> None:
    """Raise DisclosureError where fewer than *min_group_size* people, and more than none, are in a group."""
    for name in groups & arrays.keys():
        if ((arrays[name] > 0) & (arrays[name] < min_group_size)).any():
            raise DisclosureError(
                "disclosure.small-group", f"fewer than {min_group_size} people are behind a released count",
                field=name, remedy="use coarser groups or more rows; the site's policy sets min_group_size",
            )  # fmt: skip
