"""The report's section about trust: how much of each site's change the rule took, and whom it suspects of what."""

from __future__ import annotations

from collections.abc import Mapping

from atoll.report import charts
from atoll.report.markup import Child, element, table
from atoll.report.plots import MOST_SITES
from atoll.report.section import Input, Section, beside, figure, part, text
from atoll.report.words import counted, listed, significant, whole

REASONS = {
    "broke": "sent what was not declared",
    "nothing": "hardly changed anything: {} of the median length",
    "large": "far longer changes: {} times the median length",
    "against": "away from the result and from the others: cosine {}",
    "free_rider": "the last result, sent back: off its direction by {}",
    "replay": "its own last change again: off by {}",
    "copy": "the same as another site’s: off by {}",
    "claim": "claims {} times the median weight",
}


def trust(result: Input, _: Input) -> Section | None:
    """Suspects with the evidence, and a map of trust by site and part of the run."""
    shares, told = part(result, "output", "trust"), part(result, "output").get("suspects")
    if not shares or not isinstance(told, list):
        return None
    suspects = [one for one in told if isinstance(one, Mapping)]
    rows: list[list[Child]] = []
    for one in suspects:
        for reason in part(one, "reasons"):
            found = part(one, "reasons", reason)
            figured = significant(found.get("figure"), 2)
            said = REASONS[reason].format(figured) if reason in REASONS else reason
            rows.append([one.get("site"), said, whole(found.get("rounds")), whole(found.get("of"))])
    shown = dict(list(shares.items())[:MOST_SITES])
    parts = max((len(values) for values in shown.values() if isinstance(values, list)), default=0)
    cells = [values if isinstance(values, list) else [None] * parts for values in shown.values()]
    label = "Map: how much of each site’s change the rule took, by part of the run; pale: little"
    plot = charts.heat(list(shown), [i + 1 for i in range(parts)], cells, label, reach=2.0)
    names = [str(one.get("site")) for one in suspects]
    who = f"{listed(names, 12)} {'stands' if len(names) == 1 else 'stand'}" if names else "No site stands"
    words: list[Child] = [
        text("The sites’ changes were combined by a rule that withstands bad ones. ", element("strong", f"{who} out.")),
        text(
            "This is evidence, not proof: a site may stand out by a fault, or by records that are unlike all others’. "
            "What is suspected of a site, ask its operator."
        ),
    ]
    note = "A dark cell is twice an even share, a pale one nothing; × is a part in which it was not seen."
    if len(shares) > len(shown):
        note += f" The first {counted(len(shown), 'site')} are shown."
    picture = figure(plot, "Trust by site", "from the run’s first part to its last")
    evidence_table = table("What was seen of them", ["Site", "Evidence", "Rounds", "Of"], rows, text_columns=2)
    return Section("trust", "Trust", [beside(picture, *words, text(note)), evidence_table if rows else None])
