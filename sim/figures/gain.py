"""What placements save, in time: by tokens per step, GPU and EP size, by kind of traffic, and on your own traffic."""

from itertools import cycle, product
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sim.errors import counted
from sim.figures.style import (
    band,
    imbalance_axis,
    label,
    label_outer,
    legend_below,
    log2_ticks,
    look,
    nearest,
    panels,
    styled,
    title_figure,
    title_panel,
)
from sim.files import model_label

_GPU_LOOKS: list[dict[str, Any]] = [
    {"color": color, "linestyle": dashes, "marker": marker, "markersize": 3}
    for color, dashes, marker in (
        ("#0072B2", "-", "o"), ("#D55E00", "--", "s"), ("#009E73", "-.", "^"), ("#CC79A7", ":", "D"), ("#000000", "-", "v"),
        ("#E69F00", "--", "P"),
    )
]  # fmt: skip


_CROSSOVER = "crossover, from where a rank's time grows with its tokens, not with its distinct experts alone"


@styled
def gain_by_tokens(gains: pd.DataFrame) -> Figure:
    """Share of a layer's time that is saved against tokens per step, a panel per exchange and EP size, GPUs as lines."""
    sizes = list(dict.fromkeys(zip(gains.exchange, gains.ep_size, strict=True)))
    looks = dict(zip(dict.fromkeys(gains.gpu), cycle(_GPU_LOOKS), strict=False))
    figure, axes = panels(len(sizes), min(len(sizes), 4), 3.0)
    for ax, (exchange, ep_size) in zip(axes, sizes, strict=True):
        of_panel = gains[(gains.exchange == exchange) & (gains.ep_size == ep_size)].sort_values("tokens")
        for gpu, style in looks.items():
            rows, color = of_panel[of_panel.gpu == gpu], style["color"]
            ax.plot(rows.tokens, 100 * rows.layer_saved, **style)
            low, high = 100 * rows.layer_saved_low, 100 * rows.layer_saved_high
            band(ax, rows.tokens, low, high, color)
            if "balancer_us" in rows and rows.balancer_us.notna().all():
                net = 100 * (rows.layer_saved - rows.balancer_us / rows.baseline_layer_us)
                ax.plot(rows.tokens, net, color=color, linewidth=0.8, alpha=0.6)
                if rows.tokens.min() < rows.break_even_tokens.iloc[0] <= rows.tokens.max():
                    ax.axvline(rows.break_even_tokens.iloc[0], color=color, linestyle=":", linewidth=1.2)
            if rows.tokens.min() <= rows.crossover_tokens.iloc[0] <= rows.tokens.max():
                ax.axvline(rows.crossover_tokens.iloc[0], color=color, linestyle=style["linestyle"], linewidth=0.8)
        ax.axhline(0, color="#555555", linewidth=0.8)
        log2_ticks(ax, list(gains.tokens))
        title_panel(ax, f"EP {ep_size}, {exchange}" if gains.exchange.nunique() > 1 else f"EP {ep_size}")
    low, high = 100 * gains.layer_saved_low.min(), 100 * gains.layer_saved_high.max()
    axes[0].set_ylim(bottom=max(axes[0].get_ylim()[0], low - (high - low)))  # thin lines far below tell nothing
    label_outer(axes, "tokens per step\n(whole EP group)", "layer time saved (%)")
    _title(figure, gains, ", ".join(dict.fromkeys(gains.exchange)))
    legend_below(figure, [Line2D([], [], label=gpu, **style) for gpu, style in looks.items()])
    return figure


_FEW_DRAWS = 8  # layers: with fewer, intervals do not set the axis
_EP_SIZE = 16  # that is drawn, or the nearest there is


@styled
def gain_by_traffic(table: pd.DataFrame) -> Figure:
    """What placements save by kind of traffic (`saved_by_traffic`), at one EP size: a row of panels per number of tokens, a
    column per measure.
    """
    ep_size = nearest(table.ep_size.unique(), _EP_SIZE)
    table = table[table.ep_size == ep_size]
    tokens, measures = sorted(table.tokens.unique()), list(dict.fromkeys(table.measure))
    names, placements = list(dict.fromkeys(table.workload)), list(dict.fromkeys(table.placement))
    looks = {name: look(name.replace("+R", f"+{ep_size}")) | {"linestyle": ""} for name in placements}
    figure, axes = panels(len(tokens) * len(measures), len(measures), 0.7 + 0.24 * len(names))
    for ax, (n, measure) in zip(axes, product(tokens, measures), strict=True):
        ax.axvline(0, color="#555555", linewidth=0.8)
        for i, placement in enumerate(placements):
            rows = table[(table.tokens == n) & (table.measure == measure) & (table.placement == placement)]
            y = [names.index(name) + 0.22 * (i - (len(placements) - 1) / 2) for name in rows.workload]
            low, high = 100 * rows.low, 100 * rows.high
            ax.hlines(y, low, high, color=looks[placement]["color"], linewidth=1)
            ax.plot(100 * rows.saved, y, markersize=3.5, **looks[placement])
        of_measure = table[table.measure == measure]
        shown, points = of_measure[of_measure.layer_draws >= _FEW_DRAWS], of_measure.saved
        ends = 100 * np.array([min(shown.low.min(), points.min(), 0), max(shown.high.max(), points.max(), 0)])
        ax.set_xlim(*(ends + np.array([-0.05, 0.05]) * (ends[1] - ends[0])))
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.set_yticks(range(len(names)), [_two_lines(name) for name in names], fontsize=8)
        title_panel(
            ax, f"{counted(n, 'token')}: " + ("imbalance" if measure == "imbalance" else f"layer time, {measure}")
        )
    label_outer(axes, "saved (%)", "")
    row = table.iloc[0]
    title_figure(
        figure,
        f"What placements save over {row.baseline} by kind of traffic, EP {ep_size}: of the busiest rank's load (imbalance),\n"
        f"and of a layer's time by exchange ({row.gpu}, {row['dtype']})\n"
        f"*: recorded; bars: 95 %, paired, over layers; those of fewer than {_FEW_DRAWS} layers may run off the panel",
    )
    handles = [
        Line2D(
            [], [], label=f"{name}, one redundant slot a rank" if name.endswith("+R") else label(name), **looks[name]
        )
        for name in placements
    ]
    legend_below(figure, handles, 4)
    return figure


def _two_lines(name: str) -> str:
    """A name of traffic as a label: what it is fitted on goes to a second line, and stands right under it."""
    return name.removeprefix("file:").replace(" (", "\n(") + (" *" if name.startswith("file:") else "")


def _title(figure: Figure, gains: pd.DataFrame, exchanges: str) -> None:
    row = gains.iloc[0]
    name, ends = row.placement, (gains.tokens.min(), gains.tokens.max())
    lines = [f"{model_label(row.model)} in {row['dtype']}, {row.workload} traffic; bands: 95 %, paired"]
    if gains.crossover_tokens.between(*ends).any():
        lines.insert(0, f"upright lines: {_CROSSOVER}")
    if name == "in_step":
        name = f"in_step (best split over the copies of {row.copies_of})"
        takes = " to ".join(f"{us:.0f}" for us in sorted(set(gains.balancer_us)))
        text = f"thin lines: with the {takes} us that a balancer takes"
        if gains.break_even_tokens.between(*ends, inclusive="right").any():
            text += f"; dotted upright lines: from where it pays over {row.copies_of} with an even split"
        lines.insert(0, text)
    text = f"Predicted: time of a MoE layer that {name} saves over {row.baseline} (exchange: {exchanges})"
    title_figure(figure, "\n".join([text, *lines]))


@styled
def advice_by_tokens(gains: pd.DataFrame, reference: str, reference_text: str = "") -> Figure:
    """Share of the layer's time saved (left), and mean imbalance (right), against tokens per step, in the main split.

    `reference` is the row of perfect balance, whose experts' time no placement can beat, and `reference_text` what a legend
    says of it; it has no line at the right.
    """
    rows = gains[gains.split == gains.split.iloc[0]]
    names = list(dict.fromkeys(rows.placement))
    figure, (saved, balance) = panels(2, 2, 3.4, sharey=False)
    looks: dict[str, dict[str, Any]] = {name: look(name) for name in names if name != reference}
    dash = "_" if rows.tokens.nunique() == 1 else ""  # a line of one point shows nothing
    looks[reference] = {"color": "#999999", "linestyle": (0, (6, 2)), "marker": dash, "markersize": 12}
    base = rows[rows.placement == names[0]]
    current = base.baseline.iloc[0]
    looks.setdefault(current, look(current))
    balance.plot(base.tokens, base.baseline_imbalance, **looks[current])
    ends = base.baseline_imbalance_low, base.baseline_imbalance_high
    band(balance, base.tokens, *ends, looks[current]["color"])
    for name in names:
        mine = rows[rows.placement == name]
        style: dict[str, Any] = looks[name]
        saved.plot(mine.tokens, 100 * mine.layer_saved, **style)
        low, high = 100 * mine.layer_saved_low, 100 * mine.layer_saved_high
        band(saved, mine.tokens, low, high, style["color"])
        if name != reference:
            balance.plot(mine.tokens, mine.imbalance, **style)
            band(balance, mine.tokens, mine.imbalance_low, mine.imbalance_high, style["color"])
    saved.axhline(0, **looks[current] | {"marker": "", "linewidth": 0.8})
    crossover, bands = rows.crossover_tokens.iloc[0], "bands: 95 % over layers"
    if rows.tokens.min() <= crossover <= rows.tokens.max():
        saved.axvline(crossover, color="#999999", linewidth=0.8)
        bands += f"\nupright line: {_CROSSOVER}"
    imbalance_axis(balance, "y")
    for ax, title, text in (
        (saved, f"time saved over {label(current)}", "layer time saved (%)"),
        (balance, "imbalance of ranks", "mean imbalance (max / mean load)"),
    ):
        log2_ticks(ax, list(rows.tokens))
        ax.set_xlabel("tokens per step (whole EP group)")
        ax.set_ylabel(text)
        title_panel(ax, title)
    row = rows.iloc[0]
    title_figure(
        figure,
        f"{model_label(row.model)} in {row['dtype']}, EP {row.ep_size} on {row.gpu}, exchange: {row.exchange}\n"
        f"{row.workload[-90:]}; eplb is {row.split[-90:]}\n{bands}",
    )
    copied = "".join(rows.copies_of[rows.placement == "in_step"].head(1))
    labels = {name: label(name) for name in {current: 0} | looks} | {"in_step": f"in_step (copies of {copied})"}
    labels[reference] = reference_text or reference
    handles = [
        Line2D([], [], label=labels[name], **style) for name, style in ({current: looks[current]} | looks).items()
    ]
    legend_below(figure, handles, 4)
    return figure
