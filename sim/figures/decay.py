"""How load-aware placements go stale: imbalance against the age of their fit."""

from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from sim.figures.style import label, label_outer, look, panels, styled, title_panel

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
    figure.suptitle(
        f"Placements that go stale: fitted on one window, scored on a later one (windows in the order of the file)\n"
        f"{model}, {traffic}; mean of layers and of all pairs of windows of an age; bands: 95 % over layers",
        fontsize=10, x=0.01, ha="left",
    )  # fmt: skip
    handles = [Line2D([], [], label=label(name), **look(name)) for name in ("linear", *names)]
    handles.append(
        Line2D([], [], label="fitted on the scored window itself (its other half)", color="#555555", **_FRESH)
    )
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), frameon=False)
    return figure


def _line(ax: Any, rows: pd.DataFrame, figure: str, style: dict[str, Any]) -> None:
    """One figure of the table with its band."""
    ax.plot(rows.age_windows, rows[f"{figure}_mean"], **style)
    low, high = rows[f"{figure}_low"], rows[f"{figure}_high"]
    ax.fill_between(rows.age_windows, low, high, color=style["color"], alpha=0.15, linewidth=0)
