"""Averages and who bears them: imbalance against tokens, load of each rank, imbalance against fan-out."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

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
from sim.results import SweepResult
from sim.stats import Design, Moments, mean_interval


@styled
def imbalance_by_tokens(result: SweepResult) -> Figure:
    """Mean (above) and p99 (below) imbalance against tokens per step, a column per EP size."""
    sizes = pick_ep_sizes(result, (8, 16, 32, 64), 4)
    figure, axes = panels(2 * len(sizes), len(sizes), 2.2, sharey=False)
    drawn: list[str] = []
    for i, ax in enumerate(axes):
        statistic, ep_size = ("imbalance_mean", "imbalance_p99")[i // len(sizes)], sizes[i % len(sizes)]
        names, twins = distinct_placements(result, ep_size)
        drawn += names
        for placement in names:
            of_pair = (result.summary.placement == placement) & (result.summary.ep_size == ep_size)
            rows = result.summary[of_pair].sort_values("tokens")
            style = look(placement)
            ax.plot(rows.tokens, rows[statistic], **style | {"markersize": 3})
            ax.fill_between(
                rows.tokens,
                rows[f"{statistic}_low"],
                rows[f"{statistic}_high"],
                color=style["color"],
                alpha=0.15,
                linewidth=0,
            )
        log2_ticks(ax, sorted(rows.tokens), apart=7)
        imbalance_axis(ax, "y")
        if i < len(sizes):
            title_panel(ax, f"EP {ep_size}", twins)
        else:
            ax.set_xlabel("tokens per step")
        if i % len(sizes) == 0:
            ax.set_ylabel(("mean" if i < len(sizes) else "p99") + " imbalance (max / mean)")
    set_title(figure, result, "Imbalance against tokens per step: mean above, p99 below (log axes)")
    add_legend(figure, result, drawn)
    return figure


@styled
def load_by_rank(result: SweepResult) -> Figure:
    """Mean load of each rank over the mean load, a panel per EP size: who is hot."""
    sizes = pick_ep_sizes(result, (8, 12, 24, 48, 32, 64), 6)
    counts = result.counts
    figure, axes = panels(len(sizes), 3, 2.1)
    summary = result.summary.sort_values("tokens").groupby(["placement", "ep_size"]).last()
    studied = [name for name in placements_of(result) if name in ("linear", "linear_legacy", "round_robin")]
    studied = studied or placements_of(result)
    for ax, ep_size in zip(axes, sizes, strict=True):
        names, twins = distinct_placements(result, ep_size)
        for placement in [name for name in names if name in studied]:
            cell = summary.loc[(placement, ep_size)]
            of_pair = counts[(counts.placement == placement) & (counts.ep_size == ep_size)]
            loads = [
                of_pair[of_pair.metric == f"rank_load{part}"].sort_values("value")["count"].to_numpy(float)
                for part in ("", "_square", "_weighted")
            ]
            mean, low, high = mean_interval(Moments(*loads), Design.of(int(cell.trials), int(cell.draws)))
            ranks, scale, style = np.arange(ep_size), mean.mean(), look(placement)
            ax.plot(ranks, mean / scale, **style | {"markersize": 3, "linewidth": 0.8})
            ax.fill_between(ranks, low / scale, high / scale, color=style["color"], alpha=0.15, linewidth=0)
        title_panel(ax, f"EP {ep_size}", twins)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    label_outer(axes, "rank", "mean load / average")
    set_title(figure, result, f"Who is hot: mean load of each rank, {int(result.summary.tokens.max())} tokens per step")
    add_legend(figure, result, studied)
    return figure


@styled
def fan_out_trade(result: SweepResult, tokens: int = 512) -> Figure:
    """Mean imbalance against ranks (above) and nodes (below) that a token is sent to, a column per EP size."""
    steps = tokens_near(result, tokens)
    sizes = pick_ep_sizes(result, (16, 32, 64, 128), 4)
    figure, axes = panels(2 * len(sizes), len(sizes), 2.2, sharey=False)
    cells = result.summary.set_index(["placement", "ep_size", "tokens"]).sort_index()
    drawn: list[str] = []
    for i, ax in enumerate(axes):
        what, ep_size = ("ranks", "nodes")[i // len(sizes)], sizes[i % len(sizes)]
        names, twins = distinct_placements(result, ep_size)
        drawn += names
        for placement in names:
            cell = cells.loc[(placement, ep_size, steps[ep_size])]
            x, y, style = cell[f"{what}_per_token_mean"], cell.imbalance_mean, look(placement)
            ax.errorbar(
                x,
                y,
                xerr=[[x - cell[f"{what}_per_token_mean_low"]], [cell[f"{what}_per_token_mean_high"] - x]],
                yerr=[[y - cell.imbalance_mean_low], [cell.imbalance_mean_high - y]],
                **style | {"linestyle": "", "markersize": 6, "elinewidth": 1},
            )
        ax.margins(0.2)
        ax.xaxis.set_major_locator(MaxNLocator(nbins=4))
        ax.yaxis.set_major_locator(MaxNLocator(nbins=5))
        ax.set_xlabel(f"{what} per token")
        if i < len(sizes):
            title_panel(ax, f"EP {ep_size}", twins)
        if i % len(sizes) == 0:
            ax.set_ylabel("mean imbalance")
    set_title(figure, result, f"Balance against fan-out (both: lower is better), {tokens_text(steps)}", "bars")
    add_legend(figure, result, drawn, lines=False)
    return figure
