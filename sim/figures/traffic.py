"""Recorded routing and measured loads: a heat map of loads, a page of statistics, and placements that go stale."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from sim.errors import counted
from sim.figures.style import (
    band,
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
from sim.fit.description import Description, shares

_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#999999"
_MOST_LINES = 64
_MOST_POINTS = 5000


@styled
def load_map(name: str, about: Description) -> Figure:
    """Load of each expert over the mean of its layer, a row per layer."""
    figure = Figure(figsize=(9.0, min(1.8 + 0.12 * len(about.load), 9.0)), layout="constrained")
    ax = figure.subplots()
    relative = about.load / about.load.mean(axis=1, keepdims=True)
    most = max(float(np.quantile(relative, 0.995)), 1.1)
    image = ax.imshow(relative, aspect="auto", interpolation="nearest", cmap="cividis", vmin=0.0, vmax=most)
    ax.grid(visible=False)
    ax.set_xlabel("expert")
    ax.set_ylabel("layer")
    ticks = np.unique(np.linspace(0, len(about.layers) - 1, min(len(about.layers), 12)).astype(int))
    ax.set_yticks(ticks, [str(about.layers[i]) for i in ticks])
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    bar = figure.colorbar(image, ax=ax, extend="max" if relative.max() > most else "neither", pad=0.01)
    bar.set_label("load / mean of the layer")
    _title(
        figure, name, f"Load of each expert by layer: {counted(len(about.load), 'layer')}, {about.n_experts} experts"
    )
    return figure


@styled
def traffic_page(name: str, about: Description) -> Figure:
    """Sorted loads, loads by expert index, group shares, correlation of tokens, and drift: those that the file shows."""
    parts = [_sorted_loads, _by_index]
    if about.group_shares is not None:
        parts.append(_groups)
    if about.within or about.across:
        parts.append(_correlation)
    if about.by_lag:
        parts.append(_by_lag)
    if about.drift is not None:
        parts.append(_drift)
    if about.together is not None:
        parts.append(_together)
    figure, axes = panels(len(parts), 2, 2.7, sharey=False)
    for ax, draw in zip(axes, parts, strict=True):
        draw(ax, about)
    _title(figure, name, "Skew, order, correlation and drift of the recorded traffic")
    return figure


def _title(figure: Figure, name: str, text: str) -> None:
    title_figure(figure, f"{text}\n{name}")


def _sorted_loads(ax: Any, about: Description) -> None:
    """Of each layer the loads in falling order, and their mean."""
    relative = np.sort(about.load / about.load.mean(axis=1, keepdims=True), axis=1)[:, ::-1]
    x = (np.arange(about.n_experts) + 0.5) / about.n_experts * 100
    for row in relative[:: -(-len(relative) // _MOST_LINES)]:
        ax.plot(x, row, color=_GREY, linewidth=0.5, alpha=0.6)
    ax.plot(x, relative.mean(axis=0), color=_BLUE, linewidth=2)
    ax.axhline(1, color="black", linewidth=0.8, linestyle=":")
    ax.axvline(12.5, color="black", linewidth=0.8, linestyle=":")
    ax.set_ylim(0, 1.05 * relative.max())
    ax.set_xlabel("experts by falling load, %")
    ax.set_ylabel("load / mean")
    title_panel(ax, "Skew", "grey: layers; blue: their mean; dotted: 1, 12.5 %")


def _by_index(ax: Any, about: Description) -> None:
    """Mean over layers of the load by expert index, with the least-squares line."""
    relative = (about.load / about.load.mean(axis=1, keepdims=True)).mean(axis=0)
    index = np.arange(about.n_experts)
    ax.plot(index, relative, color=_BLUE, linestyle="", marker="o", markersize=3 if about.n_experts <= 64 else 1.5)
    slope = float(about.by_layer["tilt"].mean())
    ax.plot(index, 1 + slope * ((index + 0.5) / about.n_experts - 0.5), color=_ORANGE)
    ax.axhline(1, color="black", linewidth=0.8, linestyle=":")
    ax.set_ylim(0, 1.05 * relative.max())
    ax.set_xlabel("expert")
    ax.set_ylabel("load / mean, mean of layers")
    title_panel(ax, "Order", f"line: tilt {slope:+.2f} from the first expert to the last")


def _groups(ax: Any, about: Description) -> None:
    assert about.group_shares is not None
    groups = np.arange(about.group_shares.shape[1])
    ax.bar(groups, about.group_shares.mean(axis=0), color=_BLUE, alpha=0.7)
    for row in about.group_shares[:: -(-len(about.group_shares) // _MOST_LINES)]:
        ax.plot(groups, row, color="black", linestyle="", marker="_", markersize=6, alpha=0.4)
    ax.axhline(1, color="black", linewidth=0.8, linestyle=":")
    ax.set_xticks(groups)
    ax.set_xlabel("expert group")
    ax.set_ylabel("load / mean of groups")
    title_panel(ax, "Groups", "bars: mean of layers; dashes: layers")


def _correlation(ax: Any, about: Description) -> None:
    """Variance over multinomial by number of tokens: mean of layers, and their range."""
    looks = (("one sequence", about.within, _BLUE, "o"), ("different sequences", about.across, _ORANGE, "s"))
    tokens = sorted({*about.within, *about.across})
    for text, found, color, marker in looks:
        if not found:
            continue
        n = sorted(found)
        ax.plot(n, [found[i].mean() for i in n], color=color, marker=marker, label=text)
        band(ax, n, [found[i].min() for i in n], [found[i].max() for i in n], color)
    ax.axhline(1, color="black", linewidth=0.8, linestyle=":")
    log2_ticks(ax, tokens)
    ax.set_yscale("log")
    ticks = [x for x in (0.5, 1, 2, 5, 10, 20, 50, 100, 200) if ax.get_ylim()[0] <= x <= ax.get_ylim()[1]]
    ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()
    ax.legend()
    ax.set_xlabel("tokens of a block")
    ax.set_ylabel("variance / multinomial")
    title_panel(ax, "Correlation of tokens", "bands: least and most of layers")


def _by_lag(ax: Any, about: Description) -> None:
    """Correlation of two tokens of a sequence by the distance between them: mean and range of layers, and the fit."""
    lags = np.array(sorted(about.by_lag))
    found = np.array([about.by_lag[lag] for lag in lags])
    ax.plot(lags, found.mean(axis=1), color=_BLUE, marker="o", linestyle="", label="measured")
    band(ax, lags, found.min(axis=1), found.max(axis=1), _BLUE)
    most = found.max()
    if about.decay is not None:
        lag = np.geomspace(1, lags[-1], 200)
        fitted = about.decay.at(lag).mean(axis=0)
        ax.plot(lag, fitted, color=_ORANGE, label="fitted to blocks of 2 to 256 tokens")
        most = max(most, fitted.max())
    log2_ticks(ax, [lag for lag in lags.tolist() if lag & (lag - 1) == 0])
    ax.set_ylim(min(0.0, float(found.min())), 1.05 * most)
    ax.legend()
    ax.set_xlabel("distance between two tokens")
    ax.set_ylabel("correlation of their experts")
    title_panel(ax, "Decay within a sequence", "band: least and most of layers")


def _drift(ax: Any, about: Description) -> None:
    assert about.drift is not None
    first, second = (shares(part).ravel() * about.n_experts for part in (about.drift.first, about.drift.second))
    every = -(-len(first) // _MOST_POINTS)
    ax.plot(first[::every], second[::every], color=_BLUE, linestyle="", marker=".", markersize=3, alpha=0.5)
    most = float(max(first.max(), second.max())) * 1.05
    ax.plot([0, most], [0, most], color="black", linewidth=0.8, linestyle=":")
    ax.set_xlim(0, most)
    ax.set_ylim(0, most)
    for set_label, name in zip((ax.set_xlabel, ax.set_ylabel), about.drift.names, strict=True):
        set_label(f"load / mean, {name.removeprefix('file:')[-32:]}")
    title_panel(ax, "Drift", f"{about.drift.distance.mean():.1%} of the load moves; a dot per layer and expert")


def _together(ax: Any, about: Description) -> None:
    """Lift of experts that go together, by layer, with intervals."""
    assert about.together is not None
    rows = about.together[:-1]
    looks = (
        ("pair_lift", "two experts of a token", _BLUE, "o"), ("next_lift", "an expert and one of the layer before", _ORANGE, "s"),
        ("next_lift_shuffled", "the same, tokens of a sequence shuffled", _GREY, "^"),
    )  # fmt: skip
    for name, text, color, marker in looks:
        known = rows[rows[name].notna()]
        if len(known):
            ends = [known[name] - known[f"{name}_low"], known[f"{name}_high"] - known[name]]
            ax.errorbar(
                known.layer.astype(int),
                known[name],
                ends,
                color=color,
                marker=marker,
                markersize=3,
                linewidth=1,
                label=text,
            )
    ax.axhline(1, color="black", linewidth=0.8, linestyle=":")
    low, high = ax.get_ylim()
    ax.set_ylim(min(0.9, low), high + 0.4 * (high - low))  # room for the legend
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend()
    ax.set_xlabel("layer")
    ax.set_ylabel("lift over chance")
    title_panel(ax, "Co-selection of experts", "bars: 95 %, over sequences")


_FRESH: Any = {"linestyle": (0, (1, 1)), "linewidth": 1.0, "marker": ""}


@styled
def decay_by_age(table: pd.DataFrame, traffic: str, model: str, unit: str) -> Figure:
    """Mean imbalance against age, a panel per EP size: placements, the same fitted afresh, and linear, on the same windows.

    `table` is that of `sim.fit.staleness`, whose ages are in windows and in `unit`, 'tokens' or 'steps'.
    """
    sizes = list(dict.fromkeys(table.ep_size))
    aged = table[table.placement != "linear"]
    names = list(dict.fromkeys(aged.placement))
    figure, axes = panels(len(sizes), 3, 3.0, sharey=False)
    for ax, ep_size in zip(axes, sizes, strict=True):
        of_size = aged[aged.ep_size == ep_size]
        _line(ax, of_size[of_size.placement == names[0]], "linear", look("linear"))
        for name in names:
            rows = of_size[of_size.placement == name]
            _line(ax, rows, "imbalance", look(name))
            ax.plot(rows.age_windows, rows.fresh_mean, color=look(name)["color"], **_FRESH)
        ax.set_ylim(1, None)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        title_panel(ax, f"EP {ep_size}")
    window = aged[aged.age_windows == 1][f"age_{unit}"].iloc[0]
    label_outer(axes, f"age of the fit, windows of {window:,.0f} {unit}", "imbalance (max / mean rank load)")
    title_figure(
        figure,
        f"Placements that go stale: fitted on one window, scored on a later one (windows in the order of the file)\n"
        f"{model}, {traffic}; mean of layers and of all pairs of windows of an age; bands: 95 % over layers",
    )
    handles = [handle(name) for name in ("linear", *names)]
    handles.append(
        Line2D([], [], label="fitted on the scored window itself (its other half)", color="#555555", **_FRESH)
    )
    legend_below(figure, handles, 4)
    return figure


def _line(ax: Any, rows: pd.DataFrame, figure: str, style: dict[str, Any]) -> None:
    """One figure of the table with its band."""
    ax.plot(rows.age_windows, rows[f"{figure}_mean"], **style)
    low, high = rows[f"{figure}_low"], rows[f"{figure}_high"]
    band(ax, rows.age_windows, low, high, style["color"])
