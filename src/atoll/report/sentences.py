"""What each statistic found, in one plain sentence; the page and the command line tell the same.

Every function takes what the program of its name returned, and a function that gives a column's unit ("" if none).
What was withheld is said to be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

from atoll.report.section import part
from atoll.report.words import WITHHELD, counted, fixed, listed, p_value, percent, real, significant, whole

Found = Mapping[str, Any]
Unit = Callable[[object], str]
IV_MARKS = {0.02: "next to nothing", 0.1: "little", 0.3: "a fair amount"}
"""Information values below these tell so much of a label (Siddiqi 2006); beyond, much."""
PSI_MARKS = {0.1: "no shift", 0.25: "a small shift"}
V_MARKS = {0.1: "hardly any", 0.3: "a weak", 0.5: "a moderate"}


def worded(value: float, marks: Mapping[float, str], beyond: str) -> str:
    """The word for *value*: that of the first mark above it, or *beyond*."""
    return next((word for mark, word in marks.items() if value < mark), beyond)


def measured(value: object, unit: str, digits: int = 4) -> str:
    """A number with its unit."""
    return significant(value, digits) + (f" {unit}" if unit else "")


def p_told(value: object) -> str:
    """ "p = 0.012" or "p < 0.001"."""
    said = p_value(value)
    return f"p {said}" if said.startswith("<") else f"p = {said}"


def _best(values: Mapping[str, object]) -> tuple[str, float] | None:
    known = [(name, number) for name, value in values.items() if (number := real(value)) is not None]
    return max(known, key=lambda pair: pair[1]) if known else None


def pairs_of(found: Found) -> list[tuple[str, str, float, float | None, float | None]]:
    """A correlation matrix's pairs that are told, (column, column, r, p, rows), strongest first."""
    names = [str(name) for name in found.get("columns") or []]

    def at(key: str, i: int, j: int) -> float | None:
        try:
            return real(found[key][i][j])
        except (KeyError, IndexError, TypeError):
            return None

    known = [
        (names[i], names[j], r, at("p_values", i, j), at("pairs_count", i, j))
        for i, j in combinations(range(len(names)), 2)
        if (r := at("matrix", i, j)) is not None
    ]
    return sorted(known, key=lambda pair: -abs(pair[2]))


def quantiles(found: Found, unit: Unit) -> str:
    """The one column's median."""
    columns = part(found, "columns")
    if len(columns) != 1:
        return ""
    ((name, only),) = columns.items()
    known = dict(zip(part(only).get("probabilities") or [], part(only).get("values") or [], strict=False))
    middle = real(known.get(0.5))
    return f"The median of {name} is {measured(middle, unit(name))}." if middle is not None else ""


def frequency(found: Found, _: Unit) -> str:
    """The one column's commonest code."""
    columns = part(found, "columns")
    if len(columns) != 1:
        return ""
    ((name, only),) = columns.items()
    only = part(only)
    counts = [real(n) for n in only.get("counts") or []]
    best = _best({str(v): n for v, n in zip(only.get("values") or [], counts, strict=False)})
    return f"The commonest value of {name} is {best[0]} ({whole(best[1])} rows)." if best else ""


def crosstab(found: Found, _: Unit) -> str:
    """The first table's test, or how many of the tables could be tested."""
    tables = [part(table) for table in found.get("tables") or []]
    return association(tables[0]) if len(tables) == 1 else ""


def association(table: Found) -> str:
    """Whether the two columns of a cross-table depend on each other."""
    test, note = part(table, "test"), str(table.get("note") or "")
    statistic, p, v = (real(test.get(key)) for key in ("statistic", "p_value", "cramers_v"))
    pair = f"{table.get('rows')} and {table.get('columns')}"
    if statistic is None or p is None:
        return f"{pair}: {note or 'not tested'}."
    degrees, size = whole(test.get("dof")), "" if v is None else f"; Cramér’s V {fixed(v, 2)}"
    numbers = f"χ²({degrees}) = {significant(statistic)}, {p_told(p)}{size}"
    if p >= 0.05:
        return f"No dependence of {pair} shows ({numbers})."
    strength = "some" if v is None else worded(v, V_MARKS, "a strong")
    return f"{pair} depend on each other: {strength} association ({numbers})."


def correlation(found: Found, _: Unit) -> str:
    """The strongest pair."""
    pairs = pairs_of(found)
    if not pairs:
        return "No correlation is told."
    a, b, r = pairs[0][:3]
    sign = "ρ" if found.get("method") == "spearman" else "r"
    return f"{a} and {b} go together most ({sign} = {fixed(r, 2)})."


def vif(found: Found, _: Unit) -> str:
    """The column that the others explain best, and how many are beyond the usual mark of 10."""
    columns = part(found, "columns")
    endless = [str(name) for name, one in columns.items() if _endless(part(one))]
    if endless:
        return f"{listed(endless)} can be computed exactly from the other columns."
    best = _best({name: part(one).get("vif") for name, one in columns.items()})
    if best is None:
        return "No factor is told."
    many = sum((real(part(one).get("vif")) or 0.0) > 10 for one in columns.values())
    beyond = f"{counted(many, 'column')} of {len(columns)} above the usual mark of 10" if many else "none above 10"
    return f"{best[0]} is explained best by the other columns (VIF {significant(best[1], 3)}); {beyond}."


def _endless(column: Found) -> bool:
    return real(column.get("vif")) is None and (real(column.get("r_squared")) or 0.0) >= 1.0


def pca(found: Found, _: Unit) -> str:
    """How many components carry 80 % of the variance."""
    shares = [share for value in found.get("explained_share") or [] if (share := real(value)) is not None]
    if not shares:
        return "No component is told."
    sums = [math.fsum(shares[: i + 1]) for i in range(len(shares))]
    needed = next((i for i, total in enumerate(sums, 1) if total >= 0.8), len(sums))
    total = sums[needed - 1]
    of = f"of {len(shares)} components" if len(shares) > 1 else "component"
    return f"The first {needed if needed > 1 else ''} {of} carry {percent(total, 1)} of the variance.".replace(
        "  ", " "
    )


def group_by(found: Found, unit: Unit) -> str:
    """Groups with the smallest and the largest mean of the first column."""
    names = [str(name) for name in found.get("columns") or []]
    groups = [part(group) for group in found.get("groups") or []]
    by = [str(name) for name in found.get("by") or []]
    means = {key_of(g, by): part(g, "columns", names[0]).get("mean") for g in groups} if names else {}
    most, least = _best(means), _best({k: None if (m := real(v)) is None else -m for k, v in means.items()})
    if not most or not least or most[0] == least[0]:
        return ""
    unit_told = unit(names[0])
    ends = f"from {measured(-least[1], unit_told)} ({least[0]}) to {measured(most[1], unit_told)} ({most[0]})"
    return f"The groups’ mean {names[0]} goes {ends}."


def key_of(group: Found, by: Sequence[str] = ()) -> str:
    """A group's codes in words: "1, 2", or with the columns they are *by*, "EDUCATION 1, SEX 2"."""
    key = group.get("key")
    codes = ["no value" if code is None else str(code) for code in (key if isinstance(key, list | tuple) else [key])]
    return ", ".join(f"{name} {code}" for name, code in zip(by, codes, strict=False)) if by else ", ".join(codes)


def anova(found: Found, _: Unit) -> str:
    """Whether the groups' means differ."""
    f, p = real(found.get("f")), real(found.get("p_value"))
    column, by, groups = found.get("column"), found.get("by"), len(found.get("groups") or [])
    if f is None or p is None:
        return f"Whether {column} differs by {by} is not tested: {found.get('note') or 'undefined'}."
    degrees = f"{whole(found.get('df_between'))}, {whole(found.get('df_within'))}"
    numbers = f"F({degrees}) = {significant(f)}, {p_told(p)}"
    if p >= 0.05:
        return f"The mean {column} does not differ noticeably between the {groups} groups of {by} ({numbers})."
    share = percent(found.get("eta_squared"), 1)
    apart = f"The mean {column} differs between the {groups} groups of {by} ({numbers})"
    return f"{apart}, which explain {share} of its variance."


def ttest(found: Found, unit: Unit) -> str:
    """Whether the mean differs."""
    difference, p = real(found.get("difference")), real(found.get("p_value"))
    column, groups = str(found.get("column")), [str(group) for group in found.get("groups") or []]
    if difference is None or p is None:
        return f"The mean of {column} is not tested: {found.get('note') or 'undefined'}."
    unit_told, ends = unit(column), [real(end) for end in found.get("interval") or []]
    if len(groups) == 2:
        where, than = f"{column} where {found.get('by')} is {groups[0]}", f"where it is {groups[1]}"
    elif groups:
        where, than = column, f"{groups[0]}, pair by pair"
    else:
        where, than = column, "the value it is tested against"
    sure = f" with {percent(found.get('confidence'), 1).replace('.0', '')} confidence"
    sides = " to ".join("open" if end is None else significant(end) for end in ends)
    between = f"; {sides}{f' {unit_told}' if unit_told else ''}{sure}" if len(ends) == 2 else ""
    numbers = f"t = {significant(found.get('t'))}, {p_told(p)}"
    if p >= 0.05:
        said = f"The mean of {where} does not differ noticeably from {'that ' if groups else ''}{than}"
        return f"{said} (difference {measured(difference, unit_told)}{between}; {numbers})."
    way = "higher" if difference > 0 else "lower"
    apart = measured(abs(difference), unit_told)
    return f"The mean of {where} is {apart} {way} than {than} (difference{between[1:]}; {numbers})."


def survival(found: Found, unit: Unit) -> str:
    """Median survival of each group, and the log-rank test."""
    unit_told, curves = unit(found.get("duration")), part(found, "curves")
    told_of = []
    for name, curve in curves.items():
        shown = median_of(part(curve), exact=bool(found.get("exact")))
        shown += f" {unit_told}" if unit_told and shown[0].isdigit() else ""
        told_of.append(f"{shown} ({name})" if len(curves) > 1 else shown)
    p = real(part(found, "logrank").get("p_value"))
    test = (
        ""
        if p is None
        else f"; the curves {'differ' if p < 0.05 else 'do not differ noticeably'} (log-rank {p_told(p)})"
    )
    return f"Median survival: {listed(told_of, 4)}{test}." if told_of else ""


def median_of(curve: Found, *, exact: bool) -> str:
    """A curve's median; where times were merged, the interval that it lies in: "9 to 11"."""
    middle, after = real(curve.get("median")), real(curve.get("median_after"))
    if "times" not in curve:
        return WITHHELD
    if middle is None:
        return "not reached"
    return significant(middle) if exact or after is None else f"{significant(after)} to {significant(middle)}"


def woe(found: Found, _: Unit) -> str:
    """The feature that says most about the label."""
    best = _best({name: part(one).get("iv") for name, one in part(found, "features").items()})
    if best is None:
        return f"No information value for {found.get('target')} is told."
    return f"{best[0]} says most about {found.get('target')} (IV {fixed(best[1], 2)})."


def psi(found: Found, _: Unit) -> str:
    """The column that drifted most."""
    columns = {str(name): part(one) for name, one in part(found, "columns").items()}
    if found.get("between") == "periods":
        best = _best({name: one.get("psi") for name, one in columns.items()})
        if best is None:
            return "No index is told."
        word = worded(best[1], PSI_MARKS, "a large shift")
        return f"From before {found.get('cut')} to after it, {best[0]} moved most (PSI {fixed(best[1])}: {word})."
    marked = {name: real(part(one, "above").get("0.1")) or 0.0 for name, one in columns.items()}
    moved = [name for name, sites in marked.items() if sites]
    if not moved:
        return "No column of any site is shifted against all sites together (PSI at most 0.1)."
    are = "is" if len(moved) == 1 else "are"
    return f"{len(moved)} of {counted(len(columns), 'column')} {are} shifted at one site or more: {listed(moved, 4)}."


def quality(found: Found, _: Unit) -> str:
    """The score, and the weakest part of it."""
    score = real(found.get("score"))
    if score is None:
        return "The data-quality score is withheld."
    parts = {str(name): real(value) for name, value in part(found, "components").items()}
    least = _best({name: None if value is None else -value for name, value in parts.items()})
    weakest = f"; weakest: {least[0]} ({fixed(-least[1], 2)})" if least else ""
    return f"Data quality of all sites together scores {fixed(score, 2)} of 1{weakest}."


def _columns(found: Found) -> str:
    return counted(len(found.get("columns") or ()), "column")


class Kind(NamedTuple):
    """A kind of statistic: its *name* among others, *what* was computed, and what it *found*, in words."""

    name: str
    what: Callable[[Found], str]
    found: Callable[[Found, Unit], str]


KINDS: dict[str, Kind] = {
    "quantiles": Kind("quantiles", lambda f: f"the quantiles of {_columns(f)}", quantiles),
    "frequency": Kind("distributions", lambda f: f"the distributions of {_columns(f)}", frequency),
    "crosstab": Kind("cross-tables", lambda f: counted(len(f.get("tables") or ()), "cross-table"), crosstab),
    "woe": Kind(
        "information values",
        lambda f: f"the information value of {counted(len(part(f, 'features')), 'column')} for {f.get('target')}",
        woe,
    ),
    "correlation": Kind("correlations", lambda f: f"the correlations of {_columns(f)}", correlation),
    "vif": Kind("collinearity", lambda f: f"the collinearity of {_columns(f)}", vif),
    "pca": Kind("principal components", lambda f: f"the principal components of {_columns(f)}", pca),
    "group_by": Kind("groups", lambda f: f"the statistics of {counted(len(f.get('groups') or ()), 'group')}", group_by),
    "ttest": Kind("a t-test", lambda f: f"a t-test of {f.get('column')}", ttest),
    "anova": Kind(
        "an analysis of variance", lambda f: f"an analysis of variance of {f.get('column')} by {f.get('by')}", anova
    ),
    "survival": Kind(
        "survival curves", lambda f: f"the survival curves of {counted(len(part(f, 'curves')), 'group')}", survival
    ),
    "psi": Kind("drift", lambda f: f"the drift of {_columns(f)}", psi),
    "quality": Kind("data quality", lambda f: f"the quality of {_columns(f)}", quality),
}
TELLING = ("woe", "survival", "ttest", "anova", "correlation", "psi", "quality")
"""Of several kinds, the first of these is what the outcome tells."""


def outcome(output: Found, together: str, records: str, unit: Unit) -> str:
    """Of a study without a model: what *together* ("Three sites") computed, and what it says. "" if nothing known.

    records: how many there are, in words that follow "their records".
    """
    kinds = [kind for kind in KINDS if part(output, kind)]
    if not kinds:
        return ""
    what = KINDS[kinds[0]].what(part(output, kinds[0]))
    if len(kinds) > 1:
        what = listed([KINDS[kind].name for kind in kinds], 5)
    most = next((kind for kind in TELLING if kind in kinds), kinds[0] if len(kinds) == 1 else "")
    found = KINDS[most].found(part(output, most), unit) if most else ""
    return f"{together} computed {what} without pooling their records{records}. {found}".strip()
