"""What the figures share: palette, panels, legend, and files that come out the same every time."""

import textwrap
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, Literal, ParamSpec, Protocol, TypeVar

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator
from matplotlib.transforms import ScaledTranslation, Transform

from sim.errors import counted
from sim.files import model_label, whole_files
from sim.placement import split_name

# Okabe and Ito's colours, which colour-blind readers can tell apart; dashes and markers do it in greyscale.
_LOOKS: dict[str, tuple[str, Any, str]] = {
    "linear": ("#000000", "-", "o"),
    "round_robin": ("#0072B2", "-", "^"),
    "linear_legacy": ("#D55E00", "--", "s"),
    "random": ("#E69F00", ":", "D"),
    "node_aware": ("#009E73", "-.", "v"),
    "eplb": ("#56B4E9", "-", "X"),
    "eplb_refined": ("#8C510A", "--", "*"),
    "in_step": ("#117733", (0, (1, 1)), "P"),
}
# With redundant slots: a colour for each strategy, dashes and marker by their number in powers of 2.
_WITH_REDUNDANT = {"linear": "#777777", "eplb": "#882255", "eplb_refined": "#E07B91", "eplb_budget": "#44AA99"}
_BY_NUMBER = (("-", "h"), ("--", "p"), ("-.", "d"), (":", "<"), ((0, (3, 1, 1, 1)), ">"))
_OTHER = ("#CC79A7", (0, (5, 1, 1, 1, 1, 1)), "P")
_LABELS = {"round_robin": "round_robin (group-aware)"}
_BASE_WIDTH = 9.0
HOLLOW: dict[str, Any] = {"linestyle": "", "markersize": 7, "markerfacecolor": "none"}
P = ParamSpec("P")
Drawn = TypeVar("Drawn", Figure, Figure | None)


class Sweep(Protocol):
    """What the figures read of a `SweepResult`, whose room stands below theirs."""

    @property
    def summary(self) -> pd.DataFrame: ...  # noqa: D102
    @property
    def tail(self) -> pd.DataFrame: ...  # noqa: D102
    def exceedance(self, metric: str, placement: str, ep_size: int, tokens: int) -> pd.DataFrame: ...  # noqa: D102
    def rank_loads(self, placement: str, ep_size: int) -> pd.DataFrame: ...  # noqa: D102
    def against_baseline(self) -> pd.DataFrame: ...  # noqa: D102
    def __hash__(self) -> int: ...


_RC: Any = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titley": 1.0,  # where it would be; given, it is not searched for above the ticks
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "svg.hashsalt": "epsim",
    "figure.dpi": 100,
    "figure.titlesize": 10,
    "legend.frameon": False,
}


def styled(draw: Callable[P, Drawn]) -> Callable[P, Drawn]:
    """Draw a figure under the shared settings."""

    @wraps(draw)
    def inner(*args: P.args, **kwargs: P.kwargs) -> Drawn:
        with mpl.rc_context(_RC):
            return draw(*args, **kwargs)

    return inner


def look(placement: str) -> dict[str, Any]:
    """Colour, dashes and marker of a placement."""
    base, redundant = split_name(placement)
    if redundant:
        apart = 2 * (base == "eplb_budget")  # it often lies on eplb with as many
        color, (dashes, marker) = _WITH_REDUNDANT[base], _BY_NUMBER[(redundant.bit_length() + apart) % len(_BY_NUMBER)]
    else:
        color, dashes, marker = _LOOKS.get(placement, _OTHER)
    return {"color": color, "linestyle": dashes, "marker": marker}


def label(placement: str) -> str:
    """Name of a placement in a legend."""
    return _LABELS.get(placement, placement)


def handle(placement: str, **changes: Any) -> Line2D:
    """A placement's entry of a legend."""
    return Line2D([], [], label=label(placement), **look(placement) | changes)


def placements_of(result: Sweep) -> list[str]:
    """Placements in the order of the sweep."""
    return list(dict.fromkeys(result.summary.placement))


@lru_cache(maxsize=32)  # the EP sizes of a sweep
def distinct_placements(result: Sweep, ep_size: int) -> tuple[list[str], dict[str, str]]:
    """Placements that differ on an EP size, and of each other one that which it equals (to the last digit)."""
    of_size = result.summary[result.summary.ep_size == ep_size]
    columns = ["tokens", "max_load_mean", "idle_ranks_mean", "distinct_experts_max_mean", "ranks_per_token_mean"]
    rows = {str(name): cells[columns].to_numpy() for name, cells in of_size.groupby("placement", sort=False)}
    twins: dict[str, str] = {}
    for name, values in rows.items():
        twin = next((other for other in rows if other not in twins and np.array_equal(rows[other], values)), name)
        if twin != name:
            twins[name] = twin
    return [name for name in rows if name not in twins], twins


def twins_text(result: Sweep, ep_sizes: Iterable[int]) -> str:
    """Which placements are not drawn because they equal another one, and at which EP sizes."""
    where: dict[tuple[str, str], list[int]] = {}
    sizes = list(ep_sizes)
    for ep_size in sizes:
        for pair in distinct_placements(result, ep_size)[1].items():
            where.setdefault(pair, []).append(ep_size)
    parts = [
        f"{name} = {twin}".replace(" ", "\N{NO-BREAK SPACE}")
        + (f" at EP\N{NO-BREAK SPACE}{', '.join(map(str, at))}" if len(at) < len(sizes) else "")
        for (name, twin), at in where.items()
    ]
    return f"equal placements are drawn once: {'; '.join(parts)}" if parts else ""


def title_panel(ax: Axes, text: str, note: str = "") -> None:
    """Panel title, and at its right a short note."""
    ax.set_title(text, loc="left", fontweight="bold")
    if note:
        ax.set_title(note, loc="right", color="#555555")


def nearest(values: Iterable[int], wanted: int) -> int:
    """The value nearest to `wanted` in ratio."""
    return min(values, key=lambda value: abs(np.log(value / wanted)))


def tokens_near(result: Sweep, wanted: int) -> dict[int, int]:
    """For each EP size its number of tokens per step nearest to `wanted`."""
    cells = result.summary.groupby("ep_size").tokens.unique()
    return {int(ep_size): int(nearest(values, wanted)) for ep_size, values in cells.items()}


def tokens_text(tokens: dict[int, int]) -> str:
    """'64 tokens per step', or the range."""
    low, high = min(tokens.values()), max(tokens.values())
    return f"{counted(low, 'token')} per step" if low == high else f"{low} to {high} tokens per step"


def differing_sizes(result: Sweep, wanted: Sequence[int], most: int) -> list[int]:
    """Up to `most` EP sizes at which placements differ, the wanted ones first; all are taken where there is one placement."""
    alone = len(placements_of(result)) == 1
    there = [size for size in ep_sizes_of(result) if alone or len(distinct_placements(result, size)[0]) > 1]
    return sorted(sorted(there, key=lambda size: size not in wanted)[:most])


def ep_sizes_of(result: Sweep) -> list[int]:
    """EP sizes of more than one rank, or 1 where there is no other."""
    return [int(size) for size in sorted(result.summary.ep_size.unique()) if size > 1] or [1]


def sideways(ax: Axes, i: int, n: int, apart: float = 2.5) -> Transform:
    """Data coordinates of the i-th of n lines, moved sideways by points of print, so that equal values stay visible."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    shift = apart * (i - (n - 1) / 2) / 72
    return ax.transData + ScaledTranslation(shift, 0, figure.dpi_scale_trans)


def panels(n: int, columns: int, height: float, *, sharey: bool | Literal["row"] = True) -> tuple[Figure, list[Axes]]:
    """A figure of README width with `n` panels in rows of `columns`, each row `height` inches high."""
    rows = -(-n // columns)
    columns = -(-n // rows)  # 4 panels are 2 by 2, not 3 and 1
    figure = Figure(figsize=(_BASE_WIDTH, 0.9 + height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharey=sharey, squeeze=False)
    flat = [ax for row in axes for ax in row]
    for ax in flat[n:]:
        ax.remove()
    return figure, flat[:n]


def label_outer(axes: Sequence[Axes], x: str, y: str) -> None:
    """Axis labels where no panel stands below, or to the left."""
    for i, ax in enumerate(axes):
        place = ax.get_subplotspec()
        assert place is not None
        if place.is_first_col():
            ax.set_ylabel(y)
        if i + place.get_gridspec().ncols >= len(axes):
            ax.set_xlabel(x)


def add_legend(
    figure: Figure, result: Sweep, drawn: Collection[str], *, hollow: bool = False, markers: bool = True
) -> None:
    """One legend below all panels, off the data, of the placements that are drawn, in the order of the sweep; `hollow` for
    points without lines.
    """
    changes = (HOLLOW if hollow else {}) | ({} if markers else {"marker": ""})
    legend_below(figure, [handle(name, **changes) for name in placements_of(result) if name in drawn])


def legend_below(figure: Figure, handles: Sequence[Any], most: int = 6) -> None:
    """A legend below all panels, in rows of at most so many."""
    figure.legend(handles=handles, loc="outside lower center", ncols=min(most, len(handles)))


def title_figure(figure: Figure, text: str) -> None:
    """Title of a figure, in one line or several."""
    figure.suptitle(text, x=0.01, ha="left")


def band(ax: Axes, x: Any, low: Any, high: Any, color: str) -> None:
    """An interval along a line."""
    ax.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)


def set_title(figure: Figure, result: Sweep, text: str, *notes: str, ranges: str = "bands") -> None:
    """Title with the model, the traffic, what shows the 95 % intervals, and notes below in lines that fit."""
    row = result.summary.iloc[0]
    draws = f"{row.trials:,} trials" + ("" if row.trials == row.draws else f" of {row.draws:,} layer draws")
    about = f"{model_label(row.model)}, {row.workload} traffic, {draws}, {ranges}: 95 %"
    lines = [text, about, *textwrap.wrap("; ".join(note for note in notes if note), 122)]
    title_figure(figure, "\n".join(lines))


def chosen_sizes(result: Sweep, sizes: Sequence[int]) -> str:
    """Which EP sizes of the sweep a figure leaves out."""
    left = [size for size in ep_sizes_of(result) if size not in sizes]
    return f"not drawn: EP\N{NO-BREAK SPACE}{', '.join(map(str, left))}" if left else ""


def log2_ticks(ax: Axes, values: Sequence[int]) -> None:
    """A base-2 axis with ticks at its ends, then at powers of 2, then at other values, as far as their labels have room."""
    ax.set_xscale("log", base=2)
    first, last = int(min(values)), int(max(values))
    edge = max((last / first) ** 0.05, 1.15)  # a single value is in the middle
    ax.set_xlim(first / edge, last * edge)
    figure, place = ax.get_figure(root=True), ax.get_subplotspec()
    assert figure is not None
    assert place is not None
    inches, label_inches = figure.get_figwidth() / place.get_gridspec().ncols - 0.35, 0.074 * len(str(last)) + 0.08
    apart = label_inches / inches * np.log2(edge * edge * last / first)
    ticks: list[int] = []
    for value in sorted(map(int, set(values)), key=lambda n: (n not in (first, last), n & (n - 1) != 0, -n)):
        if all(abs(np.log2(value / tick)) >= apart for tick in ticks):
            ticks.append(value)
    ax.set_xticks(sorted(ticks), [str(tick) for tick in sorted(ticks)])
    ax.xaxis.set_minor_locator(NullLocator())


_NICE = (1, 1.1, 1.2, 1.3, 1.4, 1.5, 1.75, 2, 2.5, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)


def imbalance_axis(ax: Axes, which: str) -> None:
    """Make the 'x' or 'y' axis a log axis of imbalances from 1 on, with round numbers far enough apart to be read."""
    getattr(ax, f"set_{which}scale")("log", base=2)
    getattr(ax, f"set_{which}lim")(1, None)
    span = np.log(max(getattr(ax, f"get_{which}lim")()[1], 1.05))
    apart = 0.2 if which == "x" else 0.1  # labels are wider than they are high
    ticks: list[float] = []
    for value in _NICE:
        if np.log(value) < span and (not ticks or np.log(value / ticks[-1]) > apart * span):
            ticks.append(value)
    getattr(ax, f"set_{which}ticks")(ticks, [f"{tick:g}" for tick in ticks])
    getattr(ax, f"{which}axis").set_minor_locator(NullLocator())


def probability_axis(ax: Axes, least: float) -> None:
    """Make y a log axis of probabilities from `least` to 1."""
    ax.set_yscale("log")
    ax.set_ylim(least, 1)
    ax.yaxis.set_major_locator(LogLocator(numticks=8))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_minor_formatter(NullFormatter())
    for line in ax.get_lines():
        y = np.asarray(line.get_ydata(), float)
        if line.get_linestyle() == "None" and len(y) and (y >= least).all():
            line.set_clip_on(False)  # markers at 1 are drawn whole


def save_as(figure: Figure, stem: Path, formats: Sequence[str]) -> list[Path]:
    """Write a figure as STEM.png, STEM.svg or both; the files."""
    paths = [stem.with_name(f"{stem.name}.{suffix}") for suffix in formats]
    for path in paths:
        save(figure, path)
    return paths


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG or SVG, by the suffix; the same figure gives the same bytes."""
    with mpl.rc_context(_RC), whole_files(path) as (temporary,):
        engine = figure.get_layout_engine()
        if engine is not None:  # once is enough, and it is most of the time
            engine.execute(figure)
            figure.set_layout_engine("none")
        if path.suffix == ".svg":
            figure.savefig(temporary, metadata={"Date": None})
        else:
            dpi, figure.dpi = figure.dpi, 130
            canvas: Any = FigureCanvasAgg(figure)
            canvas.print_png(temporary, metadata={"Software": None})  # savefig draws twice
            figure.dpi = dpi
