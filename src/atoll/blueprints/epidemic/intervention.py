"""What interventions would avert: the twin with and without them, by the same random numbers.

Pairs of runs share their luck (common random numbers: Law 2015, *Simulation Modeling and Analysis*, 5th ed., section
11.2), so an intervention that changes nothing averts exactly 0, and the interval of what one averts is that of its
effect. It holds the fit's doubt (a bootstrap draw for each pair) and chance, not the doubt about the factors
themselves: those are the user's assumptions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from atoll.blueprints.epidemic.twin import Floats, Measure, Twin

MEASURES = (
    Measure(name="closing", contact=0.45),
    Measure(name="testing", infectious=0.63),
    Measure(name="mobility", mobility=0.2),
)
"""Examples, not advice. Closing schools and most businesses: R less by 38% and 27% (Brauner et al. 2021, Science
371:eabd9338), together 0.62 · 0.73. Testing and isolation: 37% less transmission (Kucharski et al. 2020, Lancet
Infect Dis 20:1151, self-isolation and household quarantine). Mobility: four of five journeys between regions less."""


@dataclass(frozen=True)
class Effect:
    """Cases of the coming days under an intervention, and those it averts: means, and ends of intervals of *level*.

    by_region: averted in each region, on average, in the twin's order.
    """

    name: str
    effect: str
    cases: float
    low: float
    high: float
    averted: float
    averted_low: float
    averted_high: float
    by_region: tuple[float, ...]
    level: float


def compare(
    twin: Twin,
    days: int,
    measures: Sequence[Measure | Sequence[Measure]] = MEASURES,
    *,
    draws: int = 200,
    seed: int = 0,
    level: float = 0.95,
) -> list[Effect]:
    """The effect of each of *measures* (or of several in force together) over the coming *days*.

    The first entry is "none": what comes if nothing is done. Cost: one run of the twin for each.
    """
    free = twin.run(days, draws, seed)
    effects = [_effect("none", "as now", free, free, level)]
    for entry in measures:
        together = (entry,) if isinstance(entry, Measure) else tuple(entry)
        held = twin.run(days, draws, seed, together)
        name = " and ".join(measure.name for measure in together)
        effects.append(_effect(name, "; ".join(described(measure) for measure in together), held, free, level))
    return effects


def described(measure: Measure) -> str:
    """What an intervention does, in words."""
    said = [
        f"{said} by {100 * (1 - factor):.0f}%"
        for said, factor in (
            ("contacts less", measure.contact), ("infectious time shorter", measure.infectious),
            ("journeys between regions less", measure.mobility),
        )
        if factor < 1
    ]  # fmt: skip
    where = f" in {', '.join(measure.regions)}" if measure.regions else ""
    until = "" if measure.end is None else f" to day {measure.end}"
    return (" and ".join(said) or "nothing") + where + (f", from day {measure.start + 1}{until}" if said else "")


def _effect(name: str, effect: str, held: Floats, free: Floats, level: float) -> Effect:
    tail = (1 - level) / 2
    cases, saved = held.sum(axis=(1, 2)), (free - held).sum(axis=1)
    averted = saved.sum(axis=1)
    low, high = np.quantile(cases, [tail, 1 - tail])
    least, most = np.quantile(averted, [tail, 1 - tail])
    return Effect(
        name=name, effect=effect, cases=float(cases.mean()), low=float(low), high=float(high),
        averted=float(averted.mean()), averted_low=float(least), averted_high=float(most),
        by_region=tuple(saved.mean(axis=0).tolist()), level=level,
    )  # fmt: skip
