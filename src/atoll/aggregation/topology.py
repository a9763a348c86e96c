"""Who talks to whom where no coordinator averages, and how much weight a site gives to what it hears.

A mixing matrix W is [sites, sites]; W[i, j] is the weight that site i gives to site j's model, so that i hears from
those with W[i, j] > 0. All are doubly stochastic: nobody's model counts for more than another's in the end.

- ring, mesh (a grid), torus (a grid whose ends meet), complete: both directions, with Metropolis weights,
  W[i, j] = 1 / (1 + max(degree of i, degree of j)).
- exponential: i hears from i − 1, i − 2, i − 4, …, each with weight 1 / (1 + ⌈log₂ n⌉).
- one_peer: of these, one at a time, in turn, with weight ½: after log₂ n rounds, n a power of two, all is averaged.

Sources: Xiao, Boyd & Kim 2007, Distributed Average Consensus with Least-Mean-Square Deviation, §5 (Metropolis weights);
Ying et al. 2021, Exponential Graph is Provably Efficient for Decentralized Deep Training (NeurIPS), eq. 5 and 7.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Topology = Literal["ring", "mesh", "torus", "complete", "exponential", "one_peer"]
Matrix = NDArray[np.float64]


def mixing(topology: Topology, size: int, number: int = 0) -> Matrix:
    """W of *size* sites in round *number*, which matters for one_peer alone, [size, size]."""
    if topology in ("exponential", "one_peer"):
        hops = max(size - 1, 0).bit_length()  # ⌈log₂ size⌉
        one = [number % hops] if hops else []
        chosen = one if topology == "one_peer" else list(range(hops))
        weights = np.eye(size)
        for hop in chosen:
            weights += np.roll(np.eye(size), 2**hop, 0)
        found: Matrix = weights / (1 + len(chosen))
        return found
    return metropolis(_graph(topology, size))


def metropolis(graph: NDArray[np.bool_]) -> Matrix:
    """Weights of an undirected graph without loops, [size, size]."""
    degree = graph.sum(1)
    weights = np.where(graph, 1 / (1 + np.maximum(degree[:, None], degree[None, :])), 0.0)
    weights[np.diag_indices_from(weights)] = 1 - weights.sum(1)
    return weights


def spectral_gap(weights: Matrix) -> float:
    """1 − ‖W − 11ᵀ/n‖₂: by what share, at least, each round brings the sites nearer to their mean. 0: not at all."""
    size = len(weights)
    return max(0.0, 1 - float(np.linalg.norm(weights - 1 / size, 2)))


def connectivity(weights: Matrix) -> float:
    """1 − λ₂ of W's symmetric part: Σᵢⱼ W_ij ‖xᵢ − xⱼ‖² ≥ 2 (1 − λ₂) Σᵢ ‖xᵢ − x̄‖². 0: the graph falls apart."""
    if len(weights) == 1:
        return 1.0
    return max(0.0, 1 - float(np.linalg.eigvalsh((weights + weights.T) / 2)[-2]))


def heard(weights: Matrix, site: int) -> list[int]:
    """Whom *site* hears from, besides itself, in order."""
    return [int(other) for other in np.flatnonzero(weights[site]) if other != site]


def told(weights: Matrix, site: int) -> list[int]:
    """Who hears from *site*, besides itself, in order."""
    return heard(weights.T, site)


def without(row: Matrix, site: int, here: list[int]) -> Matrix:
    """*site*'s row of W when only those in *here* are heard: what the others would weigh, the site's own model does.
    Where two sites miss each other, W stays doubly stochastic."""
    kept = np.zeros_like(row)
    kept[here] = row[here]
    kept[site] = 0
    kept[site] = 1 - kept.sum()
    return kept


def _graph(topology: Topology, size: int) -> NDArray[np.bool_]:
    graph = np.zeros((size, size), bool)
    if topology == "complete":
        graph[:] = True
    elif topology == "ring":
        for site in range(size):
            graph[site, (site + 1) % size] = True
    else:
        high = next(rows for rows in range(math.isqrt(size), 0, -1) if size % rows == 0)  # as square as it can be
        wide = size // high
        for site in range(size):
            row, column = divmod(site, wide)
            if topology == "torus" or column + 1 < wide:
                graph[site, row * wide + (column + 1) % wide] = True
            if topology == "torus" or row + 1 < high:
                graph[site, (row + 1) % high * wide + column] = True
    graph |= graph.T
    np.fill_diagonal(graph, False)
    return graph
