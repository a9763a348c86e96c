"""A party's ledger in an SQLite file, with whatever must be saved in the same transaction as an entry."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from atoll.contract.errors import IntegrityError
from atoll.contract.wire import Json
from atoll.ledger.entry import EMPTY, Chain, Entry, Signer, read_line
from atoll.runtime.write_ahead import write_ahead

_LEDGER = "CREATE TABLE IF NOT EXISTS ledger (seq INTEGER PRIMARY KEY, line TEXT NOT NULL);"

CACHE_KIB = 16 << 10
"""Of a temporary one."""


class LedgerFile:
    """Safe for threads of one process; other processes of the same party may read, and write in between."""

    def __init__(
        self, path: Path | str, tables: str, party: str, public: bytes, sign: Signer, *, durable: bool = True,
        temporary: bool = False,
    ) -> None:  # fmt: skip
        """tables: SQL that makes those beside the ledger. durable=False: no fsync, no other readers. temporary: for
        sandboxes; what is in it dies with the process, and no file is written as long as it fits SQLite's cache."""
        self._lock = threading.RLock()
        self._path = Path(path)
        self._db = sqlite3.connect("" if temporary else path, isolation_level=None, check_same_thread=False, timeout=30)
        if temporary or not durable:
            settings = ["locking_mode=EXCLUSIVE", "journal_mode=MEMORY", "synchronous=OFF"]
        else:
            write_ahead(self._db)
            settings = ["synchronous=FULL", "secure_delete=ON"]  # keys are gone when they are deleted
        for pragma in settings:
            self._db.execute(f"PRAGMA {pragma}")
        if temporary:
            self._db.execute(f"PRAGMA cache_size=-{CACHE_KIB}")
        self._db.executescript(_LEDGER + tables)
        last = self._db.execute("SELECT line FROM ledger ORDER BY seq DESC LIMIT 1").fetchone()
        entry: dict[str, Json] = json.loads(last[0]) if last else {"seq": -1, "hash": EMPTY}
        self.chain = Chain(party, public, sign, entry["seq"], entry["hash"])
        if not last:
            with self.transaction():
                if self.chain.seq < 0:  # another process may have begun it just now
                    self._append(self.chain.genesis())

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing, and durable afterwards; raises IntegrityError when it cannot be written."""
        with self._lock:
            seq, head = self.chain.seq, self.chain.head
            try:
                self._db.execute("BEGIN IMMEDIATE")
                self._follow()
                yield
                self._db.execute("COMMIT")
            except BaseException as error:
                self.chain.seq, self.chain.head = seq, head
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                if isinstance(error, sqlite3.Error | OSError):
                    raise IntegrityError(
                        "ledger.not-written",
                        "the journal cannot be written, so nothing leaves the site",
                        field="journal",
                        remedy="free disk space at the site and check the journal's permissions",
                    ) from None
                raise

    def _follow(self) -> None:
        """Take up the head that another process of the same party (an operator's command) may have moved."""
        seq = self._db.execute("SELECT max(seq) FROM ledger").fetchone()[0]
        if seq is not None and seq != self.chain.seq:
            self.chain.seq, self.chain.head = seq, self.entry(seq)["hash"]

    def _append(self, entry: Entry) -> Entry:
        self._db.execute("INSERT INTO ledger VALUES (?, ?)", (entry["seq"], self.chain.line))
        self.chain.commit(entry)
        return entry

    def record(self, kind: str, body: Entry) -> Entry:
        """Append one signed ledger entry, durably."""
        with self.transaction():
            return self._append(self.chain.next(kind, body))

    def entry(self, seq: int) -> Entry:
        """One entry; raises IntegrityError if there is none."""
        with self._lock:
            row = self._db.execute("SELECT line FROM ledger WHERE seq = ?", (seq,)).fetchone()
        if row is None:
            raise IntegrityError("ledger.no-entry", f"the ledger has no entry {seq}", field="seq")
        return read_line(row[0])

    def export(self, path: Path) -> None:
        """Write the ledger as JSON lines."""
        with self._lock, path.open("w", encoding="utf-8") as file:
            file.writelines(line + "\n" for (line,) in self._db.execute("SELECT line FROM ledger ORDER BY seq"))

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()
