"""A site's runtime: answers the coordinator's requests, by policy, through the egress gate.

Requests: "open" (a study is announced), "task" (run an installed handler), "close".
Whatever goes wrong, one coded failure leaves; the message and the traceback stay here,
in the journal's note and the site's log, under the run's trace id.
"""

from __future__ import annotations

import hashlib
import logging
import math
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from atoll.contract.errors import AtollError, IntegrityError, PlanError, PolicyError, ProtocolError
from atoll.contract.plan import Plan
from atoll.contract.program import Program, build, handler_of
from atoll.contract.protection import REPLY, Protection, Terms, find, parted
from atoll.contract.rounds import Field, Task, TaskId
from atoll.contract.wire import Array, Json, Message, canonical_json
from atoll.crypto.identity import Identity, verify
from atoll.crypto.prg import Stream, derive
from atoll.crypto.session import Session, claim
from atoll.data.site_data import SiteData
from atoll.data.table import Table
from atoll.ledger.entry import leaf
from atoll.ledger.verify import verify_receipt
from atoll.privacy.dp.release import Noise
from atoll.runtime.approval import Progress, await_approval
from atoll.runtime.budget import Charge
from atoll.runtime.egress import EgressGate, Noised, Request, too_large
from atoll.runtime.journal import ENDS, PROTECTION, Journal, Receipt, not_running
from atoll.runtime.memory import Query, query_key, question_digest
from atoll.runtime.noise import check_entities, noise_of, norms_of
from atoll.runtime.party import Own, View
from atoll.runtime.policy import Policy
from atoll.runtime.roster import read_roster, roster_hash
from atoll.runtime.study import Permitted, check_plan

log = logging.getLogger("atoll.site")


@dataclass
class _Opened:
    """A run as this process knows it; the journal holds what must survive."""

    plan: Plan
    hash: str
    roster: Mapping[str, str]
    roster_hash: str
    secret: bytes
    session: Session
    noise: Noise | None
    permitted: Permitted
    program: dict[bytes, Program] = field(default_factory=dict)
    data: SiteData | None = None


class Site:
    """One data owner. :meth:`handle` is the endpoint that every transport calls."""

    def __init__(
        self, identity: Identity, journal: Journal, policy: Policy, data: Callable[[Plan], SiteData],
        coordinator_public: bytes,
    ) -> None:  # fmt: skip
        """data: reads, checks and prepares the site's own table for a plan. coordinator_public: pinned at enrolment."""
        self.name, self._sign = identity.name, identity.sign
        self._journal, self._policy, self._data = journal, policy, data
        self._coordinator = coordinator_public
        self._gate = EgressGate(policy, journal)
        self._runs: dict[str, _Opened] = {}
        self._locks: dict[str, threading.Lock] = {}
        self._guard = threading.Lock()

    def handle(self, message: Message, progress: Progress) -> Message:
        """Answer one request; never raises. Repeating a request repeats the answer."""
        meta = message.meta
        where = {"site": self.name, "round": meta.get("round"), "step": meta.get("name"), "trace": meta.get("run")}
        answers = {"open": self._open, "task": self._task, "close": self._close}
        try:
            with np.errstate(over="ignore", invalid="ignore"):
                reply = answers[message.kind](message, progress)
        except AtollError as error:
            failure = error.at(**where)
        except MemoryError:
            failure = ProtocolError(
                "site.out-of-memory", "not enough memory at the site", remedy="give the site's process more memory"
            ).at(**where)
        except Exception as error:
            frames = "".join(traceback.format_tb(error.__traceback__))  # its message may quote a cell: it is not logged
            log.error("%s: unexpected %s in run %s\n%s", self.name, type(error).__name__, meta.get("run"), frames)
            failure = ProtocolError(
                "site.internal", "unexpected error", remedy="the site's own log has the details under the trace id"
            ).at(**where)
        else:
            return reply
        log.warning("%s", failure)
        if failure.code != "policy.withheld":
            self._note(str(meta.get("run", "")), str(failure))
        return Message("failure", {"re": meta.get("id"), **failure.public(), **where})

    def _note(self, run: str, text: str) -> None:
        """Best effort: the failure must be told even when the journal cannot be written."""
        try:
            self._journal.set_note(run, text)
        except AtollError as error:
            log.error("%s", error)

    # ---------------------------------------------------------------- open

    def _open(self, message: Message, progress: Progress) -> Message:
        run, plan = str(message.meta["run"]), Plan.from_json(message.meta["plan"])
        roster = read_roster(message.meta["roster"])
        announced: dict[str, Json] = {
            "plan": plan.to_json(),
            "hash": plan.hash,
            "roster": roster,
            "roster_hash": roster_hash(roster),
        }
        if not plan.protection.sum:
            raise PlanError("plan.no-protection", "the plan names no protection", field="protection")
        known = self._journal.run(run)
        if known is None:
            self._journal.open_run(run, "pending", announced)
        elif known[1] != announced:
            raise ProtocolError("run.changed", "the run was announced before with another plan or roster")
        self._policy.check_plan(plan, len(roster), check_plan(plan).version)
        if roster.get(self.name) != self._journal.chain.public.hex():
            raise IntegrityError(
                "roster.not-me", "the roster holds another key under this site's name", field="roster",
                remedy="tell the coordinator's operator: this site's identity was replaced",
            )  # fmt: skip
        await_approval(self._journal, self._policy, self.name, run, roster, progress)
        if self._journal.status(run) == "approved":  # else a restarted coordinator asks again
            with self._lock(run):
                tables = self._prepared(self._opened(run), {})
                rows = sum(map(len, tables))
                check_entities(plan, tables)
            self._journal.set_setting(f"rows {run}", str(rows))
            self._journal.record(
                "joined",
                {"run": run, "plan": plan.hash, "study": plan.name, "program": plan.program, "purpose": plan.purpose,
                 "protection": plan.protection.sum, "roster": announced["roster_hash"]},
            )  # fmt: skip
            self._journal.start_run(run, plan, self._policy.budget(plan.dataset))
        told = self._journal.setting(f"rows {run}") if "rows" in self._policy.share else ""
        public = Session(self._journal.session(run)).public
        signed = public + self._sign(claim(run, announced["roster_hash"], self.name, public))
        answer = {"re": message.meta["id"], "rows": int(told) if told else None, "session": signed.hex()}
        return Message("opened", answer)

    # ---------------------------------------------------------------- tasks

    def _task(self, message: Message, progress: Progress) -> Message:
        meta, task = message.meta, TaskId.from_json(message.meta)
        if task.site != self.name:
            raise ProtocolError("task.misdirected", "the task is for another site", field="site")
        with self._lock(task.run):
            status, release, state = self._journal.begin(str(task), task.run, str(meta["program"]), task.round)
            _must_be_running(status)
            receipts = self._verified(meta["receipts"])
            if release is None:
                release = self._answer(task, message, progress, state, receipts)
            elif release.meta["entry"]["body"]["question"] != question_digest(meta, message.arrays):
                raise ProtocolError("task.changed", "the task was asked before, in other words")
            else:
                self._journal.acknowledge(receipts)
        return Message(release.kind, {**release.meta, "re": meta["id"]}, release.arrays)

    def _answer(
        self, task: TaskId, message: Message, progress: Progress, state: dict[str, Array], receipts: list[Receipt]
    ) -> Message:
        """Run the handler that the task names, and let its reply out through the gate."""
        meta, opened = message.meta, self._opened(task.run)
        program = self._program(opened, str(meta["program"]), meta["params"])
        if program.version != meta["version"]:
            raise PlanError("program.version", f"version {program.version} is installed here", field=program.name)
        handler = handler_of(program, str(meta["name"]))
        if handler.reduce != meta["reduce"]:
            raise ProtocolError("task.reduction", f"its replies may only be asked for by {handler.reduce}")
        fields = {str(name): Field.from_json(value) for name, value in meta["fields"].items()}
        if sum(declared.size_bytes for declared in fields.values()) > self._policy.max_message_bytes:
            raise too_large()
        protection = find(opened.plan.protection.sum if handler.reduce == "sum" else "plain")
        sent, own = parted(message.arrays)
        party = self._party(opened, task, own, protection)
        asked = Request(
            task, program.name, str(meta["name"]), handler, fields, opened.hash, opened.roster_hash,
            question_digest(meta, message.arrays),
        )  # fmt: skip
        party.question = question = question_digest(meta, sent)
        if opened.noise is not None and handler.reduce != "sum":
            raise PolicyError("policy.withheld", "the plan's privacy lets only noised sums out", field="privacy")
        if task.step != REPLY:
            return self._gate.relay(asked, protection, party, receipts)
        before = dict(state)
        if meta["view"]:
            self._journal.pin_view(task.run, meta["view"])

        def tell(done: float, total: float) -> None:
            _must_be_running(self._journal.status(task.run))
            progress({"done": round(done / max(total, 1), 2), "total": 1})  # not how many rows there are

        smallest = self._policy.min_group_size if protection.reveals else 1
        view = View(self.name, self._prepared(opened, meta["view"]), state, tell, self._policy.share, smallest)
        seed = hashlib.sha256(f"atoll shuffle\0{opened.plan.run.seed}\0{self.name}\0{task.round}".encode()).digest()
        words = tuple(np.frombuffer(seed, "<u4").tolist())
        random = partial(_stream, opened.secret, task.round, "sample")
        reply = handler.answer(program, view, Task(task, sent, words, random))
        changed = state.keys() != before.keys() or any(state[name] is not before[name] for name in state)
        if self._policy.repeats == "refuse":
            rows = np.stack([view.table.sketch, view.holdout.sketch])
            cohort = frozenset[str]() if protection.reveals else frozenset(opened.roster)
            limits = self._policy.min_group_size, self._policy.min_sites
            party.query = Query(query_key(opened.plan.dataset, message), rows, cohort, *limits)
        noised = None
        if opened.noise is not None:
            party.query = None  # not an exact one
            norms = norms_of(opened.plan, program, asked.name, view.table.schema, fields, sent)
            scales = opened.noise.scales(task.round, fields, norms)
            noised = Noised(opened.noise, scales, partial(_stream, opened.secret, task.round, question))
        cost = opened.noise.costs[task.round] if opened.noise else math.inf
        budget = self._policy.budget(opened.plan.dataset)
        charge = Charge(task.run, task.round, opened.plan.dataset, cost, budget, question)
        return self._gate.release(asked, reply, protection, party, state if changed else None, receipts, noised, charge)

    def _party(self, opened: _Opened, task: TaskId, sent: Mapping[str, Array], protection: Protection) -> Own:
        """What *protection* may use for a task."""
        plan, roster = opened.plan, {s: bytes.fromhex(k) for s, k in sorted(opened.roster.items())}
        least, choice = plan.cohort.min_sites, plan.protection
        terms = Terms(task.run, task.round, task.attempt, roster, opened.roster_hash, least, choice)
        state = {} if protection.reveals else self._journal.state(task.run, PROTECTION)
        return Own(self.name, terms, opened.session, sent, state, self._sign, self._policy)

    def _program(self, opened: _Opened, name: str, params: Json) -> Program:
        """A program that plan and policy both allow here; the last one is kept, as rounds mostly repeat it."""
        key = canonical_json([name, params])
        if key not in opened.program:
            program = build(name, params)
            opened.permitted.check(program)
            self._policy.check_program(program.name, program.version)
            opened.program = {key: program}
        return opened.program[key]

    def _lock(self, run: str) -> threading.Lock:
        """Tasks of one run are answered one after another."""
        with self._guard:
            return self._locks.setdefault(run, threading.Lock())

    def _opened(self, run: str) -> _Opened:
        with self._guard:
            if run not in self._runs:
                _, opened, _ = self._journal.run(run) or ("", {}, "")
                plan = Plan.from_json(opened["plan"])
                secret, noise = self._journal.session(run), noise_of(plan, len(opened["roster"]))
                self._runs[run] = _Opened(
                    plan, opened["hash"], opened["roster"], opened["roster_hash"], secret, Session(secret), noise,
                    Permitted(plan),
                )  # fmt: skip
            return self._runs[run]

    def _prepared(self, opened: _Opened, view: Mapping[str, Any]) -> tuple[Table, Table]:
        """(training rows, held-out rows) after the recipe as far as it is fitted; kept while the run is open."""
        if opened.data is None:
            opened.data = self._data(opened.plan)
        return opened.data.parts(view)

    # ---------------------------------------------------------------- close

    def _verified(self, receipts: list[Json]) -> list[Receipt]:
        """The coordinator's receipts {"of", "entry", "path"}, each checked against the release it is for."""
        for receipt in receipts:
            seq = int(receipt["of"])
            released = leaf(self.name, seq, self._journal.released_hash(seq))
            verify_receipt(receipt, released, self._coordinator, verify)
        return [(int(receipt["of"]), receipt) for receipt in receipts]

    def _close(self, message: Message, progress: Progress) -> Message:
        meta, run = message.meta, str(message.meta["run"])
        self._journal.acknowledge(self._verified(meta["receipts"]))
        if meta["status"] not in ENDS:
            raise ProtocolError("run.no-end", "a run cannot be closed in this way", field="status")
        heard = str(AtollError.from_public(meta["error"])) if meta.get("error") else ""
        self._journal.end_run(run, meta["status"], meta.get("error"), heard)
        with self._guard:
            self._runs.pop(run, None)
            self._locks.pop(run, None)
        return Message("closed", {"re": meta["id"], "unacknowledged": len(self._journal.unacknowledged(run))})


def _stream(secret: bytes, number: int, purpose: str, label: str) -> Stream:
    """Secret randomness of one round: the same when it is asked again, so that nothing is told or spent twice."""
    return Stream(derive(secret, "site", number, purpose, label))


def _must_be_running(status: str) -> None:
    if status != "running":
        raise not_running(status)
