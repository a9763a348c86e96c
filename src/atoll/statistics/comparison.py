"""Comparison of sites' tables before a study: what differs so much that a model should not be fitted yet.

Parties: sites and coordinator. Messages: the rounds of ``statistics.quality``; one Sum, "shares", of missing
cells and codes, and of sites in which a column is empty or has one value, which has a code, and by
time grain; the cohort's shares go out, and one Sum, "apart", counts the sites that lie apart from them; round
"own" (asked only where a site's policy may share it) asks each site for its own flags. The coordinator
learns, of the cohort's total: missing cells and code counts (withheld where few, or where few have no code),
and how many sites raised each flag; under ``plain`` each site's. Threat model: as the plan's protection; a
site compares itself with one set of shares in a run. Dropout: the survivors' counts. Cost: quality's, and then
about 50 bytes a column and 20 a code.

Flags, by column: *empty* (no value at all), *constant* (one value), *missing* (the share of missing cells is
more than APART from the cohort's), *shares* (so is the distribution over the code list, in total variation,
codes that are withheld being one: for a label, its prevalence), *absent* (a code that makes COMMON of the
cohort's rows with a code is not there).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.contract.disclosure import Cells
from atoll.contract.errors import PolicyError, ProtocolError
from atoll.contract.program import Cohort, ProgramParams, SiteView, TableView, handler, program
from atoll.contract.rounds import Gather, Reply, Round, Steps, Sum, Task, count, real, withheld
from atoll.contract.schema import TableSchema
from atoll.contract.wire import Array
from atoll.statistics.noise import smallest
from atoll.statistics.quality import Quality

APART, COMMON = 0.2, 0.05
GRAINS_S = {"1s": 1, "1min": 60, "15min": 900, "1h": 3600, "1d": 86_400, "1w": 604_800, "1 month": 2_419_200}
CELLS = Cells("cells", "cells_withheld", lines=(1,))
"""[columns, 2]: missing, present. Rows are known, so one is withheld with the other."""
CODED = Cells("coded", "coded_withheld", values=("codes",), lines=(1,))
CODES = Cells("codes", "codes_withheld", lines=(2,))
"""The same of columns with a code list; and what is present by code, [coded columns, 2, codes]."""
FLAGS = ("empty", "constant", "missing", "shares", "absent")


class _Columns:
    """A schema's columns as this program sees them."""

    def __init__(self, schema: TableSchema) -> None:
        used = {n: c for n, c in schema.columns.items() if c.role not in ("ignore", "entity") and c.dtype != "image"}
        self.names = list(used)
        self.coded = [name for name, column in used.items() if column.values is not None]
        self.times = [name for name, column in used.items() if column.dtype in ("date", "datetime")]
        self.most = max((len(used[name].values or ()) for name in self.coded), default=0)


@program(
    "statistics.comparison",
    needs={"sum"},
    offers={"bounded", "resolution", "bounded-weight"},
    calls={"statistics.quality", "statistics.quantiles"},
)
class Comparison:
    """What differs between sites' tables: missing cells, codes, prevalence, units, time grain; and their quality."""

    class Params(ProgramParams):
        """own: also ask each site for its own flags, where its policy shares them."""

        own: bool = True

    def __init__(self, params: Params) -> None:
        self.params = params

    def coordinate(self, cohort: Cohort, start: Mapping[str, Array] | None = None) -> Steps:
        """Returns {"quality": as that program, "comparison": {"sites": number, "columns": {name: {flag: sites}},
        "codes": {name: {code: sites that have it}}, "grains": {name: {grain: sites}},
        "own": {site: {name: [flags]}}}}."""
        columns, rows, fewest = _Columns(cohort.schema), cohort.schema.max_rows, smallest(cohort)
        size, coded, most = len(columns.names), len(columns.coded), columns.most
        quality = yield from Quality(Quality.Params(own=self.params.own)).coordinate(cohort)
        fields = {
            "rows": count(bound=rows),
            "sites": count(bound=1),
            "cells": count((size, 2), bound=rows),
            "cells_withheld": withheld((size, 2)),
            "coded": count((coded, 2), bound=rows),
            "coded_withheld": withheld((coded, 2)),
            "codes": count((coded, 2, most), bound=rows),
            "codes_withheld": withheld((coded, 2, most)),
            "has": count((coded, most), bound=1),
            "alone": count((size, 2), bound=1),
            "grains": count((len(columns.times), len(GRAINS_S)), bound=1),
        }
        total = yield Round("shares", Sum(), fields)
        with np.errstate(invalid="ignore", divide="ignore"):
            gone = CELLS.hidden(total, fewest).any(axis=1)
            missing = np.where(gone, -1.0, np.nan_to_num(total["cells"][:, 0] / total["cells"].sum(axis=1), nan=-1.0))
            hidden = (CODES.hidden(total, fewest) | CODED.hidden(total, fewest)[..., None])[:, 1]
            codes = np.minimum(np.nan_to_num(total["codes"][:, 1] / total["coded"][:, 1:]), 1.0)
            codes = np.where(hidden, -1.0, codes)
        send = {"missing": missing, "codes": codes}
        apart = yield Round(
            "apart", Sum(), {"missing": count(size, bound=1), "codes": count((coded, 2), bound=1)}, send
        )
        own: dict[str, dict[str, list[str]]] = {}
        if self.params.own and cohort.exact:
            flags = {"flags": real((size, len(FLAGS)))}
            gathered = yield Round("own", Gather(), flags, send, optional=True)
            own = {site: _named(columns, gathered[site]["flags"]) for site in gathered}
        found = {name: {"empty": int(alone[0]), "constant": int(alone[1]), "missing": int(far)}
                 for name, alone, far in zip(columns.names, total["alone"], apart["missing"], strict=True)}  # fmt: skip
        for name, (shares, absent) in zip(columns.coded, apart["codes"], strict=True):
            found[name] |= {"shares": int(shares), "absent": int(absent)}
        has = {
            name: {str(v): int(n) for v, n in zip(cohort.schema.columns[name].values or (), seen, strict=False)}
            for name, seen in zip(columns.coded, total["has"], strict=True)
        }
        grains = {
            name: {grain: int(n) for grain, n in zip(GRAINS_S, seen, strict=True) if n}
            for name, seen in zip(columns.times, total["grains"], strict=True)
        }
        told = {"sites": int(total["sites"]), "columns": found, "codes": has, "grains": grains, "own": own}
        return {**quality, "comparison": told}

    @handler("shares", groups=("rows",), cells=(CELLS, CODED, CODES))
    def shares(self, site: SiteView, task: Task) -> Reply:
        """At the site: missing cells and codes, and which columns are empty or constant, and their time grain."""
        table, columns = site.table, _Columns(site.table.schema)
        missing, codes, alone = self._counted(table, columns, max(site.min_group_size, 2))
        grains = np.zeros((len(columns.times), len(GRAINS_S)), np.int64)
        for i, name in enumerate(columns.times):
            if (grain := _grain(table[name])) is not None:
                grains[i, grain] = 1
        has = codes >= max(site.min_group_size, 1)
        cells = np.stack([missing, len(table) - missing], axis=-1)
        coded = cells[[columns.names.index(name) for name in columns.coded]]
        split = np.stack([np.zeros_like(codes), codes], axis=1)
        found = {"cells": cells, "coded": coded, "codes": split, "has": has.astype(np.int64), "alone": alone}
        return {"rows": len(table), "sites": 1, **found, "grains": grains}

    @handler("apart")
    def apart(self, site: SiteView, task: Task) -> Reply:
        """At the site: whether its shares of missing cells and codes lie apart from the cohort's."""
        flags = self._flags(site, task)
        names = _Columns(site.table.schema)
        return {"missing": flags[:, 2], "codes": flags[[names.names.index(name) for name in names.coded], 3:]}

    @handler("own", reduce="gather")
    def own(self, site: SiteView, task: Task) -> Reply:
        """At the site: its own flags; withheld unless its policy shares "metrics"."""
        if not site.shares("metrics"):
            raise PolicyError("policy.withheld", "the site does not share its own metrics", field="share")
        return {"flags": self._flags(site, task).astype(np.float64)}

    def _flags(self, site: SiteView, task: Task) -> NDArray[np.int64]:
        """[columns, FLAGS], 0 or 1; raises ProtocolError when asked against other shares than before in the run."""
        table, columns = site.table, _Columns(site.table.schema)
        far = task.take("missing", (len(columns.names),))
        shares = task.take("codes", (len(columns.coded), columns.most))
        told = np.concatenate([far, shares.ravel()])
        if not np.array_equal(site.state.setdefault("compared with", told), told):
            raise ProtocolError("task.changed", "a site compares itself with one set of shares in a run", field="codes")
        missing, codes, alone = self._counted(table, columns, max(site.min_group_size, 2))
        flags = np.zeros((len(columns.names), len(FLAGS)), np.int64)
        flags[:, :2] = alone
        if len(table) >= max(site.min_group_size, 1):
            flags[:, 2] = (far >= 0) & (np.abs(missing / max(len(table), 1) - far) > APART)
            for i, name in enumerate(columns.coded):
                if (known := codes[i].sum()) >= max(site.min_group_size, 1):
                    at = columns.names.index(name)
                    told, mine = shares[i] >= 0, codes[i] / known
                    others = 0.0 if told.all() else abs(shares[i][told].sum() - mine[told].sum())
                    flags[at, 3] = (np.abs(mine - shares[i])[told].sum() + others) / 2 > APART
                    flags[at, 4] = ((shares[i] >= COMMON) & (codes[i] == 0)).any()
        return flags

    @staticmethod
    def _counted(
        table: TableView, columns: _Columns, smallest: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Missing cells [columns], codes [coded columns, most codes], and (empty, constant) [columns, 2]."""
        missing = np.zeros(len(columns.names), np.int64)
        alone = np.zeros((len(columns.names), 2), np.int64)
        codes = np.zeros((len(columns.coded), columns.most), np.int64)
        for i, name in enumerate(columns.names):
            if name in columns.coded:
                places = table.codes(name)
                known = places[places >= 0]
                codes[columns.coded.index(name)] = np.bincount(known, minlength=columns.most)
            else:
                cells = table[name]
                if cells.dtype == object:
                    there = np.fromiter((cell is not None for cell in cells), bool, len(cells))
                else:
                    there = ~(np.isnan(cells) if cells.dtype.kind == "f" else np.isnat(cells))
                known = cells[there]
            missing[i] = len(table) - len(known)
            constant = len(known) >= smallest and bool((known == known[0]).all())
            alone[i] = len(table) >= smallest and not len(known), constant
        return missing, codes, alone


def _grain(times: NDArray[Any]) -> int | None:
    """The place in GRAINS_S of the most frequent step between successive times; None where there are too few."""
    seconds = np.unique(times[~np.isnat(times)].astype("datetime64[s]").astype(np.int64))
    if len(seconds) < 3:
        return None
    steps, often = np.unique(np.diff(seconds), return_counts=True)
    return max(int(np.searchsorted(list(GRAINS_S.values()), steps[np.argmax(often)], side="right")) - 1, 0)


def _named(columns: _Columns, flags: Array) -> dict[str, list[str]]:
    raised = {
        n: [flag for flag, up in zip(FLAGS, row, strict=True) if up]
        for n, row in zip(columns.names, flags, strict=True)
    }
    return {name: names for name, names in raised.items() if names}
