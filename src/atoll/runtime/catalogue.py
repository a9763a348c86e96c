"""What is installed: programs and protections are found by the files they stand in.

Every module of Atoll's program packages is imported, and every entry point of the group
``atoll.programs`` that other installed packages declare; importing registers. A site may
name further modules in its policy. Nothing is ever received and run.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from functools import cache
from importlib.metadata import entry_points

from atoll.contract.errors import PolicyError

PACKAGES = (
    "atoll.privacy",
    "atoll.aggregation",
    "atoll.statistics",
    "atoll.horizontal",
    "atoll.trees",
    "atoll.blueprints.epidemic",
)


@cache
def load_installed() -> None:
    """Import everything that registers itself; once per process."""
    for package in PACKAGES:
        home = importlib.import_module(package)
        for module in pkgutil.iter_modules(home.__path__, package + "."):
            importlib.import_module(module.name)
    for entry in entry_points(group="atoll.programs"):
        entry.load()


def load_modules(names: Iterable[str]) -> None:
    """Import the modules a site's policy lists; raises PolicyError if one is not installed."""
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError:
            raise PolicyError(
                "policy.no-module", f"module {name!r} is not installed here", field="modules", remedy="install it"
            ) from None
