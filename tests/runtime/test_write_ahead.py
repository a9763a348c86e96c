"""Files of SQLite that several open for the first time at the same moment, as a server and an operator's command do."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from atoll.crypto.identity import Identity
from atoll.runtime.journal import Journal
from atoll.runtime.store import RunStore
from atoll.runtime.write_ahead import write_ahead

NORTH = Identity.generate("north")
AT_ONCE = 4


def store(path: Path) -> None:
    made = RunStore(f"sqlite:///{path}")
    assert made.sites() == {}
    made.close()


def journal(path: Path) -> None:
    made = Journal(path, "north", NORTH.public, NORTH.sign)
    assert made.chain.seq == 0, "one of them began the ledger"
    made.close()


def log(path: Path) -> None:
    file = sqlite3.connect(path, isolation_level=None)
    write_ahead(file)
    assert file.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    file.close()


@pytest.mark.parametrize(("opened", "files"), [(store, 6), (journal, 12), (log, 80)])
def test_a_new_file_is_opened_by_several_at_once(tmp_path: Path, opened: Callable[[Path], None], files: int) -> None:
    together = threading.Barrier(AT_ONCE)

    def one(path: Path) -> None:
        together.wait(60)
        opened(path)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        for number in range(files):
            list(pool.map(one, [tmp_path / f"{number}.db"] * AT_ONCE))
