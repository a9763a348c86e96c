"""What the benchmarks of learning share: a federation in this process over tables in memory.

``learn`` is the whole runtime. ``driving`` and ``driven`` are only a program's two halves against each other, several
times as fast: for the thousands of runs among which settings are chosen, and to look on from round to round.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from atoll.contract.fields import as_arrays
from atoll.contract.plan import Plan
from atoll.contract.program import Cohort, Program, build, handler_of
from atoll.contract.rounds import Checkpoint, Gather, Gathered, Reduced, Round, Summed, Task, TaskId
from atoll.contract.wire import Array, canonical_json
from atoll.crypto.identity import Identity
from atoll.data.site_data import SiteData
from atoll.data.table import Table
from atoll.models.model import Model
from atoll.runtime.catalogue import load_installed
from atoll.runtime.coordinator import Coordinator
from atoll.runtime.journal import Journal
from atoll.runtime.policy import Policy
from atoll.runtime.serve import settle
from atoll.runtime.site import Site
from atoll.runtime.store import RunStore
from atoll.runtime.study import settled
from atoll.transport.local import LocalTransport


@dataclass(frozen=True, slots=True)
class Learned:
    """A run's result.json, and its model's arrays."""

    result: dict[str, Any]
    arrays: dict[str, Array]


Watch = Callable[[Mapping[str, Array], int, int], None]
"""(the program's state at a checkpoint, bytes to the sites until then, bytes from them)."""


def learn(plan: Plan, tables: Mapping[str, Table], watch: Watch | None = None) -> Learned:
    """Run *plan* over *tables*: the whole runtime, on the local transport. watch: told of each round's checkpoint (with
    ``checkpoint_every: 1``)."""
    load_installed()
    settle()
    plan = settled(plan)
    with tempfile.TemporaryDirectory(prefix="atoll-") as scratch, contextlib.ExitStack() as held:
        store = RunStore(f"sqlite:///{Path(scratch) / 'store.db'}", durable=False)
        held.callback(store.close)
        identity = Identity.generate("coordinator")
        ledger, endpoints = store.ledger(identity.public, identity.sign), {}
        for number, (name, table) in enumerate(tables.items()):
            own, data = Identity.generate(name), SiteData.of(table, plan, name)
            store.invite(name, f"{number:064x}", 2**31 - 1)
            store.enrol(name, f"{number:064x}", own.public.hex(), "")
            journal = Journal(Path(scratch) / f"{name}.db", name, own.public, own.sign, temporary=True)
            held.callback(journal.close)
            endpoints[name] = Site(own, journal, Policy.sandbox(), partial(_same, data), identity.public).handle
        run = store.create_run(plan, tuple(tables))
        transport = LocalTransport(endpoints)
        held.callback(transport.close)
        told = set[int]()

        def listen(event: Mapping[str, Any]) -> None:
            kept = store.checkpoint(run) if watch is not None and "round" in event else None
            if kept is not None and watch is not None and kept[0] not in told:
                told.add(kept[0])
                traffic = transport.traffic[run]
                watch(kept[1], traffic.to_sites_bytes, traffic.from_sites_bytes)

        asyncio.run(Coordinator(transport, store, ledger, on_event=listen).run(run))
        return Learned(*store.result(run))


def _same(data: SiteData, _: Plan) -> SiteData:
    return data


def interval(values: ArrayLike) -> tuple[float, float]:
    """(mean, half width of its 95 % confidence interval by Student's t) of independent *values*, such as paired
    differences."""
    found = np.asarray(values, float)
    half = stats.t.ppf(0.975, len(found) - 1) * stats.sem(found) if len(found) > 1 else np.nan
    return float(found.mean()), float(half)


# ---------------------------------------------------------------- programs without a runtime


@dataclass
class Desk:
    """One site as a handler sees it (see ``atoll.contract.program.SiteView``)."""

    name: str
    table: Table
    holdout: Table
    state: dict[str, Array] = field(default_factory=dict)
    personal: dict[str, Array] = field(default_factory=dict)
    min_group_size: int = 1
    mail: Any = None

    def progress(self, done: float, total: float) -> None:
        """Nobody watches."""

    def shares(self, what: str) -> bool:
        """Everything."""
        return True


Fitted = tuple[Model, dict[str, Model]]
"""The federation's model; each site's own or, where the program makes none, the federation's."""


def driven(program: str, params: Mapping[str, Any], tables: Mapping[str, Table], seed: int = 0) -> Fitted:
    """Run *program* to its end."""
    steps = driving(program, params, tables, seed)
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            fitted: Fitted = stop.value
            return fitted


def driving(
    program: str, params: Mapping[str, Any], tables: Mapping[str, Table], seed: int = 0
) -> Generator[Mapping[str, Array], None, Fitted]:
    """Run *program*, yielding the coordinator's state at each of its checkpoints."""
    schema = next(iter(tables.values())).schema
    load_installed()
    desks = {name: Desk(name, *table.parts()) for name, table in tables.items()}
    programs: dict[tuple[str, str, bytes], Program] = {}
    steps, number = build(program, params).coordinate(Cohort(tuple(tables), schema, seed)), 0
    value: Reduced | None = None
    while True:
        try:
            asked: Any = steps.send(value)
        except StopIteration as stop:
            model: Model = stop.value["model"]
            own = {name: desk.personal.get("weights") for name, desk in desks.items()}
            return model, {name: model if w is None else model.with_weights(w) for name, w in own.items()}
        value = None
        if isinstance(asked, Checkpoint):
            yield asked.state
        elif isinstance(asked, Round):
            replies = {}
            for name in desks if asked.sites is None else asked.sites:
                key = (name, asked.program, canonical_json(dict(asked.params)))
                programs[key] = made = programs.get(key) or build(asked.program, asked.params)
                sent = {n: np.asarray(v) for n, v in {**asked.send, **asked.send_to.get(name, {})}.items()}
                task = Task(TaskId("0" * 32, number, 0, "reply", name), sent, (seed, number, *name.encode()))
                replies[name] = as_arrays(handler_of(made, asked.name).answer(made, desks[name], task), asked.reply)
            number += 1
            if isinstance(asked.reduce, Gather):
                value = Gathered(replies)
            else:
                added = {name: np.sum([reply[name] for reply in replies.values()], 0) for name in asked.reply}
                value = Summed(added, tuple(replies))
