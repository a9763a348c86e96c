"""A site's runtime: answers the coordinator's requests, by policy, through the egress gate.

Requests: "open" (a study is announced), "task" (run an installed handler), "close".
Whatever goes wrong, one coded failure leaves; the message and the traceback stay here,
in the journal's note and the site's log, under the run's trace id.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import traceback
from collections.abc import Callable
from functools import partial

import numpy as np

from atoll.contract.errors import AtollError, IntegrityError, PlanError, ProtocolError
from atoll.contract.fields import Field, for_members
from atoll.contract.plan import Plan
from atoll.contract.program import build, handler_of
from atoll.contract.protection import REPLY, find, parted
from atoll.contract.rounds import Task, TaskId, alike
from atoll.contract.schedule import EFFORT
from atoll.contract.wire import Array, Json, Message
from atoll.crypto.identity import Identity, verify
from atoll.crypto.session import Session, claim
from atoll.data.site_data import SiteData
from atoll.ledger.contributions import share_of
from atoll.ledger.entry import leaf
from atoll.ledger.verify import verify_receipt
from atoll.runtime.approval import Progress, await_approval
from atoll.runtime.egress import EgressGate, Request, too_large
from atoll.runtime.job import Done, Job
from atoll.runtime.journal import ENDS, PERSONAL, Journal, Receipt, not_running
from atoll.runtime.memory import Question, period_of, question_digest
from atoll.runtime.opened import Opened
from atoll.runtime.party import View
from atoll.runtime.policy import Policy
from atoll.runtime.roster import agreement, read_roster, roster_hash
from atoll.runtime.turns import Turns
from atoll.statistics.own_quality import completeness

log = logging.getLogger("atoll.site")


class Site:
    """One data owner. :meth:`handle` is the endpoint that every transport calls."""

    def __init__(
        self, identity: Identity, journal: Journal, policy: Policy, data: Callable[[Plan], SiteData],
        coordinator_public: bytes, at_once: int | None = None,
    ) -> None:  # fmt: skip
        """data: reads, checks and prepares the site's own table for a plan. coordinator_public: pinned at enrolment.
        at_once: how many runs compute at the same time (default: as many as there are cores)."""
        self.name, self._identity = identity.name, identity
        self._journal, self._policy, self._data = journal, policy, data
        self._coordinator = coordinator_public
        self._gate, self.turns = EgressGate(policy, journal), Turns(at_once)
        self._runs: dict[str, Opened] = {}
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
        if failure.code != "policy.withheld":
            log.warning("%s", failure)
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
        roster = read_roster(message.meta["roster"], plan.cohort.sites)
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
        self._policy.check_plan(plan, len(roster), build(plan.program, plan.params).version)
        if roster.get(self.name) != self._journal.chain.public.hex():
            raise IntegrityError(
                "roster.not-me", "the roster holds another key under this site's name", field="roster",
                remedy="tell the coordinator's operator: this site's identity was replaced",
            )  # fmt: skip
        await_approval(self._journal, self._policy, self.name, run, roster, progress)
        members = self._members(run, progress)
        if self._journal.status(run) == "approved":  # else a restarted coordinator asks again
            number = self._rows(run)
            self._journal.set_setting(f"rows {run}", "" if number is None else str(number))
            self._journal.set_setting(f"quality {run}", self._quality(run))
            self._journal.record(
                "joined",
                {"run": run, "plan": plan.hash, "study": plan.name, "program": plan.program, "purpose": plan.purpose,
                 "protection": plan.protection.sum, "roster": announced["roster_hash"]},
            )  # fmt: skip
            self._journal.start_run(run, plan, self._policy.budget(plan.dataset))
        shared = () if plan.privacy is not None else self._policy.share
        told = {what: self._journal.setting(f"{what} {run}") for what in ("rows", "quality") if what in shared}
        public = Session(self._journal.session(run)).public
        agreed = agreement(plan.hash, roster_hash(roster))
        signed = public + self._identity.sign(claim(run, agreed, self.name, public))
        rows, quality = told.get("rows"), told.get("quality")
        answer = {"re": message.meta["id"], "rows": int(rows) if rows else None, "session": signed.hex()}
        answer |= {"quality": float(quality)} if quality else {}
        return Message("opened", answer | ({"members": members} if members > 1 else {}))

    def _members(self, run: str, progress: Progress) -> int:
        """How many sites stand behind this one's name, before the approved run begins here."""
        return 1

    def _rows(self, run: str) -> int | None:
        """How many rows there are for the run, if that is known."""
        with self._lock(run):
            return sum(map(len, self._opened(run).tables({})))

    def _quality(self, run: str) -> str:
        """How complete the training rows are, where the site tells that of itself."""
        if "quality" not in self._policy.share:
            return ""
        with self._lock(run):
            table = self._opened(run).tables({})[0]
            return str(completeness(table, table.withheld))

    # ---------------------------------------------------------------- tasks

    def _task(self, message: Message, progress: Progress) -> Message:
        meta, task = message.meta, TaskId.from_json(message.meta)
        if task.site != self.name:
            raise ProtocolError("task.misdirected", "the task is for another site", field="site")
        with self._lock(task.run):
            mine = str(meta["program"]) if task.step == REPLY else ""  # no other step is about a program's state
            status, release, state = self._journal.begin(str(task), task.run, mine, task.round)
            must_be_running(status)
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
        program = opened.program(str(meta["program"]), meta["params"])
        if program.version != meta["version"]:
            raise PlanError("program.version", f"version {program.version} is installed here", field=program.name)
        name = str(meta["name"])
        handler = handler_of(program, name)
        if handler.reduce == "ready" and meta["fields"]:
            raise ProtocolError("task.field", "who only says that it is ready sends nothing else", field=name)
        if handler.reduce != meta["reduce"]:
            raise ProtocolError("task.reduction", f"its replies may only be asked for by {handler.reduce}")
        fields = {str(name): Field.from_json(value) for name, value in meta["fields"].items()}
        if sum(declared.size_bytes for declared in fields.values()) > self._policy.max_message_bytes:
            raise too_large()
        opened.check_planned(task.round, meta, fields)
        protection = find(opened.plan.protection.sum if handler.reduce == "sum" else "plain")
        sent, exchanged = parted(message.arrays)
        asking = Question(meta, message.arrays)
        party, digest = opened.party(task, exchanged, protection, meta, program), asking.digest(message.arrays)
        room = for_members(fields, opened.plan.cohort.members) if handler.reduce == "sum" else fields
        asked = Request(task, program.name, name, handler, fields, opened.hash, opened.roster_hash, digest, room)
        if task.step != REPLY:
            return self._gate.relay(asked, protection, party, receipts)
        told = opened.plan.schedule.allowed(sent)
        same = alike(sent)
        question = asking.digest(name for name in same if name != EFFORT)  # that is another for each site
        if not protection.reveals and question != party.terms.question:
            raise ProtocolError(
                "task.question", "what is asked is not what the round's steps are about", field="question",
                remedy="the coordinator asked sites in different words: do not go on with it",
            )  # fmt: skip
        if meta["view"]:
            self._journal.pin_view(task.run, meta["view"])
        charged = asking.digest(same)  # the effort, too: the round is not asked again with another
        with opened.paying(task, charged):
            job = Job(opened, program, message, sent, told, charged, protection, party, state)
            done = self._work(job, asked, progress)
            return self._gate.release(done.asked, done.reply, protection, party, done.cost, done.state, receipts)

    def _work(self, job: Job, asked: Request, progress: Progress) -> Done:
        """Have the handler answer from the site's own table."""
        opened, task, state = job.opened, asked.task, job.state
        before, tables = dict(state), opened.tables(job.message.meta["view"])

        def tell(done: float, total: float) -> None:
            must_be_running(self._journal.status(task.run))
            progress({"done": round(done / max(total, 1), 2), "total": 1})  # not how many rows there are

        smallest = self._policy.min_group_size if job.protection.reveals and opened.noise is None else 1
        own = partial(self._journal.state, task.run, PERSONAL)
        view = View(self.name, tables, state, tell, self._policy.share, smallest, own,
                    opened.mail(task.run, job.program.name))  # fmt: skip
        seed = hashlib.sha256(f"atoll shuffle\0{opened.plan.run.seed}\0{self.name}\0{task.round}".encode()).digest()
        words = tuple(np.frombuffer(seed, "<u4").tolist())
        secret = opened.random(task.round, "sample")
        with self.turns.taken(task.run, lambda: tell(0, 1)):
            reply = asked.handler.answer(job.program, view, Task(task, job.told, words, secret))
        changed = state.keys() != before.keys() or any(state[name] is not before[name] for name in state)
        job.party.personal = view.personalised()
        if asked.fields and not asked.handler.impersonal:
            rows = np.stack([part.sketch for part in tables])
            period = period_of(asked.handler.period, job.sent)
            job.party.query = opened.remembered(job.message, rows, job.protection, period, closed=bool(period))
        schema = view.table.schema
        cost = opened.cost(task, job.program, asked.name, schema, asked.fields, job.sent, job.question)
        return Done(asked, reply, cost, state if changed else None)

    def _lock(self, run: str) -> threading.Lock:
        """Tasks of one run are answered one after another."""
        with self._guard:
            return self._locks.setdefault(run, threading.Lock())

    def _opened(self, run: str) -> Opened:
        with self._guard:
            if run not in self._runs:
                self._runs[run] = Opened(run, self._identity, self._journal, self._policy, self._data)
            return self._runs[run]

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
        credited = None
        if (entry := meta.get("contribution")) is not None:
            share = share_of(entry, run, self.name, self._coordinator, verify)
            credited = {"run": run, "share": share, "entry": entry}
        self._journal.end_run(run, meta["status"], meta.get("error"), heard, credited)
        with self._guard:
            self._runs.pop(run, None)
            self._locks.pop(run, None)
        self.turns.forget(run)
        return Message("closed", {"re": meta["id"], "unacknowledged": len(self._journal.unacknowledged(run))})


def must_be_running(status: str) -> None:
    """Raise ProtocolError for a task of a run that is not running here."""
    if status != "running":
        raise not_running(status)
