"""What a placement saves, in time: by tokens per step, GPU and EP size."""

from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sim.figures.style import label_outer, log2_ticks, panels, styled, title_panel

_GPU_LOOKS: list[Any] = [
    ("#0072B2", "-", "o"),
    ("#D55E00", "--", "s"),
    ("#009E73", "-.", "^"),
    ("#CC79A7", ":", "D"),
    ("#000000", "-", "v"),
    ("#E69F00", "--", "P"),
]


@styled
def gain_by_tokens(gains: pd.DataFrame) -> Figure:
    """Share of a layer's time that is saved against tokens per step, a panel per exchange and EP size, GPUs as lines."""
    sizes = list(dict.fromkeys(zip(gains.exchange, gains.ep_size, strict=True)))
    gpus = list(dict.fromkeys(gains.gpu))
    figure, axes = panels(len(sizes), min(len(sizes), 4), 3.0)
    for ax, (exchange, ep_size) in zip(axes, sizes, strict=True):
        for gpu, (color, dashes, marker) in zip(gpus, _GPU_LOOKS * len(gpus), strict=False):
            rows = gains[(gains.exchange == exchange) & (gains.ep_size == ep_size) & (gains.gpu == gpu)].sort_values(
                "tokens"
            )
            look: dict[str, Any] = {"color": color, "linestyle": dashes, "marker": marker, "markersize": 3}
            ax.plot(rows.tokens, 100 * rows.layer_saved, **look)
            low, high = 100 * rows.layer_saved_low, 100 * rows.layer_saved_high
            ax.fill_between(rows.tokens, low, high, color=color, alpha=0.15, linewidth=0)
            if rows.tokens.min() <= rows.crossover_tokens.iloc[0] <= rows.tokens.max():
                ax.axvline(rows.crossover_tokens.iloc[0], color=color, linestyle=dashes, linewidth=0.8)
        ax.axhline(0, color="#555555", linewidth=0.8)
        log2_ticks(ax, list(gains.tokens), apart=3.9)
        title_panel(ax, f"EP {ep_size}, {exchange}" if gains.exchange.nunique() > 1 else f"EP {ep_size}")
    label_outer(axes, "tokens per step (whole EP group)", "layer time saved (%)")
    row = gains.iloc[0]
    _title(figure, row, ", ".join(dict.fromkeys(gains.exchange)))
    handles = [
        Line2D([], [], color=color, linestyle=dashes, marker=marker, markersize=3, label=gpu)
        for gpu, (color, dashes, marker) in zip(gpus, _GPU_LOOKS * len(gpus), strict=False)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)), frameon=False)
    return figure


def _title(figure: Figure, row: Any, exchanges: str) -> None:
    figure.suptitle(
        f"Predicted: time of a MoE layer that {row.placement} saves over {row.baseline} (exchange: {exchanges})\n"
        "upright lines: crossover, from where a rank's time grows with its tokens, not with its distinct experts alone\n"
        f"{row.model} in {row['dtype']}, {row.workload} traffic; bands: 95 %, paired",
        fontsize=10,
        x=0.01,
        ha="left",
    )
