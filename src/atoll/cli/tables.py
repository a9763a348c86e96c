"""What a study of statistics found, as compact tables in the terminal; result.json and the report have all of it.

One small function a kind of statistic: what its program returned → tables of (title, header, lines).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.markup import escape

from atoll.cli import show
from atoll.report import sentences
from atoll.report.markup import clean
from atoll.report.section import part
from atoll.report.words import NOTHING, WITHHELD, fixed, p_value, percent, real, significant, told, whole

Found = Mapping[str, Any]
Tables = Iterator[tuple[str, Sequence[str], Sequence[Sequence[object]]]]
MOST_LINES = 24
"""Lines of one table."""


def tell(result: Found) -> None:
    """Print every statistic of a run's result."""
    if described := part(result, "statistics", "columns"):
        _print(describe(described))
    output = part(result, "output")
    for kind in [*sentences.KINDS, *(name for name in output if name not in sentences.KINDS)]:
        found = part(output, kind)
        if not found:
            continue
        said = sentences.KINDS[kind].found(found, lambda _: "") if kind in sentences.KINDS else ""
        if said:
            show.say(said)
        _print(TABLES[kind](found) if kind in TABLES else anything(found, kind))
        for note in [*(found.get("notes") or []), found.get("note")]:
            if note and str(note) not in said:
                show.say(f"note: {note}", style="dim")
    if left := part(result, "preparation"):
        dropped = [[reason, told(n)] for reason, n in part(left, "dropped").items()]
        _print(iter([("preparation", ("rows", ""), [["kept", told(left.get("rows"))], *dropped])]))


def _print(tables: Tables) -> None:
    for title, header, lines in tables:
        if not lines:
            continue
        if title:
            show.say(title, style="bold")
        show.rows(
            [escape(clean(name)) for name in header], [[clean(cell) for cell in line] for line in lines[:MOST_LINES]]
        )
        if len(lines) > MOST_LINES:
            show.say(f"… and {len(lines) - MOST_LINES} more in report.html and result.json", style="dim")


def describe(columns: Found) -> Tables:
    """Moments of each column."""
    names = ("count", "missing", "mean", "std", "low", "high")
    lines = []
    for column, found in columns.items():
        gone = bool(part(found).get("withheld"))
        lines.append([column, *(WITHHELD if gone else significant(part(found).get(name)) for name in names)])
    yield "statistics", ("column", *names), lines


def quantiles(found: Found) -> Tables:
    """Quantiles of each column."""
    columns = {name: part(one) for name, one in part(found, "columns").items()}
    asked = max((one.get("probabilities") or [] for one in columns.values()), key=len, default=[])
    lines = []
    for name, one in columns.items():
        known = dict(zip(one.get("probabilities") or [], one.get("values") or [], strict=False))
        lines.append([name, told(one.get("count")), *(told(known.get(p), significant) for p in asked)])
    yield "quantiles", ("column", "values", *(f"{100 * p:g} %" for p in asked)), lines


def frequency(found: Found) -> Tables:
    """Counts of each code; of histograms, the number of bins and the values in them."""
    lines = []
    for name, one in part(found, "columns").items():
        counts = part(one).get("counts") or []
        if part(one).get("kind") == "codes":
            pairs = zip(part(one).get("values") or [], counts, strict=False)
            said = ", ".join(f"{value}: {told(n)}" for value, n in pairs)
            lines.append([name, said, told(part(one).get("missing"))])
        else:
            lines.append([name, f"{told(part(one).get('count'))} values in {len(counts)} bins", NOTHING])
    yield "frequencies", ("column", "rows", "missing"), lines


def crosstab(found: Found) -> Tables:
    """Each table's counts, and its test as the title."""
    for one in map(part, found.get("tables") or []):
        lines = [
            [value, *map(told, line or [])]
            for value, line in zip(one.get("row_values") or [], one.get("counts") or [], strict=False)
        ]
        header = (f"{one.get('rows')} \\ {one.get('columns')}", *map(str, one.get("column_values") or []))
        yield sentences.association(one), header, lines


def correlation(found: Found) -> Tables:
    """The strongest pairs."""
    pairs = sentences.pairs_of(found)
    lines = [[a, b, fixed(r), p_value(p), whole(n)] for a, b, r, p, n in pairs[:12]]
    yield f"strongest of {len(pairs)} correlations", ("column", "column", "correlation", "p", "rows"), lines


def vif(found: Found) -> Tables:
    """Variance-inflation factors."""
    lines = []
    for name, one in part(found, "columns").items():
        share = real(part(one).get("r_squared"))
        factor = "infinite" if share is not None and share >= 1 else "not told" if share is None else ""
        lines.append([name, factor or significant(part(one).get("vif")), percent(share, 1)])
    yield "collinearity", ("column", "VIF", "explained by the others"), lines


def pca(found: Found) -> Tables:
    """Components, each with its largest loadings."""
    names, lines = [str(name) for name in found.get("columns") or []], []
    rows = zip(
        found.get("eigenvalues") or [], found.get("explained_share") or [], found.get("loadings") or [], strict=False
    )
    for i, (value, share, loadings) in enumerate(rows):
        largest = sorted(zip(names, loadings or [], strict=False), key=lambda pair: -abs(real(pair[1]) or 0.0))[:3]
        said = ", ".join(f"{name} {fixed(loading, 2)}" for name, loading in largest)
        lines.append([f"PC{i + 1}", significant(value), percent(share, 1), said])
    yield "principal components", ("component", "eigenvalue", "share", "largest loadings"), lines


def group_by(found: Found) -> Tables:
    """Rows and each column's mean (and standard deviation) in each group."""
    names, lines = [str(name) for name in found.get("columns") or []], []
    for group in map(part, found.get("groups") or []):
        each = [part(group, "columns", name) for name in names]
        means = [WITHHELD if one.get("count") is None else _spread(one) for one in each]
        lines.append([sentences.key_of(group), told(group.get("count")), *means])
    yield "groups: mean (standard deviation)", (" × ".join(map(str, found.get("by") or [])), "rows", *names), lines


def _spread(one: Found) -> str:
    return f"{significant(one.get('mean'))} ({significant(one.get('std'))})"


def ttest(found: Found) -> Tables:
    """The samples."""
    groups = [str(group) for group in found.get("groups") or []]
    samples = [part(one) for one in found.get("samples") or []]
    names = groups if len(groups) == len(samples) else [str(found.get("column"))]
    yield f"t-test of {found.get('column')}", ("group", "values", "mean (std)"), list(_samples(names, samples))


def anova(found: Found) -> Tables:
    """The groups."""
    groups = [part(one) for one in found.get("groups") or []]
    lines = list(_samples([sentences.key_of(one) for one in groups], groups))
    yield f"{found.get('column')} by {found.get('by')}", ("group", "values", "mean (std)"), lines


def _samples(names: Sequence[str], samples: Sequence[Found]) -> Iterator[list[str]]:
    for name, one in zip(names, samples, strict=False):
        yield [name, told(one.get("count")), WITHHELD if one.get("count") is None else _spread(one)]


def woe(found: Found) -> Tables:
    """Information values, largest first."""
    features = {str(name): part(one) for name, one in part(found, "features").items()}
    ranking = [name for name in map(str, found.get("ranking") or features) if name in features]
    lines = []
    for name in ranking:
        iv = real(features[name].get("iv"))
        word = NOTHING if iv is None else sentences.worded(iv, sentences.IV_MARKS, "much")
        lines.append([name, told(iv, fixed), len(features[name].get("bins") or []), word])
    yield f"information value for {found.get('target')}", ("column", "IV", "bins", "says"), lines


def survival(found: Found) -> Tables:
    """Each group's rows, events and median."""
    lines = []
    for name, curve in part(found, "curves").items():
        if "times" not in part(curve):
            lines.append([name, *[WITHHELD] * 4])
            continue
        middle = sentences.median_of(part(curve), exact=bool(found.get("exact")))
        lines.append([name, *(told(curve.get(key)) for key in ("rows", "events", "censored")), middle])
    yield f"survival ({found.get('duration')})", ("group", "rows", "events", "censored", "median"), lines


def psi(found: Found) -> Tables:
    """The index of each column between periods; or how many sites are above the marks, and their own."""
    columns = {str(name): part(one) for name, one in part(found, "columns").items()}
    if found.get("between") == "periods":
        lines = [[name, told(one.get("psi"), fixed), one.get("note") or ""] for name, one in columns.items()]
        yield f"drift since {found.get('cut')}", ("column", "PSI", "note"), lines
        return
    own = {str(site): part(one) for site, one in part(found, "own").items()}
    marks = [str(mark) for mark in sentences.PSI_MARKS]
    lines = [
        [
            name,
            *(whole(part(one, "above").get(mark)) for mark in marks),
            *(told(o.get(name), fixed) for o in own.values()),
        ]
        for name, one in columns.items()
    ]
    yield "drift", ("column", *(f"sites above {mark}" for mark in marks), *own), lines


def quality(found: Found) -> Tables:
    """Scores of all sites together and of those that share their own."""
    names = list(part(found, "components"))
    sites = {"all sites": found, **part(found, "sites")}
    lines = [
        [site, fixed(part(one).get("score")), *(fixed(part(one, "components").get(name)) for name in names)]
        for site, one in sites.items()
    ]
    yield "data quality", ("rows of", "score", *names), lines


def explanation(found: Found) -> Tables:
    """Drivers of a model of trees."""
    drivers = [part(one) for one in found.get("drivers") or []]
    lines = [[one.get("feature"), significant(one.get("importance"), 3)] for one in drivers]
    yield f"what moves the predictions of {told(found.get('rows'))} rows", ("feature", "mean |SHAP|"), lines


def anything(found: Found, kind: str = "") -> Tables:
    """A result of no known kind: its numbers and words by name, and how long its lists are."""
    lines = []
    for name, value in found.items():
        many = isinstance(value, Mapping | list | tuple)
        lines.append(
            [name, f"{len(value)} entries" if many else significant(value) if real(value) is not None else value]
        )
    yield kind, ("name", "value"), lines


TABLES: dict[str, Callable[[Found], Tables]] = {
    "quantiles": quantiles, "frequency": frequency, "crosstab": crosstab, "correlation": correlation, "vif": vif,
    "pca": pca, "group_by": group_by, "ttest": ttest, "anova": anova, "woe": woe, "survival": survival, "psi": psi,
    "quality": quality, "explanation": explanation,
}  # fmt: skip
