"""The report's sections about single columns: distributions, quantiles, missing cells, preparation's rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from atoll.report import charts, plots, sentences
from atoll.report.markup import Child, Html, clean, element, join, table
from atoll.report.section import Input, Section, cards, figure, folded, output, part, text, unit_of
from atoll.report.words import NOTHING, WITHHELD, counted, listed, percent, real, significant, told, whole

MOST_CHARTS = 60
"""Small charts in one section; the table has every column."""
MOST_CODES = 16
"""Codes in one chart."""


def named(column: object, details: Input) -> Html:
    """A column's name over its unit."""
    unit = unit_of(details, column)
    return join(column, element("small", unit) if unit else None)


def distributions(result: Input, details: Input) -> Section | None:
    """Frequency tables and histograms, and quantiles."""
    codes, quantiles = part(output(result, "frequency"), "columns"), part(output(result, "quantiles"), "columns")
    if not codes and not quantiles:
        return None
    small: list[Html | None] = []
    large: list[Html | None] = []
    for name, found in list(codes.items())[:MOST_CHARTS]:
        unit = unit_of(details, name)
        if part(found).get("kind") == "histogram":
            drawn = plots.histogram(name, {**found, "histogram": part(found).get("counts")}, unit)
            small.append(figure(drawn, name, unit or None))
        elif _short(part(found)):
            picture = charts.columns(part(found).get("values") or [], part(found).get("counts") or [], str(name))
            small.append(figure(picture, name))
        else:
            large.append(figure(_codes(name, part(found)), name))
    content: list[Child] = [cards(small, "small"), cards(large), _frequencies(codes, details) if codes else None]
    if codes and _withheld(codes):
        content.insert(2, element("p", "× or “withheld”: counts of too few people to be told, or that would tell such.",
                                  class_="note"))  # fmt: skip
    content += [element("p", note, class_="note") for note in _apart(codes)]
    if quantiles:
        coded = [name for name, found in codes.items() if part(found).get("kind") == "codes"]
        content += _quantiles(quantiles, coded, details)
    said = join(sentences.frequency(output(result, "frequency"), str) if codes else None)
    return Section("distributions", "Distributions", [text(said) if said else None, *content])


def _apart(codes: Mapping[str, Any]) -> list[str]:
    """Which histograms are withheld, and which do not count every site."""
    histograms = {name: part(found) for name, found in codes.items() if part(found).get("kind") == "histogram"}
    gone = [name for name, found in histograms.items() if real(found.get("count")) is None]
    less = [name for name, found in histograms.items() if real(found.get("withheld_sites")) and name not in gone]
    said = [f"Histograms withheld, as too few people have a value: {listed(gone, 12)}."] if gone else []
    return [*said, f"Some sites had too few values to be counted in: {listed(less, 12)}."] if less else said


def _withheld(codes: Mapping[str, Any]) -> bool:
    return any(n is None for found in codes.values() for n in [*(part(found).get("counts") or [0]),
                                                               part(found).get("missing", 0)])  # fmt: skip


def _short(found: Input) -> bool:
    values = [clean(value) for value in found.get("values") or []]
    return len(values) <= MOST_CODES and sum(max(len(value), 2) for value in values) <= 24


def _codes(name: object, found: Input) -> Html | None:
    pairs = list(zip(found.get("values") or [], found.get("counts") or [], strict=False))[:MOST_CODES]
    return charts.bars(pairs, f"rows by {name}", form=whole)


def _frequencies(codes: Mapping[str, Any], details: Input) -> Html | None:
    """Every code's count; histograms have theirs in result.json."""
    rows: list[list[Child]] = []
    for name, found in codes.items():
        found = part(found)
        if found.get("kind") == "histogram":
            continue
        counts = found.get("counts") or []
        values = [*(found.get("values") or []), "missing"]
        total = sum(real(n) or 0.0 for n in counts)
        whole_known = all(real(n) is not None for n in counts)
        for i, (value, n) in enumerate(zip(values, [*counts, found.get("missing")], strict=False)):
            share = percent(n, total) if whole_known and i < len(counts) else NOTHING
            rows.append([named(name, details) if i == 0 else "", value, told(n), share])
    header = ["Column", "Value", "Rows", "Share of values"]
    return (
        folded("Every count", table("Frequencies, all sites together", header, rows, text_columns=2)) if rows else None
    )


def _quantiles(columns: Mapping[str, Any], coded: Sequence[str], details: Input) -> list[Child]:
    """Strips of the columns that are not *coded*, and all columns' quantiles."""
    strips: list[Html | None] = []
    rows: list[list[Child]] = []
    asked = max((part(found).get("probabilities") or [] for found in columns.values()), key=len)
    sites = 0
    for name, found in columns.items():
        found = part(found)
        values, unit = found.get("values") or [], unit_of(details, name)
        if len(strips) < MOST_CHARTS and name not in coded and len({v for v in values if v is not None}) > 2:
            strips.append(figure(charts.strip(found.get("probabilities") or [], values, str(name)), name, unit or None))
        known = dict(zip(found.get("probabilities") or [], values, strict=False))
        off = significant(found.get("error"), 2)
        rows.append(
            [named(name, details), told(found.get("count")), *(told(known.get(p), significant) for p in asked), off]
        )
        sites = max(sites, int(real(found.get("withheld_sites")) or 0))
    header: list[Child] = [
        "Column",
        "Values",
        *(f"{significant(100 * (real(p) or 0.0))} %" for p in asked),
        "Error at most",
    ]
    note = "Each true quantile lies within the error of the number shown."
    if sites:
        note += f" {counted(sites, 'site')} had too few values of a column to be counted in it."
    hint = "Quantiles: the line is the median, the box holds the middle half of all values."
    return [
        text(hint),
        cards(strips, "small"),
        table("Quantiles, in the columns’ units", header, rows, note=note),
    ]


def missing(result: Input, details: Input) -> Section | None:
    """Share of missing cells: of all sites together, and of each site that shares its own."""
    shares, own = _missing(result)
    if not shares:
        return None
    lacking = [name for name, share in shares.items() if share is None or share > 0]
    lacking += [n for n in shares if n not in lacking and any((real(m.get(n)) or 0.0) > 0 for m in own.values())]
    lacking = [name for name in shares if name in set(lacking)]
    full = len(shares) - len(lacking)
    said = f"{full} of {counted(len(shares), 'column')} have no missing cell." if full else ""
    if not lacking:
        said = f"No cell of the {counted(len(shares), 'column')} is missing."
    across = ["all sites", *own][: plots.MOST_SITES]
    cells = [[shares[n], *(m.get(n) for m in own.values())][: len(across)] for n in lacking]
    picture = None
    if own and lacking:
        label = f"Heat map: share of missing cells of {listed(lacking, 40)}, at {listed(across, 30)}"
        shown = _percent if len(across) <= 8 else None
        most = max([0.1, *(share for line in cells for c in line if (share := real(c)) is not None)])
        picture = charts.heat(lacking[:MOST_CHARTS], across, cells[:MOST_CHARTS], label, form=shown, reach=most)
    elif lacking:
        pairs = [(name, shares[name]) for name in lacking][:MOST_CHARTS]
        picture = charts.bars(pairs, "share of missing cells", form=lambda share: percent(share, 1))
    rows = [[named(name, details), *(told(c, lambda share: percent(share, 1)) for c in line)]
            for name, line in zip(lacking, cells, strict=True)]  # fmt: skip
    listing = table("Missing cells", ["Column", *across], rows) if rows and own else None
    hint = "all sites together" + (" and each site that shares its own" if own else "")
    drawn = figure(picture, "Share of missing cells", hint)
    return Section("missing", "Missing cells", [text(said) if said else None, cards([drawn]), listing])


def _missing(result: Input) -> tuple[dict[str, float | None], dict[str, Mapping[str, Any]]]:
    """({column: share missing, None if withheld}, {site: {column: share missing}})."""
    shares: dict[str, float | None] = {}
    for name, found in part(output(result, "frequency"), "columns").items():
        counts = [real(n) for n in [*(part(found).get("counts") or []), part(found).get("missing")]]
        if part(found).get("kind") == "codes" and counts:
            known = [n for n in counts if n is not None]
            shares[name] = known[-1] / (sum(known) or 1.0) if len(known) == len(counts) else None
            if counts[-1] == 0:
                shares[name] = 0.0
    for name, found in part(result, "statistics", "columns").items():
        lost, rows = real(part(found).get("missing")), real(part(found).get("rows"))
        shares[name] = lost / rows if lost is not None and rows else None
    quality = output(result, "quality")
    for name, found in part(quality, "columns").items():
        kept = real(part(found).get("completeness"))
        shares[name] = None if kept is None else 1 - kept
    own = {
        str(site): {n: None if (k := real(v)) is None else 1 - k for n, v in part(found, "completeness").items()}
        for site, found in part(quality, "sites").items()
    }
    return shares, {site: one for site, one in own.items() if one}


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share == 0 or share >= 0.0995 else f"{100 * share:.1f} %"


def rows_left_out(result: Input) -> list[Child]:
    """Rows that preparation kept, and left out by reason."""
    found = part(result, "preparation")
    kept, dropped = real(found.get("rows")), part(found, "dropped")
    if kept is None and not dropped:
        return []
    known = [real(n) or 0.0 for n in dropped.values()]
    some = "at least " if None in dropped.values() else ""
    said = f"{told(kept)} rows were kept and {some}{whole(sum(known))} left out."
    few = f"{WITHHELD}: fewer than may be told"
    rows = [[reason, few if n is None else whole(n)] for reason, n in dropped.items()]
    return [
        text(said),
        _anonymity(part(found, "achieved")),
        table("Rows left out, by reason", ["Reason", "Rows"], rows),
    ]


def _anonymity(achieved: Input) -> Child:
    """What k and l every site achieves, in words."""
    k, diverse = real(achieved.get("k")), real(achieved.get("l"))
    if k is None:
        return None
    said = (
        f"At every site each row is equal to at least {whole(k - 1)} others in its quasi-identifiers (k = {whole(k)})"
    )
    return text(
        said if diverse is None else f"{said}, among which the sensitive column has {whole(diverse)} values", "."
    )
