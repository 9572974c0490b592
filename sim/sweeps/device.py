"""Chunks of a sweep on a CUDA device: sampled, scored and summed there, so that only sums come back.

A block of threads takes a layer draw, and its trials one after another; a thread routes one token after another
(`sim.router.one_token`), and the block counts experts in shared memory. At each step size all its cells are scored from
these counts. The sums are those of `sim.sweeps.chunk`, integer for integer: the words are the same, and so is every float
operation on tokens. Tables of layers are another matter: `exp` and the normal quantile are those of the device, and may
differ from the CPU's in the last digits of a float64. That changes the last digit of a float32 gap once in 1e7, and a token
by that once in 1e6: no token in 1e12.
"""

import math
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import config, cuda, float32, float64, int32, int64, uint64

from sim.errors import InputError
from sim.router.draw import score_law, token_key
from sim.router.one_token import Token, new_token, route_token, whole
from sim.router.tables import fill_alias, gap_of, gap_of_others, total_of
from sim.scoring import METRICS
from sim.streams import POPULARITY, REQUEST, word_at
from sim.sweeps.chunk import ChunkSize, Stage
from sim.sweeps.grid import events_of
from sim.sweeps.plan import Plan
from sim.sweeps.steps import place_pairs
from sim.sweeps.tally import VALUE_BITS, Tally
from sim.traffic import RecordedTraffic, SyntheticTraffic
from sim.traffic.synthetic import (
    SPREAD_MEAN,
    SPREAD_RANGE,
    SPREAD_SD,
    STEEP_SHARE,
    STEEP_TILT,
    STUDENT_DF,
    TILT_MEAN,
    TILT_SD,
    tilt_profile,
)

_SIMULATED = bool(vars(config)["ENABLE_CUDASIM"])
if _SIMULATED:
    from scipy.special import ndtri as quantile
else:
    from numba.cuda.libdevice import normcdfinv as quantile

_jit: Any = cuda.jit
if not _SIMULATED:
    _jit = _jit(max_registers=128)  # four blocks of threads to a processor
_SHARED_BYTES, _MOST_THREADS, _BLOCKS_PER_PROCESSOR = 46 * 1024, 128, 16
_MOST_BINS, _ONE_REQUEST, _N_METRICS = 2**28, 2**62, len(METRICS)
_TABLE, _LOGNORMAL, _TILTED = range(3)
_MOST_RANKS, _NO_RANK = 0x7FFF, 0x7FFFFFFF


class Popularity(NamedTuple):
    """How the mean logits of a request come about."""

    kind: int  # _TABLE, _LOGNORMAL or _TILTED
    sigma: float
    table: Any  # float64 [layers, n_experts]: logits of layer draws in turn; of tilted popularity its profile
    request_sigma: float
    sd: Any  # float64 [layers, n_experts]
    n_factors: int
    loadings: Any  # float64 [layers, at least n_factors, n_experts]
    tokens_per_request: int


class Router(NamedTuple):
    """What a token's experts depend on beside the popularity."""

    n_group: int
    topk_group: int
    top_k: int
    group_sigma: Any  # float32
    score_law: Any  # three float32, a tuple


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
    baseline: Any  # int32 [cells of the stage * metrics], values that cross-products are taken with
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
    busiest: int
    lowest: int
    idle: int
    distinct: int
    first: int
    token: int  # of the first thread, and so on as in `Token`
    next: int
    time: int
    mark: int
    group: int
    expert: int
    size: int


@cuda.jit(device=True)
def _uniform(index, row, sequence, purpose, k0, k1):
    return (float(word_at(index, row, sequence, purpose, k0, k1)) + 0.5) * 2.0**-32


@cuda.jit(device=True)
def _logit(e, draw, layer, trial, request, k0, k1, popularity):
    """Mean logit of an expert for a request of a trial, as `SyntheticTraffic` draws it."""
    n_experts, kind = popularity.table.shape[1], popularity.kind
    mu = popularity.table[layer, e]
    if kind == _LOGNORMAL:
        mu = popularity.sigma * quantile(_uniform(e, draw, 0, POPULARITY, k0, k1))
    elif kind == _TILTED:
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
def _add(values, row, v, number, is_shared):
    """Add to a value of a draw, which may be that of several blocks."""
    if is_shared:
        cuda.atomic.add(values, (row, v), number)
    else:
        values[row, v] += number


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


@_jit
def _run(first_draw, n, parts, start, stop, n_draws, key, popularity, router, cells, places, room, bins, values, sums):
    """The stage's trials start .. stop - 1 of the layer draws first_draw .. first_draw + n - 1 of n_draws.

    bins int32, histograms to add to. Where a draw has but one trial, values and sums are int64 [blocks, values] and [blocks, 3,
    values] unset: sums over draws of Y, Y**2 and Y * Y of the baseline. Where it may have more, which `parts` blocks share,
    values is int64 [draws, values], to which is added, and there are no sums.
    """
    doubles, unsigned = cuda.shared.array(0, float64), cuda.shared.array(0, uint64)
    reals, wholes = cuda.shared.array(0, float32), cuda.shared.array(0, int32)
    thread, n_threads = cuda.threadIdx.x, cuda.blockDim.x
    n_experts, n_group, top_k = popularity.table.shape[1], router.n_group, router.top_k
    size = n_experts // n_group
    weight = doubles[room.weight : room.weight + n_experts]
    total = doubles[room.total : room.total + n_group]
    share = doubles[room.scratch : room.scratch + n_experts]
    stack = doubles[room.scratch + n_experts : room.scratch + 2 * n_experts]
    alias = unsigned[room.alias : room.alias + n_experts]
    gap_without = reals[room.gap_without : room.gap_without + n_experts]
    gap = reals[room.gap : room.gap + n_group]
    counts = wholes[room.counts : room.counts + n_experts]
    busiest, lowest = wholes[room.busiest :], wholes[room.lowest :]
    idle, distinct_most = wholes[room.idle :], wholes[room.distinct :]
    loads = wholes[room.token :]  # no token is worked while ranks are scored
    first = wholes[room.first : room.first + top_k]
    own = Token(
        reals, wholes, np.uint32(room.token + thread), np.uint32(n_threads), np.uint32(room.next), np.uint32(room.time),
        np.uint32(room.mark), np.uint32(room.group), np.uint32(room.expert), np.uint32(room.size),
    )  # fmt: skip
    k0, k1 = key[0], key[1]
    clustered, block = n_draws < stop, cuda.blockIdx.x
    n_steps, n_values, n_pairs = cells.tokens.size, cells.n_values, places.rows.shape[1]
    for v in range(thread, 0 if clustered else n_values, n_threads):
        values[block, v] = sums[block, 0, v] = sums[block, 1, v] = sums[block, 2, v] = 0
    for unit in range(block, n * parts, cuda.gridDim.x):
        d = unit // parts
        draw, place_row, value_row = first_draw + d, d % places.rows.shape[0], d if clustered else block
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
                        fill_alias(g * size, (g + 1) * size, total[g], weight, alias, (share, stack))
                    cuda.syncthreads()
                token_stop = min(cells.tokens[step], (request + 1) * popularity.tokens_per_request)
                for token in range(token_start + thread, token_stop, n_threads):
                    route_token(
                        uint64(token), uint64(trial), k0, k1, n_group, size, router.topk_group, top_k,
                        router.group_sigma, router.score_law, weight, gap, gap_without, alias, own,
                    )  # fmt: skip
                    for k in range(top_k):
                        e = whole(own, own.expert + k)
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
                        _add(values, value_row, cells.item_load[item], load, clustered)
                cuda.syncthreads()
                for i in range(thread, n_items, n_threads):
                    c = cells.item_cell[first_item + i]
                    if (
                        loads[2 * i] == busiest[c]
                    ):  # of the ranks with the largest load the lowest, with its distinct experts
                        cuda.atomic.min(lowest, c, (cells.item_rank[first_item + i] << 16) | loads[2 * i + 1])
                cuda.syncthreads()
                for c in range(thread, n_cells, n_threads):
                    at = cells.cell[first_cell + c]
                    scores = (int64(busiest[c]), int64(idle[c]), int64(lowest[c] & 0xFFFF), int64(distinct_most[c]))
                    for m in range(_N_METRICS):
                        cuda.atomic.add(bins, cells.first_bin[_N_METRICS * at + m] + scores[m], 1)
                        _add(values, value_row, _N_METRICS * at + m, scores[m], clustered)
                    if clustered:
                        for event in range(cells.first_event[at], cells.first_event[at + 1]):
                            if scores[cells.event_metric[event]] >= cells.event_least[event]:
                                _add(values, value_row, cells.events_at + event, 1, clustered)
                step += 1
            for p in range(thread, n_pairs, n_threads):
                reached = _reach(places.rows[place_row, p], top_k, first, places, cells.ranks_per_node)
                _add(values, value_row, cells.reached_at + 2 * p, reached[0], clustered)
                _add(values, value_row, cells.reached_at + 2 * p + 1, reached[1], clustered)
            trial += parts * n_draws
        if clustered:
            continue
        cuda.syncthreads()
        for v in range(thread, n_values, n_threads):
            y = values[block, v]
            sums[block, 0, v] += y
            sums[block, 1, v] += y * y
            if v < cells.baseline.size:
                sums[block, 2, v] += y * values[block, cells.baseline[v]]
        cuda.syncthreads()
        for v in range(thread, n_values, n_threads):
            values[block, v] = 0


def check_plan(plan: Plan) -> None:
    """Refuse what is not computed on a device. Raises InputError."""
    reason = ""
    workload = plan.workload
    if isinstance(workload, RecordedTraffic):
        reason = "recorded traffic is replayed on the CPU"
    elif workload.dummy_tokens:
        reason = "dummy tokens are not drawn on a GPU"
    elif any(plan.has_replicas):
        reason = "placements with replicas are scored on the CPU"
    elif plan.grid.received:
        reason = "received tokens are counted on the CPU; turn them off with `received` off"
    elif max(plan.grid.ep_sizes) > _MOST_RANKS:
        reason = f"at most {_MOST_RANKS} ranks"
    if reason:
        raise InputError(f"`executor` cuda: {reason}")


def device_name() -> str:
    """Name of the current device."""
    name = cuda.get_current_device().name
    return name.decode() if isinstance(name, bytes) else str(name)


def count_devices() -> int:
    """CUDA devices that numba can use."""
    return len(cuda.gpus) if cuda.is_available() else 0


def take_device(free: Any) -> None:
    """Make a device of the queue `free` that of this process."""
    cuda.select_device(free.get())


def chunk_size(plan: Plan) -> ChunkSize:
    """Of a device: large chunks, but where draws have placements of their own, made on the CPU, or values of their own."""
    few = plan.draws is not None or not _is_fixed(plan)
    return ChunkSize(tokens=2**30, draws=2**12 if few else 2**22, numbers=2**40)


def _is_fixed(plan: Plan) -> bool:
    """Whether all draws have the same placements."""
    return all(placement is not None and placement.n_rows == 1 for placement in plan.placements)


def run_chunk_on_device(plan: Plan, stage: Stage, draws: range) -> Tally:
    """As `sim.sweeps.chunk.run_chunk`, on the current CUDA device.

    Raises
    ------
    InputError
        What `check_plan` refuses; a router, or histograms, too large for a device.
    """
    check_plan(plan)
    assert isinstance(plan.workload, SyntheticTraffic)
    grid, model, cells = plan.grid, plan.model, np.array(stage.cells)
    n_placed = 1 if _is_fixed(plan) else len(draws)
    pairs = np.unique(grid.pair_of_cell[cells])
    (group,) = place_pairs(plan, range(draws.start, draws.start + n_placed), pairs.tolist())
    live = np.flatnonzero(np.isin(events_of(grid).cell, cells))
    ranks = np.flatnonzero(np.isin(grid.pair_of_rank, np.flatnonzero(np.isin(grid.largest_cells, cells))))
    job, n_bins = _lay_out_cells(plan, cells, pairs, live, ranks)
    room, n_threads, n_bytes = _room(plan, job)
    blocks, clustered = _BLOCKS_PER_PROCESSOR * _processors(), stage.draws < stage.trials.stop
    parts = min(-(-blocks // len(draws)), -(-len(stage.trials) // stage.draws)) if clustered else 1
    n_blocks = min(len(draws) * parts, blocks)
    law = tuple(score_law(model).astype(np.float32))
    router = Router(model.n_group, model.topk_group, model.top_k, np.float32(plan.workload.group_sigma), law)
    stream = cuda.stream()

    def put(values: Any) -> Any:
        return type(values)(*(cuda.to_device(v, stream) if isinstance(v, np.ndarray) else v for v in values))

    bins_there = cuda.to_device(np.zeros(n_bins, np.int32), stream)
    if clustered:
        values_there = cuda.to_device(np.zeros((len(draws), job.n_values), np.int64), stream)
    else:
        values_there = cuda.device_array((n_blocks, job.n_values), np.int64, stream=stream)
    sums_there = cuda.device_array((1 if clustered else n_blocks, 3, job.n_values), np.int64, stream=stream)
    _run[n_blocks, n_threads, stream, n_bytes](
        draws.start, len(draws), parts, stage.trials.start, stage.trials.stop, stage.draws,
        cuda.to_device(token_key(model, plan.workload, plan.seed), stream),
        put(_popularity(plan.workload, model.n_experts)), router, put(job),
        put(Places(*group.layouts, group.rows.astype(np.int32))), room, bins_there, values_there, sums_there,
    )  # fmt: skip
    bins = bins_there.copy_to_host(stream=stream)
    seen = (values_there if clustered else sums_there).copy_to_host(stream=stream)
    stream.synchronize()
    if clustered:
        n_trials = np.array([len(stage.trials_of(draw)) for draw in draws])[:, None]
        of_metrics = seen[:, : len(job.baseline)]
        total, square, weighted = (part.sum(axis=0) for part in (seen, seen * seen, seen * n_trials))
        cross = (of_metrics * seen[:, job.baseline]).sum(axis=0)
    else:
        total, square, cross = seen.sum(axis=0)
        weighted, cross = total, cross[: len(job.baseline)]
    tally = Tally.zero(grid)
    filled = np.flatnonzero(bins)
    of_bin = np.searchsorted(job.first_bin, filled, side="right") - 1
    tally.keys = (cells[of_bin // _N_METRICS] * _N_METRICS + of_bin % _N_METRICS) << VALUE_BITS
    tally.keys += filled - job.first_bin[of_bin]
    tally.counts = bins[filled].astype(np.int64)
    tally.design[cells] = stage.design(draws)
    tally.metric_cross[cells] = cross.reshape(len(cells), -1)
    pair = np.searchsorted(pairs, grid.pair_of_cell[cells])
    for part, values in (("", total), ("_square", square), ("_weighted", weighted)):
        getattr(tally, f"metric{part}")[cells] = values[: job.events_at].reshape(len(cells), -1)
        getattr(tally, f"reached{part}")[cells] = values[job.reached_at : job.loads_at].reshape(-1, 2)[pair]
        getattr(tally, f"load{part}")[ranks] = values[job.loads_at :]
        if part:
            getattr(tally, f"event{part}")[live] = values[job.events_at : job.reached_at]
    return tally


def _lay_out_cells(
    plan: Plan, cells: np.ndarray, pairs: np.ndarray, live: np.ndarray, ranks: np.ndarray
) -> tuple[Cells, int]:
    """Some cells, ascending, with their pairs, events and ranks whose loads are summed; and the bins of their histograms."""
    grid, events = plan.grid, events_of(plan.grid)
    tokens, step = np.unique(grid.tokens_of_cell[cells], return_inverse=True)
    order, sizes = np.argsort(step, kind="stable"), grid.ep_size_of_cell[cells]
    of_item = np.repeat(order, sizes[order])
    item_rank = np.arange(len(of_item)) - np.repeat(np.cumsum(sizes[order]) - sizes[order], sizes[order])
    first_cell, first_item = (np.searchsorted(step[of], np.arange(len(tokens) + 1)) for of in (order, of_item))
    place_in_step = np.empty(len(cells), np.int64)
    place_in_step[order] = np.arange(len(cells)) - first_cell[step[order]]
    events_at = len(cells) * _N_METRICS
    reached_at = events_at + len(live)
    loads_at = reached_at + 2 * len(pairs)
    pair_of_cell = grid.pair_of_cell[cells]
    load_at = loads_at + np.searchsorted(grid.pair_of_rank[ranks], pair_of_cell)
    load_at = np.where(np.isin(cells, grid.largest_cells)[of_item], load_at[of_item] + item_rank, -1)
    largest_rank = np.array(grid.largest_rank)[pair_of_cell]
    most_load = grid.tokens_of_cell[cells] * np.minimum(plan.model.top_k, largest_rank)
    widths = np.stack([most_load, sizes, largest_rank, largest_rank], axis=1).reshape(-1) + 1  # of METRICS
    if widths.sum() > _MOST_BINS:
        raise InputError("`executor` cuda: histograms of so many cells and tokens do not fit; take fewer")
    baseline = np.searchsorted(cells, grid.baseline_cells[cells])[:, None] * _N_METRICS + np.arange(_N_METRICS)
    int32s = {
        "first_cell": first_cell,
        "cell": order,
        "first_item": first_item,
        "item_cell": place_in_step[of_item],
        "item_pair": np.searchsorted(pairs, pair_of_cell)[of_item],
        "item_rank": item_rank,
        "item_load": load_at,
        "first_event": np.searchsorted(events.cell[live], np.append(cells, len(grid.cells))),
        "event_metric": events.metric[live],
        "event_least": events.least[live],
        "baseline": baseline.reshape(-1),
    }
    job = Cells(
        tokens=tokens,
        first_bin=np.cumsum(widths) - widths,
        ranks_per_node=plan.ranks_per_node,
        events_at=events_at,
        reached_at=reached_at,
        loads_at=loads_at,
        n_values=loads_at + len(ranks),
        **{name: values.astype(np.int32) for name, values in int32s.items()},
    )
    return job, int(widths.sum())


@cache
def _processors() -> int:
    return 1 if _SIMULATED else int(cuda.get_current_device().MULTIPROCESSOR_COUNT)


def _popularity(workload: SyntheticTraffic, n_experts: int) -> Popularity:
    kind = {"lognormal": _LOGNORMAL, "tilted": _TILTED}.get(workload.popularity, _TABLE)
    table, sd, loadings, n_factors = np.zeros((1, n_experts)), np.ones((1, n_experts)), np.zeros((1, 1, n_experts)), 0
    if workload.layers is not None:
        table, sd, loadings = (
            np.ascontiguousarray(part, float)
            for part in (workload.layers.mu, workload.layers.request_sd, workload.layers.request_loadings)
        )
        n_factors = loadings.shape[1]
        loadings = loadings if n_factors else np.zeros((len(table), 1, n_experts))  # nothing to send is not sent
    elif kind == _TILTED:
        table = tilt_profile(n_experts)[None]
    per_request = workload.tokens_per_request if workload.request_sigma else _ONE_REQUEST
    sigma, of_request = float(workload.sigma), float(workload.request_sigma)
    return Popularity(kind, sigma, table, of_request, sd, n_factors, loadings, per_request)


def _room(plan: Plan, job: Cells) -> tuple[Room, int, int]:
    """Shared memory, the number of threads that fit in it, and its bytes."""
    most_cells, most_items = (int(np.diff(first).max()) for first in (job.first_cell, job.first_item))
    most_tokens = int(job.tokens[-1])
    model = plan.model
    n, own = model.n_experts, new_token(model.n_group, model.topk_group, model.top_k)
    weight, alias, total, end = (int(at) for at in np.cumsum([0, n, n, model.n_group]))  # of 8 bytes
    sizes = [n, model.n_group, n, *4 * [most_cells], model.top_k]
    *starts, end = (int(at) for at in np.cumsum([2 * end, *sizes]))  # of 4 bytes
    token = (end + 1) // 2 * 2
    threads = min(-(-min(most_tokens, _MOST_THREADS) // 32), (_SHARED_BYTES // 4 - token) // own.size // 32) * 32
    n_bytes = 4 * (token + max(4 * n, 2 * most_items, own.size * threads))
    if threads < 32 or n_bytes > _SHARED_BYTES:
        raise InputError(
            "`executor` cuda: a router or a grid so large does not fit into the shared memory of a GPU; take fewer cells"
        )
    ends = (own.next, own.time, own.mark, own.group, own.expert, own.size)
    return Room._make([weight, alias, total, token // 2, *starts, token, *ends]), threads, n_bytes
