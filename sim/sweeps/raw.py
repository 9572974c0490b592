"""Raw counts as a table: the integers of a tally, each with its cell, that add from sweep to sweep."""

from dataclasses import fields

import numpy as np
import pandas as pd

from sim.errors import InputError
from sim.scoring import METRICS
from sim.sweeps.events import events_of
from sim.sweeps.grid import Grid
from sim.sweeps.tally import VALUE_BITS, Tally, merge_counts, split_keys

_SUMS = [field.name for field in fields(Tally) if field.name not in ("keys", "counts")]
_NAMES = [*METRICS, *(f"{name.replace('load', 'rank_load')}" for name in _SUMS)]


def _cells_of(grid: Grid, name: str, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Cell and value of each number of a sum: events and ranks in a row, else `width` numbers of each cell."""
    if name.startswith("event"):
        cell = events_of(grid).cell
        return cell, np.arange(len(cell)) - np.searchsorted(cell, cell)
    if name.startswith("load"):
        pair = grid.pair_of_rank
        return grid.largest_cells[pair], np.arange(len(pair)) - np.searchsorted(pair, pair)
    n_cells = len(grid.cells)
    return np.repeat(np.arange(n_cells), width), np.tile(np.arange(width), n_cells)


def build_counts(grid: Grid, tally: Tally) -> pd.DataFrame:
    """Raw counts, a row each.

    `metric` is one of METRICS: `count` blocks of the cell had this `value`. Or it is a sum of `Tally`: then `value` is
    the place of the number in the cell, a metric (metric...), event, rank (rank_load..., at the largest step), 0 for
    ranks and 1 for nodes (reached...), or blocks, draws and blocks squared (design).
    """
    cell, metric, value = split_keys(tally.keys)
    columns = [(cell, metric, value, tally.counts)]
    for i, name in enumerate(_SUMS):
        array = getattr(tally, name)
        of, place = _cells_of(grid, name, array.shape[-1])
        columns.append((of, np.full(array.size, len(METRICS) + i), place, array.reshape(-1)))
    cell, metric, value, count = (np.concatenate(parts) for parts in zip(*columns, strict=True))
    pair = grid.pair_of_cell[cell]
    return pd.DataFrame(
        {
            "placement": pd.Categorical.from_codes(pair // len(grid.ep_sizes), list(grid.placements)),
            "ep_size": np.array([ep_size for _, ep_size in grid.pairs])[pair],
            "tokens": grid.tokens_of_cell[cell],
            "metric": pd.Categorical.from_codes(metric, _NAMES),
            "value": value,
            "count": count,
        }
    )


def read_counts(grid: Grid, counts: pd.DataFrame, where: str) -> Tally:
    """The tally that `build_counts` wrote. Raises InputError if the table is not of this grid."""
    try:
        cells = {tuple(grid.keys(cell)[2:]): cell for cell in range(len(grid.cells))}
        keys = zip(counts.placement, counts.ep_size, counts.tokens, strict=True)
        cell = np.array([cells[key] for key in keys], np.int64)
        metric = np.array([_NAMES.index(name) for name in counts.metric.cat.categories])[counts.metric.cat.codes]
        value, count = counts["value"].to_numpy(np.int64), counts["count"].to_numpy(np.int64)
        histogram = metric < len(METRICS)
        tally = Tally.zero(len(grid.cells), len(events_of(grid).cell), len(grid.pair_of_rank))
        flat = (cell * len(METRICS) + metric) << VALUE_BITS | value
        tally.keys, tally.counts = merge_counts(flat[histogram], count[histogram])
        for i, name in enumerate(_SUMS):
            array, mine = getattr(tally, name), metric == len(METRICS) + i
            of, place = _cells_of(grid, name, array.shape[-1])
            order, wanted = np.lexsort((value[mine], cell[mine])), np.lexsort((place, of))
            array.reshape(-1)[wanted] = count[mine][order]
    except (AttributeError, KeyError, IndexError, ValueError, TypeError) as error:
        raise InputError(f"{where} lacks the raw counts of its sweep (counts.parquet); run the sweep again") from error
    return tally


def only_cells(grid: Grid, tally: Tally, cells: np.ndarray) -> Tally:
    """The sums of some cells, and zeros for the others."""
    kept = np.isin(split_keys(tally.keys)[0], cells)
    part = Tally.zero(len(grid.cells), len(events_of(grid).cell), len(grid.pair_of_rank))
    part.keys, part.counts = tally.keys[kept], tally.counts[kept]
    for name in _SUMS:
        array = getattr(tally, name)
        of, _ = _cells_of(grid, name, array.shape[-1])
        getattr(part, name)[:] = np.where(np.isin(of, cells).reshape(array.shape), array, 0)
    return part
