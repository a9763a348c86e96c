"""PowerSGD: the change of each layer's matrix as the product of two thin ones, found by one step of power iteration.

Source: Vogels, Karimireddy & Jaggi 2019, PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization
(NeurIPS), Algorithms 1 and 2: P ← Σ M Q; P̂ ← orthogonalise(P); Q ← Σ Mᵀ P̂; the change is P̂ Qᵀ, and the next round
begins with its Q (warm start). Each site keeps M − P̂ P̂ᵀ M, what its part of the product leaves out (error feedback).

Both are sums, so that every protection makes them: a training round is two rounds of sums, of P and of Q. A layer of
one dimension, or one that two factors would not make smaller, travels as it is, with P.

Parties: sites and coordinator. What the coordinator learns: the mean of P and of Q, and so the change; each site's
under ``plain``. Dropout: a site that is in P's sum alone keeps its change for the next round. Cost: rank · (rows +
columns) numbers for a layer of rows × columns, and as many to the sites.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from atoll.contract.rounds import not_taken
from atoll.contract.wire import Array

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Matrix:
    """One layer that travels as two factors: it begins at *first* of the weights that travel."""

    first: int
    rows: int
    columns: int

    @property
    def where(self) -> slice:
        """Its weights."""
        return slice(self.first, self.first + self.rows * self.columns)

    def of(self, change: Floats) -> Floats:
        """Its part of *change*, [rows, columns]."""
        return change[self.where].reshape(self.rows, self.columns)


@dataclass(frozen=True, slots=True)
class LowRank:
    """How a change of [size] weights travels. dense: the places of what has no factors, [k]."""

    rank: int
    size: int
    matrices: tuple[Matrix, ...]
    dense: NDArray[np.int64]

    @staticmethod
    def of(shapes: Mapping[str, tuple[int, ...]], layers: Mapping[str, slice], moving: Array, rank: int) -> LowRank:
        """shapes: of the layers that have several dimensions (the first is the rows; as in the paper, the others are
        the columns). moving: places of the weights that travel, in order; the model's weights may be there several
        times, one after another."""
        total = max((where.stop for where in layers.values()), default=0)
        found, covered = [], np.zeros(len(moving), bool)
        for copy in range(int(moving[-1]) // max(total, 1) + 1):
            for name, shape in shapes.items():
                rows, columns = shape[0], math.prod(shape[1:])
                start, size = copy * total + layers[name].start, rows * columns
                first = int(np.searchsorted(moving, start))
                there = moving[first : first + size]
                whole = len(there) == size and there[0] == start and there[-1] == start + size - 1
                if len(shape) > 1 and whole and min(rank, rows, columns) * (rows + columns) < size:
                    found.append(Matrix(first, rows, columns))
                    covered[found[-1].where] = True
        return LowRank(rank, len(moving), tuple(found), np.flatnonzero(~covered))

    def width(self, matrix: Matrix) -> int:
        """Columns of its factors: the rank, or all that there are."""
        return min(self.rank, matrix.rows, matrix.columns)

    @property
    def lefts(self) -> tuple[int, ...]:
        """Elements of each P."""
        return tuple(m.rows * self.width(m) for m in self.matrices)

    @property
    def rights(self) -> tuple[int, ...]:
        """Elements of each Q."""
        return tuple(m.columns * self.width(m) for m in self.matrices)

    @property
    def longest(self) -> tuple[float, float]:
        """How much larger an element of P, or of Q, can be than one of the change: √ of most columns, or rows."""
        most = [(m.columns, m.rows) for m in self.matrices] or [(1, 1)]
        return max(c for c, _ in most) ** 0.5, max(r for _, r in most) ** 0.5

    def begin(self, seed: int) -> Floats:
        """Q to begin with: random, orthonormal columns, [Σ rights]."""
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, self.size, 11))))
        return self.orthonormal(random.standard_normal(sum(self.rights)), self.rights)

    def orthonormal(self, factors: Array, sizes: Sequence[int]) -> Floats:
        """Each factor with orthonormal columns that span the same, flat. A column of nothing becomes any direction."""
        parts = [np.linalg.qr(part)[0].reshape(-1) for part in self.parts(factors, sizes)]
        return np.concatenate([*parts, np.zeros(0)])

    def parts(self, factors: Array, sizes: Sequence[int]) -> list[Floats]:
        """Flat *factors* as matrices of each its width."""
        ends = np.cumsum([0, *sizes])
        widths = map(self.width, self.matrices)
        return [
            np.asarray(factors[start:stop], np.float64).reshape(-1, width)
            for start, stop, width in zip(ends, ends[1:], widths, strict=False)
        ]

    def directions(self, factors: Floats, sizes: Sequence[int]) -> list[Floats]:
        """What came with a task, as matrices; raises ProtocolError where a column is longer than 1: what leaves a site
        would be beyond what it declares."""
        found = self.parts(factors, sizes)
        if any((np.linalg.norm(part, axis=0) > 1.001).any() for part in found):
            raise not_taken("directions")
        return found

    def left(self, change: Floats, right: Floats) -> Floats:
        """P = M Q of every matrix, then what is dense, [Σ lefts + k]."""
        found = [m.of(change) @ q for m, q in zip(self.matrices, self.directions(right, self.rights), strict=True)]
        return np.concatenate([*(part.reshape(-1) for part in found), change[self.dense]])

    def right(self, change: Floats, left: Floats) -> tuple[Floats, Floats]:
        """(Q = Mᵀ P̂ of every matrix, [Σ rights]; what P̂ Qᵀ leaves of *change*, [size]; zero where it is dense)."""
        rest, found = np.zeros(self.size), [np.zeros(0)]
        for matrix, p in zip(self.matrices, self.directions(left, self.lefts), strict=True):
            q = matrix.of(change).T @ p
            rest[matrix.where] = (matrix.of(change) - p @ q.T).reshape(-1)
            found.append(q.reshape(-1))
        return np.concatenate(found), rest

    def joined(self, left: Floats, right: Floats, dense: Floats) -> Floats:
        """P̂ Qᵀ, and what is dense, [size]."""
        change = np.zeros(self.size)
        change[self.dense] = dense
        both = zip(self.matrices, self.parts(left, self.lefts), self.parts(right, self.rights), strict=True)
        for matrix, p, q in both:
            change[matrix.where] = (p @ q.T).reshape(-1)
        return change
