"""A run as a site's process knows it: what was announced and approved, and what follows from that alone."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from atoll.contract.errors import IntegrityError, PolicyError, PrivacyBudgetError, ProtocolError, TransportError
from atoll.contract.plan import Plan
from atoll.contract.program import Program, build, handler_of
from atoll.contract.protection import Protection, Terms, find
from atoll.contract.rounds import Field, TaskId
from atoll.contract.schema import TableSchema
from atoll.contract.wire import Array, Json, Message, canonical_json
from atoll.crypto.identity import Identity
from atoll.crypto.prg import Stream, derive
from atoll.crypto.session import Session
from atoll.data.site_data import SiteData
from atoll.data.sketch import Sketch
from atoll.data.table import Table
from atoll.runtime.budget import Charge
from atoll.runtime.egress import Cost, Noised
from atoll.runtime.journal import PROTECTION, Journal
from atoll.runtime.mail import Mailbox
from atoll.runtime.memory import Query, query_key
from atoll.runtime.noise import asked_of, check_entities, noise_of, norms_of
from atoll.runtime.party import Own
from atoll.runtime.policy import Policy
from atoll.runtime.roster import agreement
from atoll.runtime.study import Permitted


class Opened:
    """The journal holds what must survive."""

    def __init__(
        self, run: str, identity: Identity, journal: Journal, policy: Policy, read: Callable[[Plan], SiteData]
    ) -> None:
        """read: the site's own table for a plan. Raises PlanError where the plan's privacy cannot be kept."""
        _, announced, _ = journal.run(run) or ("", {}, "")
        self.plan = Plan.from_json(announced["plan"])
        self.hash, self.roster_hash = str(announced["hash"]), str(announced["roster_hash"])
        self._hidden = not find(self.plan.protection.sum).reveals
        self._agreed = agreement(self.hash, self.roster_hash)
        self.roster = {site: bytes.fromhex(key) for site, key in sorted(announced["roster"].items())}
        self.noise = noise_of(self.plan, len(self.roster))
        self._identity, self._journal, self._policy, self._read = identity, journal, policy, read
        self._secret = journal.session(run)
        self._session = Session(self._secret)
        self._permitted = Permitted(self.plan)
        self._program: tuple[str, Json, Program] | None = None
        self._data: SiteData | None = None

    def program(self, name: str, params: Json) -> Program:
        """A program that plan and policy both allow here; the last one is kept, as rounds mostly repeat it."""
        if self._program is None or self._program[:2] != (name, params):
            made = build(name, params)
            self._permitted.check(made)
            self._policy.check_program(made.name, made.version)
            self._program = (name, params, made)
        return self._program[2]

    def check_planned(self, number: int, meta: Mapping[str, Json], fields: Mapping[str, Field]) -> None:
        """Under privacy, raise PolicyError for single replies and PrivacyBudgetError for what the noise was not chosen
        for: another handler, dtype or shape than the plan leads to in this round."""
        if self.noise is None:
            return
        if meta["reduce"] not in ("sum", "ready"):  # who is ready sends nothing else
            raise PolicyError("policy.withheld", "the plan's privacy lets only noised sums out", field="privacy")
        asked = asked_of(str(meta["program"]), meta["params"], str(meta["name"]), fields)
        if number >= len(self.noise.planned) or self.noise.planned[number] != asked:
            raise PrivacyBudgetError(
                "dp.other-question", "the round asks what the plan does not lead to there", field="privacy",
                remedy="the coordinator does not keep the plan, or has another version: compare versions",
            )  # fmt: skip

    @contextmanager
    def paying(self, task: TaskId, question: str) -> Iterator[None]:
        """Under privacy a failure tells something of the data too: the run ends here, and pays all that it reserved. So
        does an answer that is then not let out, for nothing: a round is computed for one *question* only. Raises
        PrivacyBudgetError for another, before it is."""
        if self.noise is not None:
            self._journal.begin_round(task.run, task.round, question)
        try:
            yield
        except Exception as error:
            refused = isinstance(error, IntegrityError | PrivacyBudgetError | TransportError)
            if self.noise is not None and not refused and getattr(error, "code", "") != "run.not-open":
                self._journal.forfeit(task.run)
            raise

    def tables(self, view: Mapping[str, Any]) -> tuple[Table, Table]:
        """(training rows, held-out rows) after the recipe as far as it is fitted; kept while the run is open."""
        if self._data is None:
            data = self._read(self.plan)
            check_entities(self.plan, data.parts({}))
            data.withhold(self._policy.check_withheld(self.plan, data.source))
            self._data = data
        return self._data.parts(view)

    def party(
        self, task: TaskId, sent: Mapping[str, Array], protection: Protection, meta: Mapping[str, Json],
        program: Program,
    ) -> Own:  # fmt: skip
        """What *protection* may use for a task with this *meta*. Raises PolicyError for a sum among fewer sites than
        the plan leads to."""
        least, choice, question = self.plan.cohort.min_sites, self.plan.protection, str(meta.get("question", ""))
        some = self._cohort(meta.get("cohort"), program)
        terms = Terms(task.run, task.round, task.attempt, self.roster, self._agreed, least, choice, question, some)
        state = {} if protection.reveals else self._journal.state(task.run, PROTECTION)
        me = self._identity
        return Own(me.name, terms, self._session, sent, state, me.sign, self._policy)

    def _cohort(self, told: Json, program: Program) -> tuple[str, ...] | None:
        """The sites among whose replies a sum is made, as the coordinator tells it."""
        if told is None:
            return None
        names = tuple(told) if isinstance(told, list) else ()
        if not all(isinstance(name, str) for name in names) or list(names) != sorted(set(names) & self.roster.keys()):
            raise ProtocolError("task.cohort", "a round's sites are not sites of the roster", field="cohort")
        fewest = len(self.roster) if self.plan.cohort.above else program.fewest(len(self.roster))
        rare = any(share < 1 for share in self.plan.schedule.priority.values())
        if rare and program.name == self.plan.program and not self.plan.cohort.above:
            fewest = min(fewest, self.plan.cohort.min_sites)
        if self._identity.name not in names or len(names) < fewest:
            raise PolicyError(
                "policy.narrow-sum", f"a sum among {len(names)} sites was asked for, and the plan leads to {fewest}",
                field="cohort", remedy="the coordinator does not keep the plan: do not go on with it",
            )  # fmt: skip
        return names

    def mail(self, run: str, program: str) -> Mailbox:
        """What a handler of *program* may write to other sites."""
        me = self._identity
        return Mailbox(me.name, run, program, self._session, me.sign, self.roster, self._agreed)

    def random(self, number: int, purpose: str) -> Callable[[str], Stream]:
        """Secret randomness of one round, by label: the same when it is asked again, so that nothing is told twice."""
        return partial(_stream, self._secret, number, purpose)

    def remembered(
        self, message: Message, rows: Sketch, protection: Protection, question: str = "", *, closed: bool = False
    ) -> Query | None:
        """What the journal is to remember of an exact answer over *rows*, so that no other is its near repeat.
        question: where only this very one counts, its digest or the period that it is about. closed: of such a
        period, so that it is answered once."""
        if self._policy.repeats == "allow" or self.noise is not None:
            return None
        cohort = frozenset[str]() if protection.reveals else frozenset(self.roster)
        key = query_key(self.plan.dataset, message)
        if not protection.reveals:  # sums of another run within other bounds are as good
            meta = message.meta
            program = self.program(str(meta["program"]), meta["params"])
            fields = {name: Field.from_json(field) for name, field in meta["fields"].items()}
            about = hashlib.sha256(canonical_json([key, question, sorted(cohort)]) + rows.tobytes()).hexdigest()
            if not hasattr(program, "asks") and not self._pinned(about, program, str(meta["name"]), fields):
                raise _other_bounds(str(meta["name"]))
        key = hashlib.sha256(f"{key} {question}".encode()).hexdigest() if question else key
        return Query(key, rows, cohort, self._policy.min_group_size, self._policy.min_sites, closed)

    def cost(
        self, task: TaskId, program: Program, name: str, schema: TableSchema, fields: Mapping[str, Field],
        sent: Mapping[str, Array], question: str,
    ) -> Cost:  # fmt: skip
        """What an answer costs the data set's budget, and the noise that makes it cost no more; one that tells nothing
        but that it is there costs nothing. schema: of the table that the handler saw. Raises ProtocolError where hidden
        shares are asked for within other bounds than before."""
        if not fields:
            return Cost(None)
        if self._hidden and self.noise is None and handler_of(program, name).reduce == "sum":
            self._check_bounds(task.run, program, name, schema, fields, sent)
        noised, epsilon = None, math.inf
        if self.noise is not None:
            norms = norms_of(self.plan, program, name, schema, fields, sent)
            fitted = self.noise.fitted(task.round, fields, norms)
            # a tree's nodes are several rounds' own; a round that is asked in other words is refused
            shared = task.round in self.noise.once
            noised = Noised(
                self.noise, *fitted, self.random(-1 if shared else task.round, "tree" if shared else question)
            )
            epsilon = self.noise.costs[task.round]
        dataset = self.plan.dataset
        return Cost(Charge(task.run, task.round, dataset, epsilon, self._policy.budget(dataset), question), noised)

    def _check_bounds(
        self, run: str, program: Program, name: str, schema: TableSchema, fields: Mapping[str, Field],
        sent: Mapping[str, Array],
    ) -> None:  # fmt: skip
        """A share is cut to its bound, and rounded to its step, before it is hidden: sums within many bounds b, each
        Σ min(x, b), would tell every site's x. So a handler is asked within two of them in a run (the first, and those
        of a second look at what the first lost), and over the same rows in other runs; or within those that follow from
        what is sent, where its program says so (``asks``); unless its sites narrow them by themselves (``narrows``)."""
        asks = getattr(program, "asks", None)
        own = asks(name, schema, sent) if asks is not None else None
        if own is not None:
            same = own.keys() == fields.keys() and all(_within(own[each], field) for each, field in fields.items())
        else:
            same = self._pinned(run, program, name, fields)
        if not same:
            raise _other_bounds(name)

    def _pinned(self, about: str, program: Program, name: str, fields: Mapping[str, Field]) -> bool:
        """Whether *name* was asked within these bounds first or second of all."""
        if getattr(program, "narrows", False):
            return True
        asked = canonical_json([program.name, program.params.model_dump(mode="json"), name])
        bounds: Json = {each: [field.dtype, field.bound, field.step] for each, field in fields.items()}
        places = [f"{hashlib.sha256(asked).hexdigest()} {place}" for place in (1, 2)]
        return any(self._journal.pinned("bounds", about, {place: bounds}) for place in places)


def _other_bounds(name: str) -> ProtocolError:
    return ProtocolError(
        "task.bounds", "the same was asked before within other bounds, or these are too narrow", field=name,
        remedy="ask within the ranges and max_rows of before, compare versions; else the coordinator does not keep the "
        "protocol: do not go on with it",
    )  # fmt: skip


def _within(own: Field, asked: Field) -> bool:
    """Whether what is within its *own* bounds is cut no more by those that were *asked* (to the accuracy of libraries'
    functions, which differ by a bit)."""
    limit, step = own.bound or 0.0, own.step or 0.0
    return own.dtype == asked.dtype and (asked.bound or 0.0) >= limit * (1 - 1e-9) and (asked.step or 0.0) <= 2 * step


def _stream(secret: bytes, number: int, purpose: str, label: str) -> Stream:
    return Stream(derive(secret, "site", number, purpose, label))
