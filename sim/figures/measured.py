"""What was measured: times of ranks beside what the model says, whole layers, and what placements gain."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from sim.figures.style import (
    handle,
    label_outer,
    legend_below,
    log2_ticks,
    look,
    panels,
    styled,
    title_figure,
    title_panel,
)

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "^", "s", "D", "v", "P", "X")
_DASHES = ("-", "--", "-.", ":", "-", "--", "-.")
_POINTS: dict[str, Any] = {
    "linestyle": "", "markersize": 2.5, "alpha": 0.5, "markeredgewidth": 0, "rasterized": True
}  # fmt: skip
_EXCHANGES = {
    "token": "a token once to each rank", "pair": "once for each expert", "gather": "all-gather and reduce-scatter",
    "reduce": "all-reduce",
}  # fmt: skip
_BAND = 1.2  # predicted within 20 % of measured


@styled
def predicted_against_measured(predicted: pd.DataFrame) -> Figure:
    """Predicted against measured time of each rank (`with_predictions`), a panel per type, a colour per EP size."""
    dtypes, sizes = sorted(predicted.dtype.unique()), sorted(predicted.ep_size.unique())
    figure, axes = panels(len(dtypes), 2, 3.6)
    both = predicted[["time_us", "predicted_us"]].to_numpy()
    ends = np.array([both.min() / 1.3, both.max() * 1.3])
    for ax, dtype in zip(axes, dtypes, strict=True):
        rows = predicted[predicted.dtype == dtype]
        ax.fill_between(ends, ends / _BAND, ends * _BAND, color="#dddddd", linewidth=0, zorder=0)
        ax.plot(ends, ends, color="#888888", linewidth=0.8, zorder=1)
        for size, style in zip(sizes, _styles(), strict=False):
            part = rows[rows.ep_size == size]
            ax.plot(part.time_us, part.predicted_us, **style | _POINTS)
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlim(*ends)
        ax.set_ylim(*ends)
        title_panel(ax, f"{dtype}: {_kernel(rows)}")
    label_outer(axes, "measured time of a rank (us)", "predicted time (us)")
    text = "Predicted against measured time of one rank's experts\n(line: equal, band: within 20 %; "
    _title(figure, predicted, text + "the prediction includes launches, which replays of a graph do not)")
    _legend(figure, [f"EP {size}" for size in sizes], lines=False)
    return figure


@styled
def measured_gain(
    predicted: pd.DataFrame, gains: pd.DataFrame, baseline: str = "linear", other: str = "round_robin"
) -> Figure:
    """Gain of one placement over another (`sim.measure.compare.gains`) against tokens per step: measured (markers, 95 % bars) and
    predicted (lines), a row of panels per type, a column per EP size, a colour per workload.
    """
    dtypes, sizes = sorted(gains.dtype.unique()), sorted(gains.ep_size.unique())[:6]
    workloads = list(dict.fromkeys(predicted.workload))
    figure, axes = panels(len(dtypes) * len(sizes), len(sizes), 2.2)
    cells = [(dtype, size) for dtype in dtypes for size in sizes]
    for ax, (dtype, size) in zip(axes, cells, strict=True):
        ax.axhline(0, color="#888888", linewidth=0.8)
        of_panel = gains[(gains.dtype == dtype) & (gains.ep_size == size)]
        for i, (workload, style) in enumerate(zip(workloads, _styles(), strict=False)):
            rows, color = of_panel[of_panel.workload == workload].sort_values("tokens"), style["color"]
            x = rows.tokens * 2 ** (0.2 * (i - (len(workloads) - 1) / 2))  # side by side, so that bars stay apart
            ax.plot(rows.tokens, 100 * rows.predicted, color=color, linestyle=style["linestyle"], linewidth=1.2)
            ax.plot(x, 100 * rows.measured, **style | {"linestyle": ""}, markersize=3.5)
            ax.vlines(x, 100 * rows.measured_low, 100 * rows.measured_high, color=color, linewidth=1)
        log2_ticks(ax, sorted(gains.tokens.unique()))
        title_panel(ax, f"{dtype}, EP {size}")
    label_outer(axes, "tokens per step", "gain (%)")
    text = f"Gain of {other} over {baseline} in a layer's expert time, its slowest rank"
    _title(
        figure,
        predicted,
        f"{text} \n(markers, bars: measured, 95 %, shifted sideways; lines: predicted, of the same steps)",
    )
    _legend(figure, workloads, lines=True)
    return figure


def _styles() -> list[dict[str, Any]]:
    looks = zip(_COLOURS, _MARKERS, _DASHES, strict=True)
    return [{"color": color, "marker": marker, "linestyle": dashes} for color, marker, dashes in looks]


def _kernel(rows: pd.DataFrame) -> str:
    """The kernel's name in a panel's width."""
    name = str(rows.kernel.iloc[0])
    return name if len(name) <= 56 else f"{name[:53]}..."


def _title(figure: Figure, predicted: pd.DataFrame, text: str) -> None:
    first = predicted.iloc[0]
    about = f"{first.model} on {first.device}, {predicted.step.nunique()} steps, {len(predicted)} ranks; "
    title_figure(figure, f"{text}\n{about}predicted for {first.gpu}")


def _legend(figure: Figure, names: list[str], *, lines: bool) -> None:
    handles = [
        Line2D([], [], label=name, **style | ({} if lines else {"linestyle": ""}))
        for name, style in zip(names, _styles(), strict=False)
    ]
    legend_below(figure, handles)


@styled
def published_kernels(check: pd.DataFrame) -> Figure:
    """Published kernel times (points) and the model's (lines) against tokens per step, an EP size each, and the errors."""
    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    times, errors = figure.subplots(1, 2)
    for (ep_size, rows), (color, marker) in zip(
        check.groupby("ep_size"), (("#0072B2", "o"), ("#D55E00", "^"), ("#009E73", "s")), strict=True
    ):
        times.plot(rows.tokens, rows.measured_us, marker, color=color, markersize=4, label=f"EP {ep_size}")
        times.plot(rows.tokens, rows.predicted_us, color=color)
        errors.plot(rows.tokens, 100 * rows.error, marker=marker, markersize=4, color=color)
    times.set_yscale("log")
    ticks = [us for us in (50, 100, 150, 200, 300, 400, 600) if times.get_ylim()[0] <= us <= times.get_ylim()[1]]
    times.set_yticks(ticks, [str(us) for us in ticks])
    times.yaxis.set_minor_locator(NullLocator())
    times.set_ylabel("time of a rank's experts (us)")
    errors.set_ylabel("predicted / measured - 1 (%)")
    errors.axhline(0, color="#555555", linewidth=0.8)
    for ax in (times, errors):
        log2_ticks(ax, list(check.tokens))
        ax.set_xlabel("tokens per step (whole EP group)")
    title_figure(
        figure,
        "Published kernel times of DeepSeek-V3's experts on H200 (points) and the model's (lines); even routing\n"
        f"No fit saw these times: median absolute error {check.error.abs().median():.1%}, largest {check.error.abs().max():.1%}",
    )
    legend_below(figure, times.get_legend_handles_labels()[0])
    return figure


@styled
def measured_layer_gain(layers: pd.DataFrame, gains: pd.DataFrame, baseline: str = "linear") -> Figure:
    """Gain of placements over a baseline in the time of a layer (`layer_gains`) against tokens per step, with 95 % intervals: a
    row of panels per workload, a column per exchange.
    """
    exchanges, workloads = list(dict.fromkeys(layers.exchange)), list(dict.fromkeys(layers.workload))
    placements = list(dict.fromkeys(gains.placement))
    figure, axes = panels(len(exchanges) * len(workloads), len(exchanges), 2.3, sharey="row")  # chat gains far less
    cells = [(workload, exchange) for workload in workloads for exchange in exchanges]
    for ax, (workload, exchange) in zip(axes, cells, strict=True):
        ax.axhline(0, color="#888888", linewidth=0.8)
        of_panel = gains[(gains.workload == workload) & (gains.exchange == exchange)]
        for i, name in enumerate(placements):
            rows = of_panel[of_panel.placement == name].sort_values("tokens")
            x = rows.tokens * 2 ** (0.2 * (i - (len(placements) - 1) / 2))  # side by side, so that bars stay apart
            ax.plot(x, 100 * rows.gain, **look(name) | {"linewidth": 1}, markersize=3.5)
            ax.vlines(x, 100 * rows.gain_low, 100 * rows.gain_high, color=look(name)["color"], linewidth=1)
        log2_ticks(ax, sorted(layers.tokens.unique()))
        title_panel(ax, f"{exchange}, {workload}")
    label_outer(axes, "tokens per step", "gain (%)")
    _layer_title(
        figure, layers, f"Gain over {baseline} in the measured time of a layer's experts and exchange (bars: 95 %)"
    )
    legend_below(figure, [handle(name) for name in placements])
    return figure


@styled
def measured_exchange(layers: pd.DataFrame) -> Figure:
    """Time of the exchange alone against the most tokens that a rank receives (pair: pairs), a panel per exchange."""
    exchanges, placements = list(dict.fromkeys(layers.exchange)), list(dict.fromkeys(layers.placement))
    figure, axes = panels(len(exchanges), 4, 2.8)
    for ax, exchange in zip(axes, exchanges, strict=True):
        rows = layers[layers.exchange == exchange]
        what = {"token": "received", "pair": "pairs"}.get(exchange, "tokens")
        for name in placements:
            part = rows[rows.placement == name]
            ax.plot(part[what], part.exchange_us, **look(name) | _POINTS)
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlabel({"received": "most tokens received", "pairs": "most pairs received"}.get(what, "tokens per step"))
        title_panel(ax, exchange)
    axes[0].set_ylabel("exchange alone (us)")
    _layer_title(figure, layers, "Measured time of dispatch and combine, each layer's slowest rank")
    legend_below(figure, [handle(name, linestyle="") for name in placements])
    return figure


def _layer_title(figure: Figure, layers: pd.DataFrame, text: str) -> None:
    first = layers.iloc[0]
    about = f"{first.model}, EP {first.ep_size} on {first.ep_size} x {first.gpu}, {first['dtype']}, {layers.step.nunique()} steps"
    kinds = "; ".join(f"{name}: {_EXCHANGES[name]}" for name in dict.fromkeys(layers.exchange))
    title_figure(figure, f"{text}\n{about}\n{kinds}")
