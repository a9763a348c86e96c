"""Chains of transmission: which cases of a region are linked to which, and the place where other regions' will join.

Within one region, cases and the case that each is linked to ("link to other cases" of the case list) make chains:
connected components of the graph of links. A link to a case that is not in the region's own list points outside: its
infector may be on another region's list. To find out which region's, and nothing else, case numbers of several regions
must be matched privately (private set intersection over links), so that nobody learns a case that is not shared. That
matching is not there yet: :data:`NOT_YET` is what outputs say, and :class:`LinkMatcher` is what it has to do.

Source: union-find: Tarjan 1975, Efficiency of a Good But Not Linear Set Union Algorithm, J. ACM 22(2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from atoll.contract.errors import SchemaError

NOT_YET = "Links between regions are not available yet: case numbers would have to be matched privately."


@dataclass(frozen=True, slots=True)
class Chains:
    """The chains of one case list. chain: of each case, [cases], numbered from 0 by its first case. size: cases of each
    chain, [chains]. infector: the place of the case that each is linked to, [cases], −1 where that is none of the list.
    outside: places of cases that are linked to a case of nobody knows which region."""

    chain: NDArray[np.int64]
    size: NDArray[np.int64]
    infector: NDArray[np.int64]
    outside: NDArray[np.int64]

    @property
    def index_cases(self) -> NDArray[np.int64]:
        """Places of cases without a known infector, where chains begin."""
        return np.flatnonzero(self.infector < 0)


class LinkMatcher(Protocol):
    """Private matching of case links across regions; the port that alignment will fill.

    Parties: a site for each region, and the coordinator. Each site gives its own cases' numbers and the numbers that
    its cases point to outside. It may learn which of *its own* numbers are pointed to, and by which site; nobody may
    learn another site's number that is not shared, and the coordinator learns at most how many links there are.
    """

    def match(self, site: str, cases: Sequence[str], outside: Sequence[str]) -> Mapping[str, str]:
        """Of a site's *outside* numbers, those that other sites have, and at which site."""


def chains(cases: NDArray[Any], linked_to: NDArray[Any]) -> Chains:
    """The chains of one case list. cases: each case's own number, [cases], unique; linked_to: the number of the case
    that it is linked to, [cases], None where there is none (a case may not be linked to itself).

    Raises SchemaError "epidemic.repeated-case" and "epidemic.self-link"; neither tells a number.
    """
    place = {str(number): i for i, number in enumerate(cases)}
    if len(place) < len(cases):
        raise SchemaError(
            "epidemic.repeated-case", "a case number is there twice", remedy="clean with the step deduplicate"
        )
    parent = np.arange(len(cases))
    infector = np.full(len(cases), -1, np.int64)
    outside = []

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return int(i)

    for i, number in enumerate(linked_to):
        if number is None or number == "":
            continue
        source = place.get(str(number))
        if source is None:
            outside.append(i)
            continue
        if source == i:
            raise SchemaError("epidemic.self-link", "a case is linked to itself", remedy="mend the case list's links")
        infector[i] = source
        a, b = root(i), root(source)
        parent[max(a, b)] = min(a, b)
    roots = np.array([root(i) for i in range(len(cases))], np.int64)
    _, chain = np.unique(roots, return_inverse=True)
    return Chains(chain.astype(np.int64), np.bincount(chain), infector, np.array(outside, np.int64))


def told(shared: int | None = None) -> dict[str, Any]:
    """What a program's output says of links between regions."""
    return {"shared": shared, "note": NOT_YET if shared is None else ""}
