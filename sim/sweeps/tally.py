"""The raw outcome of a sweep: integers that add, so that any split into chunks gives the same sums."""

from dataclasses import dataclass, fields

import numpy as np

from sim.scoring import METRICS
from sim.stats import Design, Moments

VALUE_BITS = 32
_COMPACT_AT = 4_000_000


@dataclass
class Tally:
    """Sums over the draws of one or more chunks; of a cell that was not scored, zeros.

    Attributes
    ----------
    keys, counts : int64 [distinct]
        Histograms: key = (cell * len(METRICS) + metric) << 32 | value; keys ascend and are distinct once compacted.
    design : int64 [cells, 3]
        Blocks, draws, and the sum over draws of the square of a draw's blocks.
    metric, metric_square, metric_weighted, metric_cross : int64 [cells, METRICS]
        Sums over draws of Y, Y**2, n * Y and Y * Y of the first placement's cell, Y the draw's sum of the metric.
    event_square, event_weighted : int64 [events]
        The same for the number of blocks of a draw in which an event happened.
    reached, reached_square, reached_weighted : int64 [cells, 2]
        The same for the ranks and nodes that a trial's first token reaches.
    load, load_square, load_weighted : int64 [ranks of all pairs]
        The same for the load of each rank at the pair's largest step.
    """

    keys: np.ndarray
    counts: np.ndarray
    design: np.ndarray
    metric: np.ndarray
    metric_square: np.ndarray
    metric_weighted: np.ndarray
    metric_cross: np.ndarray
    event_square: np.ndarray
    event_weighted: np.ndarray
    reached: np.ndarray
    reached_square: np.ndarray
    reached_weighted: np.ndarray
    load: np.ndarray
    load_square: np.ndarray
    load_weighted: np.ndarray

    @classmethod
    def zero(cls, n_cells: int, n_events: int, n_ranks: int) -> "Tally":
        """Nothing seen yet."""
        shapes = {"keys": 0, "counts": 0, "design": (n_cells, 3)}
        shapes |= {"event_square": n_events, "event_weighted": n_events}
        rows = {"metric": (n_cells, len(METRICS)), "reached": (n_cells, 2), "load": n_ranks}
        return cls(**{
            field.name: np.zeros(shapes.get(field.name, rows.get(field.name.partition("_")[0], 0)), np.int64)
            for field in fields(cls)
        })  # fmt: skip

    def add(self, other: "Tally") -> None:
        """Add the sums of other draws."""
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if field.name in ("keys", "counts"):
                setattr(self, field.name, np.concatenate([mine, theirs]))
            else:
                mine += theirs
        if len(self.keys) > _COMPACT_AT:
            self.compact()

    def compact(self) -> None:
        """Merge the counts of equal keys."""
        self.keys, self.counts = merge_counts(self.keys, self.counts)

    def moments(self, what: str) -> Moments:
        """Moments of 'metric', 'reached' or 'load'."""
        return Moments(*(getattr(self, f"{what}{part}").astype(float) for part in ("", "_square", "_weighted")))

    def design_of(self, cells: np.ndarray | slice = slice(None)) -> Design:
        """Design of some cells, arrays [cells]."""
        return Design(*self.design[cells].astype(float).T)


def merge_counts(keys: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct keys, ascending, with the sums of their counts."""
    if len(keys) == 0:
        return keys, counts
    order = np.argsort(keys, kind="stable")
    keys, counts = keys[order], counts[order]
    first = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    return keys[first], np.add.reduceat(counts, first)


def histogram_keys(scores: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Keys of scores int32 [trials, cells, METRICS] of the given cells, flat."""
    base = (cells[:, None] * len(METRICS) + np.arange(len(METRICS))) << VALUE_BITS
    return (base + scores).reshape(-1)


def split_keys(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cell, metric and value of each key."""
    cell, metric = np.divmod(keys >> VALUE_BITS, len(METRICS))
    return cell, metric, keys & ((1 << VALUE_BITS) - 1)
