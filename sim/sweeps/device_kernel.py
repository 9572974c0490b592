"""The kernel of `sim.sweeps.device`: a block of threads takes a layer draw, and its trials one after another.

A thread routes one token after another (`sim.router.one_token`), and the block counts experts in shared memory. At each step
size all its cells are scored from these counts.
"""

import math
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import config, cuda, float32, float64, int32, int64, uint64

from sim.router.one_token import Address, Token, expert_of, new_token, route_token
from sim.router.tables import GroupedTopk, Layer, fill_alias, gap_of, gap_of_others, total_of
from sim.scoring import METRICS
from sim.streams import POPULARITY, REQUEST, word_at
from sim.traffic.synthetic import (
    SPREAD_MEAN,
    SPREAD_RANGE,
    SPREAD_SD,
    STEEP_SHARE,
    STEEP_TILT,
    STUDENT_DF,
    TILT_MEAN,
    TILT_SD,
)

SIMULATED = bool(vars(config)["ENABLE_CUDASIM"])
if SIMULATED:
    from scipy.special import ndtri as quantile
else:
    from numba.cuda.libdevice import normcdfinv as quantile

_jit: Any = cuda.jit
if not SIMULATED:
    _jit = _jit(max_registers=128)  # so that 16 warps share a processor, none with registers in memory

TABLE, LOGNORMAL, TILTED = range(3)
MOST_RANKS = 0x7FFF
_N_METRICS, _NO_RANK = len(METRICS), 0x7FFFFFFF
assert METRICS == ("max_load", "idle_ranks", "distinct_experts_busiest", "distinct_experts_max"), (
    "as `_scores` has them"
)


class Router(NamedTuple):
    """What a kernel is compiled for, so that its loops are unrolled and its addresses known."""

    n_experts: int
    n_group: int
    topk_group: int
    top_k: int
    n_threads: int


class Popularity(NamedTuple):
    """How the mean logits of a request come about."""

    kind: int  # TABLE, LOGNORMAL or TILTED
    sigma: float
    table: Any  # float64 [layers, n_experts]: logits of layer draws in turn; of tilted popularity its profile
    request_sigma: float
    sd: Any  # float64 [layers, n_experts]
    n_factors: int
    loadings: Any  # float64 [layers, at least n_factors, n_experts]
    tokens_per_request: int


class Cells(NamedTuple):
    """What is scored. Cells lie step by step; the ranks of a step's cells are its items."""

    tokens: Any  # int64 [steps], ascending
    first_cell: Any  # int32 [steps + 1]
    cell: Any  # int32 [cells], places among the stage's cells
    first_item: Any  # int32 [steps + 1]
    item_cell: Any  # int32 [items], places in the step
    item_pair: Any  # int32 [items]
    item_rank: Any  # int32 [items]
    item_load: Any  # int32 [items], where in the values the load is summed; -1 for nowhere
    first_event: Any  # int32 [cells of the stage + 1]
    event_metric: Any  # int32 [events]
    event_least: Any  # int32 [events]
    first_bin: Any  # int64 [cells of the stage * metrics]
    baseline: Any  # int32 [cells of the stage], place in its step of the cell that cross-products are taken with
    ranks_per_node: int
    events_at: int  # values of a draw: metrics of cells, events, ranks and nodes reached under pairs, loads of ranks
    reached_at: int
    loads_at: int
    n_values: int


class Places(NamedTuple):
    """`sim.scoring.Layouts`, and which of them each draw has under each pair."""

    ranks: Any
    experts: Any
    bounds: Any
    rows: Any  # int32 [draws or 1, pairs]


class Room(NamedTuple):
    """Where arrays begin in shared memory, in their own units."""

    weight: int
    alias: int
    total: int
    scratch: int
    gap_without: int
    gap: int
    counts: int
    first: int
    token: int
    end: int


def room_of(router: Router) -> Room:
    """Shared memory that a kernel takes whatever is scored; its tables are made where tokens are worked later."""
    n, n_group = router.n_experts, router.n_group
    weight, alias, total, end = (int(at) for at in np.cumsum([0, n, n, n_group]))  # of 8 bytes
    gap_without, gap, counts, first, end = (int(at) for at in np.cumsum([2 * end, n, n_group, n, router.top_k]))  # of 4
    token = (end + 1) // 2 * 2
    of_tokens = router.n_threads * int(new_token(n_group, router.topk_group, router.top_k).real.size)
    return Room(weight, alias, total, token // 2, gap_without, gap, counts, first, token, token + max(4 * n, of_tokens))


@cuda.jit(device=True)
def _uniform(index, row, sequence, purpose, k0, k1):
    return (float(word_at(index, row, sequence, purpose, k0, k1)) + 0.5) * 2.0**-32


@cuda.jit(device=True)
def _logit(e, draw, layer, trial, request, k0, k1, popularity):
    """Mean logit of an expert for a request of a trial, as `SyntheticTraffic` draws it."""
    n_experts, kind = popularity.table.shape[1], popularity.kind
    mu = popularity.table[layer, e]
    if kind == LOGNORMAL:
        mu = popularity.sigma * quantile(_uniform(e, draw, 0, POPULARITY, k0, k1))
    elif kind == TILTED:
        tilt = STEEP_TILT
        if _uniform(0, draw, 0, POPULARITY, k0, k1) >= STEEP_SHARE:
            tilt = max(0.0, TILT_MEAN + TILT_SD * quantile(_uniform(1, draw, 0, POPULARITY, k0, k1)))
        spread = SPREAD_MEAN + SPREAD_SD * quantile(_uniform(2, draw, 0, POPULARITY, k0, k1))
        spread = min(max(spread, SPREAD_RANGE[0]), SPREAD_RANGE[1])
        product = 1.0
        for part in range(1, 4):
            product *= _uniform(3 + part * n_experts + e, draw, 0, POPULARITY, k0, k1)
        student = quantile(_uniform(3 + e, draw, 0, POPULARITY, k0, k1)) / math.sqrt(
            -2.0 * math.log(product) / STUDENT_DF
        )
        mu = tilt * mu + spread * student / math.sqrt(1.5)
    if popularity.request_sigma > 0:
        effect = popularity.sd[layer, e] * quantile(_uniform(e, trial, request, REQUEST, k0, k1))
        for f in range(popularity.n_factors):
            normal = quantile(_uniform(n_experts + f, trial, request, REQUEST, k0, k1))
            effect += normal * popularity.loadings[layer, f, e]
        mu += popularity.request_sigma * effect
    return mu


@cuda.jit(device=True)
def _add(number, v, clustered, values, draw, sums, block):
    """Add to a value: of a draw, which several blocks may share; or, where this is all of it, to the sums over draws."""
    if clustered:
        cuda.atomic.add(values, (draw, v), number)
    else:
        sums[block, 0, v] += number
        sums[block, 1, v] += int64(number) * number


@cuda.jit(device=True)
def _scores(c, busiest, idle, lowest, distinct_most):
    """The METRICS of a cell."""
    return int64(busiest[c]), int64(idle[c]), int64(lowest[c] & 0xFFFF), int64(distinct_most[c])


@cuda.jit(device=True)
def _reach(layout, top_k, first, places, ranks_per_node):
    """Ranks and nodes that a trial's first token is sent to under a layout."""
    n_ranks, n_nodes = 0, 0
    for k in range(top_k):
        rank = places.ranks[layout, first[k]]
        new_rank, new_node = 1, 1
        for j in range(k):
            other = places.ranks[layout, first[j]]
            if other == rank:
                new_rank = 0
            if other // ranks_per_node == rank // ranks_per_node:
                new_node = 0
        n_ranks += new_rank
        n_nodes += new_node
    return n_ranks, n_nodes


@cache
def kernel_of(router: Router) -> Any:
    """The kernel for a router and a number of threads.

    It takes the stage's trials start .. stop - 1 of the layer draws first_draw .. first_draw + n - 1 of n_draws, and adds to
    bins int32, their histograms. Where a draw has but one trial, it sets sums int64 [blocks, 3, values]: sums over the draws of a
    block of Y, Y**2 and, of metrics, Y * Y of the baseline. Where a draw may have more, which `parts` blocks share, it adds to
    values int64 [draws, values]. In shared memory `cells_at` begins what is kept of the `most_cells` cells of a step.
    """
    n_experts, n_group, topk_group, top_k, n_threads = router
    size, room, slots = n_experts // n_group, room_of(router), new_token(n_group, topk_group, top_k)
    weight_at, alias_at, total_at, scratch_at, gap_without_at, gap_at, counts_at, first_at, token_at, _ = room
    places_at, n_slots = int(slots.places), int(slots.n_slots)

    @_jit
    def run(
        first_draw, n, parts, start, stop, n_draws, key, group_sigma, score_law, popularity, cells, places, cells_at, most_cells,
        bins, values, sums,
    ):  # fmt: skip
        doubles, unsigned = cuda.shared.array(0, float64), cuda.shared.array(0, uint64)
        reals, wholes = cuda.shared.array(0, float32), cuda.shared.array(0, int32)
        thread = cuda.threadIdx.x
        weight = doubles[weight_at : weight_at + n_experts]
        total = doubles[total_at : total_at + n_group]
        share = doubles[scratch_at : scratch_at + n_experts]
        stack = doubles[scratch_at + n_experts : scratch_at + 2 * n_experts]
        alias = unsigned[alias_at : alias_at + n_experts]
        gap_without = reals[gap_without_at : gap_without_at + n_experts]
        gap = reals[gap_at : gap_at + n_group]
        counts = wholes[counts_at : counts_at + n_experts]
        first = wholes[first_at : first_at + top_k]
        loads = wholes[token_at:]  # no token is worked while ranks are scored
        busiest, lowest = wholes[cells_at:], wholes[cells_at + most_cells :]
        idle, distinct_most = wholes[cells_at + 2 * most_cells :], wholes[cells_at + 3 * most_cells :]
        own = Token(
            reals, wholes, np.uint32(token_at + thread), np.uint32(n_threads), np.uint32(places_at), np.uint32(n_slots)
        )
        topk = GroupedTopk(n_group, size, topk_group, top_k, group_sigma, score_law)
        tables = Layer(weight, gap, gap_without, alias, (share, stack))
        k0, k1 = key[0], key[1]
        clustered, block = n_draws < stop, cuda.blockIdx.x
        n_steps, n_values, n_pairs = cells.tokens.size, cells.n_values, places.rows.shape[1]
        for v in range(thread, 0 if clustered else n_values, n_threads):
            sums[block, 0, v] = sums[block, 1, v] = sums[block, 2, v] = 0
        cuda.syncthreads()
        for unit in range(block, n * parts, cuda.gridDim.x):
            d = unit // parts
            draw, place_row = first_draw + d, d % places.rows.shape[0]
            layer = draw % popularity.table.shape[0]
            trial = start + (draw - start) % n_draws + unit % parts * n_draws
            while trial < stop:
                cuda.syncthreads()
                for e in range(thread, n_experts, n_threads):
                    counts[e] = 0
                token_start, step, request = 0, 0, -1
                while step < n_steps:
                    if token_start // popularity.tokens_per_request != request:
                        request = token_start // popularity.tokens_per_request
                        cuda.syncthreads()
                        for e in range(thread, n_experts, n_threads):
                            weight[e] = math.exp(_logit(e, draw, layer, trial, request, k0, k1, popularity))
                        cuda.syncthreads()
                        for g in range(thread, n_group, n_threads):
                            total[g] = total_of(weight, g * size, (g + 1) * size)
                            gap[g] = gap_of(total[g])
                        cuda.syncthreads()
                        for e in range(thread, n_experts, n_threads):
                            g = np.uint32(e) // np.uint32(size)  # unsigned and short: a long division is slow here
                            gap_without[e] = gap_of_others(e, g * size, (g + 1) * size, total[g], weight)
                        for g in range(thread, n_group, n_threads):
                            fill_alias(g * size, (g + 1) * size, total[g], weight, alias, tables.scratch)
                        cuda.syncthreads()
                    token_stop = min(cells.tokens[step], (request + 1) * popularity.tokens_per_request)
                    for token in range(token_start + thread, token_stop, n_threads):
                        route_token(Address(uint64(token), uint64(trial), k0, k1), topk, tables, own)
                        for k in range(top_k):
                            e = expert_of(own, k)
                            cuda.atomic.add(counts, np.uint32(e), 1)
                            if token == 0:
                                first[k] = e
                    token_start = token_stop
                    if token_stop < cells.tokens[step]:
                        continue
                    first_cell, n_cells = cells.first_cell[step], cells.first_cell[step + 1] - cells.first_cell[step]
                    for c in range(thread, n_cells, n_threads):
                        busiest[c], lowest[c], idle[c], distinct_most[c] = 0, _NO_RANK, 0, 0
                    cuda.syncthreads()
                    first_item, n_items = cells.first_item[step], cells.first_item[step + 1] - cells.first_item[step]
                    for i in range(thread, n_items, n_threads):
                        item = first_item + i
                        c, rank, load, distinct = cells.item_cell[item], cells.item_rank[item], 0, 0
                        row = places.rows[place_row, cells.item_pair[item]]
                        for slot in range(places.bounds[row, 1 + rank], places.bounds[row, 2 + rank]):
                            pairs = counts[np.uint32(places.experts[row, slot])]
                            load += pairs
                            distinct += 1 if pairs > 0 else 0
                        loads[2 * i], loads[2 * i + 1] = load, distinct
                        if load == 0:
                            cuda.atomic.add(idle, c, 1)
                        cuda.atomic.max(distinct_most, c, distinct)
                        cuda.atomic.max(busiest, c, load)
                        if cells.item_load[item] >= 0:
                            _add(load, cells.item_load[item], clustered, values, d, sums, block)
                    cuda.syncthreads()
                    for i in range(thread, n_items, n_threads):
                        c = cells.item_cell[first_item + i]
                        # Of the ranks with the largest load the lowest, with its distinct experts.
                        if loads[2 * i] == busiest[c]:
                            cuda.atomic.min(lowest, c, (cells.item_rank[first_item + i] << 16) | loads[2 * i + 1])
                    cuda.syncthreads()
                    for c in range(thread, n_cells, n_threads):
                        at = cells.cell[first_cell + c]
                        scores = _scores(c, busiest, idle, lowest, distinct_most)
                        of_baseline = _scores(cells.baseline[at], busiest, idle, lowest, distinct_most)
                        for m in range(_N_METRICS):
                            v = _N_METRICS * at + m
                            cuda.atomic.add(bins, cells.first_bin[v] + scores[m], 1)
                            _add(scores[m], v, clustered, values, d, sums, block)
                            if not clustered:
                                sums[block, 2, v] += scores[m] * of_baseline[m]
                        if clustered:
                            for event in range(cells.first_event[at], cells.first_event[at + 1]):
                                if scores[cells.event_metric[event]] >= cells.event_least[event]:
                                    _add(1, cells.events_at + event, clustered, values, d, sums, block)
                    cuda.syncthreads()  # scores are also looked at by those who have the cell as baseline
                    step += 1
                for p in range(thread, n_pairs, n_threads):
                    at = cells.reached_at + 2 * p
                    reached = _reach(places.rows[place_row, p], top_k, first, places, cells.ranks_per_node)
                    _add(reached[0], at, clustered, values, d, sums, block)
                    _add(reached[1], at + 1, clustered, values, d, sums, block)
                trial += parts * n_draws

    return run
