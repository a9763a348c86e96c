"""A real PostgreSQL server for a test, benchmark or example: its own folder, port, user and password.

    with server() as database:
        database.execute("CREATE TABLE …")
        SourceSpec(url=database.url, table="…", password_env="…")

PostgreSQL refuses to run as root; started by root, it runs as the user postgres or nobody.
"""

from __future__ import annotations

import getpass
import os
import pwd
import secrets
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Database:
    """url: without the password. pid: of the server."""

    url: str
    password: str
    pid: int

    def connect(self) -> Any:
        """A connection that commits every statement."""
        import psycopg

        return psycopg.connect(self.url, password=self.password, autocommit=True)

    def execute(self, statement: str, rows: Sequence[Sequence[Any]] | None = None) -> None:
        """Run a statement, or once for each of *rows*."""
        with self.connect() as connection, connection.cursor() as cursor:
            if rows is None:
                cursor.execute(statement)
            else:
                cursor.executemany(statement, rows)


def programs() -> Path | None:
    """The folder of initdb and pg_ctl; None where PostgreSQL's server is not installed."""
    found = shutil.which("initdb")
    folders = [Path(found).parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((folder for folder in folders if (folder / "pg_ctl").is_file()), None)


@contextmanager
def server() -> Iterator[Database]:
    """A server that is gone afterwards, with everything in it. Raises RuntimeError where none is installed."""
    binaries = programs()
    if binaries is None:
        raise RuntimeError("PostgreSQL's server is not installed: apt-get install postgresql")
    runs_as = _unprivileged()
    folder = Path(tempfile.mkdtemp(prefix="atoll-pg-"))
    secret = secrets.token_hex(16)
    try:
        (folder / "password").write_text(secret)
        if runs_as:
            for path in (folder, folder / "password"):
                shutil.chown(path, runs_as)
        data, user = folder / "data", runs_as or getpass.getuser()

        def run(program: str, *arguments: str) -> int:
            return subprocess.run(
                [binaries / program, *arguments], check=False, cwd=folder, user=runs_as,
                group=pwd.getpwnam(runs_as).pw_gid if runs_as else None, extra_groups=[] if runs_as else None,
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            ).returncode  # fmt: skip

        made = run("initdb", "-D", str(data), "-U", "atoll", "--auth=scram-sha-256", f"--pwfile={folder / 'password'}",
                   "--encoding=UTF8", "--locale=C", "--no-sync")  # fmt: skip
        if made != 0:
            raise RuntimeError(f"initdb failed as {user}")
        for _ in range(5):  # a free port may be taken before the server has it
            port = _free_port()
            options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
            if run("pg_ctl", "start", "--wait", "-D", str(data), "-l", str(folder / "log"), "-o", options) == 0:
                break
        else:
            raise RuntimeError(f"PostgreSQL does not start; see its log:\n{(folder / 'log').read_text()}")
        try:
            pid = int((data / "postmaster.pid").read_text().split()[0])
            yield Database(f"postgresql://atoll@127.0.0.1:{port}/postgres", secret, pid)
        finally:
            run("pg_ctl", "stop", "--wait", "-m", "immediate", "-D", str(data))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _unprivileged() -> str | None:
    """Whom to run as: None for the user who we are."""
    if os.getuid() != 0:
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in known else "nobody"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
