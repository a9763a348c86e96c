"""Rounds in which single changes are seen, or those of groups of sites: what a rule makes of them, and the evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from atoll.aggregation.rule import MEAN, means, sound
from atoll.aggregation.suspicion import Evidence, Seen
from atoll.compression.link import Link
from atoll.contract.errors import ProtocolError
from atoll.contract.program import Cohort
from atoll.contract.rounds import Field as Declared
from atoll.contract.rounds import Gather, Gathered, Round, Sum, Together, real
from atoll.contract.schema import TableSchema
from atoll.contract.updates import Update
from atoll.horizontal.factored import Collecting, State
from atoll.horizontal.payload import Payload

Told = tuple[tuple[str, ...], Update]
"""Sites, and their update."""


class Single:
    """What learners of the family do where the mean of a Sum is not enough. params: theirs."""

    params: Any
    link: Link
    evidence: Evidence
    gaps: ClassVar[bool]

    def payload(self, schema: TableSchema) -> Payload:
        raise NotImplementedError

    def _single(self, cohort: Cohort, fields: Mapping[str, Declared], sent: State, number: int) -> Collecting:
        """One round of the sites' training: (what the plan's rule makes of their changes, whose they are)."""
        p, rule = self.params, self.params.aggregate
        names, to = tuple(name for name in fields if name != "weight"), self.link.apart
        if rule.single or p.compress.alone:
            reduce = Gather(lenient=rule.single)
            found = yield Round("train_single", reduce, fields, sent, to, draw=p.sites_per_round, paced=True)
            told, wrong = self._read(cohort, found, names)
            broken = list(wrong)
            if rule.rule == MEAN:
                nothing = Update.zero_like({name: np.zeros(()) for name in names})
                return sum((update for _, update in told), nothing), found.sites
        else:
            groups = self._groups(cohort, number)
            lenient = Sum(lenient=True)
            each = (Round("train", lenient, fields, sent, to, sites=group, among=True) for group in groups)
            sums = yield Together(tuple(each))
            told = [(one.sites, Update.from_sum(one, names)) for one in sums if one.sites]
            broken = [site for group, one in zip(groups, sums, strict=True) if not one.sites for site in group]
        some, payload = [one for one in told if sound(one[1])], self.payload(cohort.schema)
        if self.gaps and len(some) < rule.least:  # of too few the rule makes nothing
            return Update.zero_like(payload.zeros()), ()
        weights = np.array([update.weight for _, update in some])
        bounds = {name: bound for name, (_, bound) in payload.shapes.items()}
        updates, beyond = means([update for _, update in some], bounds)
        broken = [*broken, *(site for sites, update in told if sound(update) is None for site in sites)]
        combined = rule.combine(updates, [" + ".join(sites) for sites, _ in some])
        groups, changes, result = [sites for sites, _ in some], updates["weights"], combined.values["weights"]
        if cohort.exact:  # noise is no evidence
            self.evidence.note(Seen(groups, changes, weights, result, combined.trust, beyond, broken))
        weight = float(np.median(weights)) * len(weights)  # what sites say of themselves is not to be trusted
        values = {name: value * weight for name, value in combined.values.items()}
        return Update(values, weight), tuple(site for sites in groups for site in sites)

    def _read(self, cohort: Cohort, found: Gathered, names: Sequence[str]) -> tuple[list[Told], dict[str, str]]:
        """Each site's update, and what was wrong with those left out."""
        compress, broken, told = self.params.compress, dict(found.broken), list[Told]()
        size = compress.asked(len(self.payload(cohort.schema).moving))
        for site in found.sites:
            reply = dict(found[site])
            if compress.alone:
                try:
                    change = compress.read(reply["weights"], size)
                    real(bound=self.params.clip).check_values("weights", change)
                except ProtocolError as error:
                    if not self.params.aggregate.single:
                        raise error.at(site=site) from None
                    broken[site] = error.code
                    continue
                reply["weights"] = change * float(reply["weight"])
            told.append(((site,), Update.from_sum(reply, tuple(names))))
        return told, broken

    def _groups(self, cohort: Cohort, number: int) -> list[tuple[str, ...]]:
        """The sites of a round in groups of nearly the same size, drawn by the plan's seed."""
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence((cohort.seed, number, 4))))
        order, wanted = random.permutation(len(cohort.sites)), self.params.aggregate.groups or 1
        drawn = [np.sort(part) for part in np.array_split(order[: self.params.sites_per_round], wanted)]
        return [tuple(cohort.sites[place] for place in part) for part in drawn if len(part)]
