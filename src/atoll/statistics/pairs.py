"""Sums over the rows that two columns have in common: counts, sums, squares and cross-products of scores.

For ``statistics.correlation``, whose scores are standardised values (``pearson.py``) or ranks (``spearman.py``): which
rows count, what a site sums of them and may tell, and what a record changes of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.contract.disclosure import TOP, Cells
from atoll.contract.errors import PlanError
from atoll.contract.program import SiteView
from atoll.contract.rounds import Field, Reply, count
from atoll.contract.schema import TableSchema
from atoll.contract.sensitivity import Norms, touches
from atoll.contract.wire import Array
from atoll.statistics.moments import add_largest
from atoll.statistics.noise import NOTHING, powers

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
RANKED = Cells("pairs", "withheld", values=("sums",), lines=(2,))
"""[columns, columns, 2]: rows with both columns, and rows with the first alone."""
PAIRS = replace(RANKED, largest="top")


@dataclass(frozen=True)
class Scores:
    """What columns become before they are multiplied, and how sites are asked for it.

    asked: the site's handler; send: what it needs; fields: what it answers beside the sums. A value is *center* +
    *scale* · its score, each [columns]. bound: of a site's sums of squared scores. error: most that a column's vector
    of scores is off, in units of values, [columns]; None where it is not known. sites: whom to ask; None: all.
    """

    asked: str
    send: Mapping[str, Floats]
    center: Floats
    scale: Floats
    bound: float
    sites: tuple[str, ...] | None = None
    error: Floats | None = None
    fields: Mapping[str, Field] = field(default_factory=dict)


class Pairs:
    """What both methods of correlation do. params: the program's."""

    params: Any

    @property
    def _listwise(self) -> bool:
        return bool(self.params.missing == "listwise")

    def _names(self, schema: TableSchema) -> tuple[str, ...]:
        names: tuple[str, ...] = self.params.columns or schema.numeric_columns()
        if bad := sorted(set(names) - set(schema.numeric_columns())):
            raise PlanError("plan.bad-column", "correlation needs numeric columns of the schema", field=", ".join(bad))
        return names

    # -- what one record changes

    def _counts_per_record(self, schema: TableSchema) -> dict[str, Norms]:
        apart = touches(len(self._names(schema)) if self._listwise else 0)
        return {"rows": touches(), "apart": apart, "left_out": NOTHING, "withheld": NOTHING}

    def _pairs_per_record(self, schema: TableSchema, most: Floats) -> dict[str, Norms]:
        """Of columns with |z| ≤ *most* a record adds z, z² and zzᵀ, the former once for each pair."""
        p = len(most)
        s, q = powers(most)
        cross = s.l2 * s.l2  # of the outer product zzᵀ
        l1, l2 = p * (s.l1 + q.l1) + s.l1 * s.l1, math.sqrt(p * (s.l2 * s.l2 + q.l2 * q.l2) + cross * cross)
        return {**self._counts_per_record(schema), "pairs": touches(p * p), "sums": Norms(l1, l2)}

    # -- at a site

    def _batches(self, site: SiteView, apart: Ints) -> Iterator[Floats]:
        """Matrices of a few MiB, of the rows that count; *apart* [columns] then has each column's values in others."""
        names = self._names(site.table.schema)
        done, size = 0, max(1024, (1 << 21) // max(len(names), 1))
        for batch in site.table.batches(names, size):
            if self._listwise:
                known = ~np.isnan(batch)
                complete = known.all(axis=1)
                apart += known.sum(axis=0) - complete.sum()
                yield batch[complete]
            else:
                yield batch
            done += len(batch)
            site.progress(done, len(site.table))

    def _products(self, site: SiteView, scored: Callable[[Floats], Floats], most: Floats | None = None) -> Reply:
        """Of batches as they are *scored*. Into *most* go the first column's largest magnitudes in each pair's rows,
        [columns, columns, TOP + 1]."""
        p, rows = len(self._names(site.table.schema)), 0
        pairs, sums, apart = np.zeros((p, p)), np.zeros((3, p, p)), np.zeros(p, np.int64)
        for seen in self._batches(site, apart):
            batch = scored(seen)
            known = ~np.isnan(batch)
            holes = np.asarray(~known.all(axis=0))  # only these columns need a product of masks
            mask, z = known[:, holes].astype(np.float64), np.where(known, batch, 0) if holes.any() else batch
            common = np.minimum.outer(known.sum(axis=0), known.sum(axis=0)).astype(np.float64)
            common[np.ix_(holes, holes)] = mask.T @ mask
            pairs += common
            for power, total in ((z, sums[0]), (z**2, sums[1])):
                together = np.repeat(power.sum(axis=0)[:, None], p, axis=1)
                together[:, holes] = power.T @ mask
                total += together
            sums[2] += z.T @ z
            rows += len(z)
            if most is not None:
                add_largest(most.reshape(p * p, TOP + 1), largest_of_pairs(magnitudes(seen), known))
        both = np.rint(pairs).astype(np.int64)
        told = np.zeros((p, p, 2, 3))
        told[:, :, 0] = np.moveaxis(sums, 0, -1)
        alone = np.diag(both)[:, None] - both
        return guarded(site, apart, {"rows": rows, "pairs": np.stack([both, alone], axis=-1), "sums": told})


def counted(schema: TableSchema, columns: int) -> dict[str, Field]:
    """Fields of every round: rows, how many others (listwise) have each column, and sites that left out their rows."""
    rows = schema.max_rows
    return {"rows": count(bound=rows), "apart": count(columns, bound=rows), "left_out": count(bound=1)}


def tell_tale(total: Mapping[str, Array], min_group_size: int) -> bool:
    """Whether sums over the complete rows may not be told, at a site or of the cohort."""
    few = (total["apart"] > 0) & (total["apart"] < min_group_size)
    return bool(few.any() or total["left_out"] > 0)


def guarded(site: SiteView, apart: Ints, reply: dict[str, Any]) -> Reply:
    """At a site: the reply, or nothing of it where a column's sums less those of the complete rows would tell a few."""
    if ((apart > 0) & (apart < site.min_group_size)).any():
        nothing = {name: np.zeros_like(array) for name, array in reply.items()}
        return {**nothing, "apart": np.zeros_like(apart), "left_out": 1}
    return {**reply, "apart": apart, "left_out": 0}


# ---------------------------------------------------------------- who dominates


def magnitudes(batch: Floats) -> Floats:
    """[columns, rows] of a batch [rows, columns], 0 where missing."""
    return np.nan_to_num(np.abs(batch.T), nan=0.0)


def largest_of(sizes: Floats) -> Floats:
    """The TOP largest (in any order) and the sum of each column's magnitudes [columns, rows]; [columns, TOP + 1]."""
    found, n = np.zeros((len(sizes), TOP + 1)), min(TOP, sizes.shape[1])
    found[:, TOP] = sizes.sum(axis=1)
    if n:
        found[:, :n] = np.partition(sizes, -n, axis=1)[:, -n:]
    return found


def largest_of_pairs(sizes: Floats, known: NDArray[np.bool_], near: int = 64) -> Floats:
    """Of each pair of columns :func:`largest_of` the first's magnitudes [columns, rows] in the rows *known* [rows,
    columns] of the second; [columns², TOP + 1]. Mostly they are among a column's *near* largest."""
    p, rows = sizes.shape
    found = np.zeros((p, p, TOP + 1))
    found[..., TOP] = sizes @ known.astype(np.float64)
    for i, size in enumerate(sizes):
        place = np.argpartition(size, -near)[-near:] if rows > near else np.arange(rows)
        there = known[place]
        found[i, :, :TOP] = largest_of((size[place, None] * there).T)[:, :TOP]
        if rows > near:
            for j in np.flatnonzero(there.sum(axis=0) < TOP):
                found[i, j, :TOP] = largest_of((size * known[:, j])[None])[0, :TOP]
    return found.reshape(p * p, TOP + 1)


def largest_of_either(most: Floats) -> Floats:
    """As :func:`largest_of`, but such that a pair is dominated where either of its columns is, of *most* [p, p,
    TOP + 1]."""
    with np.errstate(invalid="ignore"):
        share = np.nan_to_num(np.cumsum(most[..., :TOP], axis=-1) / most[..., TOP:], nan=0.0)
    share = np.minimum(np.maximum(share, share.swapaxes(0, 1)), 1.0)
    top = np.diff(share, axis=-1, prepend=0.0)
    return np.concatenate([top, np.maximum(top.sum(axis=-1, keepdims=True), 1.0)], axis=-1)
