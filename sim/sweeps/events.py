"""The events whose probabilities tail.csv gives."""

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

from sim.scoring import METRICS
from sim.sweeps.grid import Grid

_MAX_LOAD, _IDLE = METRICS.index("max_load"), METRICS.index("idle_ranks")


@dataclass(frozen=True)
class Events:
    """The events of tail.csv, one row each: a metric of a cell is at least a whole number."""

    cell: np.ndarray  # int64
    metric: np.ndarray  # int64, index in METRICS
    least: np.ndarray  # int64
    name: list[str]
    threshold: list[float]


@lru_cache(maxsize=4)  # chunks ask for the same events again and again
def events_of(grid: Grid) -> Events:
    """All events of a grid, by cell."""
    rows = []
    for cell in range(len(grid.cells)):
        ep_size, mean = int(grid.ep_size_of_cell[cell]), grid.mean_load(cell)
        for x in grid.thresholds:
            rows.append((cell, _MAX_LOAD, math.ceil(Fraction(str(x)) * mean), "imbalance", x))
        idle = {2**i for i in range(ep_size.bit_length()) if 2**i < ep_size} | {-(-ep_size // 2), ep_size - 1}
        rows += [(cell, _IDLE, m, "idle_ranks", float(m)) for m in sorted(idle - {0})]
        rows.append((cell, _IDLE, ep_size - 1, "one_rank", 1.0))
    cells, metric, least, name, threshold = zip(*rows, strict=True)
    return Events(np.array(cells), np.array(metric), np.array(least), list(name), list(threshold))
