"""The networks of other packages that this process may import: empty, until who runs the process says otherwise.

A plan can ask for ``kind: module, name: package.nets:Net``. Importing runs the package's code, so a name that somebody
else wrote into a plan is imported only where the party's own operator has listed it: ``models`` in a site's policy.yaml
or in coordinator.yaml. On one's own machine (``atoll run``) the plan is one's own, and is taken at its word.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from typing import Any

from atoll.contract.errors import PlanError, PolicyError
from atoll.contract.wire import Json

_NAMES: set[str] = set()


def allow(names: Iterable[str]) -> None:
    """Let models be made of these, exact names, in this process."""
    _NAMES.update(names)


def asked_in(value: Json) -> Iterator[str]:
    """The names that a plan's parameters, or a model's spec, ask for."""
    if isinstance(value, dict):
        if value.get("kind") == "module":
            yield str(value.get("name", ""))
        for part in value.values():
            yield from asked_in(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from asked_in(part)


def imported(name: str) -> Any:
    """What *name* ("package.nets:Net") stands for. Raises PolicyError, before anything is imported, unless it is
    allowed, and PlanError if it is not installed."""
    if name not in _NAMES:
        raise PolicyError(
            "model.not-allowed", f"the network {name!r} is not on this party's list", field=name,
            remedy="its operator decides: 'models' in policy.yaml (at the coordinator: coordinator.yaml)",
        )  # fmt: skip
    package, _, inner = name.partition(":")
    try:
        return getattr(importlib.import_module(package), inner)
    except (ImportError, AttributeError):
        raise PlanError(
            "model.no-module", f"the network {name!r} is not installed here", field=name,
            remedy="install its package at every party",
        ) from None  # fmt: skip
