"""A site behind a link of 64 kbit/s: the run finishes, and the forecast of it told what it took."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.slow

RATE = 8000
"""Bytes a second: 64 kbit/s."""
PIECE = 200
ROUNDS = 25


def _pass(source: socket.socket, target: socket.socket, passed: list[int]) -> None:
    """What comes, at RATE."""
    free = time.monotonic()
    with contextlib.suppress(OSError):
        while data := source.recv(PIECE):
            free = max(free, time.monotonic()) + len(data) / RATE
            time.sleep(max(0.0, free - time.monotonic()))
            target.sendall(data)
            passed.append(len(data))
    for end in (source, target):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def throttled(port: int, passed: list[int]) -> Iterator[int]:
    """A port of loopback that leads to *port*, at RATE in each direction. passed: the sizes of what went through."""
    listening = socket.create_server(("127.0.0.1", 0))
    open_: list[socket.socket] = [listening]

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                here, _ = listening.accept()
                there = socket.create_connection(("127.0.0.1", port))
                open_.extend((here, there))
                for ends in ((here, there), (there, here)):
                    threading.Thread(target=_pass, args=(*ends, passed), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield int(listening.getsockname()[1])
    finally:
        for one in open_:
            one.close()


def test_a_forecast_tells_the_time_and_the_traffic_of_a_real_run_over_a_slow_link(federation: Any) -> None:
    """Traffic within 2 %; time no longer than it took, and no shorter than the link needs for what went over it."""
    gamma = federation.sites["gamma"]
    place: Path = gamma.home / "site.yaml"
    before = place.read_text()
    passed: list[int] = []
    with throttled(federation.ports[0], passed) as port:
        place.write_text(yaml.safe_dump({**yaml.safe_load(before), "address": f"127.0.0.1:{port}"}))
        try:
            gamma.stop()
            gamma.start()
            federation.await_connected("gamma")
            run = federation.submit("slow-link", params={"rounds": ROUNDS}, run={"deadline_s": 30, "holdout": 0.0})
            federation.await_status(run, "finished")
        finally:
            gamma.stop()
            place.write_text(before)
            gamma.start()
            federation.await_connected("gamma")
    measured = federation.store.result(run)[0]
    quick = {"rows": 2000, "down": "10 Gbit/s", "up": "10 Gbit/s", "latency": "1 ms"}
    slow = {**quick, "down": "64 kbit/s", "up": "64 kbit/s"}
    fleet = federation.folder / "fleet.yaml"
    fleet.write_text(yaml.safe_dump({"sites": {"alpha": quick, "beta": quick, "gamma": slow}}))
    plan = federation.plan("slow-link", params={"rounds": ROUNDS}, run={"deadline_s": 30, "holdout": 0.0})
    told = json.loads(federation.atoll("forecast", plan, "--fleet", fleet, "--step-s", "0.0005", "--json").stdout)
    for way in ("to_sites_bytes", "from_sites_bytes"):
        assert told["traffic"][way] == pytest.approx(measured["wire"][way], rel=0.02)
    assert told["waiting"][0]["site"] == "gamma" and told["waiting"][0]["last_in_rounds"] >= ROUNDS
    assert told["rounds"] == measured["rounds"] == ROUNDS
    assert told["seconds"] < measured["seconds"] / 0.9
    assert 0.6 < told["seconds"] / (sum(passed) / RATE) < 1.1, "in which the handshake is, and what frames the messages"
