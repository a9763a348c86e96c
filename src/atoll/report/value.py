"""The report's section for a site's director: what taking part brings the site, and what it brings the others."""

from __future__ import annotations

from atoll.report import charts
from atoll.report.markup import Child, Html, element, table
from atoll.report.model import METRICS
from atoll.report.section import Input, Section, cards, figure, part, text
from atoll.report.words import NOTHING, counted, fixed, listed, real, significant

METHODS = {
    "gtg": "Shapley values, by guided permutations (GTG-Shapley)",
    "exact": "Shapley values, by all coalitions",
    "leave_one_out": "what the model loses without each site",
}


def site_value(result: Input, _: Input) -> Section | None:
    """Each site's own model against the shared one, its share of the rows, and its contribution."""
    found, told = part(result, "value", "sites"), part(result, "output", "contribution")
    if not found:
        return None
    metric = METRICS.get(str(part(result, "value").get("metric")))
    gains = {site: real(part(one).get("gain")) for site, one in found.items()}
    shares = {site: real(part(one).get("contribution")) for site, one in found.items()}
    rows = {site: real(part(one).get("row_share")) for site, one in found.items()}
    content: list[Child] = [text(_gained(gains, metric.name if metric else ""))]
    pictures = [
        _bars(gains, f"Gain in {metric.name}", "over the site’s own model; above 0 is better") if metric else None,
        _bars(shares, "Share in what was gained", METHODS.get(str(told.get("method")), "")),
        _bars(rows, "Share of the rows", "of all training rows that sites told of"),
    ]
    content.append(cards(pictures, "three"))
    if negative := [str(site) for site in told.get("negative") or ()]:
        without = f"The model is better without {listed(negative, 12)}: wrong labels or units there are worth a look."
        content.append(element("p", without, class_="note"))
    name = metric.name if metric else "Metric"
    header = ["Site", f"{name}, alone", f"{name}, together", "Gain", "Share of rows", "Value", "Share in the gain"]
    lines: list[list[Child]] = []
    for site, one in found.items():
        values = part(one)
        lines.append([
            site, fixed(values.get("local")), fixed(values.get("federated")), _signed(gains[site]),
            _percent(rows[site]), significant(values.get("value"), 2), _percent(shares[site]),
        ])  # fmt: skip
    content.append(table("What taking part brings each site, and what each site brings", header, lines))
    if any(share is not None for share in shares.values()):
        signed = "The coordinator’s ledger and every site’s hold the same signed record of the shares."
        content.append(text(f"Shares count positive values only, and sum to 100 %. {signed}"))
    return Section("value", "What it is worth to each site", content)


def _gained(gains: dict[str, float | None], metric: str) -> str:
    known = [gain for gain in gains.values() if gain is not None]
    if not known:
        return "No site told what it would have alone, so that what it gains is not known."
    better, same = sum(gain >= 5e-4 for gain in known), sum(abs(gain) < 5e-4 for gain in known)
    alike = f", and as well at {same}" if same else ""
    return (
        f"By {metric}, on the site’s own held-out records, taking part is better than the model that the site trains "
        f"alone at {better} of {counted(len(known), 'site')}{alike}."
    )


def _bars(values: dict[str, float | None], title: str, note: str) -> Html | None:
    known = [(site, value) for site, value in values.items() if value is not None]
    return figure(charts.bars(known, title), title, note) if known else None


def _signed(value: float | None) -> str:
    return NOTHING if value is None else f"{value:+.3f}".replace("-", "−")


def _percent(value: float | None) -> str:
    return NOTHING if value is None else f"{100 * value:.1f} %"
