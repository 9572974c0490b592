"""The cells of a sweep, what their metrics can be, and the events whose probabilities tail.csv gives."""

import math
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from sim.scoring import METRICS, RECEIVED

_MAX_LOAD, _IDLE = METRICS.index("max_load"), METRICS.index("idle_ranks")
RECEIVED_SHARES = (0.25, 0.5, 0.75, 0.9)
"""Of a step's tokens, those that the busiest rank receives: thresholds of the tail."""
_SINCE = {"dummy_tokens": 0, "received": False}  # fields that an identity has only where they are not these


@dataclass(frozen=True)
class Grid:
    """All pairs (placement, EP size) at each number of tokens per step, as in `sim.sweep`."""

    model: str
    workload: str
    top_k: int
    placements: tuple[str, ...]
    ep_sizes: tuple[int, ...]
    tokens: tuple[int, ...]  # per step over the whole EP group, or, with `per_rank`, per step and rank
    per_rank: bool
    thresholds: tuple[float, ...]
    layouts: tuple[str, ...]  # what tells the layout of a pair from another's, see `layout_id`
    largest_rank: tuple[int, ...]  # most physical experts that a rank of each pair holds in any layer
    ranks_per_node: int
    dummy_tokens: int = 0  # padding per step, as run by idle data-parallel ranks: all of them identical
    received: bool = False  # whether the tokens that ranks and nodes receive are counted, on all tokens of a step

    @classmethod
    def of(cls, identity: dict[str, Any]) -> "Grid":
        """The grid of a sweep that was written. Raises KeyError or TypeError if the identity is not one."""
        values = {field.name: identity[field.name] for field in fields(cls) if field.name not in _SINCE}
        values |= {name: identity.get(name, default) for name, default in _SINCE.items()}
        for name, value in values.items():
            values[name] = tuple(value) if isinstance(value, list) else value
        return cls(**values)

    @property
    def identity(self) -> dict[str, Any]:
        """As JSON values; dummy tokens and received tokens only where there are any."""
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return {name: value for name, value in values.items() if name not in _SINCE or value}

    @property
    def metrics(self) -> tuple[str, ...]:
        """Whole numbers that blocks are summed up by."""
        return METRICS + RECEIVED if self.received else METRICS

    @cached_property
    def steps(self) -> np.ndarray:
        """Distinct tokens per step over the EP group, int64, ascending."""
        scale = self.ep_sizes if self.per_rank else (1,)
        return np.unique([n * r for n in self.tokens for r in scale]).astype(np.int64)

    @cached_property
    def pairs(self) -> list[tuple[str, int]]:
        """(placement, EP size), placements slowest."""
        return [(placement, ep_size) for placement in self.placements for ep_size in self.ep_sizes]

    @cached_property
    def cells(self) -> list[tuple[int, int]]:
        """(index of the pair, index of the step), pairs slowest; the cells of the first placement come first."""
        step_of = {int(step): i for i, step in enumerate(self.steps)}
        return [
            (p, step_of[n * ep_size if self.per_rank else n])
            for p, (_, ep_size) in enumerate(self.pairs)
            for n in self.tokens
        ]

    @cached_property
    def baseline_cells(self) -> np.ndarray:
        """For each cell the cell of the first placement on the same EP size and step, int64."""
        return np.arange(len(self.cells)) % (len(self.ep_sizes) * len(self.tokens))

    @cached_property
    def pair_of_cell(self) -> np.ndarray:
        """int64 [cells]."""
        return np.array([pair for pair, _ in self.cells])

    @cached_property
    def tokens_of_cell(self) -> np.ndarray:
        """Tokens per step over the EP group, int64 [cells]."""
        return self.steps[[step for _, step in self.cells]]

    @cached_property
    def ep_size_of_cell(self) -> np.ndarray:
        """int64 [cells]."""
        return np.array([self.pairs[pair][1] for pair, _ in self.cells])

    @cached_property
    def largest_cells(self) -> np.ndarray:
        """The cell of each pair with the most tokens per step, int64 [pairs]: where loads of single ranks are kept."""
        last = int(np.argmax(self.tokens))
        return np.arange(len(self.pairs)) * len(self.tokens) + last

    @cached_property
    def pair_of_rank(self) -> np.ndarray:
        """Pair of each rank, the ranks of all pairs in a row, int64 [ranks]."""
        sizes = [ep_size for _, ep_size in self.pairs]
        return np.repeat(np.arange(len(sizes)), sizes)

    @cached_property
    def idle_range(self) -> tuple[np.ndarray, np.ndarray]:
        """Fewest and most idle ranks that a block of a cell can have, int64 [cells] each.

        Few (token, expert) pairs leave ranks idle (those of identical dummy tokens, too, may go to different copies); and the
        top_k experts of one token need at least top_k / (physical experts of the largest rank) ranks.
        """
        most_reached = np.minimum((self.tokens_of_cell + self.dummy_tokens) * self.top_k, self.ep_size_of_cell)
        return self.ep_size_of_cell - most_reached, self.ep_size_of_cell - self._fewest_ranks

    @cached_property
    def reached_range(self) -> tuple[np.ndarray, np.ndarray]:
        """Fewest and most ranks and nodes that a token can be sent to, int64 [cells, 2] each."""
        least, most = self._fewest_ranks, np.minimum(self.top_k, self.ep_size_of_cell)
        n_nodes = -(-self.ep_size_of_cell // self.ranks_per_node)
        least_nodes = -(-least // self.ranks_per_node)
        return np.stack([least, least_nodes], axis=1), np.stack([most, np.minimum(most, n_nodes)], axis=1)

    @property
    def _fewest_ranks(self) -> np.ndarray:
        """Ranks that the experts of one token need at least, int64 [cells]."""
        return -(-self.top_k // np.array(self.largest_rank)[self.pair_of_cell])

    def mean_load(self, cell: int) -> Fraction:
        """Mean load over ranks of a block of a cell: the same for every block."""
        tokens = int(self.tokens_of_cell[cell]) + self.dummy_tokens
        return Fraction(tokens * self.top_k, int(self.ep_size_of_cell[cell]))

    def keys(self, cell: int) -> list[object]:
        """Model, workload, placement, EP size and tokens per step of a cell."""
        placement, ep_size = self.pairs[self.cells[cell][0]]
        return [self.model, self.workload, placement, ep_size, int(self.tokens_of_cell[cell])]


@dataclass(frozen=True)
class Events:
    """The events of tail.csv, one row each: a metric of a cell is at least a whole number."""

    cell: np.ndarray  # int64
    metric: np.ndarray  # int64, index in the grid's metrics
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
        if grid.received:
            tokens, busiest = int(grid.tokens_of_cell[cell]), grid.metrics.index("received_tokens_max")
            rows += [(cell, busiest, math.ceil(Fraction(str(x)) * tokens), "received", x) for x in RECEIVED_SHARES]
    cells, metric, least, name, threshold = zip(*rows, strict=True)
    return Events(np.array(cells), np.array(metric), np.array(least), list(name), list(threshold))
