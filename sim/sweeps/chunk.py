"""One chunk of a sweep: some layer draws, with their trials, sampled, scored and summed."""

from typing import NamedTuple

import numpy as np

from sim.router import draw_trials
from sim.scoring import METRICS, fan_out, rank_loads, score_blocks
from sim.sweeps.events import events_of
from sim.sweeps.layouts import chunk_groups
from sim.sweeps.plan import Plan
from sim.sweeps.tally import Tally, histogram_keys, merge_counts
from sim.traffic import RecordedTraffic

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
    tokens_of_draw = -(-len(stage.trials) // len(draws)) * int(steps[-1]) + plan.fit_tokens
    numbers_of_draw = len(stage.cells) + plan.model.n_experts * (len(steps) + _requests(plan, int(steps[-1])))
    numbers_of_draw += plan.slots_of_draw + plan.most_slots * len(steps)
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


class _Scorer:
    """Samples and scores the trials of a chunk under the live cells."""

    def __init__(self, plan: Plan, stage: Stage, draws: range) -> None:
        grid = plan.grid
        self.plan, self.stage, self.cells = plan, stage, np.array(stage.cells)
        self.steps, self.step_of_cell = np.unique(grid.tokens_of_cell[self.cells], return_inverse=True)
        self.pair_of_cell = grid.pair_of_cell[self.cells]
        self.groups = chunk_groups(plan, draws, np.unique(self.pair_of_cell).tolist())
        self.loaded = np.flatnonzero(np.isin(grid.largest_cells, self.cells))  # pairs whose rank loads are kept
        sizes = np.array([grid.pairs[p][1] for p in self.loaded], np.int64)
        self.first_rank = np.cumsum(sizes) - sizes
        self.ranks = np.flatnonzero(np.isin(grid.pair_of_rank, self.loaded))
        self.step_of_loaded = np.searchsorted(self.steps, grid.tokens_of_cell[grid.largest_cells[self.loaded]])
        all_tokens = plan.replica_choice == "vllm_hash" and any(group.copies for group in self.groups)
        self.n_ids = int(self.steps[-1]) if all_tokens else 1

    def score(self, trials: range) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sample and score consecutive trials of the chunk's first draws.

        Returns scores int32 [trials, live cells, METRICS], ranks and nodes of the first token int64 [trials, pairs, 2],
        and the loads of `self.ranks` at the largest steps of their pairs, int64 [trials, ranks].
        """
        plan, n = self.plan, len(trials)
        counts, ids = draw_trials(
            plan.model, plan.workload, plan.seed, trials, self.stage.draws, self.steps, self.n_ids
        )
        scores = np.empty((n, len(self.cells), len(METRICS)), np.int32)
        reached = np.zeros((n, len(plan.grid.pairs), 2), np.int64)
        loads = np.zeros((n, len(self.ranks)), np.int64)
        for group in self.groups:
            cells = np.flatnonzero(np.isin(self.pair_of_cell, group.pairs))
            loaded = np.flatnonzero(np.isin(self.loaded, group.pairs))
            of_group = np.searchsorted(group.pairs, self.pair_of_cell)  # of other groups' cells: not looked at
            rows = np.ascontiguousarray(group.rows[:, np.searchsorted(group.pairs, self.loaded[loaded])])
            dealt = group.deal(counts, ids, self.steps, plan.replica_choice)
            score_blocks(dealt, cells, self.step_of_cell, of_group, group.rows, group.layouts, scores)
            first = group.slots_of_first(ids, trials.start)
            fan_out(first, group.pairs, group.rows, group.layouts, plan.ranks_per_node, reached)
            rank_loads(dealt, self.step_of_loaded[loaded], rows, group.layouts, self.first_rank[loaded], loads)
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
