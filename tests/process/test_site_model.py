"""``atoll site model`` beside a running site: each has another model, and the coordinator has none of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from atoll.models import stored

pytestmark = pytest.mark.slow

SITES = ("alpha", "beta", "gamma")


def test_every_site_takes_its_own_model_out_of_its_journal(federation: Any, tmp_path: Path) -> None:
    run = federation.submit("personal", program="horizontal.fedper", params={"rounds": 5})
    federation.await_status(run, "finished")
    federation.as_coordinator("result", run, "--out", tmp_path / "coordinator")
    shared = stored.load(tmp_path / "coordinator" / "model")[0].weights
    own = {}
    for site in SITES:
        told = federation.as_site(site, "model", run[:10], "--out", tmp_path / site).stdout
        assert f"{site}'s own model of personal" in told
        own[site] = stored.load(tmp_path / site)[0].weights
        assert own[site][1:].tobytes() == shared[1:].tobytes()
    assert len({weights[0] for weights in own.values()} | {shared[0]}) == 1 + len(own)
