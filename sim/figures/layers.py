"""Whole layers as measured: what each placement gains under each exchange, and what the exchange itself takes."""

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sim.figures.style import label, label_outer, log2_ticks, look, panels, styled, title_panel


@styled
def measured_layer_gain(layers: pd.DataFrame, gains: pd.DataFrame, baseline: str = "linear") -> Figure:
    """Gain of placements over a baseline in the time of a layer against tokens per step, with 95 % intervals: a row of
    panels per workload, a column per exchange.

    Parameters
    ----------
    layers : DataFrame
        From `sim.measure.layer_compare.read_layers`.
    gains : DataFrame
        From `sim.measure.layer_compare.layer_gains` over this baseline.
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
        log2_ticks(ax, sorted(layers.tokens.unique()), apart=7)
        title_panel(ax, f"{exchange}, {workload}")
    label_outer(axes, "tokens per step", "gain (%)")
    _title(figure, layers, f"Gain over {baseline} in the measured time of a layer's experts and exchange (bars: 95 %)")
    _legend(figure, placements)
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
            ax.plot(
                part[what],
                part.exchange_us,
                **look(name) | {"linestyle": ""},
                markersize=2.5,
                alpha=0.5,
                markeredgewidth=0,
                rasterized=True,
            )
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlabel({"received": "most tokens received", "pairs": "most pairs received"}.get(what, "tokens per step"))
        title_panel(ax, exchange)
    axes[0].set_ylabel("exchange alone (us)")
    _title(figure, layers, "Measured time of dispatch and combine, each layer's slowest rank")
    _legend(figure, placements, lines=False)
    return figure


def _title(figure: Figure, layers: pd.DataFrame, text: str) -> None:
    first = layers.iloc[0]
    about = f"{first.model}, EP {first.ep_size} on {first.ep_size} x {first.gpu}, bf16, {layers.step.nunique()} steps"
    figure.suptitle(f"{text}\n{about}", fontsize=10, x=0.01, ha="left")


def _legend(figure: Figure, placements: list[str], lines: bool = True) -> None:
    plain = {} if lines else {"linestyle": ""}
    handles = [Line2D([], [], label=label(name), **look(name) | plain) for name in placements]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
