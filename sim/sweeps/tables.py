"""From raw integers to the tidy tables: summary, tail and counts."""

from functools import lru_cache
from itertools import pairwise

import numpy as np
import pandas as pd

from sim.score import METRICS
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
from sim.sweeps.plan import Plan
from sim.sweeps.tally import VALUE_BITS, Tally, split_keys

_MAX_LOAD, _IDLE = METRICS.index("max_load"), METRICS.index("idle_ranks")
KEYS = ["model", "workload", "placement", "ep_size", "tokens", "trials", "draws"]


def _histograms(plan: Plan, tally: Tally) -> list[list[Histogram]]:
    """Histogram of each [cell][metric]."""
    cell, metric, values = split_keys(tally.keys)
    edges = np.searchsorted(cell * len(METRICS) + metric, np.arange(len(plan.cells) * len(METRICS) + 1))
    flat = [Histogram(values[a:b], tally.counts[a:b]) for a, b in pairwise(edges)]
    return [flat[i : i + len(METRICS)] for i in range(0, len(flat), len(METRICS))]


def _event_moments(events: Events, tally: Tally, design: Design) -> Moments:
    """Moments of the number of blocks in which each event happened; all totals from one search in the sorted keys."""
    of_metric = (events.cell * len(METRICS) + events.metric) << VALUE_BITS
    below = np.concatenate([[0], np.cumsum(tally.counts)])
    first = np.searchsorted(tally.keys, of_metric + events.least)
    last = np.searchsorted(tally.keys, of_metric + (1 << VALUE_BITS))
    total = (below[last] - below[first]).astype(float)
    if design.draws == design.blocks:  # one block per draw: the sum of squares of 0 and 1
        return Moments(total, total, total)
    return Moments(total, tally.event_square.astype(float), tally.event_weighted.astype(float))


def _keys(plan: Plan, cell: int) -> list[object]:
    pair, step = plan.cells[cell]
    placement, ep_size = plan.pairs[pair]
    tokens = int(plan.steps[step])
    return [plan.model.name, plan.workload.name, placement, ep_size, tokens, plan.trials, plan.draws]


def build_tail(plan: Plan, tally: Tally) -> pd.DataFrame:
    """One row per cell and event, with its probability and 95 % interval."""
    design, events = Design.of(plan.trials, plan.draws), events_of(plan)
    moments = _event_moments(events, tally, design)
    p = moments.total / design.blocks
    low, high = probability_interval(p, effective_blocks(moments, design))
    most = np.array([plan.pairs[plan.cells[c][0]][1] for c in events.cell])
    # No load can exceed all of it, so beyond `ep_size` times the mean there is nothing to estimate; and top_k experts
    # of one token need at least top_k / (experts of the largest rank) ranks.
    largest = np.array([_largest_rank(plan, plan.cells[c][0]) for c in events.cell])
    impossible = np.where(
        events.metric == _IDLE,
        events.least > most - -(-plan.model.top_k // largest),
        (np.array(events.name) == "imbalance") & (np.array(events.threshold) > most),
    )
    certain = events.least <= np.where(events.metric == _IDLE, 0, 1)
    keys = [_keys(plan, cell) for cell in range(len(plan.cells))]
    table = pd.DataFrame([keys[c] for c in events.cell], columns=KEYS)
    return table.assign(
        metric=events.name,
        threshold=events.threshold,
        probability=p,
        low=np.where(impossible, 0.0, np.where(certain, 1.0, low)),
        high=np.where(impossible, 0.0, high),
        method=np.where(impossible | certain, "exact", "sampled"),
    )


@lru_cache(maxsize=1024)
def _largest_rank(plan: Plan, pair: int) -> int:
    """Most experts that a rank of a pair holds in any layer."""
    ranks, ep_size = plan.layer_ranks[pair], plan.pairs[pair][1]
    if ranks is None:  # random: the sizes of linear
        return -(-plan.model.n_experts // ep_size)
    return max(int(np.bincount(row).max()) for row in ranks)


def build_summary(plan: Plan, tally: Tally) -> pd.DataFrame:
    """One row per cell."""
    design, histograms, events = Design.of(plan.trials, plan.draws), _histograms(plan, tally), events_of(plan)
    moments = _event_moments(events, tally, design)
    probability, blocks = moments.total / design.blocks, effective_blocks(moments, design)
    imbalance = np.flatnonzero(events.metric == _MAX_LOAD).reshape(len(plan.cells), -1)
    metric = mean_interval(tally.moments("metric"), design)
    change = _change_from_baseline(plan, tally, design)
    reached = mean_interval(tally.moments("reached"), design)
    rows = []
    for cell, (pair, _) in enumerate(plan.cells):
        mean_load = float(plan.mean_load(cell))
        row: dict[str, object] = dict(zip(KEYS, _keys(plan, cell), strict=True))
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
        row["balancedness_mean"] = float(np.dot(mean_load / max_load.values, max_load.counts) / plan.trials)
        row |= _idle_mean(metric, cell, plan.pairs[pair][1], design)
        row["idle_ranks_p99"] = int(idle.quantile(0.99))
        row["distinct_experts_busiest_mean"] = metric[0][cell, METRICS.index("distinct_experts_busiest")]
        row["distinct_experts_max_mean"] = metric[0][cell, METRICS.index("distinct_experts_max")]
        for j, what in enumerate(("ranks", "nodes")):
            for part, values in zip(("", "_low", "_high"), reached, strict=True):
                row[f"{what}_per_token_mean{part}"] = values[pair, j]
        row["baseline"] = plan.placements[0]
        for part, values in zip(("", "_low", "_high"), change, strict=True):
            row[f"imbalance_change_mean{part}"] = values[cell] / mean_load
        rows.append(row)
    return pd.DataFrame(rows)


def _idle_mean(metric: tuple[np.ndarray, ...], cell: int, ep_size: int, design: Design) -> dict[str, float]:
    """Mean idle ranks with its interval: not below 0, and where none was ever seen, bounded by ep_size - 1 times the
    upper bound of the probability of any.
    """
    mean, low, high = (float(values[cell, _IDLE]) for values in metric)
    if mean == 0:
        high = (ep_size - 1) * float(probability_interval(np.zeros(1), np.array([float(design.draws)]))[1][0])
    return {"idle_ranks_mean": mean, "idle_ranks_mean_low": max(low, 0.0), "idle_ranks_mean_high": high}


def _change_from_baseline(plan: Plan, tally: Tally, design: Design) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Paired change of the mean max load from the first placement's, with its interval: arrays [cells]."""
    base = plan.baseline_cells
    total, square, weighted = (part[:, _MAX_LOAD] for part in tally.moments("metric"))
    cross = tally.metric_cross[:, _MAX_LOAD].astype(float)
    moments = Moments(total - total[base], square - 2 * cross + square[base], weighted - weighted[base])
    return mean_interval(moments, design)


def build_counts(plan: Plan, tally: Tally) -> pd.DataFrame:
    """Raw counts: how many blocks of each cell have each value of each metric; and for each rank (value = rank, at the
    largest step) the sums over draws of its load Y, of Y**2 and of n * Y.
    """
    cell, metric, values = split_keys(tally.keys)
    pair, step = (np.array(column) for column in zip(*plan.cells, strict=True))
    sizes = [ep_size for _, ep_size in plan.pairs]
    pair_of_rank = np.repeat(np.arange(len(sizes)), sizes)
    pair = np.concatenate([pair[cell], pair_of_rank, pair_of_rank, pair_of_rank])
    of_ranks = {
        "rank_load": tally.load,
        "rank_load_square": tally.load_square,
        "rank_load_weighted": tally.load_weighted,
    }
    n_ranks = len(pair_of_rank)
    return pd.DataFrame(
        {
            "placement": pd.Categorical.from_codes(pair // len(plan.ep_sizes), list(plan.placements)),
            "ep_size": np.array(sizes)[pair],
            "tokens": np.concatenate([plan.steps[step[cell]], np.full(3 * n_ranks, plan.steps[-1])]),
            "metric": pd.Categorical.from_codes(
                np.concatenate([metric, np.repeat(len(METRICS) + np.arange(3), n_ranks)]), [*METRICS, *of_ranks]
            ),
            "value": np.concatenate([values, *(np.arange(size) for size in sizes * 3)]),
            "count": np.concatenate([tally.counts, *of_ranks.values()]),
        }
    )
