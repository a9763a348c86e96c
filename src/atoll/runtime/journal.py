"""A site's journal: one SQLite file holding ledger, run states and stored releases.

A release, the ledger entry that signs it and the per-run state that led to it are saved
in one transaction *before* the release is sent: if the journal cannot be written,
nothing leaves; if the site is killed at any instant, it comes back exactly here.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from atoll.contract.errors import IntegrityError, ProtocolError
from atoll.contract.plan import Plan
from atoll.contract.wire import Array, Json, Message, decode, encode, encode_bytes, read_head, to_json
from atoll.crypto.session import Session
from atoll.ledger.contributions import CONTRIBUTION
from atoll.ledger.entry import Entry, Signer
from atoll.runtime.budget import TABLES, Budget, Charge, Spent, begin, charge, forfeit, reserve, settle, spent
from atoll.runtime.ledger_file import LedgerFile
from atoll.runtime.memory import Query

OPEN = ("pending", "approved", "running")
"""Statuses of a run that is neither closed nor denied."""

PROTECTION = "atoll protection"
"""Under this name, in place of a program's, a run's protection keeps its state."""
PERSONAL = "personal"
"""And under this the model that the site has for itself; it outlives a run that finished."""

ENDS = ("finished", "failed", "cancelled")
"""How a coordinator may end a run."""

LARGE_BYTES = 4 << 20
_TABLES = """
CREATE TABLE IF NOT EXISTS release
    (seq INTEGER PRIMARY KEY, task TEXT UNIQUE NOT NULL, run TEXT NOT NULL, hash TEXT NOT NULL, message BLOB);
CREATE TABLE IF NOT EXISTS state (run TEXT, program TEXT, arrays BLOB NOT NULL, PRIMARY KEY (run, program));
CREATE TABLE IF NOT EXISTS run (run TEXT PRIMARY KEY, status TEXT NOT NULL, opened BLOB NOT NULL, note TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS rowset (digest TEXT PRIMARY KEY, cells BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS asked (key TEXT, digest TEXT, cohort TEXT, PRIMARY KEY (key, digest, cohort)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS setting (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""

Receipt = tuple[int, Json]
"""(sequence number of the release entry, the coordinator's receipt)."""


def not_running(status: str) -> ProtocolError:
    """The one error for a task of a run that is not running at this site."""
    return ProtocolError(
        "run.not-open", f"the run is {status} at this site", field="run",
        remedy="it was closed, or never opened here: start a new one",
    )  # fmt: skip


def _today() -> dt.date:
    return dt.datetime.now(dt.UTC).date()


def _read_only(value: Array) -> Array:
    """As what is read from the database is."""
    view = value.view()
    view.flags.writeable = False
    return view


def _before(program: str) -> str:
    """Under which name the state before the last round that changed it is kept."""
    return f"{program} before"


class Journal(LedgerFile):
    """Safe for threads of one process; other processes may read, and write: what is kept in memory is then forgotten,
    and what follows from an older state of a protection is not stored."""

    def __init__(
        self, path: Path | str, party: str, public: bytes, sign: Signer, *, durable: bool = True,
        temporary: bool = False,
    ) -> None:  # fmt: skip
        """As :class:`LedgerFile`; large releases are in files beside it, a temporary one's too."""
        self._sent: dict[int, str] = {}
        self._in_files: set[int] = set()
        self._kept: dict[str, dict[str, Array]] = {}
        self._turns: dict[str, int] = {}
        self._version = -1
        super().__init__(path, _TABLES + TABLES, party, public, sign, durable=durable, temporary=temporary)
        self._sweep()

    def _follow(self) -> None:
        super()._follow()
        self._look()

    def _look(self) -> None:
        """Forget what is kept in memory, where another process wrote: it may have gone on with a run, or ended it."""
        version = self._db.execute("PRAGMA data_version").fetchone()[0]
        if version != self._version:
            self._version = version
            self._kept.clear()
            self._sent.clear()

    # -- releases and state

    def begin(
        self, task: str, run: str, program: str, number: int = -1
    ) -> tuple[str, Message | None, dict[str, Array]]:
        """What a task meets: the run's status ("unknown" if it was never announced), the release already
        made for it (or None), and the program's saved per-run state before round *number* (empty at first).

        Raises IntegrityError when the release was acknowledged, and is no longer kept.
        """
        with self._lock:
            row = self._db.execute(
                "SELECT (SELECT status FROM run WHERE run = ?1), seq, message,"
                " (SELECT arrays FROM state WHERE run = ?1 AND program = ?2)"
                " FROM (SELECT 1) LEFT JOIN release ON task = ?3",
                (run, program, task),
            ).fetchone()
        status, seq, stored, arrays = row
        if seq is not None and stored is None:
            raise IntegrityError("release.acknowledged", "the release was acknowledged and is no longer kept")
        release = None
        if stored is not None:
            made = decode(stored or self._large(seq).read_bytes())
            release = Message("release", {"re": task, "entry": self.entry(seq)}, made.arrays)
        state = decode(arrays) if arrays else Message("state")
        if number >= 0 and state.meta.get("round") == number:  # another attempt at the round that changed it
            return status or "unknown", release, self.state(run, _before(program))
        return status or "unknown", release, state.arrays

    def state(self, run: str, program: str) -> dict[str, Array]:
        """What *program* keeps in *run*; empty at first."""
        with self._lock:
            self._look()
            if program == PROTECTION and run in self._kept:
                return dict(self._kept[run])
            row = self._db.execute("SELECT arrays FROM state WHERE run = ? AND program = ?", (run, program)).fetchone()
            found = decode(row[0]) if row else Message("state")
            if program == PROTECTION:
                self._turns[run] = int(found.meta.get("turn", 0))
        return found.arrays

    def personal(self, run: str) -> Message:
        """The model that the site has for itself in *run* ("weights", if it has one); with it the "round" it is of, and
        what was "fitted" of the recipe."""
        with self._lock:
            row = self._db.execute("SELECT arrays FROM state WHERE run = ? AND program = ?", (run, PERSONAL)).fetchone()
        return decode(row[0]) if row else Message("state")

    def _large(self, seq: int) -> Path:
        """Where a release too large for the database is kept."""
        return self._path.with_name(f"{self._path.name}-release-{seq}.bin")

    def _sweep(self) -> None:
        """Remove large releases that a crash left behind: written but not stored, or acknowledged."""
        mark = f"{self._path.name}-release-"
        if any(path.name.startswith(mark) for path in self._path.parent.iterdir()):
            with self.transaction():  # nobody else is writing one now
                rows = self._db.execute("SELECT seq FROM release WHERE length(message) = 0")
                self._in_files = {seq for (seq,) in rows}
                kept = {self._large(seq) for seq in self._in_files}
                for path in self._path.parent.iterdir():
                    if path.name.startswith(mark) and path not in kept:
                        path.unlink(missing_ok=True)

    def _keep(self, seq: int, arrays: dict[str, Array]) -> bytes:
        """A release as the database's blob, its entry being in the ledger; a large one goes to a file instead, without
        another copy."""
        parts = encode(Message("release", {}, arrays))
        if sum(len(part) for part in parts) <= LARGE_BYTES:
            return b"".join(parts)
        self._in_files.add(seq)
        descriptor = os.open(self._large(seq), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:  # buffered: writes the rest when the disk takes a part
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(descriptor)
        return b""

    def store_release(
        self,
        task: str,
        run: str,
        program: str,
        body: Entry,
        arrays: dict[str, Array],
        state: Mapping[str, Array] | None,
        receipts: Sequence[Receipt] = (),
        query: Query | None = None,
        protection: Mapping[str, Array] | None = None,
        cost: Charge | None = None,
        personal: Mapping[str, Array] | None = None,
    ) -> Message:
        """Ledger entry, release, the program's state and its protection's (None: as it was), receipts and what is
        remembered of the *query*, its *cost* and the *personal* model, in one transaction.

        Returns the message that may now leave; raises DisclosureError if the query was asked before of
        nearly the same rows.
        """
        seq = None
        try:
            with self.transaction():
                if (status := self.status(run)) not in ("running", "unknown"):  # it was closed while the site computed
                    raise not_running(status)
                if query is not None:
                    self._remember(query)
                if cost is not None:
                    charge(self._db, cost, _today())
                self._store_receipts(receipts, sign=False)
                # in the order in which it is read again, so that a repeated release is the same bytes
                entry = self._append(self.chain.next("release", dict(sorted(body.items()))))
                seq = entry["seq"]
                row = (seq, task, run, entry["hash"], self._keep(seq, arrays))
                self._db.execute("INSERT INTO release VALUES (?, ?, ?, ?, ?)", row)
                if state is not None:
                    self._store_state(run, program, state, int(body.get("round", -1)))
                if protection is not None:
                    self._store_protection(run, protection)
                if personal is not None:
                    fitted = json.loads(self.setting(f"view {run}") or "{}")
                    about = {"round": int(body.get("round", -1)), "fitted": fitted}
                    self._put_state(run, PERSONAL, Message("state", about, dict(personal)))
        except BaseException:
            self._kept.pop(run, None)
            if seq is not None:  # what was written of a large release would keep the disk full
                self._forget([seq])
            raise
        self._acknowledged(receipts)
        self._sent[seq] = entry["hash"]
        return Message("release", {"re": task, "entry": entry}, arrays)

    def _store_state(self, run: str, program: str, state: Mapping[str, Array], number: int) -> None:
        """Keep the state, and the one before its round, should the round be asked anew."""
        row = self._db.execute("SELECT arrays FROM state WHERE run = ? AND program = ?", (run, program)).fetchone()
        if row and number >= 0 and read_head(row[0]).meta.get("round") != number:
            self._db.execute("INSERT OR REPLACE INTO state VALUES (?, ?, ?)", (run, _before(program), row[0]))
        self._put_state(run, program, Message("state", {"round": number}, dict(state)))

    def _store_protection(self, run: str, state: Mapping[str, Array]) -> None:
        """Raises IntegrityError where it does not follow from the state before: a second set of survivors, say, must
        not be signed in a round."""
        turn = self._turns.get(run, 0)
        if run not in self._kept:  # another process wrote since it was read, if only about something else
            row = self._db.execute(
                "SELECT arrays FROM state WHERE run = ? AND program = ?", (run, PROTECTION)
            ).fetchone()
            if turn != (read_head(row[0]).meta.get("turn", 0) if row else 0):
                raise IntegrityError(
                    "journal.two-processes", "another process of this site went on with the run", field="journal",
                    remedy="run one process of a site at a time, then submit again",
                )  # fmt: skip
        self._put_state(run, PROTECTION, Message("state", {"turn": turn + 1}, dict(state)))
        self._turns[run] = turn + 1
        self._kept[run] = {name: _read_only(value) for name, value in state.items()}

    def _put_state(self, run: str, program: str, state: Message) -> None:
        self._db.execute("INSERT OR REPLACE INTO state VALUES (?, ?, ?)", (run, program, encode_bytes(state)))

    def session(self, run: str) -> bytes:
        """The private session key in *run*, 32 bytes: made when first asked for, forgotten when the run ends."""
        with self.transaction():
            if not (known := self.setting(f"session {run}")):
                known = Session.fresh().hex()
                self._db.execute("INSERT OR REPLACE INTO setting VALUES (?, ?)", (f"session {run}", known))
        return bytes.fromhex(known)

    def _remember(self, query: Query) -> None:
        asked = "SELECT cells, cohort FROM asked JOIN rowset USING (digest) WHERE key = ?"
        known = [(cells, frozenset(cohort.split())) for cells, cohort in self._db.execute(asked, (query.key,))]
        for cells, cohort in known:
            query.check(cells, cohort)
        query.check_sums({cohort for cells, cohort in known if cells == query.rows.tobytes()})
        self._db.execute("INSERT OR IGNORE INTO rowset VALUES (?, ?)", (query.digest, query.rows.tobytes()))
        row = (query.key, query.digest, " ".join(sorted(query.cohort)))
        self._db.execute("INSERT OR IGNORE INTO asked VALUES (?, ?, ?)", row)

    def released_hash(self, seq: int) -> str:
        """The hash of release entry *seq*; raises IntegrityError if it is none."""
        with self._lock:
            self._look()
            if seq in self._sent:
                return self._sent[seq]
            row = self._db.execute("SELECT hash FROM release WHERE seq = ?", (seq,)).fetchone()
        if row is None:
            raise IntegrityError("receipt.unknown", f"ledger entry {seq} is not a release", field="receipt")
        return str(row[0])

    def acknowledge(self, receipts: Sequence[Receipt]) -> None:
        """Store verified receipts and forget the releases' content; repeating does nothing."""
        if receipts:
            with self.transaction():
                self._store_receipts(receipts, sign=True)
            self._acknowledged(receipts)

    def _store_receipts(self, receipts: Sequence[Receipt], *, sign: bool) -> None:
        """Append receipt entries, and forget the releases' content in the database."""
        for seq, receipt in receipts:
            kept = "UPDATE release SET message = NULL WHERE seq = ? AND message NOT NULL"
            if self._db.execute(kept, (seq,)).rowcount:
                self._append(self.chain.next("receipt", {"of": seq, "receipt": receipt}, sign=sign))

    def _acknowledged(self, receipts: Sequence[Receipt]) -> None:
        """Stored *receipts*: forget what is kept of their releases outside of the database."""
        seqs = [seq for seq, _ in receipts]
        for seq in seqs:
            self._sent.pop(seq, None)
        self._forget(seqs)

    def _forget(self, seqs: Sequence[int]) -> None:
        for seq in self._in_files.intersection(seqs):
            self._large(seq).unlink(missing_ok=True)
            self._in_files.discard(seq)

    def unacknowledged(self, run: str) -> list[int]:
        """Release entries of *run* whose receipt has not come."""
        with self._lock:
            rows = self._db.execute("SELECT seq FROM release WHERE run = ? AND message NOT NULL ORDER BY seq", (run,))
            return [seq for (seq,) in rows]

    # -- runs and settings

    def open_run(self, run: str, status: str, opened: Mapping[str, Json]) -> None:
        """Remember a run as announced, unless it is known."""
        with self.transaction():
            self._db.execute("INSERT OR IGNORE INTO run VALUES (?, ?, ?, '')", (run, status, to_json(dict(opened))))

    def status(self, run: str) -> str:
        """A run's status, "unknown" if it was never announced."""
        with self._lock:
            row = self._db.execute("SELECT status FROM run WHERE run = ?", (run,)).fetchone()
        return str(row[0]) if row else "unknown"

    def set_status(self, run: str, status: str, note: str = "") -> None:
        """Change a run's status; *note* is for the site's own operator."""
        with self.transaction():
            self._db.execute("UPDATE run SET status = ?, note = ? WHERE run = ?", (status, note, run))
            if status not in OPEN:
                self._forget_secrets(run)
        if status not in OPEN:
            self._wipe()

    def forfeit(self, run: str) -> None:
        """A run of differential privacy failed on the data: it ends here, and all that it reserved is spent."""
        with self.transaction():
            forfeit(self._db, run, _today())
        self.set_status(run, "failed", "a failure under differential privacy: what the run reserved is spent")

    def _forget_secrets(self, run: str) -> None:
        settle(self._db, run)
        self._kept.pop(run, None)
        self._turns.pop(run, None)
        names = [f"{what} {run}" for what in ("session", "rows", "quality", "view", "bounds")]
        self._db.execute("DELETE FROM setting WHERE name IN (?, ?, ?, ?, ?)", names)
        kept = PERSONAL if self.status(run) == "finished" else ""
        self._db.execute("DELETE FROM state WHERE run = ? AND program <> ?", (run, kept))

    def begin_round(self, run: str, number: int, question: str) -> None:
        """Durably remember, before it is computed, what a round of differential privacy asks. Raises
        PrivacyBudgetError where it asked something else before."""
        with self.transaction():
            begin(self._db, run, number, question)

    def advance(self, run: str, before: str, after: str) -> None:
        """Change a run's status from *before* to *after*; one that was closed meanwhile stays closed."""
        with self.transaction():
            self._db.execute("UPDATE run SET status = ? WHERE run = ? AND status = ?", (after, run, before))

    def start_run(self, run: str, plan: Plan, budget: Budget) -> None:
        """An approved run begins: what its plan's privacy promises is reserved. Raises PrivacyBudgetError."""
        with self.transaction():
            begun = "UPDATE run SET status = 'running' WHERE run = ? AND status = 'approved'"
            if self._db.execute(begun, (run,)).rowcount and plan.privacy is not None:  # else it was closed meanwhile
                reserve(self._db, run, plan.dataset, plan.privacy, budget, _today())

    def spent(self, dataset: str, budget: Budget) -> Spent:
        """What counts against a data set's budget today."""
        with self._lock:
            return spent(self._db, dataset, budget, _today())

    def end_run(self, run: str, status: str, error: Json, heard: str, credited: Entry | None = None) -> None:
        """Close a run that is open, with its ledger entry; *heard* joins the note. credited: what the ledger is to say
        of the site's contribution. Else do nothing."""
        with self.transaction():
            before, _, note = self.run(run) or ("unknown", {}, "")
            if before in OPEN:
                note = "\n".join(filter(None, (note, heard)))
                self._db.execute("UPDATE run SET status = ?, note = ? WHERE run = ?", (status, note, run))
                if credited is not None:
                    self._append(self.chain.next(CONTRIBUTION, credited))
                self._append(self.chain.next("closed", {"run": run, "status": status, "error": error}))
                self._forget_secrets(run)
        self._wipe()

    def _wipe(self) -> None:
        """The write-ahead log still holds what was deleted: empty it, unless another process is reading just now."""
        with self._lock:
            self._db.execute("PRAGMA busy_timeout=0")
            with suppress(sqlite3.Error):
                self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            self._db.execute("PRAGMA busy_timeout=30000")

    def set_note(self, run: str, note: str) -> None:
        """Tell the site's own operator something about a run, unless it was closed."""
        with self.transaction():
            marks = ", ".join("?" * len(OPEN))
            self._db.execute(f"UPDATE run SET note = ? WHERE run = ? AND status IN ({marks})", (note, run, *OPEN))  # noqa: S608

    def run(self, run: str) -> tuple[str, dict[str, Json], str] | None:
        """(status, what was announced, note), or None if unknown."""
        with self._lock:
            row = self._db.execute("SELECT status, opened, note FROM run WHERE run = ?", (run,)).fetchone()
        return (row[0], json.loads(row[1]), row[2]) if row else None

    def runs(self) -> list[tuple[str, str, dict[str, Json], str]]:
        """All runs: (run, status, what was announced, note), oldest first."""
        with self._lock:
            rows = self._db.execute("SELECT run, status, opened, note FROM run ORDER BY rowid").fetchall()
        return [(run, status, json.loads(opened), note) for run, status, opened, note in rows]

    def setting(self, name: str) -> str:
        """A stored setting, "" if never set."""
        with self._lock:
            row = self._db.execute("SELECT value FROM setting WHERE name = ?", (name,)).fetchone()
        return str(row[0]) if row else ""

    def set_setting(self, name: str, value: str) -> None:
        """Store a setting."""
        with self.transaction():
            self._db.execute("INSERT OR REPLACE INTO setting VALUES (?, ?)", (name, value))

    def pin_view(self, run: str, view: Mapping[str, Json]) -> None:
        """What was fitted is the same throughout a run: two views that differ a little could be subtracted.
        Raises ProtocolError."""
        if not self.pinned("view", run, view):
            raise ProtocolError("task.view", "a step was fitted otherwise before in the run", field="view")

    def pinned(self, what: str, run: str, told: Mapping[str, Json]) -> bool:
        """Whether *what* was *told* of each name is what a run was told of it first; what is new is kept."""
        name = f"{what} {run}"
        known: dict[str, Json] = json.loads(self.setting(name) or "{}")
        if any(known.get(key, value) != value for key, value in told.items()):
            return False
        if told.keys() - known.keys():
            self.set_setting(name, to_json({**known, **told}).decode())
        return True
