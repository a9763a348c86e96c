"""Who masks with whom, and how many must remain.

Up to 64 sites everyone masks with everyone. Above, each site has neighbours on a ring of the sites in an order that
a hash of run, round and roster gives, as many as make the two failures below improbable: Bell et al. 2020, Secure
Single-Server Aggregation with (Poly)Logarithmic Overhead (CCS), §3 and Lemma 3.7. The degree grows with the logarithm
of the number of sites.

An active coordinator draws the run's id, and may draw until the order suits it: against it the bound is one that no
search reaches. By naming sites as dropped out it can cut the ring in two places, where enough sites collude with it,
and learn the sums over the arcs, of more than half a neighbourhood each, in place of their sum (as in Bell et al. §4).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache

import scipy

from atoll.contract.protection import Terms
from atoll.crypto.prg import label
from atoll.crypto.shamir import MAX_HOLDERS

FULL_GRAPH_SITES = 64
COLLUDING = 0.2
"""Share of sites that may collude with the coordinator, above FULL_GRAPH_SITES."""
DROPPING = 0.2
"""Share of sites that may drop out in a round, above FULL_GRAPH_SITES."""
SECURITY_BITS = {"curious": 40, "active": 80}
CORRECTNESS_BITS = 30


def threshold(holders: int, adversary: str) -> int:
    """How many of *holders* must agree: more than half against a curious coordinator (no two sets of them are
    disjoint), more than two thirds against an active one (any two have an honest party in common, when fewer than a
    third collude: Bonawitz et al. 2017, Theorem 6.5)."""
    return holders // 2 + 1 if adversary == "curious" else 2 * holders // 3 + 1


@lru_cache(maxsize=256)
def degree(num_sites: int, adversary: str) -> int:
    """Neighbours of each site: the smallest even number for which, with probability 1 − 2^−SECURITY_BITS, no
    neighbourhood has a threshold of colluding sites, and, with 1 − 2^−CORRECTNESS_BITS, all keep one of survivors.

    At most one less than can hold shares: some hundred sites against an active coordinator come to that, and then
    survive somewhat fewer dropouts, at the same security.
    """
    if num_sites <= FULL_GRAPH_SITES:
        return num_sites - 1
    bad, lost = math.ceil(COLLUDING * num_sites), math.ceil(DROPPING * num_sites)
    most = min(num_sites, MAX_HOLDERS) - 1
    drawn = scipy.stats.hypergeom
    for k in range(8, most, 2):
        needed = threshold(k + 1, adversary)
        colluding = drawn.logsf(needed - 2, num_sites - 1, bad, k) / math.log(2)  # with itself one short
        too_few = drawn.logsf(k + 1 - needed - 1, num_sites - 1, lost, k) / math.log(2)
        if max(colluding + SECURITY_BITS[adversary], too_few + CORRECTNESS_BITS) + math.log2(num_sites) <= 0:
            return k
    return most


def neighbours(terms: Terms) -> dict[str, tuple[str, ...]]:
    """Every site's neighbours, without itself, ordered by name."""
    sites = terms.cohort
    k = degree(len(sites), terms.choice.adversary)
    if k >= len(sites) - 1:
        return _complete(sites)
    return _ring(sites, k, label("graph", *terms.label()))


@lru_cache(maxsize=8)
def _complete(sites: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    return {site: tuple(other for other in sites if other != site) for site in sites}


@lru_cache(maxsize=8)
def _ring(sites: tuple[str, ...], k: int, seed: bytes) -> dict[str, tuple[str, ...]]:
    mixed = sorted(sites, key=lambda site: hashlib.sha256(label(seed, site)).digest())
    place = {site: i for i, site in enumerate(mixed)}
    reach = [step for step in range(-(k // 2), k // 2 + 1) if step]
    return {site: tuple(sorted(mixed[(place[site] + step) % len(mixed)] for step in reach)) for site in sites}


def holders(site: str, around: Sequence[str]) -> dict[str, int]:
    """The numbers 1 … k + 1 by which a site and its neighbours hold shares of its secrets."""
    return {holder: i for i, holder in enumerate(sorted((site, *around)), start=1)}
