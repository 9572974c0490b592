"""From raw integers to the tidy tables: summary and tail."""

from itertools import pairwise

import numpy as np
import pandas as pd

from sim.scoring import METRICS, RECEIVED
from sim.stats import (
    Design,
    Histogram,
    Moments,
    bounded_mean_interval,
    effective_blocks,
    mean_interval,
    probability_interval,
    quantile_interval,
)
from sim.sweeps.grid import Events, Grid, events_of
from sim.sweeps.tally import VALUE_BITS, Tally, split_keys

_MAX_LOAD, _IDLE = METRICS.index("max_load"), METRICS.index("idle_ranks")
KEYS = ["model", "workload", "placement", "ep_size", "tokens", "trials", "draws"]


def _histograms(grid: Grid, tally: Tally) -> list[list[Histogram]]:
    """Histogram of each [cell][metric]."""
    cell, metric, values = split_keys(grid, tally.keys)
    n_metrics = len(grid.metrics)
    edges = np.searchsorted(cell * n_metrics + metric, np.arange(len(grid.cells) * n_metrics + 1))
    flat = [Histogram(values[a:b], tally.counts[a:b]) for a, b in pairwise(edges)]
    return [flat[i : i + n_metrics] for i in range(0, len(flat), n_metrics)]


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
    keys = cell_keys(grid, tally)
    table = pd.DataFrame([keys[c] for c in events.cell], columns=KEYS)
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
    events, histograms = events_of(grid), _histograms(grid, tally)
    moments, of_event = event_moments(grid, tally)
    probability, blocks = moments.total / of_event.blocks, effective_blocks(moments, of_event)
    imbalance = np.flatnonzero(events.metric == _MAX_LOAD).reshape(len(grid.cells), -1)
    design = tally.design_of()
    of_cell = Design(*(part[:, None] for part in design))
    metric = mean_interval(tally.moments("metric"), of_cell)
    change = _change_from_baseline(grid, tally, design, _MAX_LOAD)
    received = _received_columns(grid, tally, histograms, events, probability, blocks) if grid.received else []
    idle_mean = bounded_mean_interval(
        Moments(*(part[:, _IDLE] for part in tally.moments("metric"))), design, *grid.idle_range
    )
    reached = bounded_mean_interval(tally.moments("reached"), of_cell, *grid.reached_range)
    keys = cell_keys(grid, tally)
    rows = []
    for cell in range(len(grid.cells)):
        mean_load = float(grid.mean_load(cell))
        row: dict[str, object] = dict(zip(KEYS, keys[cell], strict=True))
        max_load, idle = histograms[cell][_MAX_LOAD], histograms[cell][_IDLE]
        row |= {"mean_load": mean_load, "max_load_mean": metric[0][cell, _MAX_LOAD]}
        for part, values in zip(("", "_low", "_high"), metric, strict=True):
            row[f"imbalance_mean{part}"] = values[cell, _MAX_LOAD] / mean_load
        for q, column in ((0.5, "p50"), (0.95, "p95"), (0.99, "p99")):
            # The effective blocks of the event whose probability is nearest to the quantile's.
            nearest = imbalance[cell, np.abs(probability[imbalance[cell]] - (1 - q)).argmin()]
            value, low, high = quantile_interval(max_load, q, float(np.floor(blocks[nearest])))
            for part, bound in (("", value), ("_low", low), ("_high", high)):
                row[f"imbalance_{column}{part}"] = bound / mean_load
        row["balancedness_mean"] = float(np.dot(mean_load / max_load.values, max_load.counts) / design.blocks[cell])
        for part, values in zip(("", "_low", "_high"), idle_mean, strict=True):
            row[f"idle_ranks_mean{part}"] = values[cell]
        row["idle_ranks_p99"] = int(idle.quantile(0.99))
        row["distinct_experts_busiest_mean"] = metric[0][cell, METRICS.index("distinct_experts_busiest")]
        row["distinct_experts_max_mean"] = metric[0][cell, METRICS.index("distinct_experts_max")]
        for j, what in enumerate(("ranks", "nodes")):
            for part, values in zip(("", "_low", "_high"), reached, strict=True):
                row[f"{what}_per_token_mean{part}"] = values[cell, j]
        row["baseline"] = grid.placements[0]
        for part, values in zip(("", "_low", "_high"), change, strict=True):
            row[f"imbalance_change_mean{part}"] = values[cell] / mean_load
        row |= {column: values[cell] for column, values in received}
        rows.append(row | {"stopped": stopped[cell], "cell_id": cell_ids[cell]})
    return pd.DataFrame(rows)


def _received_columns(
    grid: Grid,
    tally: Tally,
    histograms: list[list[Histogram]],
    events: Events,
    probability: np.ndarray,
    blocks: np.ndarray,
) -> list[tuple[str, np.ndarray]]:
    """Columns of received tokens, values [cells]: the mean over ranks (nodes), and of the one that receives the most its mean,
    quantiles, and paired change from the first placement's mean.
    """
    columns: list[tuple[str, np.ndarray]] = []
    design, parts = tally.design_of(), ("", "_low", "_high")
    of_cell = Design(*(part[:, None] for part in design))
    sums, most = mean_interval(tally.moments("received"), of_cell), mean_interval(tally.moments("metric"), of_cell)
    sizes = grid.ep_size_of_cell, -(-grid.ep_size_of_cell // grid.ranks_per_node)
    of_events = np.flatnonzero(np.array(events.name) == "received").reshape(len(grid.cells), -1)
    for i, (what, size) in enumerate(zip(("received_tokens", "received_node_tokens"), sizes, strict=True)):
        metric = grid.metrics.index(RECEIVED[i])
        columns += [(f"{what}_mean{part}", values[:, i] / size) for part, values in zip(parts, sums, strict=True)]
        columns += [(f"{what}_max_mean{part}", values[:, metric]) for part, values in zip(parts, most, strict=True)]
        for q, name in ((0.95, "p95"), (0.99, "p99")):
            # The effective blocks of the event of ranks whose probability is nearest to the quantile's.
            nearest = np.abs(probability[of_events] - (1 - q)).argmin(axis=1)
            effective = blocks[of_events[np.arange(len(nearest)), nearest]]
            found = [
                quantile_interval(of_cell[metric], q, float(np.floor(n)))
                for of_cell, n in zip(histograms, effective, strict=True)
            ]
            columns += [
                (f"{what}_max_{name}{part}", values) for part, values in zip(parts, np.array(found).T, strict=True)
            ]
        change = _change_from_baseline(grid, tally, design, metric)
        columns += [(f"{what}_max_change_mean{part}", values) for part, values in zip(parts, change, strict=True)]
    return columns


def _change_from_baseline(
    grid: Grid, tally: Tally, design: Design, metric: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Paired change of a metric's mean from the first placement's, with its interval: arrays [cells]."""
    base = grid.baseline_cells
    total, square, weighted = (part[:, metric] for part in tally.moments("metric"))
    cross = tally.metric_cross[:, metric].astype(float)
    moments = Moments(total - total[base], square - 2 * cross + square[base], weighted - weighted[base])
    return mean_interval(moments, design)
