"""The tables of the coordinator's run store, and the database that holds them: SQLite, or PostgreSQL by URL."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from atoll.contract.errors import PlanError
from atoll.runtime.write_ahead import write_ahead

_meta = sa.MetaData()
RUNS = sa.Table(
    "runs", _meta,
    sa.Column("run", sa.String(32), primary_key=True), sa.Column("created", sa.String(40), nullable=False),
    sa.Column("status", sa.String(40), nullable=False), sa.Column("name", sa.String(64), nullable=False),
    sa.Column("plan", sa.Text, nullable=False), sa.Column("plan_hash", sa.String(64), nullable=False),
    sa.Column("sites", sa.Text, nullable=False), sa.Column("cancel", sa.Boolean, nullable=False),
    sa.Column("note", sa.Text, nullable=False), sa.Column("result", sa.Text),
)  # fmt: skip
ROUNDS = sa.Table(
    "rounds", _meta,
    sa.Column("run", sa.String(32), primary_key=True), sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("stage", sa.String(40), nullable=False), sa.Column("name", sa.String(200), nullable=False),
    sa.Column("seconds", sa.Float, nullable=False), sa.Column("receipts", sa.Text, nullable=False),
)  # fmt: skip
BLOBS = sa.Table(
    "blobs", _meta,
    sa.Column("run", sa.String(32), primary_key=True), sa.Column("name", sa.String(40), primary_key=True),
    sa.Column("part", sa.Integer, primary_key=True), sa.Column("data", sa.LargeBinary, nullable=False),
)  # fmt: skip
METRICS = sa.Table(
    "metrics", _meta,
    sa.Column("run", sa.String(32), primary_key=True), sa.Column("step", sa.Integer, primary_key=True),
    sa.Column("name", sa.String(100), primary_key=True), sa.Column("value", sa.Float),  # NULL: NaN
)  # fmt: skip
UNTOLD = sa.Table(
    "untold", _meta,
    sa.Column("site", sa.String(64), primary_key=True), sa.Column("run", sa.String(32), primary_key=True),
    sa.Column("status", sa.String(40), nullable=False), sa.Column("error", sa.Text, nullable=False),
)  # fmt: skip
ATTEMPTS = sa.Table(
    "attempts", _meta,
    sa.Column("run", sa.String(32), primary_key=True), sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("attempt", sa.Integer, nullable=False),
)  # fmt: skip
PACES = sa.Table(
    "paces", _meta,
    sa.Column("run", sa.String(32), primary_key=True), sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("site", sa.String(64), primary_key=True),
    sa.Column("effort", sa.Float, nullable=False), sa.Column("seconds", sa.Float),  # NULL: did not answer in time
)  # fmt: skip
TRAFFIC = sa.Table(
    "traffic", _meta,
    sa.Column("run", sa.String(32), primary_key=True), sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("bytes", sa.BigInteger, nullable=False),
)  # fmt: skip
LEDGER = sa.Table("ledger", _meta, sa.Column("seq", sa.Integer, primary_key=True), sa.Column("line", sa.Text))
SITES = sa.Table(
    "sites", _meta,
    sa.Column("site", sa.String(64), primary_key=True), sa.Column("public_key", sa.String(64), nullable=False),
    sa.Column("token_hash", sa.String(64), nullable=False), sa.Column("token_expires", sa.BigInteger, nullable=False),
    sa.Column("certificates", sa.String(130), nullable=False),
    sa.Column("revoked", sa.Boolean, nullable=False), sa.Column("seen", sa.String(40), nullable=False),
)  # fmt: skip


class Database:
    """Opened, its tables made where they are missing; safe for threads."""

    def __init__(self, url: str, *, durable: bool = True) -> None:
        """url: an SQLAlchemy URL (``sqlite:///…`` or ``postgresql+psycopg://…``). durable=False skips
        SQLite's fsync (for sandboxes whose store dies with the process)."""
        try:
            self._engine = sa.create_engine(url)
        except ModuleNotFoundError as error:
            raise PlanError(
                "store.driver", f"the store needs {error.name}", field="store", remedy="pip install 'atoll[postgres]'"
            ) from None
        if self._engine.dialect.name == "sqlite":
            sa.event.listen(self._engine, "connect", partial(_sqlite_settings, durable))
            if (file := self._engine.url.database) and file != ":memory:":
                Path(file).touch(0o600)  # before SQLite makes it and its write-ahead log
                Path(file).chmod(0o600)
        with self._engine.begin() as db:
            for table in _meta.sorted_tables:  # another process may be making them just now
                db.execute(sa.schema.CreateTable(table, if_not_exists=True))

    @contextmanager
    def _begin(self) -> Iterator[Connection]:
        with self._engine.begin() as connection:
            yield connection

    def close(self) -> None:
        """Give back all connections."""
        self._engine.dispose()


def _sqlite_settings(durable: bool, connection: Any, _: Any) -> None:
    connection.execute("PRAGMA busy_timeout=30000")
    connection.execute(f"PRAGMA synchronous={'FULL' if durable else 'OFF'}")
    write_ahead(connection)
