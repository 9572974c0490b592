"""From raw integers to the tidy tables: summary and tail."""

from itertools import pairwise

import numpy as np
import pandas as pd

from sim.scoring import METRICS
from sim.stats import (
    Design,
    Histogram,
    Moments,
    effective_blocks,
    mean_interval,
    probability_interval,
    quantile_interval,
)
from sim.sweeps.events import Events, events_of
from sim.sweeps.grid import Grid
from sim.sweeps.tally import VALUE_BITS, Tally, split_keys

_MAX_LOAD, _IDLE = METRICS.index("max_load"), METRICS.index("idle_ranks")
KEYS = ["model", "workload", "placement", "ep_size", "tokens", "trials", "draws"]


def _histograms(grid: Grid, tally: Tally) -> list[list[Histogram]]:
    """Histogram of each [cell][metric]."""
    cell, metric, values = split_keys(tally.keys)
    edges = np.searchsorted(cell * len(METRICS) + metric, np.arange(len(grid.cells) * len(METRICS) + 1))
    flat = [Histogram(values[a:b], tally.counts[a:b]) for a, b in pairwise(edges)]
    return [flat[i : i + len(METRICS)] for i in range(0, len(flat), len(METRICS))]


def event_moments(events: Events, tally: Tally) -> tuple[Moments, Design]:
    """Moments of the number of blocks in which each event happened, and its design; arrays [events].

    All totals come from one search in the sorted keys.
    """
    of_metric = (events.cell * len(METRICS) + events.metric) << VALUE_BITS
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
    moments, design = event_moments(events, tally)
    p = moments.total / design.blocks
    low, high = probability_interval(p, effective_blocks(moments, design))
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
    )


def impossible_events(grid: Grid, events: Events) -> np.ndarray:
    """Events that cannot happen, bool [events]: no load can exceed all of it, `ep_size` times the mean; and top_k experts
    of one token need at least top_k / (experts of the largest rank) ranks.
    """
    most = grid.ep_size_of_cell[events.cell]
    largest = np.array(grid.largest_rank)[grid.pair_of_cell[events.cell]]
    too_idle = events.least > most - -(-grid.top_k // largest)
    too_high = (np.array(events.name) == "imbalance") & (np.array(events.threshold) > most)
    return np.where(events.metric == _IDLE, too_idle, too_high)


def certain_events(grid: Grid, events: Events) -> np.ndarray:
    """Events that always happen, bool [events]: one load is at least 1, and so few pairs (token, expert) leave ranks idle."""
    distinct_tokens = grid.tokens_of_cell[events.cell] + (grid.dummy_tokens > 0)
    reached = np.minimum(distinct_tokens * grid.top_k, grid.ep_size_of_cell[events.cell])
    idle = events.least <= grid.ep_size_of_cell[events.cell] - reached
    return np.where(events.metric == _IDLE, idle, events.least <= 1)


def build_summary(grid: Grid, tally: Tally, stopped: np.ndarray, cell_ids: list[str]) -> pd.DataFrame:
    """One row per cell; `stopped` says why a cell has no more trials, str [cells]."""
    events, histograms = events_of(grid), _histograms(grid, tally)
    moments, of_event = event_moments(events, tally)
    probability, blocks = moments.total / of_event.blocks, effective_blocks(moments, of_event)
    imbalance = np.flatnonzero(events.metric == _MAX_LOAD).reshape(len(grid.cells), -1)
    design = tally.design_of()
    of_cell = Design(*(part[:, None] for part in design))
    metric = mean_interval(tally.moments("metric"), of_cell)
    change = _change_from_baseline(grid, tally, design)
    reached = mean_interval(tally.moments("reached"), of_cell)
    keys = cell_keys(grid, tally)
    rows = []
    for cell in range(len(grid.cells)):
        mean_load, ep_size = float(grid.mean_load(cell)), int(grid.ep_size_of_cell[cell])
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
        row |= _idle_mean(metric, cell, ep_size, float(design.draws[cell]))
        row["idle_ranks_p99"] = int(idle.quantile(0.99))
        row["distinct_experts_busiest_mean"] = metric[0][cell, METRICS.index("distinct_experts_busiest")]
        row["distinct_experts_max_mean"] = metric[0][cell, METRICS.index("distinct_experts_max")]
        for j, what in enumerate(("ranks", "nodes")):
            for part, values in zip(("", "_low", "_high"), reached, strict=True):
                row[f"{what}_per_token_mean{part}"] = values[cell, j]
        row["baseline"] = grid.placements[0]
        for part, values in zip(("", "_low", "_high"), change, strict=True):
            row[f"imbalance_change_mean{part}"] = values[cell] / mean_load
        rows.append(row | {"stopped": stopped[cell], "cell_id": cell_ids[cell]})
    return pd.DataFrame(rows)


def _idle_mean(metric: tuple[np.ndarray, ...], cell: int, ep_size: int, draws: float) -> dict[str, float]:
    """Mean idle ranks with its interval: not below 0, and where none was ever seen, bounded by ep_size - 1 times the
    upper bound of the probability of any.
    """
    mean, low, high = (float(values[cell, _IDLE]) for values in metric)
    if mean == 0:
        high = (ep_size - 1) * float(probability_interval(np.zeros(1), np.array([draws]))[1][0])
    return {"idle_ranks_mean": mean, "idle_ranks_mean_low": max(low, 0.0), "idle_ranks_mean_high": high}


def _change_from_baseline(grid: Grid, tally: Tally, design: Design) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Paired change of the mean max load from the first placement's, with its interval: arrays [cells]."""
    base = grid.baseline_cells
    total, square, weighted = (part[:, _MAX_LOAD] for part in tally.moments("metric"))
    cross = tally.metric_cross[:, _MAX_LOAD].astype(float)
    moments = Moments(total - total[base], square - 2 * cross + square[base], weighted - weighted[base])
    return mean_interval(moments, design)
