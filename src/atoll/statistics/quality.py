"""Data-quality scores: of the cohort, and of each site that shares its own, as a weight for aggregation.

Parties: sites and coordinator. Messages: the rounds of ``statistics.quantiles`` for the cohort's quartiles; one Sum,
"months", of rows a month, where there is a time column; one Sum, "counts", for which quartiles and
newest month go out; round "own" (asked only where a site's policy may share it) gathers each site's score.

Validity, types, ranges and code lists, is the contract's: no row breaks it. What is scored, each in [0, 1]:

- completeness: share of cells that are not missing, mean over columns.
- uniqueness: share of rows that repeat no earlier row in every column (``duplicates.py``).
- plausibility: share of numbers within *outlier* robust standard deviations (IQR / 1.349) of the cohort's
  median, mean over columns; columns with an IQR of 0 are left out (Rousseeuw & Croux 1993 on robust scales).
- balance: entropy of the label's classes over its largest possible value.
- timeliness: share of dated rows within *recent_days* before the end of the cohort's newest month, that being the
  newest with at least the smallest group of rows.

The score is their geometric mean with *weights*, each component counting as at least FLOOR, so that one of
zero does not silence a site. Components that are undefined (no label, no time column) are left out.

Unit flags: a site whose own median is, in size, about 10^p times the cohort's (p rounded, at most 3 in size, not 0)
raises a flag for that column: an amount in cents, a weight in grams. Medians, as
most rows then still are in the right unit. Flags leave as counts of sites.

The coordinator learns, of the cohort's total: rows, quartiles, rows a month, missing cells, duplicates, outliers, label
counts, recent rows and flags; under ``plain`` each site's. Counts of fewer than k are withheld, and what they could
be had from: a column with so few missing cells tells nothing else either (a component that needs what is withheld is
None, and *note* says so). The own scores of sites that share "metrics" are made of the counts that a site may tell.
Threat model: as the plan's protection; a site judges by one set of quartiles in a run, so that counts
at others cannot be subtracted. Dropout: the survivors' counts. Noise: own scores are not
asked for; unit flags say little; the newest month is one with clearly more rows than noise makes. Cost: quantiles'
rounds (6 KiB a number and round), 53 KiB if there is a time column, and about 60 bytes a column and 18 a class.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from atoll.contract.disclosure import Cells, Rule, judged
from atoll.contract.errors import PlanError, PolicyError, ProtocolError
from atoll.contract.program import Cohort, ProgramParams, SiteView, handler, program
from atoll.contract.rounds import Gather, Reply, Round, Steps, Sum, Task, count, real, taken, withheld
from atoll.contract.schema import TableSchema
from atoll.contract.sensitivity import Norms, touches
from atoll.contract.wire import Array
from atoll.statistics.duplicates import duplicates
from atoll.statistics.noise import NOTHING, smallest
from atoll.statistics.own_quality import FLOOR, NORMAL_IQR, OUTLIER, missing_cells
from atoll.statistics.quantiles import Quantiles

Floats = NDArray[np.float64]
COMPONENTS = ("completeness", "uniqueness", "plausibility", "balance", "timeliness")
POWERS = (-3, -2, -1, 1, 2, 3)
FIRST_MONTH = np.datetime64("1900-01", "M")
MONTHS = 12 * 250
"""Dates outside of 1900 to 2149 count as in the first or last month."""
# Each of these first splits the rows by whether a cell is there, [..., 2] (missing, present): their total is known
# and one is withheld with the other. Then what is present is split further, [..., 2, parts].
TIMED = Cells("timed", "timed_withheld", values=("months",), lines=(0,))
MONTH = Cells("months", "months_withheld", lines=(1,))
CELLS = Cells("cells", "cells_withheld", values=("parts",), lines=(1,))
PARTS = Cells("parts", "parts_withheld", lines=(2,))
"""Of a number: plausible, outlier; of the time column: recent, older."""
LABELLED = Cells("labelled", "labelled_withheld", values=("labels",), lines=(0,))
LABELS = Cells("labels", "labels_withheld", lines=(1,))
REPEATS = Cells("repeats", "repeats_withheld", lines=(0,))
"""Rows that repeat an earlier one, and others."""
TABLES = (CELLS, PARTS, LABELLED, LABELS, REPEATS)
NEEDED = {"cells": "completeness", "parts": "plausibility or timeliness", "labels": "balance", "repeats": "uniqueness"}
Weight = Annotated[float, Field(ge=0)]


@program(
    "statistics.quality",
    needs={"sum"},
    offers={"bounded", "resolution", "bounded-weight"},
    calls={"statistics.quantiles"},
)
class Quality:
    """Data-quality score of the cohort and of sites: completeness, duplicates, outliers, balance, timeliness, units."""

    class Params(ProgramParams):
        """columns: whose cells are looked at (default: all). label: column with a code list (default: the first of
        that role). time: date column (default: the first of that role). outlier: in robust standard deviations.
        recent_days: see timeliness. weights: of the components (default: 1 each). own: also ask for each
        site's own score, where its policy shares it."""

        columns: tuple[str, ...] = ()
        label: str = ""
        time: str = ""
        outlier: float = Field(default=OUTLIER, gt=0)
        recent_days: int = Field(default=30, ge=1)
        weights: dict[str, Weight] = Field(default_factory=dict)
        own: bool = True

    def __init__(self, params: Params) -> None:
        self.params = params

    def _columns(self, schema: TableSchema) -> tuple[list[str], list[str], str, str]:
        """(columns, those with a range of numbers, label or "", time or ""); raises PlanError for others."""
        used = {name: column for name, column in schema.columns.items() if column.role != "ignore"}
        names = list(self.params.columns or used)
        if bad := sorted(set(names) - set(used)):
            raise PlanError("plan.bad-column", "quality needs columns of the schema", field=", ".join(bad))
        numbers = [n for n in names if n in schema.numeric_columns() and used[n].values is None]
        labels = [n for n, column in used.items() if column.values is not None]
        dates = [n for n, column in used.items() if column.dtype in ("date", "datetime")]
        label = self.params.label or next((n for n in labels if used[n].role == "label"), "")
        time = self.params.time or next((n for n in dates if used[n].role == "time"), "")
        if label and label not in labels:
            raise PlanError("plan.bad-column", "a label for balance needs a code list", field=label)
        if time and time not in dates:
            raise PlanError("plan.bad-column", "timeliness needs a date or datetime column", field=time)
        if bad := sorted(set(self.params.weights) - set(COMPONENTS)):
            raise PlanError("plan.bad-value", f"components are {', '.join(COMPONENTS)}", field=", ".join(bad))
        return names, numbers, label, time

    def coordinate(self, cohort: Cohort, start: Mapping[str, Array] | None = None) -> Steps:
        """Returns {"quality": {"rows", "score", "components": {name: share or None}, "weights", "columns": {name:
        {"completeness", "plausibility", "unit_flags": {power of ten: sites}}}, "newest_month", "sites": {site:
        {"score", "components", "completeness", "plausibility", "unit_flags"}}, "note"}}."""
        schema, rows, fewest = cohort.schema, cohort.schema.max_rows, smallest(cohort)
        names, numbers, label, time = self._columns(schema)
        classes = len(schema.columns[label].values or ()) if label else 0
        send: dict[str, Array] = {"quartiles": np.zeros((len(numbers), 3)), "newest": np.full(1, -1.0)}
        if numbers:
            asked = Quantiles.Params(columns=tuple(numbers), probabilities=(0.25, 0.5, 0.75))
            found = (yield from Quantiles(asked).coordinate(cohort))["quantiles"]["columns"]
            send["quartiles"] = np.array([[v or 0.0 for v in found[n]["values"]] for n in numbers])
        if time:
            months = yield Round("months", Sum(), _fields({"timed": (2,), "months": (2, MONTHS)}, rows))
            known = _known(months, (TIMED, MONTH), fewest)["months"][1]
            noise = 0 if cohort.exact else 1.5 * months["months"][0].max()  # these are all 0 but for the noise
            enough = np.flatnonzero(known > noise)
            send["newest"] = np.array([float(enough[-1]) if len(enough) else -1.0])
        watched = _watched(names, time)
        shapes = {"cells": (len(watched), 2), "parts": (len(watched), 2, 2), "labelled": (2,), "labels": (2, classes)}
        total = yield Round(
            "counts",
            Sum(),
            {
                "rows": count(bound=rows),
                "flags": count((len(numbers), len(POWERS)), bound=1),
                **_fields({**shapes, "repeats": (2,)}, rows),
            },
            send,
        )
        counts = _known(total, TABLES, fewest)
        shares = self._shares(schema, send["quartiles"], counts)
        components = _components(shares)
        columns: dict[str, Any] = {}
        for i, name in enumerate(names):
            columns[name] = {"completeness": shares["completeness"][i]}
            if name in numbers:
                at = numbers.index(name)
                flags = {
                    str(power): int(sites) for power, sites in zip(POWERS, total["flags"][at], strict=True) if sites
                }
                columns[name] |= {"plausibility": shares["plausibility"][at], "unit_flags": flags}
        newest = int(send["newest"][0])
        own: dict[str, Any] = {}
        if self.params.own and cohort.exact:
            fields = {name: real(len(values)) for name, values in shares.items()} | {"flags": real(len(numbers))}
            gathered = yield Round("own", Gather(), fields, send, optional=True)
            own = {site: self._own(gathered[site], names, numbers) for site in gathered}
        gone = [what for table, what in NEEDED.items() if np.isnan(counts[table]).any()]
        return {
            "quality": {
                "rows": int(total["rows"]),
                "score": self._score(components),
                "components": _told(components),
                "weights": {name: self.params.weights.get(name, 1.0) for name in COMPONENTS},
                "columns": {name: _told(column) for name, column in columns.items()},
                "newest_month": str(FIRST_MONTH + newest) if newest >= 0 else None,
                "sites": own,
                "note": f"withheld, and left out of the score, at least in part: {', '.join(gone)}" if gone else "",
            }
        }

    def _score(self, components: Mapping[str, float]) -> float | None:
        """The weighted geometric mean of what is defined."""
        used = {name: self.params.weights.get(name, 1.0) for name, share in components.items() if not math.isnan(share)}
        if not sum(used.values()):
            return None
        logs = math.fsum(weight * math.log(max(components[name], FLOOR)) for name, weight in used.items())
        return math.exp(logs / sum(used.values()))

    def _own(self, reply: Mapping[str, Array], names: list[str], numbers: list[str]) -> dict[str, Any]:
        shares = {name: reply[name] for name in COMPONENTS}
        components = _components(shares)
        powers = zip(numbers, reply["flags"], strict=True)
        return {
            "score": self._score(components),
            "components": _told(components),
            "completeness": _told(dict(zip(names, shares["completeness"], strict=True))),
            "plausibility": _told(dict(zip(numbers, shares["plausibility"], strict=True))),
            "unit_flags": {name: int(power) for name, power in powers if power},
        }

    # ---------------------------------------------------------------- at the site

    def _months_per_record(self, schema: TableSchema, sent: Mapping[str, Array]) -> dict[str, Norms]:
        marks = {"timed_withheld": NOTHING, "months_withheld": NOTHING}
        return {"timed": touches(), "months": touches(), **marks}

    def _per_record(self, schema: TableSchema, sent: Mapping[str, Array]) -> dict[str, Norms]:
        """Of each column a record is one cell, and in one part; a median may lower one flag and raise one."""
        names, numbers, label, time = self._columns(schema)
        taken(sent, "quartiles", (len(numbers), 3))
        taken(sent, "newest", (1,))
        cells, classes = touches(len(_watched(names, time))), touches(1 if label else 0)
        told = {"cells": cells, "parts": cells, "labelled": classes, "labels": classes, "repeats": touches()}
        marks = {f"{name}_withheld": NOTHING for name in told}
        return {"rows": touches(), "flags": touches(2 * len(numbers)), **told, **marks}

    @handler("months", cells=(TIMED, MONTH), record=_months_per_record)
    def months(self, site: SiteView, task: Task) -> Reply:
        """At the site: rows without and with a date, and of these rows a month."""
        *_, time = self._columns(site.table.schema)
        month = _months(site.table[time])
        months = np.bincount(month[month >= 0], minlength=MONTHS)
        timed = np.array([len(month) - months.sum(), months.sum()])
        return {"timed": timed, "months": np.stack([np.zeros_like(months), months])}

    @handler("counts", groups=("rows",), cells=TABLES, record=_per_record)
    def counts(self, site: SiteView, task: Task) -> Reply:
        """At the site: missing cells, outliers, recent rows, label classes, repeated rows and unit flags."""
        return self._counted(site, task)

    @handler("own", reduce="gather")
    def own(self, site: SiteView, task: Task) -> Reply:
        """At the site: its own shares, of counts that it may tell; withheld unless its policy shares "metrics"."""
        if not site.shares("metrics"):
            raise PolicyError("policy.withheld", "the site does not share its own metrics", field="share")
        found = judged(self._counted(site, task), TABLES, Rule(site.min_group_size))
        flags = (found["flags"] * np.array(POWERS)).sum(axis=1).astype(np.float64)
        counts = _known(found, TABLES, site.min_group_size)
        return {**self._shares(site.table.schema, self._judged_by(site, task)[0], counts), "flags": flags}

    def _judged_by(self, site: SiteView, task: Task) -> tuple[Floats, int]:
        """(quartiles [numbers, 3], the newest month or −1): the same throughout a run; raises ProtocolError else."""
        quartiles = task.take("quartiles", (len(self._columns(site.table.schema)[1]), 3))
        newest = task.take("newest", (1,))
        told = np.append(quartiles, newest)
        if not np.array_equal(site.state.setdefault("judged by", told), told):
            raise ProtocolError("task.changed", "a site judges by one set of quartiles in a run", field="quartiles")
        return quartiles, int(np.clip(newest[0], -1, MONTHS - 1))

    def _counted(self, site: SiteView, task: Task) -> dict[str, Any]:
        table, (quartiles, newest) = site.table, self._judged_by(site, task)
        names, numbers, label, time = self._columns(table.schema)
        flags, watched = np.zeros((len(numbers), len(POWERS)), np.int64), _watched(names, time)
        missing = np.array([missing_cells(table, name) for name in watched], np.int64)
        parts = np.zeros((len(watched), 2, 2), np.int64)
        for i, (name, (lower, median, upper)) in enumerate(zip(numbers, quartiles, strict=True)):
            values = table[name]
            values = values[~np.isnan(values)]
            reach = self.params.outlier * (upper - lower) / NORMAL_IQR
            far = int((values < median - reach).sum() + (values > median + reach).sum()) if reach > 0 else 0
            parts[watched.index(name), 1] = len(values) - far, far
            if len(values) >= max(site.min_group_size, 1):
                flags[i] = np.array(POWERS) == _power(float(np.median(values, overwrite_input=True)), float(median))
            site.progress(i + 1, len(numbers) + 1)
        if time and newest >= 0:
            end = (FIRST_MONTH + newest + 1).astype("datetime64[D]")
            days = table[time].astype("datetime64[D]", copy=False)
            recent = int(((days >= end - self.params.recent_days) & (days < end)).sum())  # NaT is neither
            parts[watched.index(time), 1] = recent, len(days) - int(np.isnat(days).sum()) - recent
        codes = table.codes(label) if label else np.zeros(0, np.int32)
        classes = len(table.schema.columns[label].values or ()) if label else 0
        labels = np.bincount(codes[codes >= 0], minlength=classes)
        again = duplicates(table)
        return {
            "rows": len(table),
            "cells": np.stack([missing, len(table) - missing], axis=-1),
            "parts": parts,
            "labelled": np.array([len(codes) - labels.sum(), labels.sum()]),
            "labels": np.stack([np.zeros_like(labels), labels]),
            "repeats": np.array([again, len(table) - again]),
            "flags": flags,
        }

    def _shares(self, schema: TableSchema, quartiles: Floats, counts: Mapping[str, Floats]) -> dict[str, Floats]:
        """Each component's shares (of columns, or of one), from counts that are NaN where withheld."""
        names, numbers, _, time = self._columns(schema)
        watched, cells, labels = _watched(names, time), counts["cells"], counts["labels"][1]
        parts = counts["parts"][:, 1]
        with np.errstate(divide="ignore", invalid="ignore"):
            share, within = labels / labels.sum(), parts[:, 0] / parts.sum(axis=1)
            entropy = -np.where(share > 0, share * np.log(share), share * 0).sum() / np.log(len(labels))
            plausible = within[[watched.index(name) for name in numbers]]
            return {
                "completeness": cells[: len(names), 1] / cells[: len(names)].sum(axis=1),
                "uniqueness": counts["repeats"][1:] / counts["repeats"].sum(),
                "plausibility": np.where(quartiles[:, 2] > quartiles[:, 0], plausible, np.nan),
                "balance": np.array([entropy if len(labels) > 1 else np.nan]),
                "timeliness": np.array([within[watched.index(time)] if time else np.nan]),
            }


def _watched(names: list[str], time: str) -> list[str]:
    """The columns whose cells are counted: *names* first."""
    return [*names, time] if time and time not in names else names


def _fields(shapes: Mapping[str, tuple[int, ...]], rows: int) -> dict[str, Any]:
    """Declared counts of these shapes, and where they are withheld."""
    marks = {f"{name}_withheld": withheld(shape) for name, shape in shapes.items()}
    return {**{name: count(shape, bound=rows) for name, shape in shapes.items()}, **marks}


def _known(counts: Mapping[str, Any], tables: Sequence[Cells], smallest: int) -> dict[str, Floats]:
    """Counts by table, NaN where withheld; what a table before it splits is withheld with that table's cell."""
    hidden = {table.counts: table.hidden(counts, smallest) for table in tables}
    for table in tables:
        for name in table.values:
            hidden[name] |= hidden[table.counts][..., None]
    return {name: np.where(marks, np.nan, counts[name]) for name, marks in hidden.items()}


def _components(shares: Mapping[str, Floats]) -> dict[str, float]:
    """The mean of each component's shares that are defined; NaN where none is."""
    known = {name: values[~np.isnan(values)] for name, values in shares.items()}
    return {name: float(values.mean()) if len(values) else math.nan for name, values in known.items()}


def _told(values: Mapping[str, Any]) -> dict[str, Any]:
    """*values*, None where NaN."""
    known = {k: float(v) if isinstance(v, float | np.floating) else v for k, v in values.items()}
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in known.items()}


def _power(own: float, cohort: float) -> int:
    """The power of ten nearest to the ratio of two medians, at most 3 in size; 0 where one of them is 0."""
    if not own or not cohort:
        return 0
    return max(min(round(math.log10(abs(own / cohort))), 3), -3)


def _months(dates: NDArray[Any]) -> NDArray[np.int64]:
    """Months since FIRST_MONTH, −1 where missing, [num_rows]."""
    known = ~np.isnat(dates)
    months = np.full(len(dates), -1, np.int64)
    months[known] = np.clip((dates[known].astype("datetime64[M]") - FIRST_MONTH).astype(np.int64), 0, MONTHS - 1)
    return months


__all__ = ["COMPONENTS", "Quality"]
