"""How often it gets how bad: exceedance, probability against EP size, idle ranks."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sim.errors import counted
from sim.figures.style import (
    Sweep,
    add_legend,
    band,
    chosen_sizes,
    differing_sizes,
    distinct_placements,
    ep_sizes_of,
    imbalance_axis,
    label_outer,
    log2_ticks,
    look,
    panels,
    placements_of,
    probability_axis,
    set_title,
    sideways,
    styled,
    title_panel,
    tokens_near,
    tokens_text,
    twins_text,
)
from sim.stats import CELL, best_rows

DEEPEST = 1e-6
"""Probability down to which the worst cases are drawn: a layer and step in a million."""
_OVERLAP = 0.1  # what goes beyond sampling is drawn from here down
_PANELS = 6
_LEAST = 1e-9  # of unlucky steps
_MARKS = "filled: exact or between bounds; hollow: sampled; arrow: never seen, upper bound; no point: impossible, or too rare"


@styled
def exceedance(result: Sweep, tokens: int = 64, deepest: float = DEEPEST) -> Figure:
    """P(imbalance >= x) on a log axis, a panel per EP size, placements as lines: sampled, and where exact rows, rare-event
    estimates and bounds go on.
    """
    steps = tokens_near(result, tokens)
    sizes = differing_sizes(result, (8, 16, 24, 32, 64, 128), _PANELS) or ep_sizes_of(result)[:_PANELS]
    figure, axes = panels(len(sizes), 3, 2.3)
    theory = _theory_rows(result.tail)
    of_cell = dict(list(theory[theory.tokens == theory.ep_size.map(steps)].groupby(CELL)))
    drawn: list[str] = []
    kinds: set[str] = set()
    untypical = 0
    for ax, ep_size in zip(axes, sizes, strict=True):
        names = distinct_placements(result, ep_size)[0]
        farthest = 1.0
        for name in names:
            cell = (name, ep_size, steps[ep_size])
            curve = result.exceedance("imbalance", *cell)
            farthest = max(farthest, _draw_staircase(ax, curve, deepest, name))
            for kind, rows in of_cell[cell].groupby("method") if cell in of_cell else []:
                if _is_untypical(rows, curve):
                    untypical += 1
                    continue
                kinds.add(kind)
                farthest = max(farthest, _draw_theory(ax, rows, deepest, name))
        ax.set_xlim(1, max(1.02 * farthest, 1.05))
        imbalance_axis(ax, "x")  # so that one bad placement does not hide how the others differ
        drawn += names
        title_panel(ax, f"EP {ep_size}")
    for ax in axes:
        probability_axis(ax, deepest if kinds else 0.5 / int(result.summary.trials.max()))
    label_outer(axes, "imbalance x", "P(imbalance ≥ x)")
    set_title(
        figure,
        result,
        f"Worst cases: how often the imbalance reaches x, {tokens_text({size: steps[size] for size in sizes})} (log axes)",
        _meaning_of_lines(result, theory, kinds),
        f"left out: {counted(untypical, 'curve')} of bounds, given layers that are off what was sampled"
        if untypical
        else "",
        twins_text(result, sizes),
        chosen_sizes(result, sizes),
    )
    add_legend(figure, result, drawn, markers=False)
    return figure


def _theory_rows(tail: pd.DataFrame) -> pd.DataFrame:
    """Rows of the imbalance's tail that go beyond sampling, and that say something; where a cell has estimates over all layers,
    nothing that holds for some layers only.
    """
    tail = tail[(tail.metric == "imbalance") & (tail.method != "sampled") & (tail.high > 0) & (tail.low < 1)]
    estimated = tail[CELL].merge(tail.loc[tail.method == "rare", CELL].drop_duplicates(), how="left", indicator=True)
    return tail[(tail.given == "") | (estimated._merge == "left_only").to_numpy()]


def _is_untypical(rows: pd.DataFrame, curve: pd.DataFrame) -> bool:
    """Whether rows that hold for some layers only are off what was sampled over all layers, where both are known."""
    given = rows[(rows.given != "") & (rows.high < _OVERLAP) & (rows.threshold <= curve["value"].iloc[-1])]
    seen = curve.iloc[np.searchsorted(curve["value"], given.threshold - 1e-9)]
    return bool(((given.low.to_numpy() > seen.high) | (given.high.to_numpy() < seen.low)).any())


def _draw_staircase(ax: Axes, curve: pd.DataFrame, deepest: float, placement: str) -> float:
    """P(imbalance at least x) with its band, from balance (x = 1), where it is 1; the largest x that is drawn."""
    x, p, low, high = (
        np.concatenate([[start], curve[column]])
        for start, column in ((1.0, "value"), (1.0, "probability"), (1.0, "low"), (1.0, "high"))
    )
    style = look(placement)
    # "At least x" holds from the value before up to the value itself: hence steps before the points.
    ax.step(x, p, where="pre", color=style["color"], linestyle=style["linestyle"], linewidth=1.8)
    ax.fill_between(x, np.maximum(low, deepest / 10), high, step="pre", color=style["color"], alpha=0.15, linewidth=0)
    return float(x[p >= deepest].max())


def _draw_theory(ax: Axes, rows: pd.DataFrame, deepest: float, placement: str) -> float:
    """What goes beyond sampling, thin: bounds and exact rows as a line with the room between the bounds, rare-event
    estimates as points with a band; the largest threshold that is drawn.
    """
    rows = rows[rows.high < _OVERLAP].sort_values("threshold")
    rows = rows.iloc[: int((rows.high >= deepest).sum()) + 1]  # down to the first beyond the axis
    if rows.empty:
        return 1.0
    color = look(placement)["color"]
    rare = rows.method.iloc[0] == "rare"
    line = rows.probability if rare else rows.high
    style: dict[str, Any] = {"marker": "o", "markersize": 2.5, "markerfacecolor": "white"} if rare else {}
    ax.plot(rows.threshold, line.clip(lower=deepest / 10), color=color, linestyle="-", linewidth=0.7, **style)
    low, high = (np.maximum(rows[column], deepest / 10) for column in ("low", "high"))
    ax.fill_between(rows.threshold, low, high, color=color, alpha=0.25, linewidth=0)
    return float(rows.threshold.max())


def _meaning_of_lines(result: Sweep, theory: pd.DataFrame, kinds: set[str]) -> str:
    """What the thin lines are."""
    if not kinds:
        return ""
    words = {"exact": "exact", "bound": "between bounds", "rare": "rare-event estimate (points)"}
    thin = " or ".join(text for kind, text in words.items() if kind in kinds)
    given = sorted(set(theory[theory.method.isin(kinds)].given) - {""})
    draws = int(result.summary.draws.max())
    text = f"thick: sampled, blind below about 3 / {draws:,} draws; thin: {thin}"
    return text + (f", given the {given[-1]} only" if given else ", for all layers")


@styled
def unlucky_steps(result: Sweep) -> Figure | None:
    """P(all of a step's load on one rank) and P(at least half of the ranks idle) against EP size, for the smallest steps: a
    panel for each event and step that can happen and need not. None where there are none.
    """
    tail = best_rows(result.tail[result.tail.metric.isin(["one_rank", "idle_ranks"])])
    tail = tail[(tail.ep_size > 1) & ((tail.metric == "one_rank") | (tail.threshold == (tail.ep_size + 1) // 2))]
    names = [name for name in placements_of(result) if name in ("linear", "linear_legacy", "round_robin")]
    names = names or placements_of(result)
    tail = tail[tail.placement.isin(names)]
    steps = sorted(set(result.summary.tokens) & {1, 2, 4, 8}) or sorted(result.summary.tokens.unique())[:4]
    parts = [
        (metric, step, tail[(tail.metric == metric) & (tail.tokens == step)])
        for metric in ("one_rank", "idle_ranks")
        for step in steps
    ]
    parts = [part for part in parts if _is_open(part[2])][:_PANELS]
    if not parts:
        return None
    figure, axes = panels(len(parts), 3, 2.2, sharey=False)
    for ax, (metric, step, rows) in zip(axes, parts, strict=True):
        for j, name in enumerate(names):
            _draw_events(ax, rows[rows.placement == name].sort_values("ep_size"), name, (j, len(names)))
        _reach_down(ax, rows)
        log2_ticks(ax, sorted(rows.ep_size.unique()))
        event = "all load on one rank" if metric == "one_rank" else "half of the ranks idle"
        title_panel(ax, f"{counted(step, 'token')}: {event}")
    label_outer(axes, "EP size (ranks)", "probability")
    set_title(
        figure,
        result,
        "Unlucky steps: all load on one rank; at least half of the ranks idle",
        _MARKS,
        ranges="bars",
    )
    add_legend(figure, result, names)
    return figure


def _is_open(rows: pd.DataFrame) -> bool:
    """Whether some event of the rows is known to happen, at least once in a million steps, and not always."""
    return bool(((rows.low > DEEPEST) & (rows.low < 0.99)).any())


def _draw_events(ax: Axes, rows: pd.DataFrame, placement: str, place: tuple[int, int]) -> None:
    """Probabilities against EP size: a line through what is known, bars for intervals, arrows for what was never seen."""
    style: dict[str, Any] = look(placement) | {"markersize": 3.5}
    aside: dict[str, Any] = {"transform": sideways(ax, *place)}
    known = (rows.low > 0) | (rows.high == 0)
    ax.plot(rows.ep_size[known], rows.probability[known].where(rows.probability > 0), **style | {"marker": ""}, **aside)
    for sampled, face in ((False, style["color"]), (True, "white")):
        part = rows[known & (rows.probability > 0) & ((rows.method == "sampled") == sampled)]
        look_of_points = style | {"linestyle": "", "markerfacecolor": face}
        ax.plot(part.ep_size, part.probability, **look_of_points, **aside)
        ax.vlines(part.ep_size, part.low, part.high, color=style["color"], linewidth=1, **aside)
    unseen = rows[~known]
    ax.plot(
        unseen.ep_size, unseen.high, linestyle="", marker=r"$\downarrow$", color=style["color"], markersize=7, **aside
    )


def _reach_down(ax: Axes, rows: pd.DataFrame) -> None:
    """A probability axis down to what is known, and below the arrows of what was never seen."""
    known, unseen = rows[rows.low > _LEAST].probability, rows[(rows.low == 0) & (rows.high > 0)].high
    least = min(known.min(), unseen.min() if len(unseen) else 1.0)
    probability_axis(ax, 10 ** np.floor(np.log10(least / 3)))


@styled
def worst_case_by_ep(result: Sweep, tokens: int = 64, deepest: float = DEEPEST) -> Figure:
    """P(imbalance >= 1.5) and P(imbalance >= 2) against EP size; a count of zero is shown by its upper bound alone."""
    steps = tokens_near(result, tokens)
    tail = best_rows(result.tail[result.tail.metric == "imbalance"])
    tail = tail[tail.tokens == tail.ep_size.map(steps)]
    levels = [x for x in (1.5, 2.0) if x in set(tail.threshold)] or sorted(set(tail.threshold))[:2]
    figure, axes = panels(len(levels), 2, 3.0)
    names = placements_of(result)
    for ax, level in zip(axes, levels, strict=True):
        of_level = tail[(tail.threshold == level) & (tail.ep_size >= level) & (tail.high >= deepest)]
        for i, name in enumerate(names):
            rows = of_level[of_level.placement == name].sort_values("ep_size")
            _draw_events(ax, rows, name, (i, len(names)))
        _reach_down(ax, of_level)
        ax.set_ylim(max(ax.get_ylim()[0], deepest), 1)
        log2_ticks(ax, sorted(tail.ep_size.unique()))
        ax.set_xlabel("EP size (ranks)")
        title_panel(ax, f"P(imbalance ≥ {level:g})")
    axes[0].set_ylabel("probability per layer and step")
    least = min(ax.get_ylim()[0] for ax in axes)
    axes[0].set_ylim(least, 1)
    text = f"Worst cases against EP size, {tokens_text(steps)}"
    set_title(
        figure,
        result,
        text,
        _MARKS,
        ranges="bars",
    )
    add_legend(figure, result, names)
    return figure


@styled
def idle_ranks(result: Sweep, tokens: int = 8) -> Figure | None:
    """P(at least m idle ranks), a panel for each EP size at which ranks are idle and placements differ. None where there
    are none.
    """
    steps = tokens_near(result, tokens)
    curves: dict[int, dict[str, pd.DataFrame]] = {}
    for ep_size in differing_sizes(result, (), len(ep_sizes_of(result))):
        names = distinct_placements(result, ep_size)[0]
        of_size = {name: _idle_curve(result, name, ep_size, steps[ep_size]) for name in names}
        if any(len(curve) > 1 for curve in of_size.values()):
            curves[ep_size] = of_size
    if not curves:
        return None
    sizes = sorted(sorted(curves, key=lambda size: size not in (8, 16, 24, 32, 48, 64))[:_PANELS])
    figure, axes = panels(len(sizes), 3, 2.1)
    for ax, ep_size in zip(axes, sizes, strict=True):
        for name, curve in curves[ep_size].items():
            style = look(name)
            ax.plot(curve["value"], curve.probability, **style | {"markersize": 3.5})
            band(ax, curve["value"], curve.low, curve.high, style["color"])
        certain = min(int(curve["value"][curve.probability == 1].max()) for curve in curves[ep_size].values())
        most = max(int(curve["value"].max()) for curve in curves[ep_size].values())
        ax.set_xlim(certain, most + 0.5)
        probability_axis(ax, 0.5 / int(result.summary.trials.iloc[0]))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        title_panel(ax, f"EP {ep_size}")
    label_outer(axes, "idle ranks m", "P(at least m idle)")
    text = "Idle ranks: how often at least m ranks of a layer have no token"
    set_title(
        figure,
        result,
        f"{text}, {tokens_text({size: steps[size] for size in sizes})}",
        "a line ends where more were never seen",
        twins_text(result, sizes),
        chosen_sizes(result, sizes),
    )
    add_legend(figure, result, [name for size in sizes for name in curves[size]])
    return figure


def _idle_curve(result: Sweep, name: str, ep_size: int, tokens: int) -> pd.DataFrame:
    """P(at least m) at each whole number m from 0 to the most idle ranks seen."""
    curve = result.exceedance("idle_ranks", name, ep_size, tokens)
    at = np.searchsorted(curve["value"], np.arange(curve["value"].iloc[-1] + 1))
    return curve.iloc[at].assign(value=np.arange(len(at)))
