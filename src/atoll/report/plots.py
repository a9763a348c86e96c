"""The report's plots, each one ``<svg>`` element. Where there is nothing to draw, the answer is None.

Colours mean the same everywhere: *federated* is the shared model, *local* a site's that it made alone, *personal* one
that it has for itself of what all learned, *pooled* the model trained on all records in one place, *data* what is no
model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from atoll.report import svg
from atoll.report.markup import Html
from atoll.report.svg import FEDERATED, INK, LOCAL, MUTED, PERSONAL, POOLED, plain_axes, render, shortened
from atoll.report.words import compact, fixed, real, significant, size, whole

WIDTH = 340.0
"""CSS pixels: a phone's width less its margins, so that text there keeps its size."""
THIRD = 262.0
"""Of plots that may stand three in a row."""
MOST_SITES = 24
"""Sites in one plot; the table beside it has all of them."""
COLOURS = {"local": LOCAL, "federated": FEDERATED, "personal": PERSONAL, "pooled": POOLED}
Z_95 = 1.959963984540054
"""97.5 % quantile of the standard normal distribution."""


def numbers(axes: Axes, which: str, most: int = 5, *, whole_only: bool = False) -> None:
    """Numbers along one axis ("x" or "y"), at most about *most*."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(MaxNLocator(most, integer=whole_only, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(svg.ticks))


def convergence(history: Sequence[Mapping[str, Any]]) -> Html | None:
    """Training loss by step. history: [{"step": from 0, "loss": mean loss a row}, …]; needs two finite points."""
    known = [(row.get("step", i) + 1, y) for i, row in enumerate(history) if (y := real(row.get("loss"))) is not None]
    if len(known) < 2:
        return None
    steps, losses = (np.array(column, float) for column in zip(*known, strict=True))

    def paint(figure: Figure) -> None:
        axes = plain_axes(figure, grid="y")
        axes.spines["bottom"].set(visible=True)
        marker = "o" if len(steps) <= 40 else None
        axes.plot(steps, losses, color=FEDERATED, marker=marker, markersize=5, markeredgewidth=0, clip_on=False)
        axes.set_xlabel("training step")
        axes.annotate(
            fixed(losses[-1]), (steps[-1], losses[-1]), (0, 7), textcoords="offset points", ha="right", color=INK
        )
        numbers(axes, "x", 6, whole_only=True)
        numbers(axes, "y")
        axes.margins(x=0.03, y=0.08)

    label = (
        f"Line: mean training loss, from {fixed(losses[0])} at step {steps[0]:.0f} "
        f"to {fixed(losses[-1])} at step {steps[-1]:.0f}"
    )
    return render(WIDTH, 210, label, paint)


def comparison(
    name: str, per_site: Mapping[str, Mapping[str, Any]], everyone: Mapping[str, Any], *, chance: float | None = None
) -> Html | None:
    """Bars of one metric: a group for each site, and one for all sites together.

    per_site: site → {"local": value, "federated": value, "personal": value}. everyone: {"federated", "personal",
    "pooled"}.
    chance: what guessing scores, as a dashed line. A value that is missing has no bar.
    """
    shown = list(per_site.items())[:MOST_SITES]
    groups = [(str(site), _known(values, ("local", "federated", "personal"))) for site, values in shown]
    if together := _known(everyone, ("federated", "personal", "pooled")):
        groups.append(("all sites", together))
    values = [value for _, bars in groups for value in bars.values()]
    if len(values) < 2:
        return None
    # A bar has to begin at zero; room beyond the longest is for its number.
    reach = max(*values, 0.0) or 1.0
    least = min(*values, 0.0)
    thick, gap = 0.8, 0.9
    places: list[float] = []
    bottom = 0.0
    for _, bars in groups:
        places.append(bottom)
        bottom += max(len(bars), 1) + gap

    def paint(figure: Figure) -> None:
        axes = plain_axes(figure)
        axes.spines["left"].set(visible=True, color=MUTED)
        for place, (_, bars) in zip(places, groups, strict=True):
            for i, (kind, value) in enumerate(bars.items()):
                axes.barh(place + i, value, thick, color=COLOURS[kind], linewidth=0)
                axes.text(
                    max(value, 0.0) + 0.02 * reach, place + i, fixed(value), va="center_baseline", color=INK,
                    fontsize=svg.TEXT_SIZE - 0.5,
                )  # fmt: skip
        if chance is not None:
            axes.axvline(chance, color=MUTED, linewidth=1, dashes=(3, 3), zorder=0.5)
        middles = [place + (max(len(bars), 1) - 1) / 2 for place, (_, bars) in zip(places, groups, strict=True)]
        axes.set_yticks(middles, [shortened(site, 12) for site, _ in groups], color=INK)
        axes.set_xticks([])
        axes.set_xlim(least * 1.05, reach * 1.25)
        axes.set_ylim(bottom - gap - 0.4, -0.6)

    told = "; ".join(
        f"{site}: {', '.join(f'{kind} {fixed(value)}' for kind, value in bars.items()) or 'not known'}"
        for site, bars in groups
    )
    return render(THIRD, 16 + 15 * bottom, f"Bars: {name} on held-out rows. {told}", paint)


def _known(values: Mapping[str, Any], kinds: Sequence[str]) -> dict[str, float]:
    return {kind: value for kind in kinds if (value := real(values.get(kind))) is not None}


def traffic(to_sites_bytes: object, from_sites_bytes: object) -> Html | None:
    """Two bars: bytes that went to the sites and came from them."""
    sent, received = real(to_sites_bytes), real(from_sites_bytes)
    if sent is None or received is None:
        return None

    def paint(figure: Figure) -> None:
        axes = plain_axes(figure)
        axes.spines["left"].set(visible=True, color=MUTED)
        reach = max(sent, received) or 1.0
        axes.barh([0, 1], [sent, received], 0.56, color=svg.DATA, linewidth=0)
        for place, value in enumerate((sent, received)):
            axes.text(value + 0.02 * reach, place, size(value), va="center_baseline", color=INK)
        axes.set_yticks([0, 1], ["to the sites", "from the sites"], color=INK)
        axes.set_xticks([])
        axes.set_xlim(0, reach * 1.28)
        axes.set_ylim(1.5, -0.5)

    label = f"Bars: {size(sent)} sent to the sites, {size(received)} received from the sites"
    return render(WIDTH, 92, label, paint)


def forest(table: Sequence[Mapping[str, Any]]) -> Html | None:
    """Coefficients with 95 % confidence intervals: [{"name", "coefficient", "std_error"}, …].

    The intercept and rows without a standard error are left out. Coefficients have different
    units and so different magnitudes: each panel holds those of like magnitude, on a scale of its own.
    """
    rows = [
        (shortened(row["name"], 20), c, Z_95 * e)
        for row in table
        if row.get("name") != "intercept"
        and (c := real(row.get("coefficient"))) is not None
        and (e := real(row.get("std_error"))) is not None
    ]
    if not rows:
        return None
    panels = by_magnitude(rows)

    def paint(figure: Figure) -> None:
        heights = [len(panel) + 0.9 for panel in panels]
        grid = figure.add_gridspec(len(panels), 1, height_ratios=heights)
        for i, panel in enumerate(panels):
            axes = plain_axes(figure, grid="x")
            axes.set_subplotspec(grid[i])
            for place, (_, coefficient, half) in enumerate(panel):
                sure = abs(coefficient) > half
                colour = FEDERATED if sure else MUTED
                axes.plot([coefficient - half, coefficient + half], [place, place], color=colour)
                face = colour if sure else svg.CARD
                axes.plot([coefficient], [place], "o", color=colour, markersize=7, markerfacecolor=face)
            axes.axvline(0, color=MUTED, linewidth=1)
            axes.set_yticks(range(len(panel)), [name for name, _, _ in panel], color=INK)
            axes.set_ylim(len(panel) - 0.4, -0.6)
            numbers(axes, "x", 5)
            axes.margins(x=0.06)

    told = "; ".join(f"{name} {significant(c, 3)} ± {significant(half, 2)}" for name, c, half in rows)
    return render(
        WIDTH,
        8 + sum(22 * len(panel) + 34 for panel in panels),
        f"Coefficients and their 95 % confidence intervals: {told}",
        paint,
    )


def by_magnitude(rows: Sequence[tuple[str, float, float]]) -> list[list[tuple[str, float, float]]]:
    """Rows (name, coefficient, half width) in groups whose farthest ends differ less than tenfold, largest first."""
    reach = {i: abs(c) + half for i, (_, c, half) in enumerate(rows)}
    panels: list[list[int]] = []
    for i in sorted(reach, key=lambda i: -reach[i]):
        if panels and reach[i] * 10 > reach[panels[-1][0]]:
            panels[-1].append(i)
        else:
            panels.append([i])
    return [[rows[i] for i in sorted(panel)] for panel in panels]


def _square(axes: Axes, across: str, up: str) -> None:
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, dashes=(3, 3))
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.set_aspect("equal")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks([0, 0.5, 1])
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))


def roc(curve: Mapping[str, Any], auc: object = None, kind: str = "federated") -> Html | None:
    """Receiver operating characteristic: {"false_positive_rate": [n], "true_positive_rate": [n]}, both rising. kind: of
    which model."""
    points = [
        (x, y)
        for a, b in zip(curve.get("false_positive_rate") or [], curve.get("true_positive_rate") or [], strict=False)
        if (x := real(a)) is not None and (y := real(b)) is not None
    ]
    if len(points) < 2:
        return None

    def paint(figure: Figure) -> None:
        axes = plain_axes(figure, grid="both")
        _square(axes, "false alarms", "found")
        axes.plot(*zip(*points, strict=True), color=COLOURS[kind])
        if real(auc) is not None:
            axes.text(0.98, 0.06, f"AUC {fixed(auc)}", ha="right", color=INK)

    return render(
        WIDTH, 290, f"ROC curve: share of positives found against share of false alarms; AUC {fixed(auc)}", paint
    )


def calibration(groups: Sequence[Mapping[str, Any]], kind: str = "federated") -> Html | None:
    """Predicted against observed rates: [{"rows", "predicted", "observed"}, …]; a dot's area is its rows. kind:
    of which model."""
    known = [
        (n, p, o)
        for row in groups
        if (n := real(row.get("rows"))) and (p := real(row.get("predicted"))) is not None
        and (o := real(row.get("observed"))) is not None
    ]  # fmt: skip
    if not known:
        return None
    rows, predicted, observed = (np.array(column, float) for column in zip(*known, strict=True))

    def paint(figure: Figure) -> None:
        axes = plain_axes(figure, grid="both")
        _square(axes, "predicted", "observed")
        areas = 14 + 130 * rows / rows.max()
        axes.scatter(predicted, observed, areas, color=COLOURS[kind], edgecolors=svg.CARD, linewidths=1, zorder=3)

    told = "; ".join(f"predicted {100 * p:.0f} %, observed {100 * o:.0f} % ({whole(n)} rows)" for n, p, o in known)
    return render(WIDTH, 290, f"Calibration: {told}", paint)


def histogram(name: str, column: Mapping[str, Any], unit: str = "") -> Html | None:
    """One column's histogram, [num_bins], over its edges, [num_bins + 1], without empty bins at the ends.

    A count of None is withheld. Bins may differ in width: then a bar's area is its count.
    """
    told = [real(n) for n in column.get("histogram") or []]
    counts = np.array([0.0 if n is None else n for n in told])
    edges = np.array([np.nan if (e := real(x)) is None else e for x in column.get("edges") or []])
    if len(edges) != len(counts) + 1 or not counts.any() or np.isnan(edges).any():
        return None
    gone = np.array([n is None for n in told])
    filled = np.flatnonzero((counts > 0) | gone)
    first, last = int(filled[0]), int(filled[-1])
    if last - first < 2:
        first, last = max(first - 1, 0), min(last + 1, len(counts) - 1)
    counts, edges, gone = counts[first : last + 1], edges[first : last + 2], gone[first : last + 1]
    widths = np.diff(edges)
    heights = counts / widths * widths.min() if (widths > 0).all() else counts

    def paint(figure: Figure) -> None:
        axes = plain_axes(figure)
        axes.spines["bottom"].set(visible=True, color=MUTED)
        axes.stairs(heights, edges, fill=True, color=svg.DATA, linewidth=0)
        for place in (edges[:-1] + widths / 2)[gone]:
            axes.text(place, 0.03 * heights.max(), "×", ha="center", color=MUTED)
        mean = real(column.get("mean"))
        if mean is not None and edges[0] <= mean <= edges[-1]:
            axes.axvline(mean, color=INK, linewidth=1.5)
        axes.set_yticks([])
        axes.set_ylim(0, heights.max() * 1.05)
        numbers(axes, "x", 3)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))

    label = (
        f"Histogram of {name}: {whole(counts.sum())} values between {significant(edges[0])} "
        f"and {significant(edges[-1])}{' ' + unit if unit else ''}, mean {significant(column.get('mean'))}"
        + (f"; {gone.sum()} bins withheld" if gone.any() else "")
    )
    return render(150, 82, label, paint)
