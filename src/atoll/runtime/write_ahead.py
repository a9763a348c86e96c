"""SQLite's write-ahead log, for a file that several processes may open for the first time at the same moment."""

from __future__ import annotations

import sqlite3
import time

PATIENCE_S = 30.0


def write_ahead(connection: sqlite3.Connection) -> None:
    """Switch it on. Of several that do so at once, SQLite tells all but one that the file is locked, whatever their
    busy timeout is. Raises sqlite3.OperationalError when that lasts."""
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                raise
            time.sleep(0.01)
        else:
            return
