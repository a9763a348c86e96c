"""A rehearsal: a plan run in this process up to one round, and what the coordinator had in its hands then.

Everything is the real thing: the sites, their gate, the plan's protection and its noise, calibrated for all of the
plan's rounds; only the rows are chosen by whoever rehearses, and the sites' policy is the sandbox's. Rounds that an
earlier rehearsal made are replayed, as after a coordinator's crash, so that other rows can be asked the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.contract.errors import AtollError, ProtocolError
from atoll.contract.fields import Field, as_arrays
from atoll.contract.plan import Plan
from atoll.contract.program import Program, build, handler_of
from atoll.contract.protection import REPLY, find, parted
from atoll.contract.rounds import Task, TaskId
from atoll.contract.sensitivity import Norms
from atoll.contract.wire import Array, Json, Message
from atoll.crypto.identity import Identity
from atoll.crypto.session import Session
from atoll.data.recipe import Prepared
from atoll.data.site_data import SiteData
from atoll.data.table import Table
from atoll.privacy.dp.release import Noise
from atoll.privacy.fixed_point import Layout
from atoll.privacy.narrow import decode, narrow
from atoll.runtime.coordinator import Coordinator
from atoll.runtime.journal import Journal
from atoll.runtime.noise import noise_of, norms_of
from atoll.runtime.opened import _stream
from atoll.runtime.party import View
from atoll.runtime.policy import Policy
from atoll.runtime.roster import among
from atoll.runtime.sandbox import _run_local
from atoll.runtime.site import Site
from atoll.runtime.store import RunStore
from atoll.transport.base import Endpoint, Progress
from atoll.transport.local import LocalTransport

Stored = tuple[str, str, Message]
"""A finished round: stage, name, reduction."""


class Rows(SiteData):
    """A site's training rows as they are, whatever the recipe would make of them; nothing is held out."""

    def __init__(self, table: Table) -> None:
        self._rows, self.source = table, None

    def base(self) -> Table:
        return self._rows

    def parts(self, view: Mapping[str, Any]) -> tuple[Table, Table]:
        return self._rows, self._rows.rows(np.zeros(len(self._rows), bool))


def taken(table: Table, rows: NDArray[np.int64]) -> Table:
    """The *rows* of a table, by number, in this order."""
    return Table(table.schema, {name: table[name][rows] for name in table.columns}, marked=table.ids[rows])


@dataclass(frozen=True, slots=True)
class Seen:
    """One round as the coordinator had it. asked: the message to one site; replies: what left each site in step
    "reply"; total: the sum that came out; before: the rounds until then."""

    number: int
    asked: Message
    replies: Mapping[str, Mapping[str, Array]]
    total: Mapping[str, Array]
    before: tuple[Stored, ...]

    @property
    def sent(self) -> dict[str, Array]:
        """The program's own arrays in the request."""
        return parted(self.asked.arrays)[0]

    @property
    def view(self) -> dict[str, Json]:
        """What of the recipe was fitted by then."""
        return dict(self.asked.meta["view"])

    @property
    def fields(self) -> dict[str, Field]:
        """What the handler had to answer."""
        return {name: Field.from_json(value) for name, value in self.asked.meta["fields"].items()}


def rehearse(
    plan: Plan, data: Mapping[str, SiteData], name: str, before: Sequence[Stored] = (),
    sessions: Mapping[str, bytes] | None = None,
) -> Seen:  # fmt: skip
    """Run *plan* until the round of its program's handler *name* is reduced.

    before: rounds to be replayed, not asked. sessions: a site's private session key (32 bytes), from which all its
    secrets in the run follow. Raises the AtollError that ended it sooner.
    """
    replies: dict[str, tuple[Message, Message]] = {}
    begun: list[int] = []

    def watch(event: Mapping[str, Any]) -> None:
        if not begun and event.get("name") == f"{plan.program}/{name}":
            begun.append(int(event["round"]))
        elif begun and not event.keys().isdisjoint(("round", "metrics")):
            raise asyncio.CancelledError("stopping")

    with tempfile.TemporaryDirectory(prefix="atoll-") as scratch, contextlib.ExitStack() as open_:
        store = RunStore(f"sqlite:///{Path(scratch) / 'store.db'}", durable=False)
        open_.callback(store.close)
        identity = Identity.generate("coordinator")
        ledger, endpoints, journals = store.ledger(identity.public, identity.sign), {}, {}
        for number, (site, rows) in enumerate(data.items()):
            own = Identity.generate(site)
            store.invite(site, f"{number:064x}", 2**31 - 1)
            store.enrol(site, f"{number:064x}", own.public.hex(), "")
            journals[site] = Journal(Path(scratch) / f"{site}.db", site, own.public, own.sign, temporary=True)
            open_.callback(journals[site].close)
            party = Site(own, journals[site], Policy.sandbox(), lambda _, rows=rows: rows, identity.public)  # type: ignore[misc]
            endpoints[site] = _tapped(site, party.handle, name, replies)
        run = store.create_run(among(plan, data), tuple(data))
        for site, key in (sessions or {}).items():
            journals[site].set_setting(f"session {run}", key.hex())
        for number, (stage, called, reduced) in enumerate(before):
            store.finish_round(run, number, stage, called, 0.0, reduced, [], {})
        transport = LocalTransport(endpoints)
        open_.callback(transport.close)
        try:
            asyncio.run(Coordinator(transport, store, ledger, on_event=watch).run(run))
        except (asyncio.CancelledError, AtollError):
            if not begun or store.reduced(run, begun[0]) is None:  # what it made of the sum is of no interest
                raise
        total = store.reduced(run, begun[0]) if begun else None
        if total is None:
            raise ProtocolError("rehearsal.no-round", f"the plan came to no round {name!r}", field=plan.program)
        stored = [(row["stage"], row["name"], store.reduced(run, row["number"])) for row in store.rounds(run)]
    made = tuple((stage, called, message) for stage, called, message in stored[: begun[0]] if message is not None)
    asked = next(iter(replies.values()))[0]
    seen = Seen(begun[0], asked, {site: replies[site][1].arrays for site in data}, total.arrays, made)
    return _unpacked(plan, seen) if find(plan.protection.sum).reveals else seen


def _unpacked(plan: Plan, seen: Seen) -> Seen:
    """With numbers where ``plain`` sent them in few bits."""
    fields, noise = seen.fields, noise_of(plan, len(seen.replies))
    if noise is not None:
        program = build(str(seen.asked.meta["program"]), seen.asked.meta["params"])
        schema = Prepared(plan.recipe).schema(plan.table)
        fields = noise.fitted(seen.number, fields, norms(plan, program, seen, schema))[0]
    told = {
        site: {name: _number(array, fields[name]) for name, array in reply.items()}
        for site, reply in seen.replies.items()
    }
    return replace(seen, replies=told)


def _number(array: Array, field: Field) -> Array:
    if not narrow(field) or array.dtype != np.uint8:
        return array
    return np.concatenate([piece for _, piece in decode(array, field)]).reshape([n or 0 for n in field.shape])


def _tapped(site: str, endpoint: Endpoint, name: str, replies: dict[str, tuple[Message, Message]]) -> Endpoint:
    def answer(message: Message, progress: Progress) -> Message:
        reply = endpoint(message, progress)
        if reply.kind == "release" and (message.meta["name"], message.meta["step"]) == (name, REPLY):
            replies.setdefault(site, (message, reply))
        return reply

    return answer


def read_as_numbers(plan: Plan, program: Program, seen: Seen, noise: Noise | None, schema: Any) -> dict[str, Any]:
    """Each site's reply as arrays of the round's fields: as they are, where the protection shows them; else what is
    had by decoding a masked vector, or the bytes of a ciphertext, as if nothing hid it."""
    if find(plan.protection.sum).reveals:
        return dict(seen.replies)
    fields = seen.fields
    if noise is not None:
        fields = noise.fitted(seen.number, fields, norms(plan, program, seen, schema))[0]
    return {site: _as_numbers(arrays, fields, len(seen.replies)) for site, arrays in seen.replies.items()}


def _as_numbers(arrays: Mapping[str, Array], fields: Mapping[str, Field], num_sites: int) -> dict[str, Array]:
    if all(name.startswith("ring") for name in arrays):
        return Layout.of(fields, num_sites).decode(arrays)
    whole = b"".join(np.ascontiguousarray(array).tobytes() for array in arrays.values())
    numbers = np.frombuffer(whole[: len(whole) // 8 * 8], "<i8") * 2.0**-32
    return {name: np.resize(numbers, [n or 0 for n in field.shape]) for name, field in fields.items()}


def norms(plan: Plan, program: Program, seen: Seen, schema: Any) -> dict[str, Norms]:
    """By how much one unit of the plan's privacy changes each field of the round."""
    return norms_of(plan, program, str(seen.asked.meta["name"]), schema, seen.fields, seen.sent)


# ---------------------------------------------------------------- what a site does in secret, known to a rehearsal


def task_of(plan: Plan, seen: Seen, site: str, session: bytes) -> Task:
    """The task as the handler of *site* had it, whose private session key was *session*."""
    seed = hashlib.sha256(f"atoll shuffle\0{plan.run.seed}\0{site}\0{seen.number}".encode()).digest()
    words = tuple(np.frombuffer(seed, "<u4").tolist())
    told = TaskId("0" * 32, seen.number, 0, REPLY, site)
    return Task(told, seen.sent, words, lambda label: _stream(session, seen.number, "sample", label))


def exact_reply(plan: Plan, program: Program, seen: Seen, site: str, table: Table, session: bytes) -> dict[str, Array]:
    """What the handler of *site* answers, before the gate: without noise or masks."""
    parts = Rows(table).parts({})
    view = View(site, parts, {}, lambda *_: None, (), 1)
    handler = handler_of(program, str(seen.asked.meta["name"]))
    return as_arrays(handler.answer(program, view, task_of(plan, seen, site, session)), seen.fields)


def session_where(good: Callable[[bytes], bool], tries: int = 20_000) -> bytes:
    """A private session key for which *good*; raises ProtocolError when none is found."""
    for _ in range(tries):
        key = Session.fresh()
        if good(key):
            return key
    raise ProtocolError("rehearsal.no-sample", "no sample of so many rows is likely", field="batch",
                        remedy="choose a batch nearer to sampling_rate times the rows of a site")  # fmt: skip


def trained(
    plan: Plan, data: Mapping[str, SiteData], tell: Callable[[dict[str, Any]], None]
) -> tuple[dict[str, Any], dict[str, Array]]:
    """The whole run in this process: (its result, the arrays of its model)."""
    with tempfile.TemporaryDirectory(prefix="atoll-") as scratch:
        store, run = _run_local(plan, data, Path(scratch), None, tell)
        found = store.result(run)
        store.close()
    return found
