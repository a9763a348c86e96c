"""Databases by URL: a table or a query is delivered into the site's engine, as Arrow batches.

Here are what all of them share, and those that only Ibis knows; PostgreSQL, SQLite and DuckDB files have
files of their own. Only the columns that the contract knows, or the recipe's cleaning needs, are asked for, in a
transaction that reads.
No message holds an engine's own words: they quote cells, addresses and passwords.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import ibis
import ibis.expr.types as ir
from ibis.common.exceptions import TableNotFound

from atoll.contract.errors import AtollError, SchemaError
from atoll.contract.schema import TableSchema
from atoll.data.engine import Engine
from atoll.data.sources import Opener, SourceSpec, source, wanted

DATABASES: dict[str, Opener] = {}
"""By the URL's scheme; they are given the base folder as path."""
BATCH_ROWS = 65_536


def database(*schemes: str) -> Callable[[Opener], Opener]:
    """Register how URLs of *schemes* are opened."""

    def register(opener: Opener) -> Opener:
        DATABASES.update(dict.fromkeys(schemes, opener))
        return opener

    return register


def database_file(*schemes: str) -> Callable[[Opener], Opener]:
    """The same, of openers that are given the file that the URL names."""

    def register(opener: Opener) -> Opener:
        @database(*schemes)
        def open_url(spec: SourceSpec, path: Path, schema: TableSchema | None, engine: Engine) -> ir.Table:
            return opener(spec, file_of(spec, path), schema, engine)

        return opener

    return register


@source("sql")
def open_sql(spec: SourceSpec, path: Path, schema: TableSchema | None, engine: Engine) -> ir.Table:
    """*path* is the folder that files of databases are relative to."""
    check_question(spec)
    url = urlsplit(spec.url)
    if url.password is not None or "password" in parse_qs(url.query):
        raise SchemaError(
            "source.password-in-url", "the source's url holds a password", field="url",
            remedy="take it out, and name the environment variable that holds it in password_env",
        )  # fmt: skip
    return DATABASES.get(url.scheme.partition("+")[0], through_ibis)(spec, path, schema, engine)


def check_question(spec: SourceSpec) -> None:
    """Raises SchemaError unless the source names a table or a query."""
    if bool(spec.table) == bool(spec.query):
        raise SchemaError(
            "source.no-table", "a database's source needs a table or a query", field="table",
            remedy="set table (or schema.table), or query",
        )  # fmt: skip


def password(spec: SourceSpec) -> str | None:
    """The password from the environment; None where the source names none. Raises SchemaError."""
    if not spec.password_env:
        return None
    found = os.environ.get(spec.password_env)
    if found is None:
        raise SchemaError(
            "source.no-password", "the environment variable of the source's password_env is not set",
            field="password_env", remedy="set it for the site's process",
        )  # fmt: skip
    return found


def file_of(spec: SourceSpec, base: Path) -> Path:
    """The file of a URL such as sqlite:///relative.db or sqlite:////absolute.db. Raises SchemaError."""
    path = base / unquote(urlsplit(spec.url).path.removeprefix("/"))
    if not path.is_file():
        raise SchemaError(
            "source.missing-file", "there is no readable file at the source's url", field="url",
            remedy="three slashes before a path relative to the site's folder, four before an absolute one",
        )  # fmt: skip
    return path


@contextmanager
def interrupting(seconds: float | None, stop: Callable[[], None]) -> Iterator[None]:
    """Call *stop* after *seconds*, unless done by then."""
    timer = threading.Timer(seconds, stop) if seconds is not None else None
    if timer is not None:
        timer.start()
    try:
        yield
    finally:
        if timer is not None:
            timer.cancel()


def quoted(name: str) -> str:
    """One name as SQL writes it."""
    return '"' + name.replace('"', '""') + '"'


def qualified(table: str) -> str:
    """schema.table as SQL writes it."""
    return ".".join(map(quoted, table.split(".")))


def question(spec: SourceSpec, schema: TableSchema | None, execute: Callable[[str], Any]) -> tuple[list[str], str]:
    """(the columns to read, the SQL that reads them). execute: a DB-API connection's, asked which columns there are."""
    place = f"({spec.query.strip().rstrip(';')}\n) AS source" if spec.query else qualified(spec.table)
    there = [column[0] for column in execute(f"SELECT * FROM {place} LIMIT 0").description]  # noqa: S608
    names = wanted(spec, schema, there)
    return names, f"SELECT {', '.join(map(quoted, names))} FROM {place}"  # noqa: S608


def no_table() -> SchemaError:
    """The table is not there."""
    return SchemaError(
        "source.no-table", "the database has no such table, or does not show it to this user", field="table",
        remedy="check the source's table (schema.table, in its own capitals) and the user's rights",
    )  # fmt: skip


def bad_query() -> SchemaError:
    """The query is wrong."""
    return SchemaError(
        "source.query", "the database cannot answer the source's query", field="query",
        remedy="try the query in the database's own shell, as the same user",
    )  # fmt: skip


def unreachable() -> SchemaError:
    """No connection, or none any more."""
    return SchemaError(
        "source.database", "the database cannot be reached, refuses the user, or went away while it was read",
        field="url", remedy="check the source's url and password_env, and that the database runs",
    )  # fmt: skip


def too_slow(spec: SourceSpec) -> SchemaError:
    """The source's time limit, or the database's own."""
    limit = f"took longer than {spec.timeout_s:g} s" if spec.timeout_s is not None else "was cancelled by the database"
    return SchemaError(
        "source.timeout", f"reading the table {limit}", field="timeout_s",
        remedy="raise the source's timeout_s, or read a smaller table or a faster view",
    )  # fmt: skip


def no_driver(install: str) -> SchemaError:
    """What to install."""
    return SchemaError(
        "source.driver", "the database's driver is not installed at this site", field="url",
        remedy=f"pip install {install}",
    )  # fmt: skip


def through_ibis(spec: SourceSpec, path: Path, schema: TableSchema | None, engine: Engine) -> ir.Table:
    """Any other database that Ibis reaches (MySQL, Trino, ClickHouse, Spark …)."""
    with warnings.catch_warnings(action="ignore"):  # Ibis's own are nothing to this site
        return _through_ibis(spec, schema, engine)


def _through_ibis(spec: SourceSpec, schema: TableSchema | None, engine: Engine) -> ir.Table:
    scheme = urlsplit(spec.url).scheme
    secret = password(spec)
    try:
        connection = ibis.connect(spec.url, **({} if secret is None else {"password": secret}))
    except ImportError:
        raise no_driver(f'"ibis-framework[{scheme}]"') from None
    except ValueError:
        raise SchemaError(
            "source.unknown-database", "the source's url names a database that is not known", field="url",
            remedy="begin it as Ibis does: postgresql://, mysql://, trino://, clickhouse:// …",
        ) from None  # fmt: skip
    except Exception:
        raise unreachable() from None
    try:
        if spec.query:
            table = connection.sql(spec.query)
        else:
            *place, name = spec.table.split(".")
            table = connection.table(name, database=".".join(place) or None)
        table = table.select(wanted(spec, schema, list(table.columns)))
        return engine.load(connection.to_pyarrow_batches(table, chunk_size=BATCH_ROWS))
    except AtollError as error:
        raise unreachable() if error.code == "source.unreadable" else error from None
    except TableNotFound:
        raise no_table() from None
    except Exception:
        raise (bad_query() if spec.query else unreachable()) from None
    finally:
        connection.disconnect()
