"""Sites in Ray's actors whose endpoints are functions of the test: what they are asked goes back to its process."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

from atoll.contract.errors import AtollError
from atoll.contract.wire import Message, decode, encode, encode_bytes, parse_json, to_json
from atoll.transport.base import Endpoint, Progress

NOTE, PART, END, BROKEN = b"n", b"p", b"e", b"b"


class Relay:
    """Listens in the test's process."""

    def __init__(self, endpoints: Mapping[str, Endpoint]) -> None:
        self._endpoints, self._key, self._closed = endpoints, os.urandom(16), False
        self._listener = Listener(("127.0.0.1", 0), backlog=256, authkey=self._key)
        self.settings = {"port": self._listener.address[1], "key": self._key.hex()}
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while not self._closed:
            try:
                connection = self._listener.accept()
            except (OSError, EOFError, AuthenticationError):  # one that came and went, or the end
                continue
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: Connection) -> None:
        with suppress(OSError, EOFError):  # the actor has ended: nobody waits for an answer
            self._exchange(connection)

    def _exchange(self, connection: Connection) -> None:
        site, request, guard = connection.recv_bytes().decode(), decode(connection.recv_bytes()), threading.Lock()

        def tell(note: Mapping[str, Any]) -> None:
            with guard:
                connection.send_bytes(NOTE + to_json(dict(note)))

        try:
            parts = encode(self._endpoints[site](request, tell))
        except Exception:
            connection.send_bytes(BROKEN)
            return
        for part in parts:
            connection.send_bytes(PART)
            connection.send_bytes(part)
        connection.send_bytes(END)

    def close(self) -> None:
        """Listen no longer."""
        self._closed = True
        self._listener.close()


class Far:
    """A site in an actor."""

    def __init__(self, name: str, settings: Mapping[str, Any]) -> None:
        self._name, self._settings, self.about = name, settings, {"pid": os.getpid()}

    def handle(self, message: Message, progress: Progress) -> Message:
        """As the test's endpoint; a task called "die" ends the process, the first time or always."""
        if (how := message.meta.get("die")) is not None and (how == "always" or not Path(how).exists()):
            if how != "always":
                Path(how).touch()
            os._exit(1)
        if "port" not in self._settings:
            return Message("echo", {"re": message.meta["id"], "pid": os.getpid()}, message.arrays)
        parts: list[bytes] = []
        with Client(("127.0.0.1", self._settings["port"]), authkey=bytes.fromhex(self._settings["key"])) as connection:
            connection.send_bytes(self._name.encode())
            connection.send_bytes(encode_bytes(message))
            while (told := connection.recv_bytes()) != END:
                if told == BROKEN:
                    raise ValueError("secret 4711")
                if told == PART:
                    parts.append(connection.recv_bytes())
                else:
                    progress(parse_json(told[1:]))
        return decode(b"".join(parts))

    def leave(self) -> bytes:
        """Says goodbye."""
        return f"goodbye from {self._name}".encode()


def make(name: str, settings: Mapping[str, Any]) -> Far:
    """What actors are told to make."""
    if settings.get("refuse"):
        raise AtollError("test.refused", "no")
    return Far(name, settings)
