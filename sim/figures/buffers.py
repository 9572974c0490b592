"""How often a capacity is exceeded, against the capacity as a factor of the balanced load."""

from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sim.figures.style import label, label_outer, look, panels, styled, title_panel

_SCOPES: dict[tuple[str, str], Any] = {
    ("layer", "all"): (":", "one layer of one step"),
    ("step", "median"): ("--", "any layer of a step, median deployment"),
    ("horizon", "median"): ("-.", "any layer of any step of the horizon, median deployment"),
    ("horizon", "worst_5_percent"): ("-", "the same, worst 5 % of deployments"),
    ("step", "worst_5_percent"): ("-", "any layer of a step, worst 5 % of deployments"),
}
_TITLES = {"received": "tokens that a rank receives", "pairs": "rows of a rank", "expert_rows": "rows of an expert"}


@styled
def capacity_curves(curves: pd.DataFrame, risk: float, of: str) -> Figure:
    """P(exceed) against the capacity factor: a row of panels per quantity, a panel per EP size; the largest step.

    `curves` as `size_buffers` gives them; `of` names model and workload.
    """
    tokens = curves.groupby("ep_size").tokens.max()
    sizes = list(tokens.index)
    has_horizon = (curves.scope == "horizon").any()
    shown = {
        key: value
        for key, value in _SCOPES.items()
        if key != (("step" if has_horizon else "horizon"), "worst_5_percent")
    }
    shown = {key: value for key, value in shown.items() if has_horizon or key[0] != "horizon"}
    figure, axes = panels(len(sizes) * len(_TITLES), len(sizes), 2.4)
    placements = list(dict.fromkeys(curves.placement))
    for i, (quantity, what) in enumerate(_TITLES.items()):
        for ax, size in zip(axes[i * len(sizes) :], sizes, strict=False):
            cell = curves[(curves.quantity == quantity) & (curves.ep_size == size) & (curves.tokens == tokens[size])]
            for (scope, deployments), (dashes, _) in shown.items():
                for n_before, placement in enumerate(placements):
                    line = cell[
                        (cell.scope == scope) & (cell.deployments == deployments) & (cell.placement == placement)
                    ]
                    color = look(placement)["color"]
                    ax.plot(
                        line.factor, line.probability, color=color, linestyle=dashes, linewidth=max(2.4 - n_before, 1.0)
                    )
            ax.axhline(risk, color="#555555", linewidth=0.8)
            ax.set_yscale("log")
            ax.set_ylim(1e-9, 2)
            title_panel(ax, f"EP {size}: {what}")
    label_outer(axes, "capacity / balanced load", "P(exceed)")
    steps = sorted(set(tokens))
    text = f"{steps[0]}" if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"
    figure.suptitle(
        f"How often a capacity is exceeded: {of}, {text} tokens per step\ngrey line: the risk that is asked for, {risk:g}",
        fontsize=10,
        x=0.01,
        ha="left",
    )
    handles = [Line2D([], [], color=look(name)["color"], label=label(name)) for name in placements]
    handles += [Line2D([], [], color="#000000", linestyle=dashes, label=text) for dashes, text in shown.values()]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    return figure
