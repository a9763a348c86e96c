"""What a party's operator reads in the terminal."""

from __future__ import annotations

import pytest

from atoll.cli import show


def test_a_state_is_told_when_it_changes(capsys: pytest.CaptureFixture[str]) -> None:
    tell = show.changes("north")
    for state in ("connected", "disconnected", "disconnected", "disconnected", "connected"):
        tell(state)
    assert capsys.readouterr().out.split() == ["north:", "connected", "north:", "disconnected", "north:", "connected"]


def test_who_stood_out_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    show.suspects({"output": {"suspects": [], "trust": {}}})
    show.suspects({"output": {}})
    assert not capsys.readouterr().out
    show.suspects({"output": {"suspects": [{"site": "[bold]mallory", "rounds": 3, "reasons": {}}]}})
    assert "[bold]mallory" in capsys.readouterr().out
