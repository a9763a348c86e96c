"""Sites in Ray's actors: an actor that dies is dropped and comes back, and a study gives the numbers of ``local``."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from atoll.contract.errors import PlanError, TransportError
from atoll.contract.plan import Plan
from atoll.contract.wire import Message
from atoll.data.sources import SourceSpec
from atoll.runtime.sandbox import run_sandbox
from atoll.transport.ray import QUIET, RayTransport

PATIENCE_S = 300.0


async def ask(transport: RayTransport, site: str, name: str, deadline_s: float = PATIENCE_S, **meta: Any) -> Message:
    incoming = await transport.request(site, Message("task", {"id": name, **meta}), deadline_s, lambda head: None)
    return incoming.message()


async def back(transport: RayTransport, site: str) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while site not in transport.sites():
            await asyncio.sleep(0.05)


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(PlanError) as error:
        RayTransport("ray_relay:make", {"a": {}})
    assert error.value.code == "transport.no-ray" and error.value.remedy == 'pip install "atoll[ray]"'


def test_no_statistics_of_usage_leave() -> None:
    assert QUIET["RAY_USAGE_STATS_ENABLED"] == "0"


@pytest.mark.slow
async def test_an_actor_that_died_is_asked_once_more(ray_cluster: None, tmp_path: Path) -> None:
    transport = RayTransport("ray_relay:make", {name: {} for name in "abc"}, actors=2)
    try:
        assert transport.sites() == {"a": 1, "b": 1, "c": 1}
        assert transport.about["a"] == transport.about["c"] != transport.about["b"]  # a and c share an actor
        before = await ask(transport, "a", "1")
        after = await ask(transport, "a", "2", die=str(tmp_path / "died"))
        assert before.meta["pid"] == transport.about["a"]["pid"] != after.meta["pid"]
        assert transport.sites() == {"a": 2, "b": 1, "c": 2}
        assert (await ask(transport, "b", "3")).meta["pid"] == transport.about["b"]["pid"]
    finally:
        transport.close()


@pytest.mark.slow
async def test_an_actor_that_dies_again_and_again_is_lost_and_comes_back(ray_cluster: None) -> None:
    transport = RayTransport("ray_relay:make", {"a": {}, "b": {}}, actors=2)
    try:
        with pytest.raises(TransportError) as error:
            await ask(transport, "a", "1", die="always")
        assert error.value.code == "transport.actor-lost" and error.value.field == "a"
        assert set(transport.sites()) == {"b"}
        await back(transport, "a")
        assert transport.sites()["a"] > 1 and (await ask(transport, "a", "2")).meta["re"] == "2"
        assert transport.leave() == {"a": b"goodbye from a", "b": b"goodbye from b"}
    finally:
        transport.close()


@pytest.mark.slow
async def test_an_actor_that_may_not_start_again_stays_away(ray_cluster: None) -> None:
    transport = RayTransport("ray_relay:make", {"a": {}, "b": {}}, actors=2, restarts=0)
    try:
        for name in ("1", "2"):
            with pytest.raises(TransportError) as error:
                await ask(transport, "a", name, die="always")
            assert error.value.code == "transport.actor-lost" and set(transport.sites()) == {"b"}
        assert transport.leave() == {"b": b"goodbye from b"}
    finally:
        transport.close()


@pytest.mark.slow
def test_sites_that_cannot_be_made(ray_cluster: None) -> None:
    with pytest.raises(TransportError) as error:
        RayTransport("ray_relay:make", {"a": {"refuse": True}}, restarts=0)
    assert error.value.code == "transport.actor-lost"


# ---------------------------------------------------------------- whole studies


FEATURES = ["u", "v"]
SCHEMA = {
    "name": "trial", "max_rows": 1000,
    "columns": {**{name: {"range": [-4, 4]} for name in FEATURES},
                "sick": {"dtype": "integer", "values": [0, 1], "role": "label"}},
}  # fmt: skip


@pytest.fixture
def study(tmp_path: Path) -> tuple[Plan, dict[str, SourceSpec]]:
    random, sources = np.random.default_rng(1), {}
    for place in range(4):
        x = np.clip(random.normal(place / 2 - 1, 1, (60, 2)), -4, 4)
        sick = (x.sum(1) + random.normal(0, 1, 60) > 0).astype(int)
        lines = [f"{u:.4f},{v:.4f},{s}" for (u, v), s in zip(x, sick, strict=True)]
        (tmp_path / f"s{place}.csv").write_text("\n".join(["u,v,sick", *lines]) + "\n")
        sources[f"s{place}"] = SourceSpec(path=f"s{place}.csv")
    model = {"kind": "mlp", "features": FEATURES, "hidden": [4]}
    plan = Plan.from_json({
        "name": "trial", "schema": SCHEMA, "program": "horizontal.scaffold", "protection": "secagg",
        "params": {"target": "sick", "model": model, "rounds": 6}, "run": {"holdout": 0.2},
    })  # fmt: skip
    return plan, sources


def told(result: dict[str, Any]) -> Any:
    metrics = {name: found for name, found in result["metrics"].items() if name in ("federated", "pooled")}
    return json.loads(json.dumps([metrics, result["model"], result["output"], result["wire"]["to_sites_bytes"] > 0]))


@pytest.mark.slow
def test_a_study_gives_the_numbers_of_local(tmp_path: Path, study: tuple[Plan, dict[str, SourceSpec]]) -> None:
    plan, sources = study
    here, _ = run_sandbox(plan, sources, tmp_path, tmp_path / "here")
    there, _ = run_sandbox(plan, sources, tmp_path, tmp_path / "there", "ray")
    assert told(there) == told(here)
    assert {path.name for path in (tmp_path / "there" / "ledger").iterdir()} == {
        "coordinator.jsonl", *(f"{name}.jsonl" for name in sources)
    }  # fmt: skip


def name(process: psutil.Process) -> str:
    """Of a process that may end just now."""
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return ""


@pytest.mark.slow
def test_a_study_goes_on_when_an_actor_is_killed(tmp_path: Path, study: tuple[Plan, dict[str, SourceSpec]]) -> None:
    """Its sites find their journals again, so that the numbers stay the same."""
    plan, sources = study
    here, _ = run_sandbox(plan, sources, tmp_path, tmp_path / "here")
    killed: list[int] = []

    def watch(event: dict[str, Any]) -> None:
        if event.get("round") == 3 and not killed:
            actors = [p for p in psutil.Process().children(recursive=True) if name(p).startswith("ray::House")]
            killed.append(actors[0].pid)
            os.kill(killed[0], signal.SIGKILL)

    there, _ = run_sandbox(plan, sources, tmp_path, tmp_path / "there", "ray", watch)
    assert killed and told(there) == told(here)
