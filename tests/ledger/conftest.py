"""A federation's ledgers."""

from __future__ import annotations

import pytest

from .parties import World


@pytest.fixture
def world() -> World:
    return World()
