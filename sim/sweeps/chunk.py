"""One chunk of a sweep: some layer draws, with all of their trials, sampled, scored and summed."""

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


def chunk_draws(plan: Plan) -> list[range]:
    """The draws of each chunk: about a million tokens, bounded memory, and enough chunks to share out."""
    tokens_of_draw = -(-plan.trials // plan.draws) * int(plan.steps[-1])
    numbers_of_draw = len(plan.cells) + plan.model.n_experts * (len(plan.steps) + _requests(plan))
    size = min(
        _CHUNK_TOKENS // tokens_of_draw,
        _CHUNK_NUMBERS // numbers_of_draw,
        _CHUNK_DRAWS,
        -(-plan.draws // _LEAST_CHUNKS),
    )
    size = max(1, size)
    return [range(start, min(start + size, plan.draws)) for start in range(0, plan.draws, size)]


def _requests(plan: Plan) -> int:
    """Requests of a trial whose logits are held at a time."""
    if isinstance(plan.workload, RecordedTraffic) or not plan.workload.request_sigma:
        return 1
    return -(-int(plan.steps[-1]) // plan.workload.tokens_per_request)


def _chunk_layouts(plan: Plan, draws: range) -> tuple[Layouts, np.ndarray]:
    """Layouts that the chunk needs, and int64 [draws, pairs] with the row of each draw and pair."""
    rows, sizes, first = [], [], 0
    layout_of_pair = np.empty((len(draws), len(plan.pairs)), np.int64)
    for p, (_, ep_size) in enumerate(plan.pairs):
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


def _score_trials(
    plan: Plan, trials: range, layouts: Layouts, layout_of_pair: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sample and score consecutive trials.

    Returns scores int32 [trials, cells, METRICS], ranks and nodes of the first token int64 [trials, pairs, 2], and the
    load of each rank of each pair at the largest step, int64 [trials, ranks].
    """
    pair_of_cell, step_of_cell = (np.array(column) for column in zip(*plan.cells, strict=True))
    sizes = np.array([ep_size for _, ep_size in plan.pairs])
    counts, ids = draw_trials(plan.model, plan.workload, plan.seed, trials, plan.draws, plan.steps)
    scores = np.empty((len(trials), len(plan.cells), len(METRICS)), np.int32)
    reached = np.empty((len(trials), len(plan.pairs), 2), np.int64)
    loads = np.empty((len(trials), int(sizes.sum())), np.int64)
    score_blocks(counts, step_of_cell, pair_of_cell, layout_of_pair, layouts, scores)
    fan_out(ids[:, 0], layout_of_pair, layouts, plan.ranks_per_node, reached)
    rank_loads(counts[:, -1], layout_of_pair, layouts, np.cumsum(sizes) - sizes, loads)
    return scores, reached, loads


def run_chunk(plan: Plan, draws: range) -> Tally:
    """Sample and score all trials of some consecutive draws: round i holds trials i * plan.draws + draw."""
    layouts, layout_of_pair = _chunk_layouts(plan, draws)
    events = events_of(plan)
    clustered = plan.draws < plan.trials
    blocks = np.zeros(len(draws), np.int64)
    metric = np.zeros((len(draws), len(plan.cells), len(METRICS)), np.int64)
    event = np.zeros((len(draws), len(events.cell)), np.int64)
    reached = np.zeros((len(draws), len(plan.pairs), 2), np.int64)
    load = np.zeros((len(draws), sum(ep_size for _, ep_size in plan.pairs)), np.int64)
    keys, counts = np.empty(0, np.int64), np.empty(0, np.int64)
    for first in range(draws.start, plan.trials, plan.draws):
        n = min(len(draws), plan.trials - first)
        scores, reached_now, load_now = _score_trials(plan, range(first, first + n), layouts, layout_of_pair)
        new_keys, new_counts = np.unique(histogram_keys(scores), return_counts=True)
        keys, counts = np.concatenate([keys, new_keys]), np.concatenate([counts, new_counts])
        if len(keys) > 4 * len(new_keys):
            keys, counts = merge_counts(keys, counts)
        blocks[:n] += 1
        metric[:n] += scores
        reached[:n] += reached_now
        load[:n] += load_now
        if clustered:
            event[:n] += events.happen(scores)
    return Tally(
        *merge_counts(keys, counts),
        *_sums(metric, blocks),
        (metric * metric[:, plan.baseline_cells]).sum(axis=0),
        *_sums(event, blocks)[1:],
        *_sums(reached, blocks),
        *_sums(load, blocks),
    )


def _sums(of_draw: np.ndarray, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sums over draws of Y, Y**2 and n * Y; of_draw int64 [draws, ...], blocks int64 [draws]."""
    weight = blocks.reshape(-1, *[1] * (of_draw.ndim - 1))
    return of_draw.sum(axis=0), (of_draw * of_draw).sum(axis=0), (of_draw * weight).sum(axis=0)
