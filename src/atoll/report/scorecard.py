"""The report's sections about how columns relate to a label and to time: weight of evidence, drift, data quality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from atoll.report import charts, plots, sentences
from atoll.report.association import noted, notes
from atoll.report.distributions import named
from atoll.report.markup import Child, Html, table
from atoll.report.section import Input, Section, beside, cards, figure, folded, output, part, text, unit_of
from atoll.report.svg import shortened
from atoll.report.words import (
    NOTHING,
    WITHHELD,
    compact,
    counted,
    fixed,
    listed,
    percent,
    real,
    significant,
    told,
    whole,
)

MOST_FEATURES = 12
"""Features with a plot of their own; the table has all of them."""
MOST_RANKED = 40
MOST_SITES = 8
"""Sites in a heat map whose cells are wide enough for numbers."""
IV_MARKS = tuple(sentences.IV_MARKS)
PSI_MARKS = tuple(sentences.PSI_MARKS)
COUNTED = {"completeness": "missing", "uniqueness": "duplicates", "plausibility": "outliers", "balance": "labels",
           "timeliness": "dated"}  # fmt: skip
"""Parts of a quality score, and the count that each needs."""


def evidence(result: Input, details: Input) -> Section | None:
    """Information values, and the weights of evidence of the features that say most."""
    found = output(result, "woe")
    features = {str(name): part(one) for name, one in part(found, "features").items()}
    if not features:
        return None
    target = str(found.get("target"))
    asked = [str(name) for name in found.get("ranking") or [] if str(name) in features]
    ranking = [*asked, *(name for name in features if name not in asked)]
    values = [(name, features[name].get("iv")) for name in ranking[:MOST_RANKED]]
    ranked = charts.bars(values, f"information value for {target}", marks=IV_MARKS)
    pictures, tables = [], []
    for name in ranking[:MOST_FEATURES]:
        bins = _bins(features[name])
        drawn = charts.evidence(
            [(b["label"], b.get("woe"), f"{percent(b.get('share'), 1)}, {percent(b.get('rate'), 1)}") for b in bins],
            f"weight of evidence of {name} for {target}",
        )  # fmt: skip
        unit = unit_of(details, name)
        hint = f"IV {fixed(features[name].get('iv'))}{f'; {unit}' if unit else ''}"
        pictures.append(figure(drawn, name, hint))
        rows = [[b["label"], told(b.get("count")), told(b.get("positives")), percent(b.get("share"), 1),
                 percent(b.get("rate"), 1), fixed(b.get("woe")), fixed(b.get("iv"))] for b in bins]  # fmt: skip
        header = ["Bin", "Rows", f"{target} = 1", "Share", "Rate", "WOE", "IV"]
        if rows:
            tables.append(table(f"{name}{f', {unit}' if unit else ''}", header, rows))
    listing = table(
        f"Information value for {target}", ["Column", "IV", "Says", "Bins"],
        [_ranked(name, features[name]) for name in ranking],
    )  # fmt: skip
    said = (
        f"{sentences.woe(found, str)} Of {told(_total(found))} rows, {told(found.get('positives'))} have {target} = 1."
    )
    if sites := int(real(found.get("withheld_sites")) or 0):
        said += (
            f" {counted(sites, 'site')} had too few rows of a label and {'is' if sites == 1 else 'are'} not counted."
        )
    how = (
        f"An information value below 0.02 says next to nothing of {target}, below 0.1 little, below 0.3 a fair amount, "
        f"and beyond much. Blue bins have fewer rows of {target} = 1 than average, orange bins more; beside each: its "
        f"share of all rows, and that of its rows with {target} = 1."
    )
    drawn = beside(figure(ranked, "Information value", "marks: 0.02, 0.1, 0.3"), listing, top=True)
    told_of = noted({name: one.get("note") for name, one in features.items()})
    content = [text(said), text(how), drawn, cards(pictures), told_of, folded("Every bin", *tables) if tables else None]
    return Section("evidence", "Weight of evidence", content)


def _total(found: Input) -> float | None:
    both = [real(found.get(key)) for key in ("positives", "negatives")]
    return None if None in both else sum(n for n in both if n is not None)


def _ranked(name: str, one: Input) -> list[Child]:
    iv = real(one.get("iv"))
    word = NOTHING if iv is None else sentences.worded(iv, sentences.IV_MARKS, "much")
    return [name, told(iv, fixed), word, whole(len(one.get("bins") or []))]


def _bins(one: Input) -> list[dict[str, Any]]:
    """A feature's bins, that of missing cells last, each with its *label*."""
    bins = [{**b, "label": bin_label(b, first=i == 0)} for i, b in enumerate(part(b) for b in one.get("bins") or [])]
    missing = part(one, "missing")
    if not missing:
        return bins
    merged = f" or {bin_label(missing, first=True)}" if {"values", "from"} & set(missing) else ""
    return [*bins, {**missing, "label": f"missing{merged}"}]


def bin_label(one: Input, *, first: bool = False) -> str:
    """ "20 – 35": more than 20 (in the first bin, at least), at most 35; or the codes of the bin."""
    if "values" in one:
        codes = list(one.get("values") or [])
        numbers = [real(code) for code in codes]
        if len(codes) > 2 and all(n is not None and n == (numbers[0] or 0.0) + i for i, n in enumerate(numbers)):
            codes = [f"{codes[0]} to {codes[-1]}"]
        return shortened(", ".join(str(code) for code in codes).replace("-", "−"), 16)
    low, high = (compact(one.get(key)) for key in ("from", "to"))
    return f"≤ {high}" if first else f"{low} – {high}"


def drift(result: Input, _: Input) -> Section | None:
    """Population-stability indices: between periods, or at how many sites, and at each that shares its own."""
    found = output(result, "psi")
    columns = {str(name): part(one) for name, one in part(found, "columns").items()}
    if not columns:
        return None
    periods = found.get("between") == "periods"
    content: list[Child] = [
        text(sentences.psi(found, str)),
        text("A PSI below 0.1 is no shift, below 0.25 a small one."),
    ]
    about = noted({name: one.get("note") for name, one in columns.items()})
    if periods:
        ordered = sorted(columns, key=lambda name: -(real(columns[name].get("psi")) or -1.0))
        values = [(name, columns[name].get("psi")) for name in ordered[:MOST_RANKED]]
        picture = charts.bars(values, "population-stability index", marks=PSI_MARKS)
        rows = [[name, _index(columns[name].get("psi"), columns[name])] for name in ordered]
        listing = table(f"Drift since {found.get('cut')}", ["Column", "PSI"], rows)
        content.append(beside(figure(picture, "Before against after", "PSI; marks: 0.1, 0.25"), listing, top=True))
        return Section("drift", "Drift", [*content, about])
    own = {str(site): part(one) for site, one in part(found, "own").items()}
    ordered = sorted(columns, key=lambda n: -max((real(mine.get(n)) or -1.0 for mine in own.values()), default=-1.0))
    shown = len(own) <= MOST_SITES
    rows = []
    for name in ordered:
        one = columns[name]
        above = [whole(part(one, "above").get(str(mark))) for mark in PSI_MARKS]
        each = [] if shown else [_index(mine.get(name), one) for mine in own.values()]
        rows.append([name, whole(one.get("sites")), *above, *each])
    header = ["Column", "Sites measured", "Above 0.1", "Above 0.25", *([] if shown else own)]
    note = None if own else "No site shares its own index; only how many are above a mark."
    listing = table("Each site against all sites together", header, rows, note=note)
    return Section("drift", "Drift", [*content, beside(_own(ordered, own), listing, top=True), about])


def _own(ordered: Sequence[str], own: Mapping[str, Input]) -> Html | None:
    """Heat map of each site's own indices, largest first."""
    names, sites = ordered[:MOST_RANKED], list(own)[: plots.MOST_SITES]
    cells = [[own[site].get(name) for site in sites] for name in names]
    label = f"Heat map: population-stability index of {listed(names, 40)} at {listed(sites, 24)}"
    form = _two_places if len(sites) <= MOST_SITES else None
    plot = charts.heat(names, sites, cells, label, reach=0.25, form=form)
    return figure(plot, "Drift of each site", "PSI against all sites together; fully coloured from 0.25")


def _two_places(value: float) -> str:
    return fixed(value, 2)


def _index(value: object, column: Input) -> str:
    return fixed(value) if real(value) is not None else "not measured" if not column.get("note") else "withheld"


def quality(result: Input, details: Input) -> Section | None:
    """Data-quality scores of all sites together, and of those that share their own."""
    found = output(result, "quality")
    components = part(found, "components")
    if not found or not components:
        return None
    sites = {str(site): part(one) for site, one in part(found, "sites").items()}
    everyone = {"score": found.get("score"), **components}
    each = [everyone, *({"score": one.get("score"), **part(one, "components")} for one in sites.values())]
    note = str(found.get("note") or "")
    gone = {name for name, counts in COUNTED.items() if counts in note and real(everyone.get(name)) is None}
    names = [name for name in everyone if name in gone or any(real(one.get(name)) is not None for one in each)]
    picture = charts.bars(
        [(name, everyone[name]) for name in names], "data quality of all sites together", form=lambda v: fixed(v, 2)
    )
    rows = [
        [site, *(WITHHELD if name in gone and one is everyone else fixed(one.get(name)) for name in names)]
        for site, one in zip(["all sites", *sites], each, strict=True)
    ]
    described = {str(name): part(one) for name, one in part(found, "columns").items()}
    flags = [
        f"{name}: values about 10^{power} times the others’ at {counted(int(real(n) or 0), 'site')}; check the unit"
        for name, one in described.items()
        for power, n in part(one, "unit_flags").items()
    ]
    worst = [(real(one.get("completeness")), real(one.get("plausibility")), name) for name, one in described.items()]
    worst.sort(key=lambda one: min(x for x in (*one[:2], 2.0) if x is not None))
    listing = table(
        "Columns, least complete or plausible first", ["Column", "Complete", "Plausible"],
        [[named(name, details), told(c, _share), NOTHING if p is None else _share(p)] for c, p, name in worst],
    )  # fmt: skip
    how = "A score is the geometric mean of its parts, each between 0 and 1; a part that does not apply is left out."
    if not sites:
        how += " No site shares its own score."
    said = sentences.quality(found, str)
    if found.get("newest_month"):
        said += f" Newest month with enough rows: {found['newest_month']}."
    scored = table("Scores", ["Rows of", *names], rows, note=how)
    drawn = cards([figure(picture, "Data quality", "all sites together; 1 is best")])
    content = [text(said), drawn, scored, notes({"notes": flags}), notes(found), folded("Every column", listing)]
    return Section("quality", "Data quality", content)


def _share(value: object) -> str:
    return significant(100 * (real(value) or 0.0), 3) + " %"
