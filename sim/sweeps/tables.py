"""From raw integers to the tidy tables: summary and tail."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import pandas as pd

from sim.scoring import METRICS, RECEIVED
from sim.stats import (
    Design,
    Moments,
    bounded_mean_interval,
    effective_blocks,
    mean_interval,
    probability_interval,
    quantile_intervals,
)
from sim.sweeps.grid import Events, Grid, events_of
from sim.sweeps.tally import VALUE_BITS, Tally, split_keys

_MAX_LOAD, _IDLE = METRICS.index("max_load"), METRICS.index("idle_ranks")
KEYS = ["model", "workload", "placement", "ep_size", "tokens", "trials", "draws"]


class _Histograms(NamedTuple):
    """Histograms of all cells and metrics, in a row, and how sure their quantiles are."""

    values: np.ndarray  # int64, those of each histogram ascending
    counts: np.ndarray  # int64, of each value
    cumulated: np.ndarray  # int64 [values + 1], counts before each
    edges: np.ndarray  # int64 [cells, metrics + 1], where each histogram begins, and the last of the cell's ends

    @classmethod
    def of(cls, grid: Grid, tally: Tally) -> "_Histograms":
        cell, metric, values = split_keys(grid, tally.keys)
        n_metrics = len(grid.metrics)
        bins = np.arange(len(grid.cells))[:, None] * n_metrics + np.arange(n_metrics + 1)
        cumulated = np.concatenate([[0], np.cumsum(tally.counts)])
        return cls(values, tally.counts, cumulated, np.searchsorted(cell * n_metrics + metric, bins))

    def quantiles(self, metric: int, q: float, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Quantile of a metric in each cell, with its interval, float64 [cells] each; blocks float64 [cells], effective ones."""
        first, last = self.edges[:, metric], self.edges[:, metric + 1]
        return quantile_intervals(self.values, self.cumulated, first, last, q, np.floor(blocks))


def event_moments(grid: Grid, tally: Tally) -> tuple[Moments, Design]:
    """Moments of the number of blocks in which each event happened, and its design; arrays [events].

    All totals come from one search in the sorted keys.
    """
    events = events_of(grid)
    of_metric = (events.cell * len(grid.metrics) + events.metric) << VALUE_BITS
    below = np.concatenate([[0], np.cumsum(tally.counts)])
    first = np.searchsorted(tally.keys, of_metric + events.least)
    last = np.searchsorted(tally.keys, of_metric + (1 << VALUE_BITS))
    total = (below[last] - below[first]).astype(float)
    design = tally.design_of(events.cell)
    fresh = design.draws == design.blocks  # one block per draw: the sum of squares of 0 and 1
    square, weighted = (np.where(fresh, total, part) for part in (tally.event_square, tally.event_weighted))
    return Moments(total, square, weighted), design


def cell_keys(grid: Grid, tally: Tally) -> list[list[object]]:
    """KEYS of each cell."""
    return [[*grid.keys(cell), *map(int, tally.design[cell, :2])] for cell in range(len(grid.cells))]


def build_tail(grid: Grid, tally: Tally) -> pd.DataFrame:
    """One row per cell and event, with its probability and 95 % interval."""
    events = events_of(grid)
    moments, design = event_moments(grid, tally)
    p, blocks = moments.total / design.blocks, effective_blocks(moments, design)
    low, high = probability_interval(p, blocks)
    impossible, certain = impossible_events(grid, events), certain_events(grid, events)
    table = pd.DataFrame(cell_keys(grid, tally), columns=KEYS).iloc[events.cell].reset_index(drop=True)
    return table.assign(
        metric=events.name,
        threshold=events.threshold,
        probability=p,
        low=np.where(impossible, 0.0, np.where(certain, 1.0, low)),
        high=np.where(impossible, 0.0, high),
        method=np.where(impossible | certain, "exact", "sampled"),
        given="",
        effective_blocks=blocks,
    )


def impossible_events(grid: Grid, events: Events) -> np.ndarray:
    """Events that cannot happen, bool [events]: more idle ranks than there can be, or a load above all of it, which is `ep_size`
    times the mean.
    """
    too_idle = events.least > grid.idle_range[1][events.cell]
    too_high = (np.array(events.name) == "imbalance") & (np.array(events.threshold) > grid.ep_size_of_cell[events.cell])
    return np.where(events.metric == _IDLE, too_idle, too_high)


def certain_events(grid: Grid, events: Events) -> np.ndarray:
    """Events that always happen, bool [events]: one load is at least 1, and some ranks must be idle."""
    return np.where(events.metric == _IDLE, events.least <= grid.idle_range[0][events.cell], events.least <= 1)


def build_summary(grid: Grid, tally: Tally, stopped: np.ndarray, cell_ids: list[str]) -> pd.DataFrame:
    """One row per cell; `stopped` says why a cell has no more trials, str [cells]."""
    histograms, design = _Histograms.of(grid, tally), tally.design_of()
    of_cell = Design(*(part[:, None] for part in design))
    means = mean_interval(tally.moments("metric"), of_cell)
    idle_moments = Moments(*(part[:, _IDLE] for part in tally.moments("metric")))
    idle_mean = bounded_mean_interval(idle_moments, design, *grid.idle_range)
    reached = bounded_mean_interval(tally.moments("reached"), of_cell, *grid.reached_range)
    blocks_near = _effective_blocks_near(grid, tally)
    mean_load = np.array([float(grid.mean_load(cell)) for cell in range(len(grid.cells))])
    columns: dict[str, object] = {"mean_load": mean_load, "max_load_mean": means[0][:, _MAX_LOAD]}

    def add(name: str, interval: Iterable[np.ndarray]) -> None:
        columns.update((f"{name}{end}", values) for end, values in zip(("", "_low", "_high"), interval, strict=True))

    add("imbalance_mean", (values[:, _MAX_LOAD] / mean_load for values in means))
    for q, name in ((0.5, "p50"), (0.95, "p95"), (0.99, "p99")):
        found = histograms.quantiles(_MAX_LOAD, q, blocks_near("imbalance", q))
        add(f"imbalance_{name}", (values / mean_load for values in found))
    edges = histograms.edges[:, _MAX_LOAD : _MAX_LOAD + 2]
    inverse = [
        np.dot(mean / histograms.values[a:b], histograms.counts[a:b])
        for mean, (a, b) in zip(mean_load, edges, strict=True)
    ]
    columns["balancedness_mean"] = inverse / design.blocks
    add("idle_ranks_mean", idle_mean)
    columns["idle_ranks_p99"] = histograms.quantiles(_IDLE, 0.99, design.blocks)[0].astype(np.int64)
    for name in ("distinct_experts_busiest", "distinct_experts_max"):
        columns[f"{name}_mean"] = means[0][:, METRICS.index(name)]
    for j, what in enumerate(("ranks", "nodes")):
        add(f"{what}_per_token_mean", (values[:, j] for values in reached))
    columns["baseline"] = grid.placements[0]
    change = _change_from_baseline(grid, tally, design, _MAX_LOAD)
    add("imbalance_change_mean", (values / mean_load for values in change))
    if grid.received:
        sums = mean_interval(tally.moments("received"), of_cell)
        sizes = grid.ep_size_of_cell, -(-grid.ep_size_of_cell // grid.ranks_per_node)
        for i, (what, size) in enumerate(zip(("received_tokens", "received_node_tokens"), sizes, strict=True)):
            metric = grid.metrics.index(RECEIVED[i])
            add(f"{what}_mean", (values[:, i] / size for values in sums))
            add(f"{what}_max_mean", (values[:, metric] for values in means))
            for q, name in ((0.95, "p95"), (0.99, "p99")):  # of nodes, too, the effective blocks of ranks
                add(f"{what}_max_{name}", histograms.quantiles(metric, q, blocks_near("received", q)))
            add(f"{what}_max_change_mean", _change_from_baseline(grid, tally, design, metric))
    table = pd.DataFrame(cell_keys(grid, tally), columns=KEYS)
    return table.assign(**columns, stopped=stopped, cell_id=cell_ids)


def _effective_blocks_near(grid: Grid, tally: Tally) -> Callable[[str, float], np.ndarray]:
    """For a name of events and a quantile, of each cell the effective blocks of the event whose probability is nearest to the
    quantile's, float64 [cells].
    """
    moments, design = event_moments(grid, tally)
    probability, blocks = moments.total / design.blocks, effective_blocks(moments, design)
    names = np.array(events_of(grid).name)

    def near(name: str, q: float) -> np.ndarray:
        of_cells = np.flatnonzero(names == name).reshape(len(grid.cells), -1)
        nearest = np.abs(probability[of_cells] - (1 - q)).argmin(axis=1)
        return blocks[of_cells[np.arange(len(of_cells)), nearest]]

    return near


def _change_from_baseline(
    grid: Grid, tally: Tally, design: Design, metric: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Paired change of a metric's mean from the first placement's, with its interval: arrays [cells]."""
    base = grid.baseline_cells
    total, square, weighted = (part[:, metric] for part in tally.moments("metric"))
    cross = tally.metric_cross[:, metric].astype(float)
    moments = Moments(total - total[base], square - 2 * cross + square[base], weighted - weighted[base])
    return mean_interval(moments, design)
