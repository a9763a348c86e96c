"""The report's sections about groups: group-by, tests of means, survival."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import scipy

from atoll.report import charts, sentences
from atoll.report.association import notes
from atoll.report.markup import Child, Html, element, table
from atoll.report.section import Input, Section, beside, cards, figure, output, part, text, unit_of
from atoll.report.sentences import key_of
from atoll.report.words import NOTHING, WITHHELD, counted, fixed, p_value, percent, real, significant, told, whole

MOST_GROUPS = 40
"""Groups in one chart; the table has all of them."""
AT_RISK = 7
"""Times in the table of how many are still under observation."""


def reach_95(n: object, std: object) -> float | None:
    """Half the width of the 95 % confidence interval of a mean (Student's t with n − 1 degrees of freedom)."""
    count, deviation = real(n), real(std)
    if count is None or count < 2 or deviation is None:
        return None
    return float(scipy.special.stdtrit(count - 1, 0.975)) * deviation / math.sqrt(count)


def _means(rows: Sequence[tuple[str, Input]], label: str) -> Html | None:
    """Bars of means with their confidence intervals; *rows* are (group, {"count", "mean", "std"})."""
    shown = [(name, one) for name, one in rows if real(one.get("count")) != 0][:MOST_GROUPS]
    pairs = [(name, one.get("mean")) for name, one in shown]
    ends = []
    for _, one in shown:
        mean, reach = real(one.get("mean")), reach_95(one.get("count"), one.get("std"))
        ends.append((None, None) if mean is None or reach is None else (mean - reach, mean + reach))
    return charts.bars(pairs, label, form=lambda v: significant(v, 3), ends=ends)


def _described(one: Input) -> list[str]:
    """Count, mean, its interval, standard deviation."""
    count, mean = real(one.get("count")), real(one.get("mean"))
    if count is None:
        return [WITHHELD] * 4
    reach = reach_95(count, one.get("std"))
    between = (
        NOTHING if mean is None or reach is None else f"{significant(mean - reach)} to {significant(mean + reach)}"
    )
    return [whole(count), significant(mean), between, significant(one.get("std"))]


DESCRIBED = ["Values", "Mean", "95 % confidence", "Standard deviation"]


def group_by(result: Input, details: Input) -> Section | None:
    """Each column's mean in each group."""
    found = output(result, "group_by")
    groups = [part(group) for group in found.get("groups") or []]
    if not groups:
        return None
    names, by = [str(name) for name in found.get("columns") or []], [str(name) for name in found.get("by") or []]
    pictures: list[Html | None] = []
    tables: list[Child] = []
    for name in names:
        unit, each = unit_of(details, name), [(key_of(group), part(group, "columns", name)) for group in groups]
        where = f"mean in each group, {unit}" if unit else "mean in each group"
        pictures.append(
            figure(_means(each, f"mean {name} by {' and '.join(by)}"), name, f"{where}; line: 95 % confidence")
        )
        rows = [[key, *_described(one)] for key, one in each]
        tables.append(table(f"{name}{f', {unit}' if unit else ''}", [" × ".join(by), *DESCRIBED], rows))
    if not names:
        tables.append(table("Rows", [" × ".join(by), "Rows"], [[key_of(g), told(g.get("count"))] for g in groups]))
    said = sentences.group_by(found, lambda column: unit_of(details, column))
    title = f"{counted(len(groups), 'group')} by {' and '.join(by)}. {said}"
    return Section("groups", "Groups", [text(title), cards(pictures), tables, notes(found)])


def tests(result: Input, details: Input) -> Section | None:
    """t-test and analysis of variance, each in a sentence and its numbers."""

    def unit(column: object) -> str:
        return unit_of(details, column)

    content: list[Child] = []
    if ttest := output(result, "ttest"):
        samples, groups = [part(one) for one in ttest.get("samples") or []], list(ttest.get("groups") or [])
        two = len(samples) == 2
        named = [f"{ttest.get('by')} {group}" for group in groups] if two else [str(ttest.get("column"))]
        numbers = [
            ("t", significant(ttest.get("t"))), ("degrees of freedom", significant(ttest.get("df"))),
            ("p-value", p_value(ttest.get("p_value"))), ("Cohen’s d", fixed(ttest.get("cohens_d"))),
        ]  # fmt: skip
        kind = {"welch": "Welch’s t-test", "pooled": "Student’s t-test", "paired": "Paired t-test"}
        content += _test(
            kind.get(str(ttest.get("test")), "One-sample t-test"), sentences.ttest(ttest, unit), numbers,
            list(zip(named, samples, strict=False)), str(ttest.get("column")), unit(ttest.get("column")), ttest,
        )  # fmt: skip
    if anova := output(result, "anova"):
        each = [part(one) for one in anova.get("groups") or []]
        numbers = [
            ("F", significant(anova.get("f"))),
            ("degrees of freedom", f"{whole(anova.get('df_between'))} and {whole(anova.get('df_within'))}"),
            ("p-value", p_value(anova.get("p_value"))), ("η²", fixed(anova.get("eta_squared"))),
            ("ω²", fixed(anova.get("omega_squared"))),
        ]  # fmt: skip
        groups = [(f"{anova.get('by')} {key_of(one)}", one) for one in each]
        column = str(anova.get("column"))
        content += _test(
            "Analysis of variance", sentences.anova(anova, unit), numbers, groups, column, unit(column), anova
        )
    return Section("tests", "Tests of means", content) if content else None


def _test(
    title: str, said: str, numbers: Sequence[tuple[str, str]], groups: Sequence[tuple[str, Input]], column: str,
    unit: str, found: Input,
) -> list[Child]:  # fmt: skip
    picture = figure(
        _means(groups, f"mean {column}"), f"Mean {column}", f"{unit + '; ' if unit else ''}line: 95 % confidence"
    )
    shown = [(name, value) for name, value in numbers if value != NOTHING]
    listing = table(title, ["Number", "Value"], shown) if shown else None
    rows = [[name, *_described(one)] for name, one in groups]
    each = table(f"{column} of each group", ["Group", *DESCRIBED], rows) if rows else None
    return [text(element("b", f"{title}: "), said), beside(picture, listing, top=True), each, notes(found)]


def survival(result: Input, details: Input) -> Section | None:
    """Kaplan–Meier curves with confidence bands, how many were at risk, and the log-rank test."""
    found = output(result, "survival")
    curves = {str(name): part(curve) for name, curve in part(found, "curves").items()}
    if not curves:
        return None
    unit = unit_of(details, found.get("duration"))
    points = {name: _points(curve) for name, curve in curves.items()}
    across = f"{found.get('duration')}{f' ({unit})' if unit else ''}"
    exact = bool(found.get("exact"))
    confidence = percent(found.get("confidence"), 1).replace(".0 %", " %")
    hint, together = f"share without the event; band: {confidence} confidence", len(curves) <= len(charts.SERIES)
    colours = {name: charts.SERIES[i % len(charts.SERIES)] for i, name in enumerate(curves)}
    parts = [points] if together else [{name: p} for name, p in points.items()]
    pictures: list[Html | None] = []
    for one in parts:
        drawn = charts.steps(one, _in_words(one, curves), across, {n: colours[n][1] for n in one})
        pictures.append(figure(drawn, "Survival" if together else next(iter(one)), hint))
    key = element(
        "ul", [element("li", element("span", class_=f"key {colours[n][0]}"), n) for n in curves], class_="legend"
    )
    rows = [_summary(name, curve, exact=exact) for name, curve in curves.items()]
    header = ["Group", "Rows", "Events", "Censored", f"Median{f', {unit}' if unit else ''}"]
    test = part(found, "logrank")
    said = text(sentences.survival(found, lambda _: unit))
    logrank = None
    if real(test.get("chi_square")) is not None:
        square = f"χ²({whole(test.get('degrees_of_freedom'))}) = {significant(test.get('chi_square'))}"
        logrank = text(element("b", "Log-rank test: "), f"{square}, {sentences.p_told(test.get('p_value'))}.")
    elif test:
        logrank = text(element("b", "Log-rank test: "), str(test.get("note") or "not told"), ".")
    listing = table("Groups", header, rows)
    content: list[Child] = [said, cards(pictures), listing, logrank]
    if together:
        content = [said, beside(pictures[0], key if len(curves) > 1 else None, listing, logrank, top=True)]
    content.append(_at_risk(points, across, exact=exact))
    noted = sorted({str(c["note"]) for c in [*curves.values(), test] if c.get("note")})
    left = real(found.get("left_out"))
    if left is None or left > 0:
        noted.append(f"rows left out, as duration, event or group is missing: {told(left)}")
    return Section("survival", "Survival", [*content, notes({"notes": noted})])


def _points(curve: Input) -> list[dict[str, float | None]]:
    lists = [[real(v) for v in curve.get(key) or []] for key in ("times", "survival", "low", "high", "at_risk")]
    keys = ("time", "survival", "low", "high", "at_risk")
    found = [dict(zip(keys, values, strict=True)) for values in zip(*lists, strict=False)]
    return [one for one in found if one["time"] is not None and one["survival"] is not None]


def _in_words(points: Mapping[str, Sequence[Mapping[str, float | None]]], curves: Mapping[str, Input]) -> str:
    said = []
    for name, p in points.items():
        if p:
            last = f"{percent(p[-1]['survival'], 1)} at {significant(p[-1]['time'])}"
            said.append(f"{name}: {last}, median {significant(curves[name].get('median'))}")
    return f"Kaplan–Meier curves. {'; '.join(said)}"


def _summary(name: str, curve: Input, *, exact: bool) -> list[Child]:
    if "times" not in curve:
        return [name, *[WITHHELD] * 4]
    median = sentences.median_of(curve, exact=exact)
    return [name, *(told(curve.get(key)) for key in ("rows", "events", "censored")), median]


def _at_risk(points: Mapping[str, Sequence[Mapping[str, float | None]]], across: str, *, exact: bool) -> Html | None:
    """Those under observation just after each of a few times, up to the last one with anybody."""
    last = max((p["time"] or 0.0 for each in points.values() for p in each if p["at_risk"]), default=0.0)
    if not last:
        return None
    step = 10 ** math.floor(math.log10(last / (AT_RISK - 1)))
    step = next(step * k for k in (1, 2, 3, 5, 6, 10, 12, 20) if step * k * (AT_RISK - 1) >= last * 0.999)
    times = [i * step for i in range(AT_RISK) if i * step <= last]

    def left(each: Sequence[Mapping[str, float | None]], time: float) -> str:
        # Those at risk in the interval that ends at a time were there at its start.
        reached = next((p["at_risk"] for p in each if (p["time"] or 0.0) >= time), None)
        return told(reached) if each else WITHHELD

    rows = [[name, *(left(each, time) for time in times)] for name, each in points.items()]
    header = [f"Still under observation, by {across}", *(significant(time) for time in times)]
    note = None if exact else "Told at fewer times than these: each number is that of the last one before."
    return table("At risk", header, rows, note=note)
