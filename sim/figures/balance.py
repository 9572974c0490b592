"""What a placement buys and who pays: ratios to the baseline, load of each rank, imbalance against fan-out."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from sim.figures.style import (
    HOLLOW,
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
    nearest,
    panels,
    placements_of,
    set_title,
    sideways,
    styled,
    title_panel,
    tokens_near,
    tokens_text,
    twins_text,
)

_STEPS = {"small": 8, "middle": 256, "large": 8192}
_MOST_CHANGE = 0.1  # a change beyond is marked at the edge, so that it does not hide the others
_UNEVEN = 0.02
_MOST_MARKERS = 32
_FEW_PAIRS = 16  # a p99 of fewer jumps by whole pairs, and is not drawn


@styled
def against_baseline(result: Sweep) -> Figure | None:
    """What another placement buys: mean (above) and p99 (below) of the busiest rank's load relative to the baseline,
    against EP size, for small, middle and large steps. None where the sweep has one placement.
    """
    ratios, names, sizes = _ratios(result), placements_of(result), ep_sizes_of(result)
    if len(names) < 2:
        return None
    steps = list(dict.fromkeys(nearest(sorted(result.summary.tokens.unique()), wanted) for wanted in _STEPS.values()))
    columns = []
    for i, of_size in enumerate(tokens_near(result, step) for step in steps):
        text = tokens_text({size: of_size[size] for size in sizes}).replace(" per step", "")
        title = f"{list(_STEPS)[i].capitalize()} steps: {text}" if len(steps) == len(_STEPS) else text
        rows = ratios[(ratios.tokens == ratios.ep_size.map(of_size)) & ratios.ep_size.isin(sizes)]
        columns.append((title, rows, names))
    return _draw_ratios(result, ratios, "What another placement buys", columns, "ep_size", "EP size (ranks)", 2.4)


def _ratios(result: Sweep) -> pd.DataFrame:
    """Ratios to the baseline, without a p99 of few pairs."""
    cells = result.summary
    pairs = (cells.imbalance_p99 * cells.mean_load).groupby([cells.ep_size, cells.tokens]).min()
    ratios = result.against_baseline()
    few = pairs.loc[list(zip(ratios.ep_size, ratios.tokens, strict=True))].to_numpy() < _FEW_PAIRS
    ratios.loc[few, ["p99", "p99_low", "p99_high"]] = np.nan
    return ratios


def _draw_ratios(
    result: Sweep,
    ratios: pd.DataFrame,
    head: str,
    columns: list[tuple[str, pd.DataFrame, list[str]]],
    x: str,
    x_label: str,
    height: float,
    *notes: str,
) -> Figure:
    """Mean (above) and p99 (below) of ratios against `x`; `columns` are those of panels: title, rows of `ratios`, placements."""
    n, baseline, beyond = len(columns), placements_of(result)[0], False
    figure, axes = panels(2 * n, n, height, sharey="row")
    for i, ax in enumerate(axes):
        what, (title, rows, names) = ("mean", "p99")[i // n], columns[i % n]
        for j, name in enumerate(names):
            of_name = rows[rows.placement == name].sort_values(x)
            beyond |= _draw_ratio(ax, of_name, what, name, (j, len(names)), x)
        log2_ticks(ax, sorted(rows[x].unique()))
        if i < n:
            title_panel(ax, title)
    label_outer(axes, x_label, "")
    for row, what in enumerate(("mean", "p99")):
        _ratio_axes(axes[row * n : (row + 1) * n])
        axes[row * n].set_ylabel(f"busiest rank, {what}:\nchange from {baseline}")
    few = f"a p99 of fewer than {_FEW_PAIRS} pairs jumps, and is not drawn" if ratios.p99.isna().any() else ""
    far = f"cut off at +{100 * _MOST_CHANGE:g} %, triangle: beyond" if beyond else ""
    text = f"{head}: load of the busiest rank relative to {baseline} (below 0 is better)"
    set_title(figure, result, text, few, far, *notes)
    add_legend(figure, result, [name for _, _, names in columns for name in names])
    return figure


def _draw_ratio(ax: Axes, rows: pd.DataFrame, what: str, name: str, place: tuple[int, int], x: str) -> bool:
    """A line of ratios with its band; whether some of it is beyond the axis."""
    style = look(name)
    change = rows[what] - 1
    over = change > _MOST_CHANGE
    ax.plot(rows[x], change.mask(over), **style | {"markersize": 3.5})
    low, high = (rows[f"{what}{end}"] - 1 for end in ("_low", "_high"))
    band(ax, rows[x], low.mask(over), high.mask(over), style["color"])
    ax.plot(
        rows[x][over],
        np.full(int(over.sum()), 0.9 * _MOST_CHANGE),
        **{"linestyle": "", "marker": "^", "markersize": 6, "color": style["color"], "markerfacecolor": "white"},
        transform=sideways(ax, *place, apart=1.5),
    )
    return bool((over | (high > _MOST_CHANGE)).any())


def _ratio_axes(axes: Sequence[Axes]) -> None:
    """One y for a row of panels, in %: lines with their bands, and 0."""
    ends = [(ax.dataLim.intervaly, *(line.get_ydata() for line in ax.get_lines())) for ax in axes]
    drawn = np.concatenate([np.asarray(part, float) for of_panel in ends for part in of_panel])
    low, high = (float(end(drawn[np.isfinite(drawn)], initial=0.0)) for end in (np.min, np.max))
    axes[0].set_ylim(1.1 * low - 0.005, min(max(1.15 * high, 0.02), _MOST_CHANGE))
    for ax in axes:
        ax.axhline(0, color="#888888", linewidth=0.8, zorder=0)
        ax.yaxis.set_major_locator(MaxNLocator(nbins=6))
        ax.yaxis.set_major_formatter(FuncFormatter(_percent))


def _percent(value: float, _: object) -> str:
    return "0 %" if abs(value) < 1e-9 else f"{100 * value:+g} %".replace("-", "\N{MINUS SIGN}")


@styled
def imbalance_by_tokens(result: Sweep) -> Figure | None:
    """Mean (above) and p99 (below) of the busiest rank's load relative to the baseline, against tokens per step, a column
    per EP size. None where the sweep has one placement.
    """
    ratios, columns = _ratios(result), []
    sizes = differing_sizes(result, (8, 16, 32, 64), 4)
    if len(placements_of(result)) < 2 or not sizes:
        return None
    for size in sizes:
        columns.append((f"EP {size}", ratios[ratios.ep_size == size], distinct_placements(result, size)[0]))
    notes = twins_text(result, sizes), chosen_sizes(result, sizes)
    return _draw_ratios(result, ratios, "By tokens per step", columns, "tokens", "tokens per step", 2.2, *notes)


@styled
def load_by_rank(result: Sweep) -> Figure | None:
    """Mean load of each rank over the mean load, a panel per EP size: who is hot. Drawn are the EP sizes at which the
    interval of some rank is more than 2 % away from 1; None where there are none.
    """
    studied = [name for name in placements_of(result) if name in ("linear", "linear_legacy", "round_robin")]
    studied = studied or placements_of(result)
    loads: dict[int, dict[str, pd.DataFrame]] = {}
    for ep_size in ep_sizes_of(result):
        names = [name for name in distinct_placements(result, ep_size)[0] if name in studied]
        of_size = {name: result.rank_loads(name, ep_size) for name in names}
        if any(((rows.low > 1 + _UNEVEN) | (rows.high < 1 - _UNEVEN)).any() for rows in of_size.values()):
            loads[ep_size] = of_size
    if not loads:
        return None
    sizes = sorted(sorted(loads, key=lambda size: size not in (8, 12, 24, 48, 32, 64))[:6])
    figure, axes = panels(len(sizes), 3, 2.1, sharey=False)
    for ax, ep_size in zip(axes, sizes, strict=True):
        for name, rows in loads[ep_size].items():
            style = look(name)
            width = 2.4 if name == studied[0] else 0.8  # of equal lines, both are seen
            every = -(-ep_size // _MOST_MARKERS)  # with a marker on the last rank, which may be the hot one
            ax.plot(
                rows["rank"],
                rows.load,
                **style | {"markersize": 3, "linewidth": width, "markevery": ((ep_size - 1) % every, every)},
            )
            band(ax, rows["rank"], rows.low, rows.high, style["color"])
        ax.axhline(1, color="#888888", linewidth=0.8, zorder=0)
        title_panel(ax, f"EP {ep_size}")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    label_outer(axes, "rank", "load / mean of ranks")
    text = f"Who is hot: load of each rank, mean over {int(result.summary.tokens.max())}-token steps"
    left = [size for size in ep_sizes_of(result) if size not in loads]
    even = f"even, and not drawn: EP {', '.join(map(str, left))}" if left else ""
    set_title(figure, result, text, even, twins_text(result, sizes))
    add_legend(figure, result, studied)
    return figure


@styled
def fan_out_trade(result: Sweep, tokens: int = 512) -> Figure | None:
    """Mean imbalance against ranks (above) and nodes (below) that a token is sent to, a column per EP size, on one scale.
    None where the placements do not differ.
    """
    steps = tokens_near(result, tokens)
    sizes = differing_sizes(result, (16, 32, 64, 128), 4)
    if len(placements_of(result)) < 2 or not sizes:
        return None
    cells = result.summary.set_index(["placement", "ep_size", "tokens"]).sort_index()
    drawn_cells = result.summary[result.summary.ep_size.isin(sizes)]
    kinds = [what for what in ("ranks", "nodes") if (drawn_cells[f"{what}_per_token_mean"] > 1).any()]
    figure, axes = panels(len(kinds) * len(sizes), len(sizes), 2.4)
    drawn: list[str] = []
    for i, ax in enumerate(axes):
        what, ep_size = kinds[i // len(sizes)], sizes[i % len(sizes)]
        names = distinct_placements(result, ep_size)[0]
        drawn += names
        for name in names:
            _draw_trade(ax, cells.loc[(name, ep_size, steps[ep_size])], what, name)
        ax.set_xlabel(f"{what} per token")
        if i < len(sizes):
            title_panel(ax, f"EP {ep_size}")
        if i % len(sizes) == 0:
            ax.set_ylabel("mean imbalance")
    for row in range(len(kinds)):
        _share_x(axes[row * len(sizes) : (row + 1) * len(sizes)])
    low, high = axes[0].get_ylim()
    for ax in axes:
        imbalance_axis(ax, "y")
        ax.set_ylim(max(1.0, 0.95 * low), 1.05 * high)
    set_title(
        figure,
        result,
        f"Balance against fan-out (both: lower is better), {tokens_text({size: steps[size] for size in sizes})}, one scale",
        twins_text(result, sizes),
        chosen_sizes(result, sizes),
        ranges="bars",
    )
    add_legend(figure, result, drawn, hollow=True)
    return figure


def _draw_trade(ax: Axes, cell: Any, what: str, name: str) -> None:
    """A placement's point with both intervals."""
    x, y = cell[f"{what}_per_token_mean"], cell.imbalance_mean
    ax.errorbar(
        x,
        y,
        xerr=[[x - cell[f"{what}_per_token_mean_low"]], [cell[f"{what}_per_token_mean_high"] - x]],
        yerr=[[y - cell.imbalance_mean_low], [cell.imbalance_mean_high - y]],
        **look(name) | HOLLOW | {"elinewidth": 1},
    )


def _share_x(axes: list[Axes]) -> None:
    """The range of all panels in each, with a margin."""
    low, high = min(ax.get_xlim()[0] for ax in axes), max(ax.get_xlim()[1] for ax in axes)
    edge = 0.04 * (high - low)
    for ax in axes:
        ax.set_xlim(low - edge, high + edge)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
