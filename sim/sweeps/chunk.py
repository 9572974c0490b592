"""One chunk of a sweep: some layer draws, with their trials, sampled, scored and summed."""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import numpy as np

from sim.scoring import rank_loads
from sim.sweeps.grid import events_of
from sim.sweeps.plan import Plan
from sim.sweeps.steps import Blocks, Group, StepScorer, place_pairs
from sim.sweeps.tally import Tally, add_by_draw, add_events, add_moments, histogram, merge_counts

FIRST_TRIALS = 1024
"""Trials of the first stage under a precision; each further one doubles them."""
_LEAST_CHUNKS = 16
_PART_NUMBERS = 2**21  # that are held at a time


class ChunkSize(NamedTuple):
    """What a chunk may hold at most."""

    tokens: int = 2**20
    draws: int = 1024
    numbers: int = 2**23


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

    def batches(self, draws: range, most_trials: int) -> Iterator[np.ndarray]:
        """The trials of consecutive draws, int64, some at a time: of each draw in turn, and so on."""
        firsts, n = np.array(self.trials_of(draws.start)), max(1, most_trials // len(draws))
        for i in range(0, len(firsts), n):
            trials = (firsts[i : i + n, None] + np.arange(len(draws))).reshape(-1)
            yield trials[trials < self.trials.stop]

    def design(self, draws: range) -> tuple[int, int, int]:
        """Trials of consecutive draws, how many of these have any, and the sum of the squares of a draw's trials."""
        below = [
            trial // self.draws * len(draws) + min(max(trial % self.draws - draws.start, 0), len(draws))
            for trial in (self.trials.start, self.trials.stop)
        ]
        n_trials, least = below[1] - below[0], len(self.trials) // self.draws  # a draw has so many, or one more
        more = n_trials - least * len(draws)
        return n_trials, len(draws) if least else more, len(draws) * least**2 + more * (2 * least + 1)


def first_stage(plan: Plan) -> Stage:
    """All cells: to the end, or, under a precision, to the first check."""
    cells = tuple(range(len(plan.grid.cells)))
    stop = plan.trials if plan.precision is None else min(FIRST_TRIALS, plan.trials)
    return stage_of(plan, range(stop), cells)


def stage_of(plan: Plan, new: range, cells: tuple[int, ...]) -> Stage:
    """The stage that adds the trials `new` of some cells."""
    if plan.draws is None:
        return Stage(new, new.stop, cells)
    return Stage(range(new.stop), min(plan.draws, new.stop), cells)  # a draw's trials belong together: from the start


def stage_chunks(plan: Plan, stage: Stage, most: ChunkSize = CPU_CHUNKS) -> list[range]:
    """The draws of each chunk: by default about a million tokens, and enough chunks to share out."""
    steps = np.unique(plan.grid.tokens_of_cell[list(stage.cells)])
    first = stage.trials.start if stage.draws > stage.trials.start else 0
    draws = range(first, min(stage.draws, stage.trials.stop))
    tokens_of_draw = -(-len(stage.trials) // len(draws)) * int(steps[-1]) + plan.fit_tokens
    size = min(
        most.tokens // tokens_of_draw,
        most.numbers // (_numbers_of_trial(plan, stage) + plan.slots_of_draw),
        most.draws,
        -(-len(draws) // _LEAST_CHUNKS),
    )
    size = max(1, size)
    return [range(start, min(start + size, draws.stop)) for start in range(draws.start, draws.stop, size)]


def _numbers_of_trial(plan: Plan, stage: Stage) -> int:
    """About how many numbers a trial holds."""
    n_steps = len(np.unique(plan.grid.tokens_of_cell[list(stage.cells)]))
    return len(stage.cells) + plan.model.n_experts * (n_steps + 1) + plan.most_slots * n_steps


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
    """Sample and score the stage's trials of some consecutive draws, in parts of bounded memory."""
    most_draws = max(1, _PART_NUMBERS // (_numbers_of_trial(plan, stage) + plan.slots_of_draw))
    total = Tally.zero(plan.grid)
    for start in range(draws.start, draws.stop, most_draws):
        total.add(_run_part(plan, stage, range(start, min(start + most_draws, draws.stop))))
    total.compact()
    return total


def _run_part(plan: Plan, stage: Stage, draws: range) -> Tally:
    grid, cells = plan.grid, np.array(stage.cells)
    groups = place_pairs(plan, draws, np.unique(grid.pair_of_cell[cells]).tolist())
    scorer = StepScorer(plan, cells, groups, stage.draws)
    largest, events = _LargestSteps(scorer), events_of(grid)
    clustered = stage.draws < stage.trials.stop  # else every draw has one trial, and the histograms tell of events
    live = np.flatnonzero(np.isin(events.cell, cells)) if clustered else np.empty(0, np.int64)
    event = (np.searchsorted(cells, events.cell[live]), events.metric[live], events.least[live])
    n_of = {"metric": (len(cells), len(grid.metrics)), "event": (len(live),), "reached": (len(grid.pairs), 2)}
    n_of |= {"received": (len(cells), 2 if grid.received else 0), "load": (len(largest.ranks),)}
    sums = {what: np.zeros((len(draws), *n), np.int64) for what, n in n_of.items()}
    n_trials = np.zeros((len(draws), 1), np.int64)
    most_trials = min(_PART_NUMBERS // _numbers_of_trial(plan, stage), CPU_CHUNKS.tokens // int(scorer.tokens[-1]))
    keys, counts = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for trials in stage.batches(draws, most_trials):
        loads = np.zeros((len(trials), len(largest.ranks)), np.int64)
        seen = scorer.score(trials, partial(largest.load, loads=loads))
        draw = (trials - trials[0]) % stage.draws
        add_by_draw(np.ones((len(trials), 1), np.int64), draw, n_trials)
        for what, values in (("metric", seen.scores), ("reached", seen.reached), ("received", seen.received)):
            add_by_draw(values.reshape(len(trials), -1), draw, sums[what].reshape(len(draws), -1))
        add_by_draw(loads, draw, sums["load"])
        if clustered:
            add_events(seen.scores, draw, *event, sums["event"])
        for parts, part in zip((keys, counts), histogram(seen.scores, cells), strict=True):
            parts.append(part)
    tally = Tally.zero(grid)
    tally.keys, tally.counts = merge_counts(np.concatenate(keys), np.concatenate(counts))
    tally.design[cells] = stage.design(draws)
    baseline = np.searchsorted(cells, grid.baseline_cells[cells])
    tally.metric_cross[cells] = np.einsum("d...,d...->...", sums["metric"], sums["metric"][:, baseline])
    sums["reached"] = sums["reached"][:, scorer.pair_of_cell]
    of_cells = dict.fromkeys(("metric", "reached", "received"), cells)
    for what, where in (of_cells | {"event": live, "load": largest.ranks}).items():
        _fill_sums(tally, what, where, sums[what], n_trials[:, 0])
    return tally


def _fill_sums(tally: Tally, what: str, where: np.ndarray, of_draw: np.ndarray, n_trials: np.ndarray) -> None:
    """Sums over draws of Y, Y**2 and n * Y; of_draw int64 [draws, ...], n_trials int64 [draws]."""
    values = of_draw.reshape(len(of_draw), -1)
    total, square, weighted = np.zeros((3, values.shape[1]), np.int64)
    add_moments(values, n_trials, total, square, weighted)
    for part, sums in (("", total), ("_square", square), ("_weighted", weighted)):
        if part or what != "event":  # of events the histograms tell it
            getattr(tally, f"{what}{part}")[where] = sums.reshape(of_draw.shape[1:])
