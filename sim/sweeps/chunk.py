"""One chunk of a sweep: some layer draws, with their trials, sampled, scored and summed."""

from typing import NamedTuple

import numpy as np

from sim.placement import random_ranks
from sim.router import draw_trials
from sim.score import METRICS, Layouts, fan_out, lay_out, rank_loads, score_blocks
from sim.sweeps.events import events_of
from sim.sweeps.plan import Plan
from sim.sweeps.tally import Tally, histogram_keys, merge_counts
from sim.workload import RecordedTraffic

_CHUNK_TOKENS = 2**20
_CHUNK_DRAWS = 256
_CHUNK_NUMBERS = 2**21  # bounds the memory of a chunk
_LEAST_CHUNKS = 16


class Stage(NamedTuple):
    """A part of a sweep: consecutive trials of the cells that are still alive. Trial t belongs to draw t % draws."""

    trials: range
    draws: int
    cells: tuple[int, ...]

    def trials_of(self, draw: int) -> range:
        """The trials that belong to a draw."""
        first = self.trials.start + (draw - self.trials.start) % self.draws
        return range(first, self.trials.stop, self.draws)


def stage_chunks(plan: Plan, stage: Stage) -> list[range]:
    """The draws of each chunk: about a million tokens, bounded memory, and enough chunks to share out."""
    steps = np.unique(plan.grid.tokens_of_cell[list(stage.cells)])
    first = stage.trials.start if stage.draws > stage.trials.start else 0
    draws = range(first, min(stage.draws, stage.trials.stop))
    tokens_of_draw = -(-len(stage.trials) // len(draws)) * int(steps[-1])
    numbers_of_draw = len(stage.cells) + plan.model.n_experts * (len(steps) + _requests(plan, int(steps[-1])))
    size = min(
        _CHUNK_TOKENS // tokens_of_draw,
        _CHUNK_NUMBERS // numbers_of_draw,
        _CHUNK_DRAWS,
        -(-len(draws) // _LEAST_CHUNKS),
    )
    size = max(1, size)
    return [range(start, min(start + size, draws.stop)) for start in range(draws.start, draws.stop, size)]


def _requests(plan: Plan, largest_step: int) -> int:
    """Requests of a trial whose logits are held at a time."""
    if isinstance(plan.workload, RecordedTraffic) or not plan.workload.request_sigma:
        return 1
    return -(-largest_step // plan.workload.tokens_per_request)


def chunk_layouts(plan: Plan, draws: range) -> tuple[Layouts, np.ndarray]:
    """Layouts that some draws need, and int64 [draws, pairs] with the row of each draw and pair."""
    pairs, rows, sizes, first = plan.grid.pairs, [], [], 0
    layout_of_pair = np.empty((len(draws), len(pairs)), np.int64)
    for p, (_, ep_size) in enumerate(pairs):
        fixed = plan.layer_ranks[p]
        if fixed is None:
            ranks = random_ranks(plan.model.n_experts, ep_size, plan.seed, draws.start, len(draws))
            layout_of_pair[:, p] = first + np.arange(len(draws))
        else:
            ranks = fixed
            layout_of_pair[:, p] = first + np.arange(draws.start, draws.stop) % len(fixed)
        rows.append(ranks)
        sizes += [ep_size] * len(ranks)
        first += len(ranks)
    return lay_out(np.concatenate(rows), np.array(sizes)), layout_of_pair


class _Scorer:
    """Samples and scores the trials of a chunk under the live cells."""

    def __init__(self, plan: Plan, stage: Stage, draws: range) -> None:
        grid = plan.grid
        self.plan, self.stage, self.cells = plan, stage, np.array(stage.cells)
        self.layouts, self.layout_of_pair = chunk_layouts(plan, draws)
        self.steps, self.step_of_cell = np.unique(grid.tokens_of_cell[self.cells], return_inverse=True)
        self.pair_of_cell = grid.pair_of_cell[self.cells]
        self.loaded = np.flatnonzero(np.isin(grid.largest_cells, self.cells))  # pairs whose rank loads are kept
        sizes = np.array([grid.pairs[p][1] for p in self.loaded], np.int64)
        self.first_rank = np.cumsum(sizes) - sizes
        self.ranks = np.flatnonzero(np.isin(grid.pair_of_rank, self.loaded))
        self.step_of_loaded = np.searchsorted(self.steps, grid.tokens_of_cell[grid.largest_cells[self.loaded]])

    def score(self, trials: range) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sample and score consecutive trials of the chunk's first draws.

        Returns scores int32 [trials, live cells, METRICS], ranks and nodes of the first token int64 [trials, pairs, 2],
        and the loads of `self.ranks` at the largest steps of their pairs, int64 [trials, ranks].
        """
        plan, n = self.plan, len(trials)
        counts, ids = draw_trials(plan.model, plan.workload, plan.seed, trials, self.stage.draws, self.steps)
        scores = np.empty((n, len(self.cells), len(METRICS)), np.int32)
        reached = np.empty((n, self.layout_of_pair.shape[1], 2), np.int64)
        loads = np.empty((n, len(self.ranks)), np.int64)
        score_blocks(counts, self.step_of_cell, self.pair_of_cell, self.layout_of_pair, self.layouts, scores)
        fan_out(ids[:, 0], self.layout_of_pair, self.layouts, plan.ranks_per_node, reached)
        of_loaded = np.ascontiguousarray(self.layout_of_pair[:, self.loaded])
        rank_loads(counts, self.step_of_loaded, of_loaded, self.layouts, self.first_rank, loads)
        return scores, reached, loads


def run_chunk(plan: Plan, stage: Stage, draws: range) -> Tally:
    """Sample and score the stage's trials of some consecutive draws, a trial of each draw at a time."""
    grid, scorer = plan.grid, _Scorer(plan, stage, draws)
    events = events_of(grid)
    live = np.flatnonzero(np.isin(events.cell, scorer.cells))
    place_of_event = np.searchsorted(scorer.cells, events.cell[live])
    clustered = stage.draws < stage.trials.stop
    blocks = np.zeros(len(draws), np.int64)
    metric = np.zeros((len(draws), len(scorer.cells), len(METRICS)), np.int64)
    event = np.zeros((len(draws), len(live)), np.int64)
    reached = np.zeros((len(draws), len(grid.pairs), 2), np.int64)
    load = np.zeros((len(draws), len(scorer.ranks)), np.int64)
    keys, counts = np.empty(0, np.int64), np.empty(0, np.int64)
    for first in stage.trials_of(draws.start):
        n = min(len(draws), stage.trials.stop - first)
        scores, reached_now, load_now = scorer.score(range(first, first + n))
        new_keys, new_counts = np.unique(histogram_keys(scores, scorer.cells), return_counts=True)
        keys, counts = np.concatenate([keys, new_keys]), np.concatenate([counts, new_counts])
        if len(keys) > 4 * len(new_keys):
            keys, counts = merge_counts(keys, counts)
        blocks[:n] += 1
        metric[:n] += scores
        reached[:n] += reached_now
        load[:n] += load_now
        if clustered:
            event[:n] += scores[:, place_of_event, events.metric[live]] >= events.least[live]
    tally = Tally.zero(len(grid.cells), len(events.cell), len(grid.pair_of_rank))
    tally.keys, tally.counts = merge_counts(keys, counts)
    tally.design[scorer.cells] = blocks.sum(), (blocks > 0).sum(), (blocks * blocks).sum()
    _fill_sums(tally, "metric", scorer.cells, metric, blocks)
    baseline = np.searchsorted(scorer.cells, grid.baseline_cells[scorer.cells])
    tally.metric_cross[scorer.cells] = (metric * metric[:, baseline]).sum(axis=0)
    _fill_sums(tally, "event", live, event, blocks)
    _fill_sums(tally, "reached", scorer.cells, reached[:, scorer.pair_of_cell], blocks)
    _fill_sums(tally, "load", scorer.ranks, load, blocks)
    return tally


def _fill_sums(tally: Tally, what: str, where: np.ndarray, of_draw: np.ndarray, blocks: np.ndarray) -> None:
    """Sums over draws of Y, Y**2 and n * Y; of_draw int64 [draws, ...], blocks int64 [draws]."""
    weight = blocks.reshape(-1, *[1] * (of_draw.ndim - 1))
    for part, values in (("", of_draw), ("_square", of_draw * of_draw), ("_weighted", of_draw * weight)):
        if hasattr(tally, what + part):
            getattr(tally, what + part)[where] = values.sum(axis=0)
