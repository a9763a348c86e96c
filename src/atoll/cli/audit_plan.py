"""The audit of one plan: rehearsals of its rounds, whose bytes the attacks of :mod:`atoll.audit` are then given.

The attacker is the coordinator, curious and not more: it has each site's release, and the sum. The auditor, who is
not the attacker, chose the rows, and so can tell which were reconstructed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.audit.audit import PASSIVE, Attack, Leak, attack_rounds
from atoll.audit.dp_audit import audit_sum, canaries, two_worlds
from atoll.audit.leak import pictures, wilson
from atoll.audit.membership import Membership, lira, loss_threshold, ridge
from atoll.audit.subjects import batch_of, in_order, inputs_of, subject_of
from atoll.audit.view import Batch, Observation, Protection, captured
from atoll.cli.audit_reading import reading_of
from atoll.contract.plan import Plan
from atoll.contract.protection import find
from atoll.data.recipe import Prepared
from atoll.data.site_data import SiteData
from atoll.data.table import Table
from atoll.models.linear import LinearModel
from atoll.privacy.dp.release import Noise
from atoll.runtime.noise import noise_of
from atoll.runtime.rehearsal import (
    Rows,
    Seen,
    exact_reply,
    norms,
    read_as_numbers,
    rehearse,
    taken,
    trained,
)
from atoll.runtime.study import check_plan, settled

MOST_ROWS = 4000
"""So many members, and others, are enough to test membership."""
MOST_DRAWS = 200_000
"""So many numbers of a noise are enough to look at its size."""
Tell = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Options:
    """batches: rows of a local step. samples: how many rows to attack for each, about. local_steps: of SGD before the
    reply (FedAvg's relations); 0: as many as the plan says. steps: of each attack that searches."""

    batches: tuple[int, ...] = (1, 8)
    samples: int = 60
    local_steps: int = 1
    seed: int = 0
    steps: int = 300
    membership: bool = True


@dataclass
class Audited:
    """What was found. sheets: (title, PNG) of true and reconstructed images side by side."""

    found: dict[str, Any]
    sheets: list[tuple[str, bytes]] = field(default_factory=list)


def audit_plan(
    plan: Plan, data: Mapping[str, SiteData], options: Options, tell: Tell, public: NDArray[Any] | None = None
) -> Audited:
    """Attack *plan* over the sites' own rows. public: the attacker's own inputs, as the model's table has them.

    Raises PlanError "audit.not-training" for a program, and "audit.not-read" for a setting, that no attack reads.
    """
    plan = settled(plan)
    made = _Audit(plan, data, options, tell, public)
    done = [made.batch(size) for size in options.batches]
    batches, audited = [batch for batch, _ in done], Audited({}, [sheet for _, sheet in done if sheet])
    worst = max(batches, key=lambda batch: float(batch["leak_rate"]))
    audited.found = {
        "study": plan.name, "plan_hash": plan.hash, "program": plan.program, "protection": plan.protection.sum,
        "privacy": plan.privacy.model_dump(mode="json") if plan.privacy else None, "sites": list(data),
        "criterion": made.criterion(), "public": made.public_from, "seed": options.seed,
        "leak_rate": worst["leak_rate"], "attacked": sum(int(batch["attacked"]) for batch in batches),
        "reconstructed": sum(int(batch["reconstructed"]) for batch in batches), "batches": batches,
        "membership": made.membership() if options.membership else None, "dp": made.dp(), "notes": made.notes(),
    }  # fmt: skip
    return audited


def public_inputs(plan: Plan, tables: Sequence[Table]) -> NDArray[Any]:
    """The inputs of the plan's model in *tables* that need no fitted preparation."""
    model = _program(plan).model(tables[0].schema)
    return np.concatenate([inputs_of(model, table) for table in tables])


class _Audit:
    def __init__(
        self, plan: Plan, data: Mapping[str, SiteData], options: Options, tell: Tell, public: NDArray[Any] | None
    ) -> None:
        self.plan, self.data, self.options, self.tell = plan, data, options, tell
        self.program = _program(plan)
        prepared = Prepared(plan.recipe).schema(plan.table)
        self.reading = reading_of(plan, self.program, prepared, noised=plan.privacy is not None)
        self.noise: Noise | None = noise_of(plan, len(data))
        tell({"starting": "the plan on all rows"})
        self.first = rehearse(_small(plan, **self.reading.everybody), data, self.reading.handler)
        parts = {site: one.parts(self.first.view) for site, one in data.items()}
        self.schema = next(iter(parts.values()))[0].schema
        self.model = self.program.model(self.schema)
        self.random = np.random.default_rng(options.seed)
        self.rows = {site: self.reading.dressed(train) for site, (train, _) in parts.items()}
        self.order = {site: self.random.permutation(len(train)) for site, train in self.rows.items()}
        self.public_from = "the attacker's own"
        if public is None:
            public = self._held_out({site: held for site, (_, held) in parts.items()})
        self.subject = subject_of(self.model, np.array(self.first.sent["weights"]), public)
        self.noises: list[NDArray[np.float64]] = []

    def _held_out(self, held: Mapping[str, Table]) -> NDArray[Any]:
        """What stands for public data: rows of the sites that are not attacked."""
        if any(map(len, held.values())):
            self.public_from = "rows that the sites hold out"
            return np.concatenate([inputs_of(self.model, table) for table in held.values()])
        self.public_from = "a fifth of the sites' rows, which is not attacked"
        kept = []
        for site, order in self.order.items():
            cut = max(len(order) // 5, 1)
            kept.append(inputs_of(self.model, taken(self.rows[site], order[:cut])))
            self.order[site] = order[cut:]
        return np.concatenate(kept)

    def criterion(self) -> str:
        """When a row counts as reconstructed."""
        subject = self.subject
        if not subject.images:
            return f"every feature within {subject.tolerance / 2:.1%} of its range"
        limit = subject.criterion
        nearer = f"the dissimilarity of the nearest public image lessened by {limit.margin:.0%}"
        return f"SSIM ≥ {limit.ssim:g} and {nearer}"

    # ---------------------------------------------------------------- reconstruction

    def batch(self, size: int) -> tuple[dict[str, Any], tuple[str, bytes] | None]:
        """Rehearse rounds in which every site's step is of *size* rows, and attack them."""
        plan, steps, rows = self._step(min(size, *map(len, self.order.values())))
        each, fewest = rows * steps, min(map(len, self.order.values()))
        reveals = find(plan.protection.sum).reveals
        number = max(1, min(-(-self.options.samples // (each * len(self.data))), fewest // each))
        rounds: list[Mapping[str, Batch]] = []
        single: list[list[Observation]] = []
        summed: list[list[Observation]] = []
        for i in range(number):
            self.tell({"round": i, "name": f"batch {rows}"})
            chosen = {site: order[i * each : (i + 1) * each] for site, order in self.order.items()}
            seen, batches = self._round(plan, chosen, rows, steps)
            rounds.append(batches)
            single.append(self._single(seen, each, steps))
            if not reveals:
                mean = self._mean(seen.total, each * len(chosen), steps)
                summed.append([captured(self.subject.model, "sum", mean, each * len(chosen), tuple(chosen))])
        views = {"single replies": single}
        if not reveals:
            views[f"sum of {len(self.data)} sites"] = summed
        leaks = {view: self._attack(rounds, seen, f"batch {rows}, {view}") for view, seen in views.items()}
        baseline = attack_rounds(
            self.subject, rounds, Protection(), ("no-gradient",), seed=self.options.seed,
            captured=[*views.values()][-1],
        )  # fmt: skip
        told = self._told(rows, steps, leaks, baseline[0])
        return told, self._sheet(rows, rounds, leaks, baseline[0])

    def _step(self, rows: int) -> tuple[Plan, int, int]:
        """(the plan with such a local step, local steps, rows of each)."""
        fewest = min(map(len, self.order.values()))
        changes, steps, rows = self.reading.step(rows, fewest, self.options.local_steps)
        return _small(self.plan, **changes), steps, rows

    def _round(
        self, plan: Plan, chosen: Mapping[str, NDArray[np.int64]], rows: int, steps: int
    ) -> tuple[Seen, dict[str, Batch]]:
        """Have one round answered in which each site's batch is just its *chosen* rows."""
        fewest = min(map(len, self.order.values()))
        tables, sessions, batches = {}, {}, {}
        for site, mine in chosen.items():
            size, places, sessions[site] = self.reading.drawn(plan, self.first, site, fewest, rows * steps)
            index = np.empty(size, np.int64)
            others = np.setdiff1d(self.order[site], mine)
            index[places] = mine
            rest = np.setdiff1d(np.arange(size), places)
            index[rest] = self.random.permutation(others)[: len(rest)]
            tables[site], batch = taken(self.rows[site], index), taken(self.rows[site], mine)
            batches[site] = batch_of(self.model, inputs_of(self.model, batch), batch[self.model.targets[0]])
        data = {site: Rows(table) for site, table in tables.items()}
        seen = rehearse(plan, data, self.reading.handler, self.first.before, sessions)
        if self.noise is not None:
            self.noises.extend(self._noise(plan, seen, tables, sessions))
        return seen, batches

    def _single(self, seen: Seen, num_rows: int, steps: int) -> list[Observation]:
        reveals = find(self.plan.protection.sum).reveals
        numbers = read_as_numbers(self.plan, self.program, seen, self.noise, self.schema)
        found = []
        for site, arrays in numbers.items():
            mean = self._mean(arrays, num_rows, steps)
            found.append(captured(self.subject.model, "update" if reveals else "masked", mean, num_rows, (site,)))
        return found

    def _mean(self, arrays: Mapping[str, Any], num_rows: int, steps: int) -> NDArray[np.float64]:
        """Arrays of the round's fields as a mean gradient over *num_rows* rows."""
        vector = self.reading.gradient(arrays, num_rows, steps)
        return in_order(self.model, np.clip(np.nan_to_num(vector), -1e30, 1e30))

    def _attack(self, rounds: list[Mapping[str, Batch]], seen: list[list[Observation]], title: str) -> list[Leak]:
        leaks = []
        attacks: list[Attack] = [attack for attack in PASSIVE if attack != "no-gradient"]
        for attack in attacks:
            self.tell({"starting": f"{title}: {attack}"})
            leaks += attack_rounds(
                self.subject, rounds, Protection(), (attack,), seed=self.options.seed, steps=self.options.steps,
                captured=seen,
            )  # fmt: skip
        return leaks

    def _told(self, rows: int, steps: int, leaks: Mapping[str, list[Leak]], baseline: Leak) -> dict[str, Any]:
        """By each view and attack, and for all views together the attack that got most."""
        together: dict[str, NDArray[np.bool_]] = {}
        for leak in (leak for found in leaks.values() for leak in found):
            together[leak.attack] = together.get(leak.attack, np.zeros(len(leak.leaked), bool)) | leak.leaked
        by, leaked = max(together.items(), key=lambda item: int(item[1].sum()))
        return {
            "batch": rows, "local_steps": steps, "attacked": len(leaked), "reconstructed": int(leaked.sum()),
            "leak_rate": float(leaked.mean()), "interval": list(wilson(int(leaked.sum()), len(leaked))), "by": by,
            "views": {view: [leak.to_json() for leak in found] for view, found in leaks.items()},
            "no_gradient": baseline.to_json(),
        }  # fmt: skip

    def _sheet(
        self, size: int, rounds: list[Mapping[str, Batch]], leaks: Mapping[str, list[Leak]], baseline: Leak
    ) -> tuple[str, bytes] | None:
        if not self.subject.images:
            return None
        true = _joined([x for sites in rounds for x, _ in sites.values()])[:8]
        shown = [(f"{view.split()[0]}: {leak.attack}", leak) for view, found in leaks.items() for leak in found]
        lines = [
            (title, leak.images[:8], leak.score[:8].clip(0).tolist())
            for title, leak in [*shown, ("no gradient", baseline)]
            if leak.images is not None
        ]
        return f"batch {size}", pictures(true, lines)

    # ---------------------------------------------------------------- membership, and DP

    def membership(self) -> dict[str, Any]:
        """Can the model that the whole plan gives be asked who was in it?"""
        held = {site: one.parts(self.first.view)[1] for site, one in self.data.items()}
        if self.model.task != "binary" or not any(map(len, held.values())):
            return {"skipped": "it needs a binary target, and rows that are held out"}
        self.tell({"starting": "the whole plan, for membership"})
        _, arrays = trained(self.plan, self.data, self.tell)
        if "weights" not in arrays:
            return {"skipped": "the run's result holds no weights of this kind of model"}
        model, parts = self.model.with_weights(arrays["weights"]), []
        for tables in (self.rows, held):
            few = [taken(t, self.random.permutation(len(t))[: MOST_ROWS // len(tables)]) for t in tables.values()]
            parts.append([(inputs_of(model, t), t[model.targets[0]], model.predict(t)) for t in few if len(t)])
        x, y, p = (np.concatenate([one[k] for part in parts for one in part]) for k in range(3))
        member = np.arange(len(y)) < sum(len(one[1]) for one in parts[0])

        def predict(_: NDArray[np.float64]) -> NDArray[np.float64]:
            return np.asarray(p, np.float64)

        found: dict[str, Membership] = {"loss threshold": loss_threshold(predict, x, y, member)}
        if isinstance(model, LinearModel) and len(y) > 40:
            self.tell({"starting": "membership: LiRA"})
            found["LiRA"] = lira(predict, ridge(), model.design(x)[:, 1:], y, member, seed=self.options.seed)
        told = {name: {"auc": one.auc, "tpr_at_1_fpr": one.tpr_at_1_fpr} for name, one in found.items()}
        return {"members": int(member.sum()), "others": int((~member).sum()), "attacks": told}

    def _noise(
        self, plan: Plan, seen: Seen, tables: Mapping[str, Table], sessions: Mapping[str, bytes]
    ) -> list[NDArray[np.float64]]:
        """What was added to each release that is seen (the sites', or the sum), as it left: flat."""
        program, name = _program(plan), self.reading.field
        exact = {s: exact_reply(plan, program, seen, s, table, sessions[s])[name] for s, table in tables.items()}
        if find(plan.protection.sum).reveals:
            return [np.ravel(seen.replies[site][name] - exact[site]) for site in exact]
        return [np.ravel(seen.total[name] - np.sum(list(exact.values()), axis=0))]

    def dp(self) -> dict[str, Any] | None:
        """The real noise of releases, with canaries: lower bounds on ε, which must not exceed what is claimed.

        The noise does not depend on the rows, so canaries are added to what was drawn: many to one release
        (``one_run``), and to each number of all releases by itself, or not (``two_worlds``).
        """
        privacy = self.plan.privacy
        if self.noise is None or privacy is None or not self.noises:
            return None
        self.tell({"starting": "the noise, with canaries"})
        norm_l2 = norms(self.plan, self.program, self.first, self.schema)[self.reading.field].l2
        rate, size = self.noise.rates[self.first.number], self.noises[0].size
        planted = canaries(int(np.clip(5_000_000 // size, 100, 1000)), size, norm_l2, self.random)
        included = self.random.random(len(planted)) < 0.5
        drawn = included & (self.random.random(len(planted)) < rate)
        single = np.concatenate(self.noises)[:MOST_DRAWS]
        there = np.arange(len(single)) % 2 == 0
        single = single + norm_l2 * (there & (self.random.random(len(single)) < rate))
        bounds = {"one_run": audit_sum(self.noises[0] + planted[drawn].sum(0), planted, included, privacy.delta)}
        if len(single) >= 40:
            bounds["two_worlds"] = two_worlds(single[~there], single[there], privacy.delta, 0.99)
        claim = self.noise.costs[self.first.number]
        return {"epsilon_at_least": max(bounds.values()), **bounds, "claimed_of_release": claim,
                "claimed_of_plan": privacy.epsilon, "delta": privacy.delta, "canaries": len(planted),
                "draws": len(single), "holds": max(bounds.values()) <= claim}  # fmt: skip

    def notes(self) -> list[str]:
        """What a reader must know to read the numbers."""
        notes = [f"{self.public_from[0].upper()}{self.public_from[1:]} stand for public data."]
        notes += self.reading.notes(self.options.local_steps)
        if find(self.plan.protection.sum).reveals:
            notes.append("The protection shows the coordinator each site's own reply.")
        else:
            notes.append("Masks hide whose a share is, not what the sum says: the sum is attacked as a batch of all.")
            if len(self.data) == 2:
                notes.append("With two sites each learns the other's share: it subtracts its own from the sum.")
        return notes


def _program(plan: Plan) -> Any:
    """With all that its kind has beside what every program has."""
    return check_plan(plan)


def _small(plan: Plan, **params: Any) -> Plan:
    """*plan* with other parameters, and no smallest group: the auditor's groups are as small as they are."""
    run = plan.run.model_copy(update={"min_group_size": 1})
    return plan.model_copy(update={"run": run, "params": {**plan.params, **params}})


def _joined(tensors: list[Any]) -> Any:
    """Tensors one after the other."""
    made = tensors[0].new_empty((sum(map(len, tensors)), *tensors[0].shape[1:]))
    at = 0
    for tensor in tensors:
        made[at : at + len(tensor)] = tensor
        at += len(tensor)
    return made
