"""``python -m atoll …`` without the start-up: processes forked off one that has imported everything and done nothing.

A start costs a second of imports, and the tests start Atoll more than a thousand times. What is forked is a process
like any other, with an id to be killed by, memory, files, an environment and an exit code of its own. Imported, this is
the tests' side; run as a script, it is the process that forks. What a start imports is tested in ``cli/test_start``.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import select
import signal
import site
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO

ENVIRONMENT = {**os.environ, "NO_COLOR": "1", "COLUMNS": "400", "PYTHONUNBUFFERED": "1"}


class Process:
    """A running ``python -m atoll``, as far as tests need ``subprocess.Popen``."""

    def __init__(self, arguments: Sequence[str], files: Sequence[int], environment: Mapping[str, str]) -> None:
        told, tell = os.pipe()
        asked = {"arguments": list(arguments), "folder": str(Path.cwd()), "environment": dict(environment)}
        socket.send_fds(_origin(), [json.dumps(asked).encode()], [*files, tell])
        os.close(tell)
        self.returncode: int | None = None
        self._told = os.fdopen(told)
        self.pid = int(self._told.readline())

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, once it has ended; minus a signal's number if that ended it."""
        if self.returncode is None:
            if not select.select([self._told], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("atoll", timeout or 0.0)
            self.returncode = int(self._told.readline())
            self._told.close()
        return self.returncode

    def poll(self) -> int | None:
        """Its exit code, or None while it runs."""
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(*arguments: str | Path, output: IO[bytes], environment: Mapping[str, str] = ENVIRONMENT) -> Process:
    """Start ``python -m atoll`` with *arguments*, printing and logging to *output*."""
    with Path(os.devnull).open("rb") as nothing:
        files = [nothing.fileno(), output.fileno(), output.fileno()]
        return Process([*map(str, arguments)], files, environment)


def run(
    *arguments: str | Path, stdin: str = "", environment: Mapping[str, str] = ENVIRONMENT
) -> subprocess.CompletedProcess[str]:
    """What ``python -m atoll`` with *arguments* prints until it ends."""
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        given.write(stdin.encode())
        for file in (given, out, err):
            file.seek(0)
        files = [given.fileno(), out.fileno(), err.fileno()]
        code = Process([*map(str, arguments)], files, environment).wait()
        for file in (out, err):
            file.seek(0)
        return subprocess.CompletedProcess(arguments, code, out.read().decode(), err.read().decode())


@cache
def _origin() -> socket.socket:
    """The connection to the process that forks; it ends when this one does."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, __file__, str(theirs.fileno())]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, env=ENVIRONMENT, pass_fds=[theirs.fileno()]
    )  # fmt: skip
    theirs.close()

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


def serve(asked: socket.socket) -> list[str]:
    """Fork off a process for each request, and another that waits for it; returns only in the former: its arguments."""
    while True:
        message, files, _, _ = socket.recv_fds(asked, 1 << 20, 4)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not message:
            raise SystemExit
        if not os.fork():
            break
        for file in files:
            os.close(file)
    asked.close()
    *standard, tell = files
    if pid := os.fork():
        for file in (*standard, 0, 1, 2):
            os.close(file)
        os.write(tell, f"{pid}\n".encode())
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.write(tell, f"{code}\n".encode())
        os._exit(0)
    os.close(tell)
    for number, file in enumerate(standard):
        os.dup2(file, number)
        os.close(file)
    request = json.loads(message)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.orig_argv = [sys.executable, "-m", "atoll", *request["arguments"]]
    if path := os.environ.get("PYTHONPATH"):  # as at the start of an interpreter
        sys.path[1:1] = path.split(os.pathsep)
        sys.modules.pop("sitecustomize", None)
        site.execsitecustomize()
    return list(request["arguments"])


if __name__ == "__main__":
    sys.path[0] = ""  # as for python -m
    import dp_accounting  # noqa: F401
    import duckdb
    import ibis
    import scipy.stats  # noqa: F401

    from atoll.cli import main
    from atoll.report import html  # noqa: F401
    from atoll.runtime.catalogue import load_installed

    load_installed()
    ibis.duckdb.connect().disconnect()  # which imports most of it
    duckdb.default_connection().close()  # it has a thread, which would be missed in a child
    gc.freeze()  # so that collecting does not touch, and copy, what was there before
    sys.argv = [main.__file__, *serve(socket.socket(fileno=int(sys.argv[1])))]
    runpy.run_module("atoll", run_name="__main__", alter_sys=True)
