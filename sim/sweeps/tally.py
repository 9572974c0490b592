"""The raw outcome of a sweep: integers that add, so that any split into chunks gives the same sums; and as a table."""

from dataclasses import dataclass, fields

import numpy as np
import pandas as pd

from sim.errors import InputError
from sim.kernels import kernel
from sim.stats import Design, Moments
from sim.sweeps.grid import Grid, events_of

VALUE_BITS = 32
_COMPACT_AT = 4_000_000


@dataclass
class Tally:
    """Sums over the draws of one or more chunks, int64; of a cell that was not scored, zeros.

    With Y a draw's sum of what is counted and n its blocks, a square is the sum over draws of Y**2, weighted of n * Y, and cross
    of Y * Y of the first placement's cell. Histograms have key = (cell * metrics + metric) << 32 | value; keys ascend and are
    distinct once compacted.
    """

    keys: np.ndarray
    counts: np.ndarray
    design: np.ndarray  # [cells, 3]: blocks, draws, and the sum over draws of the square of a draw's blocks
    metric: np.ndarray  # [cells, metrics of the grid]
    metric_square: np.ndarray
    metric_weighted: np.ndarray
    metric_cross: np.ndarray
    event_square: np.ndarray  # [events], of the blocks in which an event happened
    event_weighted: np.ndarray
    reached: np.ndarray  # [cells, 2], the ranks and nodes that a trial's first token reaches
    reached_square: np.ndarray
    reached_weighted: np.ndarray
    received: np.ndarray  # [cells, 2], the tokens that all ranks, and all nodes, receive; [cells, 0] where not counted
    received_square: np.ndarray
    received_weighted: np.ndarray
    load: np.ndarray  # [ranks of all pairs], of each rank at the pair's largest step
    load_square: np.ndarray
    load_weighted: np.ndarray

    @classmethod
    def zero(cls, grid: Grid) -> "Tally":
        """Nothing seen yet."""
        n_cells, n_events = len(grid.cells), len(events_of(grid).cell)
        shapes = {"keys": 0, "counts": 0, "design": (n_cells, 3)}
        shapes |= {"event_square": n_events, "event_weighted": n_events}
        rows = {"metric": (n_cells, len(grid.metrics)), "reached": (n_cells, 2), "load": len(grid.pair_of_rank)}
        rows |= {"received": (n_cells, 2 if grid.received else 0)}
        return cls(**{
            field.name: np.zeros(shapes.get(field.name, rows.get(field.name.partition("_")[0], 0)), np.int64)
            for field in fields(cls)
        })  # fmt: skip

    def __post_init__(self) -> None:
        self._added: list[tuple[np.ndarray, np.ndarray]] = []  # keys and counts that wait to be merged

    def add(self, other: "Tally") -> None:
        """Add the sums of other draws; their histograms are there once compacted."""
        for name in SUMS:
            mine = getattr(self, name)
            mine += getattr(other, name)
        self._added.append((other.keys, other.counts))
        if sum(len(keys) for keys, _ in self._added) > _COMPACT_AT:
            self.compact()

    def compact(self) -> None:
        """Merge the counts of equal keys."""
        parts = zip((self.keys, self.counts), *self._added, strict=True)
        self.keys, self.counts = merge_counts(*(np.concatenate(of_parts) for of_parts in parts))
        self._added.clear()

    def moments(self, what: str) -> Moments:
        """Moments of 'metric', 'reached', 'received' or 'load'."""
        return Moments(*(getattr(self, f"{what}{part}").astype(float) for part in ("", "_square", "_weighted")))

    def design_of(self, cells: np.ndarray | slice = slice(None)) -> Design:
        """Design of some cells, arrays [cells]."""
        return Design(*self.design[cells].astype(float).T)


def merge_counts(keys: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct keys, ascending, with the sums of their counts."""
    if (keys[1:] > keys[:-1]).all():
        return keys, counts
    order = np.argsort(keys, kind="stable")
    keys, counts = keys[order], counts[order]
    first = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    return keys[first], np.add.reduceat(counts, first)


def histogram(scores: np.ndarray, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keys of scores int32 [trials, cells, metrics] of the given cells, ascending and distinct, and their counts."""
    n_trials, _, n_metrics = scores.shape
    columns = np.sort(scores.reshape(n_trials, -1).T, axis=1)
    is_first = np.ones(columns.shape, bool)
    np.not_equal(columns[:, 1:], columns[:, :-1], out=is_first[:, 1:])
    first = np.flatnonzero(is_first)
    base = (cells[:, None] * n_metrics + np.arange(n_metrics)).reshape(-1) << VALUE_BITS
    return base[first // n_trials] + columns.reshape(-1)[first], np.diff(np.append(first, columns.size))


@kernel
def add_by_draw(values, draw, sums):
    """Add the values of trials to those of their draws: values [trials, n]; draw int64 [trials]; sums int64 [draws, n]."""
    for t in range(values.shape[0]):
        of_draw, of_trial = sums[draw[t]], values[t]
        for i in range(of_trial.size):
            of_draw[i] += of_trial[i]


@kernel
def add_moments(values, n_trials, total, square, weighted):
    """Add up over draws Y, Y**2 and n * Y: values int64 [draws, n], Y; n_trials int64 [draws]; sums int64 [n]."""
    for d in range(values.shape[0]):
        for i in range(values.shape[1]):
            y = values[d, i]
            total[i] += y
            square[i] += y * y
            weighted[i] += n_trials[d] * y


@kernel
def add_events(scores, draw, cell, metric, least, sums):
    """Count the trials of each draw in which events happened: scores int32 [trials, cells, metrics]; draw int64 [trials]; cell,
    metric, least int64 [events]; sums int64 [draws, events].
    """
    for t in range(scores.shape[0]):
        of_draw = sums[draw[t]]
        for i in range(cell.size):
            of_draw[i] += scores[t, cell[i], metric[i]] >= least[i]


def split_keys(grid: Grid, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cell, metric and value of each key."""
    cell, metric = np.divmod(keys >> VALUE_BITS, len(grid.metrics))
    return cell, metric, keys & ((1 << VALUE_BITS) - 1)


SUMS = [field.name for field in fields(Tally) if field.name not in ("keys", "counts")]


def _names(grid: Grid) -> list[str]:
    """Metrics of the raw counts: histograms, then sums."""
    return [*grid.metrics, *(name.replace("load", "rank_load") for name in SUMS)]


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

    `metric` is one of the grid's: `count` blocks of the cell had this `value`. Or it is a sum of `Tally`: then `value` is
    the place of the number in the cell, a metric (metric...), event, rank (rank_load..., at the largest step), 0 for
    ranks and 1 for nodes (reached..., received...), or blocks, draws and blocks squared (design).
    """
    cell, metric, value = split_keys(grid, tally.keys)
    columns = [(cell, metric, value, tally.counts)]
    for i, name in enumerate(SUMS):
        array = getattr(tally, name)
        of, place = _cells_of(grid, name, array.shape[-1])
        columns.append((of, np.full(array.size, len(grid.metrics) + i), place, array.reshape(-1)))
    cell, metric, value, count = (np.concatenate(parts) for parts in zip(*columns, strict=True))
    pair = grid.pair_of_cell[cell]
    return pd.DataFrame(
        {
            "placement": pd.Categorical.from_codes(pair // len(grid.ep_sizes), list(grid.placements)),
            "ep_size": np.array([ep_size for _, ep_size in grid.pairs])[pair],
            "tokens": grid.tokens_of_cell[cell],
            "metric": pd.Categorical.from_codes(metric, _names(grid)),
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
        names, n_metrics = _names(grid), len(grid.metrics)
        metric = np.array([names.index(name) for name in counts.metric.cat.categories])[counts.metric.cat.codes]
        value, count = counts["value"].to_numpy(np.int64), counts["count"].to_numpy(np.int64)
        histogram = metric < n_metrics
        tally = Tally.zero(grid)
        flat = (cell * n_metrics + metric) << VALUE_BITS | value
        tally.keys, tally.counts = merge_counts(flat[histogram], count[histogram])
        for i, name in enumerate(SUMS):
            array, mine = getattr(tally, name), metric == n_metrics + i
            of, place = _cells_of(grid, name, array.shape[-1])
            order, wanted = np.lexsort((value[mine], cell[mine])), np.lexsort((place, of))
            array.reshape(-1)[wanted] = count[mine][order]
    except (AttributeError, KeyError, IndexError, ValueError, TypeError) as error:
        raise InputError(f"{where} lacks the raw counts of its sweep (counts.parquet); run the sweep again") from error
    return tally


def only_cells(grid: Grid, tally: Tally, cells: np.ndarray) -> Tally:
    """The sums of some cells, and zeros for the others."""
    kept = np.isin(split_keys(grid, tally.keys)[0], cells)
    part = Tally.zero(grid)
    part.keys, part.counts = tally.keys[kept], tally.counts[kept]
    for name in SUMS:
        array = getattr(tally, name)
        of, _ = _cells_of(grid, name, array.shape[-1])
        getattr(part, name)[:] = np.where(np.isin(of, cells).reshape(array.shape), array, 0)
    return part
