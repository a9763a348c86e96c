"""Simulated sites: the handlers of many sites called directly, without wire, journals, signatures and ledgers.

What a site answers is what its process would: the same view of its rows, the same seeds, its state from round to
round, and the gate's checks, clipping, disclosure rules and noise. Where the program offers it, the sites of a round
compute in one batch (``atoll.horizontal.batch``), which rounds differently in the last bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np

from atoll.contract.disclosure import Rule, check_groups, judged
from atoll.contract.errors import AtollError, ProtocolError
from atoll.contract.fields import Field, as_arrays, clip
from atoll.contract.mail import SEAL_BYTES, SIGNED_KEY_BYTES
from atoll.contract.plan import Plan
from atoll.contract.program import Handler, Program, build, handler_of
from atoll.contract.protection import REPLY, find
from atoll.contract.rounds import Gather, Reply, Round, Sum, Task, TaskId
from atoll.contract.wire import Array, canonical_json
from atoll.data.site_data import SiteData
from atoll.data.table import Table
from atoll.horizontal.batch import batched
from atoll.privacy.dp.release import Noise
from atoll.runtime.noise import check_entities, noise_of, norms_of
from atoll.runtime.opened import _stream
from atoll.runtime.party import View
from atoll.runtime.policy import Policy
from atoll.runtime.scheduler import is_dropout
from atoll.runtime.study import Permitted

RUN = "0" * 32
LARGEST = float(np.finfo(np.float64).max)
Answer = dict[str, Array]


class Answers(Protocol):
    """Whoever has the sites of a simulation: this process, several, or nobody."""

    real: bool
    """Are there sites at all? Else every answer is of zeros."""
    lost: dict[str, AtollError]
    """Sites that could not do what the last round asked, and why: they drop out."""
    broken: dict[str, AtollError]
    """Sites that a lenient round left out, and why."""

    def rows(self) -> dict[str, int]:
        """How many rows each site has, held-out ones too."""

    def answers(self, asked: Round, number: int, sites: Sequence[str], sent: Mapping[str, Array]) -> dict[str, Answer]:
        """The checked replies of *sites* to round *number*, in their order; those that drop out are absent.

        sent: the round's arrays for all of them. Raises the first failure that is no dropout.
        """

    def total(
        self, asked: Round, number: int, sites: Sequence[str], counted: Collection[str], sent: Mapping[str, Array]
    ) -> tuple[dict[str, Array], tuple[str, ...]]:
        """The sum of the replies of *sites* as far as they are *counted*, in order; and whose they are."""

    def close(self) -> None:
        """Give back processes."""


class Engine:
    """Sites in this process."""

    def __init__(
        self, plan: Plan, data: Mapping[str, SiteData], *, policy: Policy | None = None,
        cohort: Sequence[str] | None = None, batch: bool = True,
    ) -> None:  # fmt: skip
        """cohort: all sites, where these are some of them. batch: compute in batches where the
        program can. Raises what sites raise that cannot open the plan."""
        self.real = True
        self.lost: dict[str, AtollError] = {}
        self.broken: dict[str, AtollError] = {}
        self._plan, self._data, self._policy, self._batch = plan, dict(data), policy or Policy.sandbox(), batch
        self._noise: Noise | None = noise_of(plan, len(cohort or data))
        self._permitted = Permitted(plan)
        self._programs: dict[bytes, Program] = {}
        self._state: dict[tuple[str, str], dict[str, Array]] = {}
        self._mail = _OpenMail(tuple(sorted(cohort or data)))
        self._tables: dict[str, tuple[bytes, tuple[Table, Table]]] = {}
        self._seen: tuple[bytes, Table] | None = None
        for site in data:
            try:
                check_entities(plan, self._parts(site, {}, b""))
            except AtollError as error:
                raise error.at(site=site) from None

    def rows(self) -> dict[str, int]:
        """See :class:`Answers`."""
        return {site: len(data) for site, data in self._data.items()}

    def answers(self, asked: Round, number: int, sites: Sequence[str], sent: Mapping[str, Array]) -> dict[str, Answer]:
        """See :class:`Answers`."""
        self.lost, self.broken = {}, {}
        made = self._program(asked)
        handler, where = handler_of(made, asked.name), {"round": number, "step": f"{asked.program}/{asked.name}"}
        if handler.reduce != asked.reduce.tag:
            raise ProtocolError("task.reduction", f"its replies may only be asked for by {handler.reduce}").at(**where)
        gate = _Gate(self._plan, self._policy, self._noise, asked, number, made, handler)
        key, view = canonical_json(dict(asked.view)), dict(asked.view)
        found: dict[str, Answer] = {}
        views, tasks = [], []
        for site in sites:
            state = dict(self._state.get((site, asked.program), {}))
            own = partial(self._own, site)
            tables = self._parts(site, view, key)
            views.append(View(site, tables, state, _unwatched, self._policy.share, gate.smallest, own, self._mail))
            tasks.append(self._task(asked, number, site, sent))
        together = batched(made, asked.name) if self._batch and len(sites) > 1 else None
        with np.errstate(over="ignore", invalid="ignore"):
            replies = together(views, tasks) if together is not None else map(_answer(made, handler), views, tasks)
            for seen, task, reply in zip(views, tasks, replies, strict=True):
                try:
                    if isinstance(reply, AtollError):
                        raise reply
                    found[seen.name] = gate.checked(reply, seen, task)
                except AtollError as error:
                    error.at(site=seen.name, **where)
                    if is_dropout(error):
                        self.lost[seen.name] = error
                    elif asked.reduce == Gather(lenient=True):
                        self.broken[seen.name] = error
                    elif not (asked.optional and error.code == "policy.withheld"):
                        raise
                else:
                    self._keep(seen, asked.program)
        return found

    def total(
        self, asked: Round, number: int, sites: Sequence[str], counted: Collection[str], sent: Mapping[str, Array]
    ) -> tuple[dict[str, Array], tuple[str, ...]]:
        """See :class:`Answers`."""
        return add_up(self.answers(asked, number, sites, sent), counted, asked.reply)

    def close(self) -> None:
        """Nothing to give back."""

    def keeping(self, sites: Sequence[str]) -> list[str]:
        """Those of *sites* that remember something of their rounds."""
        known = {site for site, _ in self._state}
        return [site for site in sites if site in known]

    def _own(self, site: str) -> dict[str, Array]:
        return dict(self._state.get((site, ""), {}))

    def _keep(self, view: View, program: str) -> None:
        """A site's release has left: what it remembers is stored with it."""
        if view.state:
            self._state[view.name, program] = {name: np.asarray(value) for name, value in view.state.items()}
        if (personal := view.personalised()) is not None:
            self._state[view.name, ""] = {name: np.asarray(value) for name, value in personal.items()}

    def _program(self, asked: Round) -> Program:
        key = canonical_json([asked.program, dict(asked.params)])
        if key not in self._programs:
            made = build(asked.program, asked.params)
            self._permitted.check(made)
            self._policy.check_program(made.name, made.version)
            self._programs[key] = made
        return self._programs[key]

    def _parts(self, site: str, view: Mapping[str, Any], key: bytes) -> tuple[Table, Table]:
        """A site's (training, held-out) rows; all sites' tables share one schema, so that a program makes one model."""
        known = self._tables.get(site)
        if known is not None and known[0] == key:
            return known[1]
        tables = self._data[site].parts(view)
        if self._seen is None or self._seen[0] != key or self._seen[1].schema != tables[0].schema:
            self._seen = (key, tables[0])
        schema = self._seen[1].schema
        made = tuple(Table(schema, t.columns, t.held_out, t.dropped, t.marked, t.achieved) for t in tables)
        self._tables[site] = (key, (made[0], made[1]))
        return made[0], made[1]

    def _task(self, asked: Round, number: int, site: str, sent: Mapping[str, Array]) -> Task:
        seed = hashlib.sha256(f"atoll shuffle\0{self._plan.run.seed}\0{site}\0{number}".encode()).digest()
        extra = asked.send_to.get(site, {})
        arrays = self._plan.schedule.allowed({**sent, **{n: np.asarray(value) for n, value in extra.items()}})
        words, secret = tuple(np.frombuffer(seed, "<u4").tolist()), secret_of(self._plan, site)
        return Task(TaskId(RUN, number, 0, REPLY, site), arrays, words, partial(_stream, secret, number, "sample"))


class _Gate:
    """What the egress gates of all sites do with the replies to one round."""

    def __init__(
        self, plan: Plan, policy: Policy, noise: Noise | None, asked: Round, number: int, made: Program,
        handler: Handler,
    ) -> None:  # fmt: skip
        protection = find(plan.protection.sum if isinstance(asked.reduce, Sum) else "plain")
        self._plan, self._noise, self._asked, self._number = plan, noise, asked, number
        self._made, self._handler, self._policy = made, handler, policy
        self._shown = protection.reveals and noise is None
        self._rule = policy.rule() if self._shown else Rule()
        self._fitted: tuple[dict[str, Field], dict[str, float]] | None = None
        self._summed = isinstance(asked.reduce, Sum)
        self._quick = [
            (n, np.dtype(f.dtype), f.shape, LARGEST if f.bound is None else f.bound) for n, f in asked.reply.items()
        ]
        self.smallest = policy.min_group_size if self._shown else 1

    def checked(self, reply: Reply, view: View, task: Task) -> Answer:
        """What leaves of *reply*; raises as :meth:`atoll.runtime.egress.EgressGate.release` does."""
        fields, handler = self._asked.reply, self._handler
        told = judged(reply, handler.cells, self._rule) if handler.cells else reply
        sound = self._sound(told)
        arrays = as_arrays(told, fields) if sound is None else sound
        if sound is None:
            for name, declared in fields.items():
                declared.check_finite(name, arrays[name], undefined=handler.reduce == "gather")
        if self._shown and handler.groups:
            check_groups(arrays, handler.groups, self._policy.min_group_size)
        if sound is None:
            arrays, _ = clip(arrays, fields)
        return arrays if self._noise is None else self._noised(arrays, view, task)

    def _sound(self, told: Mapping[str, Any]) -> Answer | None:
        """The reply as arrays, where they are as declared and within their bounds; None: to be looked at closely."""
        found: Answer = {}
        least, most = np.minimum.reduce, np.maximum.reduce
        for name, dtype, shape, bound in self._quick:
            array = np.asarray(told.get(name))
            if array.dtype != dtype or array.shape != shape or not array.flags.c_contiguous:
                return None
            if array.size:
                low, high = (array, array) if shape == () else (least(array, None), most(array, None))
                if not (-bound <= low and high <= bound):  # NaN is not within either
                    return None
            found[name] = array if self._summed else array.copy()  # a site could change it before it is looked at
        return found if len(found) == len(told) else None

    def _noised(self, arrays: Answer, view: View, task: Task) -> Answer:
        noise, number = self._noise, self._number
        if noise is None:
            return arrays
        fitted = self._fitted
        if fitted is None or self._asked.send_to:
            norms = norms_of(
                self._plan, self._made, self._asked.name, view.table.schema, self._asked.reply, task.arrays
            )
            fitted = self._fitted = noise.fitted(number, self._asked.reply, norms)
        shared = number in noise.once
        secret = secret_of(self._plan, view.name)
        random = partial(_stream, secret, -1 if shared else number, "tree" if shared else "simulated")
        return clip(noise.add(number, arrays, *fitted, random), fitted[0])[0]


def _answer(made: Program, handler: Handler) -> Callable[[View, Task], Reply | AtollError]:
    def one(view: View, task: Task) -> Reply | AtollError:
        try:
            return handler.answer(made, view, task)
        except AtollError as error:
            return error
        except MemoryError:
            return ProtocolError("site.out-of-memory", "not enough memory", remedy="simulate fewer sites at a time")
        except Exception as error:
            failure = ProtocolError("site.internal", f"unexpected {type(error).__name__} in the handler {task.id}")
            failure.__cause__ = error
            return failure

    return one


def secret_of(plan: Plan, site: str) -> bytes:
    """A simulated site's secret, 32 bytes: of the plan's seed, so that a simulation can be repeated. Never for real."""
    return hashlib.sha256(f"atoll simulated secret\0{plan.run.seed}\0{site}".encode()).digest()


class _OpenMail:
    """Mail between simulated sites: nobody else is there who could read it (see :class:`atoll.contract.mail.Mail`)."""

    def __init__(self, sites: tuple[str, ...]) -> None:
        self.sites, self.key = sites, bytes(SIGNED_KEY_BYTES)

    def seal(self, receiver: str, key: bytes, step: str, number: int, data: bytes) -> bytes:
        return data + bytes(SEAL_BYTES)

    def unseal(self, sender: str, key: bytes, step: str, number: int, sealed: bytes, size: int) -> bytes:
        if len(sealed) != size + SEAL_BYTES:
            raise ProtocolError("mail.size", "an envelope is not of the size that its round says", field=sender)
        return sealed[:size]


def add_up(
    replies: Mapping[str, Answer], counted: Collection[str], fields: Mapping[str, Field]
) -> tuple[dict[str, Array], tuple[str, ...]]:
    """Σ over the sites that count, in order, as ``plain`` makes it: counts in int64, reals in float64."""
    totals: dict[str, Array] = {}
    for name, declared in fields.items():
        wide = np.int64 if np.dtype(declared.dtype).kind in "iu" else np.float64
        totals[name] = np.zeros([size or 0 for size in declared.shape], wide)
    for site, reply in replies.items():
        if site in counted:
            for name, total in totals.items():
                total += reply[name]
    return totals, tuple(site for site in replies if site in counted)


def _unwatched(done: float, total: float) -> None:
    """Nobody waits for a simulated site."""
