"""A real PostgreSQL for tests of the run store, started and stopped by the test session."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import sqlalchemy as sa
from tests.free_ports import free_ports

from atoll.runtime.store import RunStore


@dataclass(frozen=True)
class Postgres:
    """A running server. It listens on loopback and on a socket in *folder*."""

    folder: Path
    port: int
    password: str

    def url(self, database: str, *, socket: bool = False) -> str:
        """An SQLAlchemy URL, over TCP or over the Unix socket."""
        place = "@" if socket else f"@127.0.0.1:{self.port}"
        options = f"?host={self.folder}&port={self.port}" if socket else ""
        return f"postgresql+psycopg://atoll:{self.password}{place}/{database}{options}"

    def new_database(self) -> str:
        """An empty database; returns its name."""
        name = f"t{secrets.token_hex(8)}"
        engine = sa.create_engine(self.url("postgres"), isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
        with engine.connect() as connection:
            connection.execute(sa.text(f"CREATE DATABASE {name}"))
        return name


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL server in a temporary folder; skips where it is not installed."""
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'atoll[postgres]'")
    if shutil.which("initdb") is None or shutil.which("pg_ctl") is None:
        pytest.skip("PostgreSQL's initdb and pg_ctl are not on the PATH")
    folder = Path(tempfile.mkdtemp(prefix="atoll-pg-"))
    password = secrets.token_hex(16)
    (folder / "password").write_text(password)
    settings = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "cwd": folder}
    settings |= {"env": {"PATH": os.environ["PATH"], "LC_ALL": "C"}, "text": True, "check": True, "timeout": 600}
    if os.geteuid() == 0:  # initdb and postgres refuse to run as root
        try:
            owner = pwd.getpwnam("postgres")
        except KeyError:
            shutil.rmtree(folder)
            pytest.skip("PostgreSQL does not run as root, and there is no user 'postgres' to run it as")
        for path in (folder, folder / "password"):
            os.chown(path, owner.pw_uid, owner.pw_gid)
        settings |= {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []}
    command = ["initdb", "-D", "data", "-U", "atoll", "--auth=scram-sha-256", "--pwfile=password"]
    try:
        subprocess.run([*command, "--no-sync", "--no-locale", "-E", "UTF8"], **settings)
        (port,) = free_ports(1)
        options = f"-F -h 127.0.0.1 -p {port} -k {folder}"
        subprocess.run(["pg_ctl", "-D", "data", "-w", "-t", "300", "-l", "log", "-o", options, "start"], **settings)
        try:
            yield Postgres(folder, port, password)
        finally:
            subprocess.run(["pg_ctl", "-D", "data", "-w", "-m", "immediate", "stop"], **settings)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


OpenStore = Callable[[], RunStore]


@pytest.fixture(params=["sqlite", "postgresql"])
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[OpenStore]:
    """Opens the run store of this test, any number of times (as after a restart, or in another process)."""
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path / 'store.db'}"
    else:
        server: Postgres = request.getfixturevalue("postgres")
        url = server.url(server.new_database())
    stores: list[RunStore] = []

    def opened() -> RunStore:
        stores.append(RunStore(url, durable=False))  # nobody cuts the power
        return stores[-1]

    yield opened
    for made in stores:
        made.close()


@pytest.fixture
def store(open_store: OpenStore) -> RunStore:
    """An empty run store."""
    return open_store()
