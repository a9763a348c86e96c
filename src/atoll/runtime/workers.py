"""Simulated sites in processes of this machine, each of which holds some of them with their rows and state.

Sites whose rows are in memory anyway are held by every process, and each round is dealt out evenly; a site that has
kept something of a round stays where that is.
What goes between the processes is what goes between parties: messages of :mod:`atoll.contract.wire`, over pipes. Only
the tables themselves are handed over at the start as Python objects, from this process to those that it has started.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np

from atoll.contract.errors import AtollError, ProtocolError
from atoll.contract.plan import Plan
from atoll.contract.rounds import Field, Gather, Ready, Reduction, Round, Stream, Sum
from atoll.contract.wire import Array, Message, decode, encode_bytes
from atoll.data.recipe import Prepared
from atoll.data.site_data import SiteData
from atoll.data.sources import SourceSpec
from atoll.data.table import Table
from atoll.models.allowed import allow, asked_in
from atoll.runtime.catalogue import load_installed
from atoll.runtime.courier import described
from atoll.runtime.serve import settle
from atoll.runtime.simulation import Answer, Engine, add_up
from atoll.runtime.study import check_plan


@dataclass(frozen=True)
class Dealt:
    """One of *many* nearly equal parts of a source's rows, dealt at random by the plan's seed."""

    spec: SourceSpec
    place: int
    many: int

    def of(self, whole: Table, plan: Plan) -> Table:
        """The part of the *whole*."""
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence((plan.run.seed, self.many, 6))))
        mine = random.permutation(len(whole)) % self.many == self.place
        return replace(whole, held_out=None).rows(mine)


Data = Mapping[str, Table | SourceSpec | Dealt]
REDUCTIONS: dict[str, Reduction] = {
    "sum": Sum(), "gather": Gather(), "lenient": Gather(lenient=True), "stream": Stream(), "ready": Ready(),
}  # fmt: skip
STOP_S = 5.0


def opened(plan: Plan, data: Data, base: Path) -> dict[str, SiteData]:
    """Every site's table as its process would read it; raises what it raises there, with the site's name."""
    found: dict[str, SiteData] = {}
    whole: dict[int, Table] = {}
    for site, source in data.items():
        try:
            if isinstance(source, Table):
                found[site] = SiteData.of(source, plan, site)
            elif isinstance(source, Dealt):
                if id(source.spec) not in whole:
                    whole[id(source.spec)] = SiteData.read(source.spec, plan, base, "whole").base()
                found[site] = SiteData(source.of(whole[id(source.spec)], plan), plan, Prepared(plan.recipe), site)
            else:
                found[site] = SiteData.read(source, plan, base, site)
        except AtollError as error:
            raise error.at(site=site) from None
    return found


class Workers:
    """See :class:`atoll.runtime.simulation.Answers`. This process is the first of them."""

    def __init__(self, plan: Plan, number: int) -> None:
        """Start the others of *number* processes, which get ready for the plan while its data is read; then
        :meth:`open`."""
        self.real = True
        self.lost: dict[str, AtollError] = {}
        self.broken: dict[str, AtollError] = {}
        self._plan, self._home = plan, dict[str, int]()
        self._children: list[tuple[BaseProcess, Connection]] = []
        context = multiprocessing.get_context("spawn")
        for place in range(1, number):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs,), name=f"sites-{place}", daemon=True)
            process.start()
            theirs.close()
            self._children.append((process, ours))
            ours.send(plan.to_json())

    def open(self, data: Data, *, base: Path = Path(), batch: bool = True) -> None:
        """Hand out the sites. Raises what a site raises that cannot open the plan."""
        names, shared = list(data), all(isinstance(source, Table | Dealt) for source in data.values())
        parts: list[Data] = [
            data if shared else {site: data[site] for site in names[place :: 1 + len(self._children)]}
            for place in range(1 + len(self._children))
        ]
        self._home = {} if shared else {site: place for place, part in enumerate(parts) for site in part}
        self._engine = Engine(self._plan, opened(self._plan, parts[0], base), cohort=names, batch=batch)
        self._rows = self._engine.rows()
        for (_, pipe), part in zip(self._children, parts[1:], strict=True):
            with suppress(BrokenPipeError):  # what ended it is told below
                pipe.send((dict(part), names, base, batch))
        for place in range(1, len(parts)):
            self._rows |= self._received(place).meta["rows"]

    def rows(self) -> dict[str, int]:
        """See :class:`atoll.runtime.simulation.Answers`."""
        return dict(self._rows)

    def answers(self, asked: Round, number: int, sites: Sequence[str], sent: Mapping[str, Array]) -> dict[str, Answer]:
        """See :class:`atoll.runtime.simulation.Answers`."""
        self.lost, self.broken = {}, {}
        shares = dealt_out(sites, self._rows, self._home, 1 + len(self._children))
        for place, own in shares.items():
            if place:
                self._children[place - 1][1].send_bytes(_question(asked, number, own, sent))
        found: dict[str, Answer] = {}
        failures: list[AtollError] = []
        for place, own in sorted(shares.items()):  # all are heard, so that none has an answer left that nobody takes
            try:
                found |= self._there(place, asked) if place else self._here(asked, number, own, sent)
            except AtollError as error:
                failures.append(error)
        if failures:
            raise failures[0]
        return {site: found[site] for site in sites if site in found}

    def _here(self, asked: Round, number: int, own: list[str], sent: Mapping[str, Array]) -> dict[str, Answer]:
        found = self._engine.answers(asked, number, own, sent)
        self._home |= dict.fromkeys(self._engine.keeping(own), 0)
        self.lost |= self._engine.lost
        self.broken |= self._engine.broken
        return found

    def _there(self, place: int, asked: Round) -> dict[str, Answer]:
        reply = self._received(place)
        self._home |= dict.fromkeys(reply.meta["kept"], place)
        self.lost |= {site: _error(told) for site, told in reply.meta["lost"].items()}
        self.broken |= {site: _error(told) for site, told in reply.meta["broken"].items()}
        return _unpacked(reply, asked.reply)

    def total(
        self, asked: Round, number: int, sites: Sequence[str], counted: Collection[str], sent: Mapping[str, Array]
    ) -> tuple[dict[str, Array], tuple[str, ...]]:
        """See :class:`atoll.runtime.simulation.Answers`."""
        return add_up(self.answers(asked, number, sites, sent), counted, asked.reply)

    def close(self) -> None:
        """End the processes."""
        for _, pipe in self._children:
            pipe.close()
        for process, _ in self._children:
            process.join(STOP_S)
            if process.is_alive():
                process.kill()
                process.join()
        self._children = []

    def _received(self, place: int) -> Message:
        process, pipe = self._children[place - 1]
        try:
            reply = decode(pipe.recv_bytes())
        except (EOFError, OSError):
            process.join(STOP_S)
            raise ProtocolError(
                "simulation.worker", f"process {process.name} ended with {process.exitcode}", field="workers",
                remedy="look at what it printed; with too little memory, simulate with fewer workers",
            ) from None  # fmt: skip
        if reply.kind == "failure":
            raise _error(reply.meta)
        return reply


def dealt_out(
    sites: Sequence[str], rows: Mapping[str, int], home: Mapping[str, int], number: int
) -> dict[int, list[str]]:
    """Which of *number* processes answers for which *sites*: those with a *home* there, the others so that all have
    about as many rows."""
    shares: dict[int, list[str]] = {}
    loads = [0] * number
    for site in sorted(sites, key=lambda site: (site not in home, -rows[site])):
        place = home.get(site, loads.index(min(loads)))
        shares.setdefault(place, []).append(site)
        loads[place] += rows[site] + 1
    return shares


def _work(pipe: Connection) -> None:
    """A worker process: answers rounds until its pipe is closed."""
    load_installed()
    try:
        plan = Plan.from_json(pipe.recv())
        allow(asked_in(plan.params))
        check_plan(plan)  # which imports what its model needs
        settle()
        data, cohort, base, batch = pipe.recv()
        engine = Engine(plan, opened(plan, data, base), cohort=cohort, batch=batch)
        pipe.send_bytes(encode_bytes(Message("rows", {"rows": engine.rows()})))
        while True:
            asked, number, sites, sent = _round(decode(pipe.recv_bytes()))
            try:
                replies = engine.answers(asked, number, sites, sent)
            except AtollError as error:
                pipe.send_bytes(encode_bytes(Message("failure", _told(error))))
                continue
            lost = {site: _told(error) for site, error in engine.lost.items()}
            broken = {site: _told(error) for site, error in engine.broken.items()}
            meta = {"sites": list(replies), "lost": lost, "broken": broken, "kept": engine.keeping(sites)}
            pipe.send_bytes(encode_bytes(Message("answers", meta, _packed(replies, asked.reply))))
    except AtollError as error:
        pipe.send_bytes(encode_bytes(Message("failure", _told(error))))
    except (EOFError, OSError, KeyboardInterrupt):
        pass  # the simulation is over


def _question(asked: Round, number: int, own: list[str], sent: Mapping[str, Array]) -> bytes:
    about = {**described(asked), "number": number, "optional": asked.optional, "paced": asked.paced}
    told = {f"{i}/{n}": v for i, site in enumerate(own) for n, v in asked.send_to.get(site, {}).items()}
    meta = {**about, "sites": own, "lenient": asked.reduce == Gather(lenient=True)}
    return encode_bytes(Message("round", meta, {**{f"/{name}": value for name, value in sent.items()}, **told}))


def _round(message: Message) -> tuple[Round, int, list[str], dict[str, Array]]:
    meta, sent, own = message.meta, dict[str, Array](), dict[str, dict[str, Array]]()
    for key, value in message.arrays.items():
        place, name = key.split("/", 1)
        if place:
            own.setdefault(meta["sites"][int(place)], {})[name] = value
        else:
            sent[name] = value
    fields = {name: Field.from_json(value) for name, value in meta["fields"].items()}
    reduce = REDUCTIONS["lenient" if meta["lenient"] else meta["reduce"]]
    asked = Round(
        meta["name"], reduce, fields, send_to=own, paced=meta["paced"], optional=meta["optional"],
        program=meta["program"], params=meta["params"], view=meta["view"],
    )  # fmt: skip
    return asked, meta["number"], meta["sites"], sent


def _packed(replies: Mapping[str, Answer], fields: Mapping[str, Field]) -> dict[str, Array]:
    """Every field of all sites in one array, [num_sites, …]; of any length: one for each site."""
    found: dict[str, Array] = {}
    for name, field in fields.items() if replies else ():
        if None in field.shape:
            found |= {f"{i}/{name}": reply[name] for i, reply in enumerate(replies.values())}
        else:
            found[f"/{name}"] = np.stack([reply[name] for reply in replies.values()])
    return found


def _unpacked(reply: Message, fields: Mapping[str, Field]) -> dict[str, Answer]:
    found: dict[str, Answer] = {site: {} for site in reply.meta["sites"]}
    for name, field in fields.items():
        for place, own in enumerate(found.values()):
            own[name] = reply.arrays[f"{place}/{name}"] if None in field.shape else reply.arrays[f"/{name}"][place]
    return found


def _told(error: AtollError) -> dict[str, Any]:
    return {**error.public(), "message": error.message, "where": error.where}


def _error(told: Mapping[str, Any]) -> AtollError:
    found = AtollError.from_public(dict(told), **told["where"])
    found.message = found.message or str(told["message"])
    return found
