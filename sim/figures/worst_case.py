"""How often it gets how bad: exceedance, probability against EP size, idle ranks."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from sim.figures.style import (
    add_legend,
    distinct_placements,
    imbalance_axis,
    label_outer,
    log2_ticks,
    look,
    panels,
    pick_ep_sizes,
    placements_of,
    set_title,
    styled,
    title_panel,
    tokens_near,
    tokens_text,
)
from sim.results import CELL, SweepResult, best_rows
from sim.stats import Histogram, probability_interval

_OVERLAP = 0.1  # bounds are drawn from here down


def _histograms(result: SweepResult, metric: str) -> dict[tuple[Any, ...], Histogram]:
    """Histogram of a metric in each (placement, EP size, tokens)."""
    rows = result.counts[result.counts.metric == metric].sort_values("value", kind="stable")
    groups = rows.groupby(CELL, observed=True)
    return {key: Histogram(cell["value"].to_numpy(), cell["count"].to_numpy()) for key, cell in groups}


def _tails(result: SweepResult, metric: str) -> dict[tuple[Any, ...], pd.DataFrame]:
    """Rows of the tail of a metric in each (placement, EP size, tokens)."""
    rows = result.tail[result.tail.metric == metric].drop_duplicates(
        [*CELL, "threshold"]
    )  # what was sampled comes first
    return dict(list(rows.groupby(CELL)))


def _effective_blocks(rows: pd.DataFrame, at: np.ndarray) -> np.ndarray:
    """Effective blocks at thresholds `at`: between those of the tail's rows; a draw counts once where none is known."""
    trials, draws = int(rows.trials.iloc[0]), int(rows.draws.iloc[0])
    seen = rows[(rows.probability > 0) & (rows.probability < 1)].sort_values("threshold")
    if trials == draws or seen.empty:
        return np.full(len(at), float(draws))
    return np.interp(at, seen.threshold, seen.effective_blocks.fillna(draws))


def _draw_staircase(ax: Axes, histogram: Histogram, mean_load: float, tail: pd.DataFrame, placement: str) -> None:
    """P(imbalance at least x) with its band, from balance (x = 1), where it is 1."""
    values, counts = histogram.exceedance()
    x = np.concatenate([[1.0], values / mean_load])
    p = np.concatenate([[1.0], counts / counts[0]])
    low, high = probability_interval(p, _effective_blocks(tail, x))
    style = look(placement)
    # "At least x" holds from the value before up to the value itself: hence steps before the points.
    ax.step(x, p, where="pre", color=style["color"], linestyle=style["linestyle"], linewidth=1.8)
    ax.fill_between(x, np.maximum(low, 1e-12), high, step="pre", color=style["color"], alpha=0.15, linewidth=0)


def _draw_points(ax: Axes, histogram: Histogram, tail: pd.DataFrame, placement: str) -> None:
    """P(at least m) at each whole number m, with its band."""
    values, counts = histogram.exceedance()
    m = np.arange(values[-1] + 1)
    p = (counts / counts[0])[np.searchsorted(values, m)]
    low, high = probability_interval(p, _effective_blocks(tail, m))
    style = look(placement)
    ax.plot(m, p, **style | {"markersize": 3 if len(m) < 40 else 1})
    ax.fill_between(m, np.maximum(low, 1e-12), high, color=style["color"], alpha=0.15, linewidth=0)


_DEEPEST = 1e-13


def _draw_bounds(ax: Axes, rows: pd.DataFrame, placement: str) -> None:
    """Lower and upper bounds at their thresholds, down to the first beyond the axis; thin, so that they are told apart.

    An estimate is drawn as such, with its interval.
    """
    rows = rows[(rows.high > 0) & (rows.high < _OVERLAP)].sort_values("threshold")
    rows = rows.iloc[: int((rows.high >= _DEEPEST).sum()) + 1]
    color = look(placement)["color"]
    ax.plot(rows.threshold, rows.probability, color=color, linestyle="-", linewidth=0.7)
    low, high = (np.maximum(rows[column], 1e-300) for column in ("low", "high"))
    ax.fill_between(rows.threshold, low, high, color=color, alpha=0.25, linewidth=0)


def _theory_rows(result: SweepResult, metric: str) -> pd.DataFrame:
    """Rows of the tail that go beyond sampling: of a cell with estimates over all layers, nothing that holds for some."""
    tail = result.tail
    tail = tail[(tail.metric == metric) & (tail.method != "sampled") & (tail.probability > 0) & (tail.probability < 1)]
    estimated = tail[CELL].merge(tail.loc[tail.method == "rare", CELL].drop_duplicates(), how="left", indicator=True)
    return tail[(tail.given == "") | (estimated._merge == "left_only").to_numpy()]


@styled
def exceedance(result: SweepResult, tokens: int = 64) -> Figure:
    """P(imbalance >= x) on a log axis, a panel per EP size, placements as lines: sampled, and where bounds go on."""
    steps = tokens_near(result, tokens)
    sizes = [size for size in steps if size > 1] or list(steps)
    figure, axes = panels(len(sizes), 5 if len(sizes) > 8 else 4, 1.9)
    histograms, tails = _histograms(result, "max_load"), _tails(result, "imbalance")
    bounds = dict(list(_theory_rows(result, "imbalance").groupby(CELL)))
    mean_load = result.summary.set_index(CELL).mean_load
    drawn: list[str] = []
    for ax, ep_size in zip(axes, sizes, strict=True):
        names, twins = distinct_placements(result, ep_size)
        for name in names:
            cell = (name, ep_size, steps[ep_size])
            _draw_staircase(ax, histograms[cell], mean_load[cell], tails[cell], name)
            if cell in bounds:
                _draw_bounds(ax, bounds[cell], name)
        _set_probability_axis(ax, result)
        if bounds:
            ax.set_ylim(_DEEPEST, 3)
        imbalance_axis(ax, "x")  # so that one bad placement does not hide how the others differ
        drawn += names
        title_panel(ax, f"EP {ep_size}", twins)
    label_outer(axes, "imbalance x", "P(imbalance ≥ x)")
    text = f"Worst cases: how often the imbalance reaches x, {tokens_text(steps)} (log axes)"
    set_title(figure, result, text + _meaning_of_thin_lines(result, "imbalance"))
    add_legend(figure, result, drawn, markers=False)
    return figure


def _meaning_of_thin_lines(result: SweepResult, metric: str) -> str:
    """What the thin lines are."""
    rows = _theory_rows(result, metric)
    given, estimated = sorted(set(rows.given)), (rows.method == "rare").any()
    if not given:
        return ""
    if given == [""]:
        known = "estimated past sampling" if estimated else "exact or between bounds"
        return f"\nthick: sampled; thin: {known}, for all layers"
    known = "; where one is uniform over layers, for all" if "" in given else ""
    if estimated:
        known = "; where estimated past sampling, for all"
    draws = int(result.summary.draws.max())
    return (
        f"\nthick: sampled over all layers, blind below about 3 / {draws} draws; thin: bounds given the {given[-1]} only"
        f"{known}"
    )


@styled
def unlucky_steps(result: SweepResult) -> Figure:
    """P(all of a step's load on one rank) (above) and P(at least half of the ranks idle) (below) against EP size, for the
    smallest steps, to their true size; a line ends where the event cannot happen.
    """
    tail = best_rows(result.tail[result.tail.metric.isin(["one_rank", "idle_ranks"])])
    steps = sorted(set(result.summary.tokens) & {1, 2, 4, 8}) or sorted(result.summary.tokens.unique())[:4]
    figure, axes = panels(2 * len(steps), len(steps), 2.3, sharey=False)
    names = [name for name in placements_of(result) if name in ("linear", "linear_legacy", "round_robin")]
    names = names or placements_of(result)
    for i, ax in enumerate(axes):
        step, idle = steps[i % len(steps)], i >= len(steps)
        rows = tail[
            (tail.tokens == step) & (tail.ep_size > 1) & (tail.metric == ("idle_ranks" if idle else "one_rank"))
        ]
        if idle:
            rows = rows[rows.threshold == (rows.ep_size + 1) // 2]
        for j, name in enumerate(names):
            shift = 2 ** (0.12 * (j - (len(names) - 1) / 2))  # side by side, so that equal values stay visible
            _draw_events(ax, rows[rows.placement == name].sort_values("ep_size"), name, shift)
        ax.set_yscale("log")
        ax.set_ylim(max(ax.get_ylim()[0], 1e-300), 10)
        ax.yaxis.set_major_locator(LogLocator(numticks=6))
        log2_ticks(ax, sorted(tail.ep_size.unique()), apart=3)
        if not idle:
            title_panel(ax, f"{step} token{'s' if step > 1 else ''}")
        else:
            ax.set_xlabel("EP size (ranks)")
        if i % len(steps) == 0:
            ax.set_ylabel("P(half of the ranks idle)" if idle else "P(all load on one rank)")
    text = "Unlucky steps: all load on one rank, at least half of the ranks idle (shifted sideways; "
    text += "a line ends where it cannot be;"
    set_title(
        figure,
        result,
        text + "\nfilled: exact or between bounds; hollow: sampled, arrow: never seen, upper bound)",
        "bars",
    )
    add_legend(figure, result, names)
    return figure


def _draw_events(ax: Axes, rows: pd.DataFrame, placement: str, shift: float) -> None:
    """Probabilities against EP size: a line through what is known, bars for intervals, arrows for what was never seen."""
    style, x = look(placement) | {"markersize": 3}, rows.ep_size * shift
    known = (rows.low > 0) | (rows.high == 0)
    ax.plot(x[known], rows.probability[known].where(rows.probability > 0), **style | {"marker": ""})
    for sampled, face in ((False, style["color"]), (True, "white")):
        part = known & (rows.probability > 0) & ((rows.method == "sampled") == sampled)
        ax.plot(x[part], rows.probability[part], **style | {"linestyle": "", "markerfacecolor": face})
        ax.vlines(x[part], rows.low[part], rows.high[part], color=style["color"], linewidth=1)
    ax.plot(x[~known], rows.high[~known], linestyle="", marker=r"$\downarrow$", color=style["color"], markersize=7)


@styled
def worst_case_by_ep(result: SweepResult, tokens: int = 64) -> Figure:
    """P(imbalance >= 1.5) and P(imbalance >= 2) against EP size; a count of zero is shown by its upper bound alone."""
    steps = tokens_near(result, tokens)
    tail = best_rows(result.tail[result.tail.metric == "imbalance"])
    tail = tail[tail.tokens == tail.ep_size.map(steps)]
    levels = [x for x in (1.5, 2.0) if x in set(tail.threshold)] or sorted(set(tail.threshold))[:2]
    figure, axes = panels(len(levels), 2, 3.0)
    names = placements_of(result)
    for ax, level in zip(axes, levels, strict=True):
        for i, name in enumerate(names):
            rows = tail[(tail.placement == name) & (tail.threshold == level) & (tail.ep_size >= level)]
            rows = rows.sort_values("ep_size")
            shift = 2 ** (0.03 * (i - (len(names) - 1) / 2))  # side by side, so that equal values stay visible
            x, style = rows.ep_size * shift, look(name)
            seen = rows.probability > 0
            ax.plot(x, rows.probability.where(seen), **style)
            ax.vlines(x[seen], rows.low[seen].clip(lower=1e-300), rows.high[seen], color=style["color"], linewidth=1)
            ax.plot(
                x[~seen], rows.high[~seen], linestyle="", marker=r"$\downarrow$", color=style["color"], markersize=7
            )
        _set_probability_axis(ax, result)
        known = tail[(tail.threshold == level) & (tail.low > 0)].probability
        if known.min() < ax.get_ylim()[0]:  # beyond sampling
            ax.set_ylim(max(_DEEPEST, 0.5 * known.min()), 3)
        log2_ticks(ax, sorted(tail.ep_size.unique()))
        ax.set_xlabel("EP size (ranks)")
        title_panel(ax, f"P(imbalance ≥ {level:g})")
    axes[0].set_ylabel("probability per layer and step")
    text = f"Worst cases against EP size, {tokens_text(steps)} (shifted sideways; arrow: never seen, upper bound)"
    set_title(figure, result, text, "bars")
    add_legend(figure, result, names)
    return figure


@styled
def idle_ranks(result: SweepResult, tokens: int = 8) -> Figure:
    """P(at least m idle ranks), a panel per EP size, placements as lines."""
    steps = tokens_near(result, tokens)
    sizes = pick_ep_sizes(result, (8, 16, 24, 32, 48, 64, 128, 256), 8)
    figure, axes = panels(len(sizes), 4, 1.9)
    histograms, tails = _histograms(result, "idle_ranks"), _tails(result, "idle_ranks")
    drawn: list[str] = []
    for ax, ep_size in zip(axes, sizes, strict=True):
        names, twins = distinct_placements(result, ep_size)
        for name in names:
            cell = (name, ep_size, steps[ep_size])
            _draw_points(ax, histograms[cell], tails[cell], name)
        drawn += names
        _set_probability_axis(ax, result)
        ax.set_xlim(
            0, min(ep_size, 1.2 * max(histograms[(name, ep_size, steps[ep_size])].values[-1] for name in names) + 1)
        )
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        title_panel(ax, f"EP {ep_size}", twins)
    label_outer(axes, "idle ranks m", "P(at least m idle)")
    set_title(figure, result, f"Idle ranks: how often at least m ranks of a layer have no token, {tokens_text(steps)}")
    add_legend(figure, result, drawn)
    return figure


def _set_probability_axis(ax: Axes, result: SweepResult) -> None:
    """Log axis down to half a trial."""
    ax.set_yscale("log")
    ax.set_ylim(0.5 / int(result.summary.trials.iloc[0]), 1.5)
