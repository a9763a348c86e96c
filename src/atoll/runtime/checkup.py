"""A study before the study: do the sites' tables keep one contract, and do they look alike?

Every site checks its table against the schema when a study is opened. The comparison program then says
what differs between sites; here its result becomes findings: what is wrong, where, and how to mend it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atoll.contract.plan import Plan
from atoll.contract.protection import Choice
from atoll.data.sources import SourceSpec
from atoll.runtime.sandbox import run_sandbox

WHAT = {
    "empty": ("has no value at all", "leave the column out, or ask why it was not exported"),
    "constant": ("has one value only", "a model learns nothing from it there: check the export's filter"),
    "missing": ("has far more or fewer missing cells than the cohort", "check codes for missing, and what is recorded"),
    "shares": ("has other shares of codes than the cohort", "check the code list's mapping, and whom the table holds"),
    "absent": ("lacks codes that are common elsewhere", "check the code list's mapping"),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to look at: which column, at which sites (or how many), what, and how to mend it."""

    column: str
    where: str
    what: str
    remedy: str


def check_of(plan: Plan) -> Plan:
    """The study that compares the sites' tables before *plan* is run: same data set, schema, cleaning and cohort."""
    settings = plan.run.model_copy(update={"holdout": 0.0, "evaluate": False})
    recipe = plan.recipe.model_copy(update={"steps": ()})
    changed = {"name": f"{plan.name[:57]}-check", "recipe": recipe, "run": settings}
    return plan.model_copy(update={**changed, "program": "statistics.comparison", "params": {}})


def compared(plan: Plan, sources: Mapping[str, SourceSpec], base: Path) -> list[Finding]:
    """The findings of :func:`check_of` a plan on *sources*, all on this machine."""
    cohort = plan.cohort.model_copy(update={"sites": (), "min_sites": 1})
    asked = check_of(plan).model_copy(update={"cohort": cohort, "protection": Choice(sum="plain"), "privacy": None})
    with tempfile.TemporaryDirectory(prefix="atoll-") as out:
        return findings(run_sandbox(asked, sources, base, Path(out))[0]["output"])


def findings(output: Mapping[str, Any]) -> list[Finding]:
    """What the comparison's result (a run's ``output``) warns of."""
    return list(_findings(output["comparison"], output["quality"]))


def _findings(found: Mapping[str, Any], quality: Mapping[str, Any]) -> Iterator[Finding]:
    named: dict[tuple[str, str], list[str]] = {}
    for site, columns in found["own"].items():
        for column, flags in columns.items():
            for flag in flags:
                named.setdefault((column, flag), []).append(site)
    for column, flags in found["columns"].items():
        for flag, number in flags.items():
            if number:
                what, remedy = WHAT[flag]
                yield Finding(column, _where(number, found["sites"], named.get((column, flag), [])), what, remedy)
    for column, codes in found["codes"].items():
        for code, number in codes.items():
            if number == 1 < found["sites"]:
                yield Finding(column, "one site", f"only it has the code {code}", "check the code list's mapping")
    for column, told in quality["columns"].items():
        for power, number in (told.get("unit_flags") or {}).items():
            sites = [site for site, own in quality["sites"].items() if own["unit_flags"].get(column) == int(power)]
            yield Finding(
                column, _where(number, found["sites"], sites), f"its median is about 10^{power} times the cohort's",
                "declare the table's unit in the source (units:) and convert it in the recipe (step: units)",
            )  # fmt: skip
        if (share := told.get("plausibility")) is not None and share < 0.95:
            yield Finding(column, "all sites together", f"{1 - share:.0%} of its values are outliers",
                          "look at the distribution; consider the step outliers")  # fmt: skip
    for column, grains in found["grains"].items():
        if len(grains) > 1:
            told = ", ".join(f"{grain} at {_sites(number)}" for grain, number in grains.items())
            yield Finding(column, "between sites", f"the time grain differs: {told}", "align times: step resample")
    unique = quality["components"].get("uniqueness")
    if unique is not None and unique < 0.999:
        yield Finding("(rows)", "all sites together", f"{1 - unique:.1%} of rows repeat another row",
                      "clean with the step deduplicate")  # fmt: skip


def _sites(number: int) -> str:
    return f"{number} site{'s' if number > 1 else ''}"


def _where(number: int, of: int, names: list[str]) -> str:
    """Sites by name where they share their own flags, else how many of how many."""
    return ", ".join(names) if len(names) == number else f"{_sites(number)} of {of}"
