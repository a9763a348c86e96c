"""How what a program's sites send is read as gradients, and which rows of a site are in it: what an audit must know.

There are three readings: of a change of weights by local steps (FedAvg and its relations), of a sum of clipped
gradients over some of the rows (DP-SGD, DP-FTRL), and of one over all of them (GLM). A program, or a setting, that none
of them reads is refused: that no attack got anything of it would say nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.contract.errors import PlanError
from atoll.contract.plan import Plan
from atoll.contract.program import REGISTRY
from atoll.contract.schema import TableSchema
from atoll.crypto.session import Session
from atoll.data.table import Table
from atoll.horizontal.dpftrl import DpFtrl
from atoll.horizontal.dpsgd import DpSgd, poisson_sample
from atoll.horizontal.fedasync import FedAsync
from atoll.horizontal.fedbuff import FedBuff
from atoll.horizontal.federated import Federated
from atoll.horizontal.fednova import FedNova
from atoll.horizontal.glm import Glm
from atoll.horizontal.ifca import Ifca
from atoll.horizontal.online import Online, ticks
from atoll.horizontal.perfedavg import PerFedAvg
from atoll.horizontal.validation import Parts
from atoll.models.linear import LinearModel, feature_bounds
from atoll.models.rows import Rows
from atoll.runtime.rehearsal import Seen, session_where, task_of

UNREAD = (FedBuff, FedAsync, Ifca)
"""Of FedAvg's relations those of whose first round not every site's change is seen, of the weights that all were
sent."""
OF_ROWS = (DpSgd, DpFtrl, Glm)
Vector = NDArray[np.float64]
Places = NDArray[np.int64]


@dataclass(frozen=True)
class Reading:
    """One program's; as it stands, of Σ of gradients over all rows of a site. handler: that of the round which is read.
    field: the one of its fields that shows a gradient."""

    program: Any
    schema: TableSchema
    handler: str = "gradient"
    field: str = "gradient"

    @property
    def everybody(self) -> dict[str, Any]:
        """Changes of the plan's parameters by which all of the cohort answers its first round."""
        return {}

    def step(self, rows: int, fewest: int, local_steps: int) -> tuple[dict[str, Any], int, int]:
        """(changes of the plan's parameters, local steps, rows of each), for steps of about *rows* where each site has
        *fewest*. local_steps: 0 for as many as the plan says."""
        return {}, 1, rows

    def drawn(self, plan: Plan, first: Seen, site: str, fewest: int, rows: int) -> tuple[int, Places, bytes]:
        """(rows of a site's table, which of them it takes, under which private session key), to take *rows* in all.

        All sites' tables have the same number of rows, so that the sum is of equal shares: the attacker's best case.
        """
        return rows, np.arange(rows), Session.fresh()

    def dressed(self, table: Table) -> Table:
        """A site's rows so that its first round may take any of them."""
        return table

    def gradient(self, arrays: Mapping[str, Any], num_rows: int, steps: int) -> Vector:
        """A reply, or a sum of replies, as the mean gradient over *num_rows* rows, [num_weights]; 0 where nothing of a
        weight is sent."""
        return np.asarray(arrays[self.field], np.float64) / num_rows

    def notes(self, local_steps: int) -> list[str]:
        """What a reader must know. local_steps: those that were asked for."""
        return ["This program sums over all rows of a site: a batch stands for a site with so few rows."]


def reading_of(plan: Plan, program: Any, schema: TableSchema, *, noised: bool) -> Reading:
    """Raises PlanError "audit.not-training" for a program, and "audit.not-read" for a setting, that none reads."""
    if isinstance(program, Federated) and not isinstance(program, UNREAD):
        return Averaged.of(program, schema)
    if isinstance(program, DpSgd):
        return Sampled(program, schema)
    if isinstance(program, DpFtrl):
        return Streamed(program, schema)
    if isinstance(program, Glm):
        return Reading(program, schema, "step" if noised else "newton")
    kinds = (name for name, kind in REGISTRY.items() if issubclass(kind, (Federated, *OF_ROWS)))
    read = sorted(name for name in kinds if not issubclass(REGISTRY[name], UNREAD))
    raise PlanError(
        "audit.not-training", f"no attack reads what {plan.program} releases", field="program",
        remedy=f"audit a plan of {', '.join(read)}",
    )  # fmt: skip


class Averaged(Reading):
    """FedAvg and its relations: each site's weight times the change of its weights by steps of SGD. In a first round
    that is −(learning rate) · Σ gradients for all of them: proximal terms, control variates and contrasts are still 0.
    """

    @classmethod
    def of(cls, program: Any, schema: TableSchema) -> Averaged:
        """Raises PlanError "audit.not-read"."""
        p = program.params
        compress, groups = p.compress, p.aggregate.groups is not None
        sparse = compress.keep < 1 or compress.rank is not None or compress.alone
        model = program.model(schema)
        part = isinstance(model, LinearModel) and len(program.payload(schema).moving) < len(model.weights)
        odd = {
            "compress": sparse, "compress.down": compress.down.active, "aggregate.groups": groups,
            "freeze or personal_layers of a linear model": part,
        }  # fmt: skip
        if unread := [name for name, there in odd.items() if there]:
            raise PlanError(
                "audit.not-read", f"no attack reads what leaves by params.{unread[0]}", field=f"params.{unread[0]}",
                remedy="leave it out: replies of all weights, by all of the cohort, are read",
            )  # fmt: skip
        single = "gather" in program.capabilities.needs
        return cls(program, schema, "train_single" if single else "train", "weights")

    def step(self, rows: int, fewest: int, local_steps: int) -> tuple[dict[str, Any], int, int]:
        """Within one pass over the rows."""
        p, number = self.program.params, len(self._kept("", fewest))
        rows = min(rows, number)
        steps = local_steps or p.local_steps or p.local_epochs * -(-number // rows)
        steps = min(steps, number // rows)
        return {**self.everybody, "batch_size": rows, "local_steps": steps}, steps, rows

    @property
    def everybody(self) -> dict[str, Any]:
        """Nobody is drawn."""
        return {"sites_per_round": None}

    def drawn(self, plan: Plan, first: Seen, site: str, fewest: int, rows: int) -> tuple[int, Places, bytes]:
        """The mini-batches of the pass that counts: of Per-FedAvg the second, of which the outer gradients are."""
        key, kept = Session.fresh(), self._kept(site, fewest)
        shuffler = task_of(plan, first, site, key).shuffler()
        if isinstance(self.program, PerFedAvg):
            shuffler = np.random.Generator(np.random.Philox(shuffler.integers(2**63)))
        return fewest, kept[shuffler.permutation(len(kept))[:rows]], key

    def _kept(self, site: str, number: int) -> Places:
        """Those of so many rows that are not held back."""
        share = getattr(self.program.params, "validation", None)
        if share is None:
            return np.arange(number)
        return Parts.of(Rows(self.schema, number, lambda _: np.zeros(number)), site, share).kept

    def dressed(self, table: Table) -> Table:
        """Of a stream: all in the first period."""
        if not isinstance(self.program, Online):
            return table
        p, column = self.program.params, table[self.program.params.time]
        start, _ = p.clock(table.schema)
        timed = column.dtype.kind == "M"
        began = np.array(int(start), "datetime64[us]").astype(column.dtype) if timed else np.array(start)
        if float(ticks(began[None])[0]) < start:  # a day's begin is before an hour that it has
            began = began + 1
        return _with(table, p.time, np.full(len(table), began, column.dtype))

    def gradient(self, arrays: Mapping[str, Any], num_rows: int, steps: int) -> Vector:
        """−change / (learning rate · steps), of the weights that travel."""
        model, p = self.program.model(self.schema), self.program.params
        weight = float(arrays["weight"])
        mean = np.asarray(arrays["weights"], np.float64) / (weight if abs(weight) >= 1e-6 else 1.0)
        steps = 1 if isinstance(self.program, FedNova) else steps  # it is divided by them before it leaves
        found = np.zeros(len(model.weights))
        found[self.program.payload(self.schema).moving] = -mean / (p.learning_rate * steps)
        return found

    def notes(self, local_steps: int) -> list[str]:
        """Of its steps, and of layers that stay."""
        found = ["Each update is of the stated local steps: the plan's own may be more, and then tell less."]
        found = found if local_steps else []
        if len(self.program.payload(self.schema).moving) < len(self.program.model(self.schema).weights):
            found.append("Layers that no site sends are not seen, and their gradients read as zero.")
        return found


class Sampled(Reading):
    """DP-SGD: Σ of clipped gradients over a Poisson sample."""

    def drawn(self, plan: Plan, first: Seen, site: str, fewest: int, rows: int) -> tuple[int, Places, bytes]:
        """Of a key that happens to draw so many."""
        rate = self.program.params.sampling_rate
        size = min(fewest, max(rows, round(rows / rate)))

        def sample(key: bytes) -> Places:
            return np.asarray(poisson_sample(size, rate, task_of(plan, first, site, key)), np.int64)

        key = session_where(lambda key: len(sample(key)) == rows)
        return size, sample(key), key

    def notes(self, local_steps: int) -> list[str]:
        """None."""
        return []


class Streamed(Reading):
    """DP-FTRL: Σ of clipped gradients over the rows of the first period."""

    def step(self, rows: int, fewest: int, local_steps: int) -> tuple[dict[str, Any], int, int]:
        """Where rows are in periods by lot, as many as are likely in one."""
        p = self.program.params
        return {}, 1, rows if p.time else min(rows, max(1, fewest // p.rounds))

    def drawn(self, plan: Plan, first: Seen, site: str, fewest: int, rows: int) -> tuple[int, Places, bytes]:
        """All of so many rows, dressed for it; or those of a key that happens to draw so many."""
        p = self.program.params
        if p.time:
            return super().drawn(plan, first, site, fewest, rows)
        size = min(fewest, rows * p.rounds)

        def sample(key: bytes) -> Places:
            words = task_of(plan, first, site, key).secret("periods").bytes(8 * size)  # as DpFtrl draws them
            return np.flatnonzero(np.frombuffer(words, "<u8") % np.uint64(p.rounds) == 0)

        key = session_where(lambda key: len(sample(key)) == rows)
        return size, sample(key), key

    def dressed(self, table: Table) -> Table:
        """All at the begin of time."""
        time = self.program.params.time
        return _with(table, time, np.full(len(table), feature_bounds(table.schema, time)[0])) if time else table

    def notes(self, local_steps: int) -> list[str]:
        """None."""
        return []


def _with(table: Table, name: str, column: NDArray[Any]) -> Table:
    return Table(table.schema, {**table.columns, name: column}, marked=table.ids)
