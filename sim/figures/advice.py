"""What the candidates save, and how even they are, by tokens per step."""

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sim.figures.style import imbalance_axis, label, log2_ticks, look, panels, styled, title_panel


@styled
def advice_by_tokens(gains: pd.DataFrame, reference: str) -> Figure:
    """Share of the layer's time saved (left), and mean imbalance (right), against tokens per step, in the main split.

    `reference` is the row of what no placement can beat; it has no line at the right.
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
    for name in names:
        mine = rows[rows.placement == name]
        style: dict[str, Any] = looks[name]
        saved.plot(mine.tokens, 100 * mine.layer_saved, **style)
        low, high = 100 * mine.layer_saved_low, 100 * mine.layer_saved_high
        saved.fill_between(mine.tokens, low, high, color=style["color"], alpha=0.15, linewidth=0)
        if name != reference:
            balance.plot(mine.tokens, mine.imbalance, **style)
            balance.fill_between(
                mine.tokens, mine.imbalance_low, mine.imbalance_high, color=style["color"], alpha=0.15, linewidth=0
            )
    saved.axhline(0, **looks[current] | {"marker": "", "linewidth": 0.8})
    crossover = rows.crossover_tokens.iloc[0]
    if rows.tokens.min() <= crossover <= rows.tokens.max():
        saved.axvline(crossover, color="#999999", linewidth=0.8)
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
    figure.suptitle(
        f"{Path(row.model).name} in {row['dtype']}, EP {row.ep_size} on {row.gpu}, exchange: {row.exchange}\n"
        f"{row.workload[-90:]}; eplb is {row.split[-90:]}\n"
        "bands: 95 % over layers; upright line: the crossover, from where time grows with tokens, not distinct experts alone",
        fontsize=10,
        x=0.01,
        ha="left",
    )
    copied = "".join(rows.copies_of[rows.placement == "in_step"].head(1))
    labels = {name: label(name) for name in {current: 0} | looks} | {"in_step": f"in_step (copies of {copied})"}
    handles = [
        Line2D([], [], label=labels[name], **style) for name, style in ({current: looks[current]} | looks).items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    return figure
