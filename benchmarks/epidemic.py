"""The epidemic blueprint, held against the past: forecasts and alarms on real waves, and the daily job's time.

Rolling origin: each model is fitted anew to what was known by the end of each origin's day and foretells, for each of
four regions, the cases confirmed in the next 1, 3, 7 and 14 days. Two times:

- ``2020``: January to February 2020, after Hubei; origins daily, 27 January to 25 February; cities are the rows.
- ``2022``: Shanghai's spring 2022, and its neighbours'; origins every third day, March to mid-June; provinces are the
  rows, with all days since January 2020 before them.

MAE is over origins and regions; its peer is persistence's. Beside it RMSE, the weighted interval score (WIS), how
often the 95 % interval held the truth, and the mean difference in MAE to persistence with its 95 % interval by a block
bootstrap over origins. All models' intervals are made alike, of their own errors so far. *Federated* trees are one
model of all regions' rows, the same to the byte as pooled ones; *local* ones are a region's own; *growth* trees tell
how cases grow from the mean of three days. The series are as finally published, not as they stood on the day.
Data: $ATOLL_DATA or ../shared/data.
"""

from __future__ import annotations

import itertools
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from atoll.blueprints.epidemic import alarms, backtest
from benchmarks.epidemic_models import COUNTS, FORECASTERS, GROWTH, HORIZONS, Forecaster, federated_differs
from benchmarks.epidemic_panel import DATA, SITES, Panel, cities, provinces
from benchmarks.table import Row, main

SEED = 7
EXAMPLE = Path(__file__).parents[1] / "examples" / "epidemic"
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Span:
    """A wave's origins. before: origins that only the first intervals are made of; block: of the bootstrap, origins."""

    name: str
    first: str
    last: str
    step: int
    before: int
    block: int

    def origins(self, panel: Panel, *, quick: bool) -> list[int]:
        """Places of the days, those before the first scored one included."""
        step = self.step * (5 if quick else 1)
        first, last = panel.at(self.first), panel.at(self.last)
        return [*range(first - step * self.before, first, step), *range(first, last + 1, step)]


SPANS = (Span("2020", "2020-01-27", "2020-02-25", 1, 0, 7), Span("2022", "2022-03-01", "2022-06-15", 3, 10, 5))


def rolled(panel: Panel, origins: Sequence[int], forecasters: Mapping[str, Forecaster]) -> dict[str, Floats]:
    """Each model's forecasts, [origins, sites, horizons]."""
    found = {}
    for name, forecaster in forecasters.items():
        begun = time.perf_counter()
        found[name] = np.stack([forecaster(panel, at) for at in origins])
        print(f"{name}: {len(origins)} origins in {time.perf_counter() - begun:.1f} s", file=sys.stderr, flush=True)
    return found


def quantiles(forecast: Floats, truth: Floats, origins: Sequence[int], days: int) -> Floats:
    """Quantile forecasts of one horizon, [origins, sites, levels], of errors whose truth was known at each origin."""
    errors, ends = backtest.log_errors(truth, forecast), np.asarray(origins) + days
    return np.stack([
        backtest.quantiles_of_errors(forecast[i], errors[ends <= at].ravel()) for i, at in enumerate(origins)
    ])  # fmt: skip


def scored(span: Span, panel: Panel, origins: Sequence[int], found: Mapping[str, Floats]) -> list[Row]:
    """A row for each horizon and model."""
    rows, begin = list[Row](), panel.at(span.first)
    kept = np.array([at >= begin for at in origins])
    for h, days in enumerate(HORIZONS):
        truth = np.stack([panel.truth(at, days) for at in origins])
        off = {name: np.abs(one[kept, :, h] - truth[kept]).mean(1) for name, one in found.items()}
        for name, one in found.items():
            told = quantiles(one[:, :, h], truth, origins, days)[kept]
            flat, true = told.reshape(-1, told.shape[-1]), truth[kept].ravel()
            wis = float(backtest.weighted_interval_score(true, flat).mean())
            held = backtest.coverage(true, flat[:, 0], flat[:, -1])
            gap = backtest.mean_difference(off[name], off["persistence"], block=span.block, seed=SEED)
            note = (
                f"RMSE {backtest.root_mean_squared_error(true, one[kept, :, h].ravel()):.4g}, WIS {wis:.3g}, "
                f"95 % held {100 * held:.0f} %"
            )
            if name != "persistence":
                note += f", {gap[0]:+.3g} ({gap[1]:+.3g} to {gap[2]:+.3g})"
            rows.append(Row(f"{span.name}, {days} d, {name}", float(off[name].mean()), "cases",
                            float(off["persistence"].mean()), note=note))  # fmt: skip
    return rows


def forecasts(quick: bool) -> list[Row]:
    """Both times."""
    rows = list[Row]()
    for span, panel in zip(SPANS, (cities(), provinces()), strict=True):
        origins = span.origins(panel, quick=quick)
        found = rolled(panel, origins, FORECASTERS)
        rows += [*scored(span, panel, origins, found), *by_region(found, span, panel, origins)]
    return rows


def by_region(found: Mapping[str, Floats], span: Span, panel: Panel, origins: Sequence[int]) -> list[Row]:
    """Where learning together helps: MAE of the federated model in each region; peer: that of the region's own."""
    rows, begin = list[Row](), panel.at(span.first)
    kept = np.array([at >= begin for at in origins])
    for days in HORIZONS:
        h = HORIZONS.index(days)
        truth = np.stack([panel.truth(at, days) for at in origins])
        for kind, (k, site) in itertools.product(("trees", "growth trees"), enumerate((*SITES, "all"))):
            where = slice(None) if site == "all" else slice(k, k + 1)
            together, alone = (np.abs(found[f"{kind}, {how}"][kept, where, h] - truth[kept, where]).mean(1)
                               for how in ("federated", "local"))  # fmt: skip
            gap = backtest.mean_difference(together, alone, block=span.block, seed=SEED)
            note = f"peer: its own {kind}; {gap[0]:+.3g} ({gap[1]:+.3g} to {gap[2]:+.3g})"
            rows.append(Row(f"{span.name}, {days} d, federated {kind} at {site}", float(together.mean()), "cases",
                            float(alone.mean()), note=note))  # fmt: skip
    return rows


def same(quick: bool) -> list[Row]:
    """The program at four sites against the pooled fit above: how many weights differ, at three origins."""
    panel, rows = cities(), list[Row]()
    for day in ("2020-02-01",) if quick else ("2020-01-30", "2020-02-06", "2020-02-13"):
        at, days = panel.at(day), 3
        for kind, learner in (("trees", COUNTS), ("growth trees", GROWTH)):
            off = federated_differs(panel, at, days, learner)
            rows.append(Row(f"{day}, {days} d, {kind}, weights that differ from pooled", off, "weights", limit=0.0))
    return rows


def peeking(_: bool) -> list[Row]:
    """How many forecasters tell something else at an origin where other days come after it."""
    panel = cities()
    at, draw = panel.at("2020-02-05"), np.random.default_rng(SEED)

    def other(daily: Floats) -> Floats:
        found = daily.copy()
        found[..., at + 1 :] = draw.integers(0, 500, found[..., at + 1 :].shape)
        return found

    changed = replace(panel, new=other(panel.new), hubei=other(panel.hubei), national=other(panel.national))
    off = sum(not np.array_equal(one(panel, at), one(changed, at)) for one in FORECASTERS.values())
    return [Row("models that see days to come", off, "models", limit=0.0)]


def known_waves(daily: Floats) -> list[backtest.Wave]:
    """With hindsight: a week's mean of 5 cases a day or more, and of three times the mean of 60 to 14 days before; of
    50 cases at least in all."""
    before = np.array([daily[max(0, t - 60) : max(1, t - 14)].mean() for t in range(len(daily))])
    found = backtest.waves(daily, threshold=np.maximum(5.0, 3 * before))
    return [wave for wave in found if daily[wave.onset : wave.end + 1].sum() >= 50]


def alarmed(panel: Panel, by_site: Floats, units: Floats) -> dict[str, list[NDArray[np.bool_]]]:
    """Alarms by day of each region, by what it looks at."""
    own = [alarms.alarms(daily) for daily in by_site]
    many, total = np.sum(own, axis=0), alarms.alarms(by_site.sum(0))
    found = {"own series": own}
    if len(units) > len(SITES):
        flags = alarms.alarms(units.T)
        found["own, or three cities"] = [
            alarms.multi_point(one, flags[:, panel.site == k]) for k, one in enumerate(own)
        ]  # fmt: skip
    found["own, or two regions"] = [one | (many >= alarms.AlarmRule().regions) for one in own]
    found["own, or the sum of all"] = [one | total for one in own]
    return found


def triggers(_: bool) -> list[Row]:
    """EARS C2 alarms on all waves of 2020 (cities) and of January 2020 to June 2022 (provinces). Before the series
    begin there were no cases. By chance: the recall of the same alarms at other times."""
    rows, calm = [], 21
    for name, panel, end in (("2020", cities(), "2020-12-01"), ("2020–22", provinces(), "2022-07-01")):
        by_site, units = (np.pad(one[:, : panel.at(end)], ((0, 0), (calm, 0))) for one in (panel.by_site, panel.new))
        waves = [known_waves(daily) for daily in by_site]
        for kind, flags in alarmed(panel, by_site, units).items():
            regions = list(zip(flags, waves, strict=True))
            score, chance = backtest.alarm_score(regions), backtest.recall_by_chance(regions)
            note = (
                f"of {score.waves} waves (by chance {chance:.2f}); first alarm {score.lead_days:.3g} days before the "
                f"peak (median); {score.false_per_100_days:.2g} false alarms a region and 100 days"
            )
            rows.append(Row(f"{name}, alarms, {kind}", score.recall, "recall", note=note))
    return rows


def command(*words: object, **environment: str) -> tuple[float, str]:
    """(seconds, processor time in words) that a command and its processes take; raises what it said where it fails."""
    begun, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True,
                          env={**os.environ, **environment}, check=False)  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{words}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    took, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    worked = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return took, f"{worked:.0f} s of processor time"


def daily() -> list[Row]:
    """The whole daily job of four regions as an operator starts it, on the first wave with saved models, and the
    training of the 7-day one before."""
    with tempfile.TemporaryDirectory(prefix="atoll-") as scratch:
        folder = Path(scratch)
        command(EXAMPLE / "prepare.py", DATA / "covid19-china-cities", folder, "--until", "2020-02-10", "--cases", 0)
        told = ("--sites", folder / "sites.yaml", "--data", folder)
        plan, held, training = EXAMPLE / "daily.yaml", str(folder / "models"), dict[int, tuple[float, str]]()
        for days in HORIZONS:
            one = folder / f"forecast-{days}"
            training[days] = command("-m", "atoll", "run", EXAMPLE / f"forecast-{days}.yaml", *told, "--out", one)
            filled = folder / f"daily-{days}.yaml"
            command("-m", "atoll", "install", one / "model", "--name", f"epidemic-{days}", "--models", held,
                    "--plan", plan, "--out", filled)  # fmt: skip
            plan = filled
        took, worked = training[7]
        rows = [Row("7-day trees at four regions", took, "s", note=f"atoll run: 40 trees of depth 2, masked; {worked}")]
        for transport in ("local", "grpc"):
            out = folder / transport
            took, worked = command("-m", "atoll", "daily", plan, *told, "--transport", transport, "--out", out,
                                   ATOLL_MODELS=held)  # fmt: skip
            rows.append(Row(f"daily job of four regions, {transport}", took, "s", limit=60.0, note=worked))
    return rows


def measure(quick: bool) -> list[Row]:
    """Forecasts, alarms, and (not a quick one) the daily job."""
    return [*forecasts(quick), *same(quick), *peeking(quick), *triggers(quick), *([] if quick else daily())]


if __name__ == "__main__":
    main("epidemic", ("numpy", "statsmodels", "scikit-learn"), measure, SEED)
