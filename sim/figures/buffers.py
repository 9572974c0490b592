"""How often a capacity is exceeded, against the capacity as a factor of the balanced load."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sim.figures.style import (
    label,
    label_outer,
    legend_below,
    look,
    panels,
    probability_axis,
    styled,
    title_figure,
    title_panel,
)

_TITLES = {"received": "tokens on a rank", "pairs": "rows of a rank", "expert_rows": "rows of an expert"}
_LEAST = 1e-8
_RISK: dict[str, Any] = {"color": "#D55E00", "linewidth": 0.8, "linestyle": "-", "zorder": 0}


@styled
def capacity_curves(curves: pd.DataFrame, risk: float, of: str) -> Figure:
    """P(exceed) against the capacity factor: a row of panels per quantity, a panel per EP size; the largest step.

    `curves` as `size_buffers` gives them; `of` names model and workload.
    """
    tokens = curves.groupby("ep_size").tokens.max()
    sizes = list(tokens.index)
    widest = "horizon" if (curves.scope == "horizon").any() else "step"
    steps = "step of the horizon" if widest == "horizon" else "one step"
    shown: dict[tuple[str, str], tuple[Any, str]] = {
        ("layer", "all"): (":", "one layer, drawn afresh, of one step"),
        (widest, "median"): ("--", f"any layer of any {steps}: median deployment".replace("any one", "one")),
        (widest, "worst_5_percent"): ("-", "the same: deployment worse than 95 % of others"),
    }
    figure, axes = panels(len(sizes) * len(_TITLES), len(sizes), 2.5)
    placements = list(dict.fromkeys(curves.placement))
    for i, (quantity, what) in enumerate(_TITLES.items()):
        for ax, size in zip(axes[i * len(sizes) :], sizes, strict=False):
            cell = curves[(curves.quantity == quantity) & (curves.ep_size == size) & (curves.tokens == tokens[size])]
            safe = []
            for n_before, placement in enumerate(placements):
                of_placement = cell[cell.placement == placement].set_index(["scope", "deployments"])
                for scope, (dashes, _) in shown.items():
                    if scope not in of_placement.index:
                        continue
                    line = of_placement.loc[[scope]]
                    width = max(2.6 - 0.8 * n_before, 1.0)  # of equal lines, all are seen
                    ax.plot(
                        line.factor, line.probability, color=look(placement)["color"], linestyle=dashes, linewidth=width
                    )
                    if dashes == "-":
                        safe.append(f"{placement} {_factor_at(line, risk):.2f}")
            title_panel(ax, f"EP {size}: {what}\n")
            ax.text(0, 1.02, ", ".join(safe), transform=ax.transAxes, fontsize=7.5, va="bottom")
            ax.axhline(risk, **_RISK)
            probability_axis(ax, min(_LEAST, risk / 10))
            ax.set_xlim(left=min(1.0, ax.get_xlim()[0]))
    label_outer(axes, "capacity / balanced load", "P(exceeded)")
    number = sorted({int(n) for n in tokens})
    text = f"{number[0]}" if len(number) == 1 else f"{number[0]} to {number[-1]}"
    title_figure(
        figure,
        f"How much more than the balanced load must fit? {of}, {text} tokens per step\n"
        "over each panel: the factor at which the solid line meets the risk (intervals: the table); rows: (token, expert) pairs",
    )
    handles = [Line2D([], [], color=look(name)["color"], label=label(name)) for name in placements]
    handles += [Line2D([], [], color="#777777", linestyle=dashes, label=text) for dashes, text in shown.values()]
    handles.append(Line2D([], [], label=f"risk: {risk:g}", **_RISK))
    legend_below(figure, handles, 2)
    return figure


def _factor_at(line: pd.DataFrame, risk: float) -> float:
    """Where a curve falls to the risk; nan if it does not get there."""
    at = np.flatnonzero(line.probability.to_numpy() <= risk)
    if not len(at):
        return np.nan
    ends = line.iloc[[max(at[0] - 1, 0), at[0]]]
    return float(np.interp(-np.log(risk), -np.log(ends.probability), ends.factor))
