"""The report's sections about data and custody: statistics, preparation, what left each site, traffic, proof."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from atoll.report import plots
from atoll.report.distributions import rows_left_out
from atoll.report.markup import Child, Html, code, element, join, table
from atoll.report.section import Input, Section, beside, cards, figure, part, text, unit_of
from atoll.report.words import NOTHING, WITHHELD, counted, duration, listed, percent, real, significant, size, whole

MOST_HISTOGRAMS = 60
"""Histograms in one page; the table has every column."""
EXACT = ("releases", "traffic", "verify")
"""Sections that tell nothing of data."""
NOISY = "These numbers carry noise: that of differential privacy, see above."


def statistics(result: Input, details: Input) -> Section | None:
    """Columns' statistics over all sites, with small histograms."""
    columns = part(result, "statistics", "columns")
    if not columns:
        return None
    pictures: list[Html | None] = []
    rows: list[list[Child]] = []
    for name, found in columns.items():
        unit = unit_of(details, name)
        if len(pictures) < MOST_HISTOGRAMS:
            pictures.append(figure(plots.histogram(name, part(found), unit), name, unit or None))
        gone = bool(part(found).get("withheld"))
        missing = WITHHELD if gone else whole(part(found).get("missing"))
        if real(part(found).get("missing")):
            missing += f" ({percent(found['missing'], found.get('rows'))})"
        shown = [significant(part(found).get(key)) for key in ("mean", "std", "low", "high")]
        title = join(name, element("small", unit) if unit else None)
        count = WITHHELD if gone else whole(part(found).get("count"))
        rows.append([title, count, missing, *([WITHHELD] * 4 if gone else shown)])
    said = f"{whole(part(result, 'statistics').get('rows'))} rows of all sites together."
    hint = " The line in a histogram marks the mean." if any(pictures) else ""
    if any(n is None for found in columns.values() for n in part(found).get("histogram") or []):
        hint += " × marks a bin that is withheld, as too few rows are in it or beside it."
    note = (
        "Smallest and largest values never leave a site: low and high are edges of histogram bins, "
        "with at least a few rows at or beyond each."
    )
    header = ["Column", "Values", "Missing", "Mean", "Standard deviation", "Low", "High"]
    whole_table = table("All sites together, in the columns’ units", header, rows, note=note)
    return Section("statistics", "Statistics", [text(said, hint), cards(pictures, "small"), whole_table])


def preparation(result: Input, details: Input) -> Section | None:
    """Rows kept and left out by reason, and values that the recipe's steps computed over all sites."""
    rows: list[list[Child]] = []
    for step, fitted in part(result, "fitted").items():
        for column, value in part(fitted).items():
            unit = unit_of(details, column)
            title = join(column, element("small", unit) if unit else None)
            rows.append([title, int(step) + 1 if str(step).isdecimal() else step, _value(value)])
    content = rows_left_out(result)
    if rows:
        said = "Every site prepared its table in the same way, with these values, computed from all sites together."
        header = ["Column", "Step of the recipe", "Value"]
        content += [text(said), table("Values used in preparation", header, rows)]
    return Section("preparation", "Preparation", content) if content else None


def _value(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(_value(item) for item in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_value(item)}" for key, item in value.items())
    return significant(value) if value is None or isinstance(value, float | int) else str(value)


def releases(result: Input, details: Input) -> Section | None:
    """What left each site, in words; sites that released the same share one table."""
    known = part(details, "releases")
    order = {site: place for place, site in enumerate(part(result, "sites"))}
    found = {site: known[site] for site in sorted(known, key=lambda site: order.get(site, len(order)))}
    if not found:
        return None
    alike: dict[tuple[tuple[object, ...], ...], list[str]] = {}
    for site, items in found.items():
        key = tuple((i.get("what"), i.get("handler"), i.get("program"), i.get("times")) for i in items)
        alike.setdefault(key, []).append(site)
    tables: list[Child] = []
    for kinds, sites in alike.items():
        rows = []
        for i, (what, handler, program, times) in enumerate(kinds):
            sizes = [n for site in sites if (n := real(found[site][i].get("bytes"))) is not None]
            rows.append([what, join(code(handler), element("small", code(program))), whole(times), _span(sizes)])
        each = f"Each of {listed(sites, 12)} released" if len(sites) > 1 else f"{sites[0]} released"
        header = ["What", "For", "Times", "Size per site" if len(sites) > 1 else "Size"]
        tables.append(table(each, header, rows, text_columns=2) if rows else text(each, " nothing."))
    said = (
        "Records stay where they are. Each site writes every message into its own signed ledger before sending it; "
        "this is what the ledgers list."
    )
    return Section("releases", "What left each site", [text(said), tables])


def promise(result: Input) -> Html | None:
    """Who learned what by the protection, and what differential privacy hides; what a reader must know first."""
    privacy, unit = part(result, "privacy"), part(result, "privacy").get("unit")
    epsilon, delta = real(privacy.get("epsilon")), real(privacy.get("delta"))
    loss: Child = "none: no ε is claimed" + (
        ", and no number carries noise." if privacy.get("noised") is False else "."
    )
    if epsilon is not None:
        limits = f"ε = {significant(epsilon, 3)}" + ("" if delta is None else f", δ = {significant(delta, 3)}")
        noise = str(privacy.get("mechanism") or "").replace("_", " ")
        loss = join(
            f"{limits}{f' for each {unit}' if unit else ''}. ",
            element("strong", "The numbers on this page carry noise"),
            f" ({noise})" if noise else None,
            ", which hides whether any one of them took part." if unit else ".",
        )
    named = privacy.get("protection") or result.get("protection")
    if not named and not privacy:
        return None
    warned = privacy.get("warnings") or []
    return element(
        "div",
        text(element("b", "Protection: "), code(named) if named else NOTHING),
        text(privacy["statement"]) if privacy.get("statement") else None,
        text(element("b", "Differential privacy: "), loss),
        [text(element("b", "Warning: "), f"{warning}.") for warning in warned],
        class_="promise",
    )


def noisy(result: Input, made: Section) -> Section:
    """A section of results, said to be under noise where it is."""
    if not part(result, "privacy").get("noised") or made.anchor in EXACT:
        return made
    return replace(made, content=[element("p", NOISY, class_="note"), *made.content])


def _span(sizes: Sequence[float]) -> str:
    if not sizes:
        return NOTHING
    least, most = size(min(sizes)), size(max(sizes))
    return least if least == most else f"{least} to {most}"


def traffic(result: Input, details: Input) -> Section | None:
    """Bytes on the wire, and time by kind of round."""
    wire = part(result, "wire")
    sent, received = real(wire.get("to_sites_bytes")), real(wire.get("from_sites_bytes"))
    picture = figure(plots.traffic(sent, received), "Bytes on the wire", "all sites and rounds, envelopes included")
    kinds: dict[str, list[float]] = {}
    for row in details.get("rounds") or []:
        kinds.setdefault(str(row.get("name")), []).append(real(row.get("seconds")) or 0.0)
    if picture is None and not kinds:
        return None
    sites, rounds = len(part(result, "sites")), int(real(result.get("rounds")) or 0)
    took = f"The study took {counted(rounds, 'round')} and {duration(result.get('seconds'))}."
    words = [text(took)] if rounds else []
    if sites and rounds and sent is not None and received is not None:
        there, back = size(sent / sites / rounds), size(received / sites / rounds)
        words.append(text(f"In a round, on average, {there} went to each site and {back} came back."))
    rows = [[code(name), whole(len(s)), duration(sum(s)), duration(max(s))] for name, s in kinds.items()]
    header = ["Round", "Times", "Time in all", "Longest"]
    timed = table("Rounds, by what they asked", header, rows) if rows else None
    return Section("traffic", "Traffic and time", [beside(picture, *words), timed])


def verification(result: Input, _: Input) -> Section | None:
    """How anybody who has the ledgers can check this page."""
    plan = result.get("plan_hash")
    command = element("pre", element("code", "atoll ledger verify ledger/*.jsonl"), tabindex="0", aria_label="command")
    steps: list[Child] = [
        join("Put the ledgers of the coordinator and of all sites into one folder, ", code("ledger"), "."),
        join("Run this command; it needs no network:", command),
        "It checks every signature and every link of each ledger, and that what a site released is what the "
        "coordinator received. It names the entry that was changed or cut off.",
    ]
    if plan:
        steps.append(join("Compare the plan’s hash with the one that your institution approved: ", code(plan)))
    return Section("verify", "How to verify", [element("ol", [element("li", step) for step in steps])])
