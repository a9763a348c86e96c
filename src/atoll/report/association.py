"""The report's sections about columns together: correlation, collinearity, principal components, cross-tables."""

from __future__ import annotations

from collections.abc import Mapping

from atoll.report import charts, sentences
from atoll.report.markup import Child, Html, element, table
from atoll.report.section import Input, Section, beside, cards, figure, folded, output, part, text
from atoll.report.words import counted, fixed, listed, p_value, percent, real, significant, told, whole

MOST_COLUMNS = 40
"""Columns in one heat map; the table has all of them."""
WITH_NUMBERS = 15
"""Columns of a heat map whose cells are wide enough for numbers."""
STRONGEST = 12
"""Pairs in the table of the strongest correlations."""


def notes(found: Input) -> Html | None:
    """What a program notes about its result."""
    said = [str(note) for note in found.get("notes") or []] or [str(found.get("note") or "")]
    shown = [note[:1].upper() + note[1:] for note in said if note]
    return element("ul", [element("li", note) for note in shown], class_="notes") if shown else None


def noted(notes_of: Mapping[str, object]) -> Html | None:
    """Notes about columns, each with the columns it is about."""
    about: dict[str, list[str]] = {}
    for name, note in notes_of.items():
        if note:
            about.setdefault(str(note), []).append(name)
    return notes({"notes": [f"{note}: {listed(names, 12)}" for note, names in about.items()]})


def _short(value: float) -> str:
    """A correlation as .87 or −.05; 1 as 1."""
    if abs(value) < 0.005:
        return "0"
    return "1" if value >= 0.995 else "−1" if value <= -0.995 else fixed(value, 2).replace("0.", ".")


def correlation(result: Input, _: Input) -> Section | None:
    """Heat map, the strongest pairs, and the whole matrix."""
    found = output(result, "correlation")
    names, matrix = [str(name) for name in found.get("columns") or []], found.get("matrix") or []
    if not names:
        return None
    ranked = found.get("method") == "spearman"
    method = "Spearman’s rank correlation" if ranked else "Pearson’s correlation"
    some, pairs = names[:MOST_COLUMNS], sentences.pairs_of(found)
    strongest = "; ".join(f"{a} and {b} {fixed(r, 2)}" for a, b, r, *_ in pairs[:STRONGEST])
    cells = [list(line or [])[:MOST_COLUMNS] for line in matrix[:MOST_COLUMNS]]
    picture = charts.heat(
        some, some, cells, f"Heat map: {method} of {counted(len(some), 'column')}. Strongest: {strongest}",
        form=_short if len(some) <= WITH_NUMBERS else None,
    )  # fmt: skip
    key = element(
        "ul",
        element("li", element("span", class_="key positive"), "rise together"),
        element("li", element("span", class_="key negative"), "one rises as the other falls"),
        element("li", "× not told") if any(real(v) is None for line in cells for v in line) else None,
        class_="legend",
    )
    header = ["Columns", "Correlation", "p-value", "Rows"]
    rows = [[f"{a} · {b}", fixed(r), p_value(p), whole(n)] for a, b, r, p, n in pairs[:STRONGEST]]
    alike = rows[0][-1] if len({row[-1] for row in rows}) == 1 else None
    if alike:
        header, rows = header[:-1], [row[:-1] for row in rows]
    lines = [
        [name, *(fixed(v) if real(v) is not None else "not told" for v in line or [])]
        for name, line in zip(names, matrix, strict=False)
    ]
    whole_table = table(f"{method}, all sites together", ["Column", *names], lines)
    rule = "the rows that have both columns" if found.get("missing") != "listwise" else "the rows that have all columns"
    off = [e for line in found.get("error_bound") or [] for v in line or [] if (e := real(v)) is not None]
    exact = f" Ranks are of fine bins: no correlation is off by more than {significant(max(off), 2)}." if off else ""
    said = f"{sentences.correlation(found, str)} {method}, over {rule}.{exact}"
    listing = (
        table(
            f"The strongest of {counted(len(pairs), 'pair')}", header, rows, note=alike and f"Each over {alike} rows."
        )
        if rows
        else None
    )
    drawn = beside(figure(picture, method), key if picture else None, listing, top=True)
    content = [text(said), drawn, notes(found), folded("Whole matrix", whole_table)]
    return Section("correlation", "Correlation", content)


def collinearity(result: Input, _: Input) -> Section | None:
    """Variance-inflation factors, largest first."""
    found = output(result, "vif")
    columns = {str(name): part(one) for name, one in part(found, "columns").items()}
    if not columns:
        return None

    def size(one: Input) -> float:
        factor = real(one.get("vif"))
        return factor if factor is not None else 1e308 if (real(one.get("r_squared")) or 0) >= 1 else -1.0

    def factor(one: Input) -> str:
        if real(one.get("vif")) is not None:
            return significant(one["vif"], 3)
        return "∞" if size(one) > 0 else "not told"

    ordered = sorted(columns, key=lambda name: -size(columns[name]))
    rows = [[n, factor(columns[n]), percent(columns[n].get("r_squared"), 1)] for n in ordered]
    known = [(n, columns[n]["vif"]) for n in ordered if real(columns[n].get("vif")) is not None][:24]
    picture = charts.bars(known, "variance-inflation factors", form=lambda v: significant(v, 3), marks=(5, 10))
    said = f"{sentences.vif(found, str)} Rows with every column: {told(found.get('rows'))}."
    note = "A factor of 10 says that the other columns explain 90 % of a column; marks at 5 and 10."
    listing = table("Variance-inflation factors", ["Column", "VIF", "Explained by the others"], rows, note=note)
    drawn = beside(figure(picture, "Variance-inflation factors", "largest first"), listing, top=True)
    return Section("collinearity", "Collinearity", [text(said), drawn, notes(found)])


def components(result: Input, _: Input) -> Section | None:
    """Principal components: scree plot and loadings."""
    found = output(result, "pca")
    if not found:
        return None
    names = [str(name) for name in found.get("columns") or []]
    shares = [share for value in found.get("explained_share") or [] if (share := real(value)) is not None]
    loadings = [[real(v) for v in line or []] for line in found.get("loadings") or []]
    few = len(loadings[:8])
    across = [f"PC{i + 1}" for i in range(few)]
    turned = [[loadings[i][j] if j < len(loadings[i]) else None for i in range(few)] for j in range(len(names))]
    label = f"Heat map: loadings of {listed(names, 40)} on {few} components"
    plot = charts.heat(names[:MOST_COLUMNS], across, turned[:MOST_COLUMNS], label, form=_short)
    pictures = [
        figure(charts.scree(shares[:20]), "Explained variance", "bars: each component; line: their sum"),
        figure(plot, "Loadings", "blue: rises with the component; orange: falls"),
    ]
    rows = [[f"PC{i + 1}", significant(value), percent(share, 1), percent(sum(shares[: i + 1]), 1)]
            for i, (value, share) in enumerate(zip(found.get("eigenvalues") or [], shares, strict=False))]  # fmt: skip
    listing = table("Components", ["Component", "Eigenvalue", "Share", "Sum of shares"], rows) if rows else None
    said = f"{sentences.pca(found, str)} Rows with every column: {told(found.get('rows'))}."
    return Section("components", "Principal components", [text(said), cards(pictures), listing, notes(found)])


def crosstables(result: Input, _: Input) -> Section | None:
    """Cross-tables with chi-square tests, each with a picture of its rows' shares."""
    tables = [part(one) for one in output(result, "crosstab").get("tables") or []]
    content: list[Child] = []
    for one in tables:
        rows, columns = [list(one.get(key) or []) for key in ("row_values", "column_values")]
        counts = [[real(n) for n in line or []] for line in one.get("counts") or []]
        shares = [_shares(line) for line in counts]
        pair = f"{one.get('rows')} by {one.get('columns')}"
        label = f"Heat map: of each {one.get('rows')}, the share of each {one.get('columns')}"
        form, shown = _whole_percent if len(columns) <= WITH_NUMBERS else None, [v for line in shares for v in line]
        small = max(len(rows), len(columns)) <= MOST_COLUMNS and shown.count(None) * 2 <= len(shown)
        plot = charts.heat(rows, columns, shares, label, form=form) if small else None
        lines: list[list[Child]] = [
            [value, *(told(n) for n in line), told(None if None in line else sum(n for n in line if n is not None))]
            for value, line in zip(rows, counts, strict=False)
        ]
        listing = table(pair, [str(one.get("rows")), *columns, "Total"], lines)
        note = str(one.get("note") or "") if part(one, "test") else ""
        said = [text(sentences.association(one)), notes({"note": note})]
        hint = f"share of each {one.get('columns')} in a row; × nobody, or withheld"
        content.append(beside(figure(plot, pair, hint), said, listing, top=True))
    return Section("crosstables", "Cross-tables", content) if content else None


def _shares(line: list[float | None]) -> list[float | None]:
    known: list[float] = [n for n in line if n is not None]
    if len(known) < len(line) or not sum(known):
        return [None] * len(line)
    return [n / sum(known) for n in known]


def _whole_percent(share: float) -> str:
    return f"{100 * share:.0f} %"
