"""One chunk of a sweep: some layer draws, with their trials, sampled, scored and summed."""

from functools import partial
from typing import NamedTuple

import numpy as np

from sim.scoring import rank_loads
from sim.sweeps.grid import events_of
from sim.sweeps.plan import Plan
from sim.sweeps.steps import Blocks, Group, StepScorer, place_pairs
from sim.sweeps.tally import Tally, histogram_keys, merge_counts

_LEAST_CHUNKS = 16


class ChunkSize(NamedTuple):
    """What a chunk may hold at most."""

    tokens: int = 2**20
    draws: int = 1024
    numbers: int = 2**21  # bounds its memory


CPU_CHUNKS = ChunkSize()


class Stage(NamedTuple):
    """A part of a sweep: consecutive trials of the cells that are still alive. Trial t belongs to draw t % draws."""

    trials: range
    draws: int
    cells: tuple[int, ...]

    def trials_of(self, draw: int) -> range:
        """The trials that belong to a draw."""
        first = self.trials.start + (draw - self.trials.start) % self.draws
        return range(first, self.trials.stop, self.draws)

    def design(self, draws: range) -> tuple[int, int, int]:
        """Trials of consecutive draws, how many of these have any, and the sum of the squares of a draw's trials."""
        below = [
            trial // self.draws * len(draws) + min(max(trial % self.draws - draws.start, 0), len(draws))
            for trial in (self.trials.start, self.trials.stop)
        ]
        n_trials, least = below[1] - below[0], len(self.trials) // self.draws  # a draw has so many, or one more
        more = n_trials - least * len(draws)
        return n_trials, len(draws) if least else more, len(draws) * least**2 + more * (2 * least + 1)


def stage_chunks(plan: Plan, stage: Stage, most: ChunkSize = CPU_CHUNKS) -> list[range]:
    """The draws of each chunk: by default about a million tokens; bounded memory, and enough chunks to share out."""
    steps = np.unique(plan.grid.tokens_of_cell[list(stage.cells)])
    first = stage.trials.start if stage.draws > stage.trials.start else 0
    draws = range(first, min(stage.draws, stage.trials.stop))
    tokens_of_draw = -(-len(stage.trials) // len(draws)) * int(steps[-1]) + plan.fit_tokens
    numbers_of_draw = len(stage.cells) + plan.model.n_experts * (len(steps) + 1)
    numbers_of_draw += plan.slots_of_draw + plan.most_slots * len(steps)
    if plan.grid.received:
        numbers_of_draw += len(plan.grid.pair_of_rank) * len(steps)
    size = min(
        most.tokens // tokens_of_draw,
        most.numbers // numbers_of_draw,
        most.draws,
        -(-len(draws) // _LEAST_CHUNKS),
    )
    size = max(1, size)
    return [range(start, min(start + size, draws.stop)) for start in range(draws.start, draws.stop, size)]


class _LargestSteps:
    """Loads of single ranks, at the largest step of each pair where that is scored."""

    def __init__(self, scorer: StepScorer) -> None:
        grid = scorer.plan.grid
        self.pairs = np.flatnonzero(np.isin(grid.largest_cells, scorer.cells))
        self.ranks = np.flatnonzero(np.isin(grid.pair_of_rank, self.pairs))  # of all pairs' ranks
        sizes = np.array([grid.pairs[pair][1] for pair in self.pairs], np.int64)
        self.first_rank = np.cumsum(sizes) - sizes
        self.step = np.searchsorted(scorer.tokens, grid.tokens_of_cell[grid.largest_cells[self.pairs]])

    def load(self, group: Group, blocks: Blocks, counts: np.ndarray, *, loads: np.ndarray) -> None:
        """Add the loads of the group's ranks to int64 [trials, ranks]."""
        mine = np.flatnonzero(np.isin(self.pairs, group.pairs))
        rows = np.ascontiguousarray(group.rows[:, np.searchsorted(group.pairs, self.pairs[mine])])
        rank_loads(blocks.counts, self.step[mine], rows, group.layouts, self.first_rank[mine], loads)


def run_chunk(plan: Plan, stage: Stage, draws: range) -> Tally:
    """Sample and score the stage's trials of some consecutive draws, a trial of each draw at a time."""
    grid, cells = plan.grid, np.array(stage.cells)
    groups = place_pairs(plan, draws, np.unique(grid.pair_of_cell[cells]).tolist())
    scorer = StepScorer(plan, cells, groups, stage.draws)
    largest, events = _LargestSteps(scorer), events_of(grid)
    live = np.flatnonzero(np.isin(events.cell, cells))
    place_of_event = np.searchsorted(cells, events.cell[live])
    clustered = stage.draws < stage.trials.stop
    blocks = np.zeros(len(draws), np.int64)
    metric = np.zeros((len(draws), len(cells), len(grid.metrics)), np.int64)
    event = np.zeros((len(draws), len(live)), np.int64)
    reached = np.zeros((len(draws), len(grid.pairs), 2), np.int64)
    received = np.zeros((len(draws), len(cells), 2 if grid.received else 0), np.int64)
    load = np.zeros((len(draws), len(largest.ranks)), np.int64)
    keys, counts = np.empty(0, np.int64), np.empty(0, np.int64)
    for first in stage.trials_of(draws.start):
        n = min(len(draws), stage.trials.stop - first)
        seen = scorer.score(range(first, first + n), partial(largest.load, loads=load[:n]))
        new_keys, new_counts = np.unique(histogram_keys(seen.scores, cells), return_counts=True)
        keys, counts = np.concatenate([keys, new_keys]), np.concatenate([counts, new_counts])
        if len(keys) > 4 * len(new_keys):
            keys, counts = merge_counts(keys, counts)
        blocks[:n] += 1
        metric[:n] += seen.scores
        reached[:n] += seen.reached
        received[:n] += seen.received
        if clustered:
            event[:n] += seen.scores[:, place_of_event, events.metric[live]] >= events.least[live]
    tally = Tally.zero(grid)
    tally.keys, tally.counts = merge_counts(keys, counts)
    tally.design[cells] = stage.design(draws)
    _fill_sums(tally, "metric", cells, metric, blocks)
    baseline = np.searchsorted(cells, grid.baseline_cells[cells])
    tally.metric_cross[cells] = (metric * metric[:, baseline]).sum(axis=0)
    _fill_sums(tally, "event", live, event, blocks)
    _fill_sums(tally, "reached", cells, reached[:, scorer.pair_of_cell], blocks)
    _fill_sums(tally, "received", cells, received, blocks)
    _fill_sums(tally, "load", largest.ranks, load, blocks)
    return tally


def _fill_sums(tally: Tally, what: str, where: np.ndarray, of_draw: np.ndarray, blocks: np.ndarray) -> None:
    """Sums over draws of Y, Y**2 and n * Y; of_draw int64 [draws, ...], blocks int64 [draws]."""
    weight = blocks.reshape(-1, *[1] * (of_draw.ndim - 1))
    for part, values in (("", of_draw), ("_square", of_draw * of_draw), ("_weighted", of_draw * weight)):
        if hasattr(tally, what + part):
            getattr(tally, what + part)[where] = values.sum(axis=0)
