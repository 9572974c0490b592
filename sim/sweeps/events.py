"""The events whose probabilities tail.csv gives."""

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

from sim.score import METRICS
from sim.sweeps.plan import Plan

_MAX_LOAD, _IDLE = METRICS.index("max_load"), METRICS.index("idle_ranks")


@dataclass(frozen=True)
class Events:
    """The events of tail.csv, one row each: a metric of a cell is at least a whole number."""

    cell: np.ndarray  # int64
    metric: np.ndarray  # int64, index in METRICS
    least: np.ndarray  # int64
    name: list[str]
    threshold: list[float]

    def happen(self, scores: np.ndarray) -> np.ndarray:
        """Whether each event happened in each block: bool [trials, events], from scores int32 [trials, cells, METRICS]."""
        return scores[:, self.cell, self.metric] >= self.least


@lru_cache(maxsize=4)  # chunks ask for the same events again and again
def events_of(plan: Plan) -> Events:
    """All events of a plan, by cell."""
    rows = []
    for cell, (pair, _) in enumerate(plan.cells):
        ep_size, mean = plan.pairs[pair][1], plan.mean_load(cell)
        for x in plan.thresholds:
            rows.append((cell, _MAX_LOAD, math.ceil(Fraction(str(x)) * mean), "imbalance", x))
        idle = {2**i for i in range(ep_size.bit_length()) if 2**i < ep_size} | {ep_size - 1}
        rows += [(cell, _IDLE, m, "idle_ranks", float(m)) for m in sorted(idle - {0})]
        rows.append((cell, _IDLE, ep_size - 1, "one_rank", 1.0))
    cells, metric, least, name, threshold = zip(*rows, strict=True)
    return Events(np.array(cells), np.array(metric), np.array(least), list(name), list(threshold))
