"""Chunks of a sweep on a CUDA device: sampled, scored and summed there, so that only sums come back.

The sums are those of `sim.sweeps.chunk`, integer for integer: the words are the same, and so is every float operation on tokens.
Tables of layers are another matter: `exp` and the normal quantile are those of the device, and may differ from the CPU's in
the last digits of a float64. That changes the last digit of a float32 gap once in 1e7, and a token by that once in 1e6: no
token in 1e12.
"""

import warnings
from functools import cache
from typing import Any

import numpy as np
from numba import cuda

from sim.errors import InputError
from sim.router.draw import grouped_topk, token_key
from sim.scoring import METRICS
from sim.sweeps.chunk import ChunkSize, Stage
from sim.sweeps.device_kernel import (
    LOGNORMAL,
    MOST_RANKS,
    SIMULATED,
    TABLE,
    TILTED,
    Cells,
    Places,
    Popularity,
    Router,
    kernel_of,
    room_of,
)
from sim.sweeps.grid import events_of
from sim.sweeps.plan import Plan
from sim.sweeps.steps import place_pairs
from sim.sweeps.tally import VALUE_BITS, Tally
from sim.traffic import RecordedTraffic, SyntheticTraffic
from sim.traffic.synthetic import tilt_profile

_SHARED_BYTES, _BLOCKS_PER_PROCESSOR = 46 * 1024, 16
_THREADS = (128, 64, 32)  # of a block
_MOST_BINS, _ONE_REQUEST, _N_METRICS = 2**28, 2**62, len(METRICS)
_LAW = {"popularity", "sigma", "layers", "x0", "group_sigma", "request_sigma", "tokens_per_request"}
"""What of a workload's law the kernel knows: of what it does not, it would draw something else."""


def check_plan(plan: Plan) -> None:
    """Refuse what is not computed on a device. Raises InputError."""
    reason = ""
    if isinstance(plan.workload, RecordedTraffic):
        reason = "recorded traffic is replayed on the CPU"
    elif unknown := sorted(set(plan.workload.law) - _LAW):
        reason = f"traffic with {unknown[0]} is drawn on the CPU"
    elif any(plan.has_replicas):
        reason = "placements with replicas are scored on the CPU"
    elif plan.grid.received:
        reason = "received tokens are counted on the CPU; turn them off with `received` off"
    elif max(plan.grid.ep_sizes) > MOST_RANKS:
        reason = f"at most {MOST_RANKS} ranks"
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
    number = free.get()
    if not SIMULATED:  # the simulator has but one
        cuda.select_device(number)


def chunk_size(plan: Plan) -> ChunkSize:
    """Of a device: large chunks, but where draws have placements of their own, made on the CPU, or values of their own."""
    few = plan.draws is not None or not _is_fixed(plan)
    return ChunkSize(tokens=2**30, draws=2**12 if few else 2**22, numbers=2**40)


def _is_fixed(plan: Plan) -> bool:
    """Whether all draws have the same placements."""
    return all(placement is not None and placement.n_rows == 1 for placement in plan.placements)


def run_chunk_on_device(plan: Plan, stage: Stage, draws: range) -> Tally:
    """As `sim.sweeps.chunk.run_chunk`, on the current CUDA device. Raises InputError for what `check_plan` refuses, and a router,
    or histograms, too large for a device.
    """
    check_plan(plan)
    workload = plan.synthetic
    grid, model, cells = plan.grid, plan.model, np.array(stage.cells)
    n_placed = 1 if _is_fixed(plan) else len(draws)
    pairs = np.unique(grid.pair_of_cell[cells])
    (group,) = place_pairs(plan, range(draws.start, draws.start + n_placed), pairs.tolist())
    live = np.flatnonzero(np.isin(events_of(grid).cell, cells))
    ranks = np.flatnonzero(np.isin(grid.pair_of_rank, np.flatnonzero(np.isin(grid.largest_cells, cells))))
    job, n_bins = _lay_out_cells(plan, cells, pairs, live, ranks)
    router, cells_at, most_cells = _fit(plan, job)
    blocks, clustered = _BLOCKS_PER_PROCESSOR * _processors(), stage.draws < stage.trials.stop
    parts = min(-(-blocks // len(draws)), -(-len(stage.trials) // stage.draws)) if clustered else 1
    n_blocks = min(len(draws) * parts, blocks)
    stream = cuda.stream()

    def put(values: Any) -> Any:
        return type(values)(*(cuda.to_device(v, stream) if isinstance(v, np.ndarray) else v for v in values))

    bins_there = cuda.to_device(np.zeros(n_bins, np.int32), stream)
    values_there = cuda.to_device(np.zeros((len(draws) if clustered else 1, job.n_values), np.int64), stream)
    sums_there = cuda.device_array((1 if clustered else n_blocks, 3, job.n_values), np.int64, stream=stream)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numba's word on small grids
        kernel_of(router)[n_blocks, router.n_threads, stream, 4 * (cells_at + 4 * most_cells)](
            draws.start, len(draws), parts, stage.trials.start, stage.trials.stop, stage.draws,
            cuda.to_device(token_key(model, workload, plan.seed), stream), *grouped_topk(model, workload)[-2:],
            put(_popularity(workload, model.n_experts)), put(job), put(Places(*group.layouts, group.rows.astype(np.int32))),
            cells_at, most_cells, bins_there, values_there, sums_there,
        )  # fmt: skip
    bins = bins_there.copy_to_host(stream=stream)
    seen = (values_there if clustered else sums_there).copy_to_host(stream=stream)
    stream.synchronize()
    baseline = np.searchsorted(cells, grid.baseline_cells[cells])
    if clustered:
        n_trials = np.array([len(stage.trials_of(draw)) for draw in draws])[:, None]
        total, square, weighted = (part.sum(axis=0) for part in (seen, seen * seen, seen * n_trials))
        of_metrics = seen[:, : job.events_at].reshape(len(draws), len(cells), -1)
        cross = (of_metrics * of_metrics[:, baseline]).sum(axis=0)
    else:
        total, square, cross = seen.sum(axis=0)
        weighted, cross = total, cross[: job.events_at].reshape(len(cells), -1)
    tally = Tally.zero(grid)
    filled = np.flatnonzero(bins)
    of_bin = np.searchsorted(job.first_bin, filled, side="right") - 1
    tally.keys = (cells[of_bin // _N_METRICS] * _N_METRICS + of_bin % _N_METRICS) << VALUE_BITS
    tally.keys += filled - job.first_bin[of_bin]
    tally.counts = bins[filled].astype(np.int64)
    tally.design[cells] = stage.design(draws)
    tally.metric_cross[cells] = cross
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
        "baseline": place_in_step[np.searchsorted(cells, grid.baseline_cells[cells])],
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
    return 1 if SIMULATED else int(cuda.get_current_device().MULTIPROCESSOR_COUNT)


def _popularity(workload: SyntheticTraffic, n_experts: int) -> Popularity:
    kind = {"lognormal": LOGNORMAL, "tilted": TILTED}.get(workload.popularity, TABLE)
    table, sd, loadings, n_factors = np.zeros((1, n_experts)), np.ones((1, n_experts)), np.zeros((1, 1, n_experts)), 0
    if workload.layers is not None:
        table, sd, loadings = (
            np.ascontiguousarray(part, float)
            for part in (workload.layers.mu, workload.layers.request_sd, workload.layers.request_loadings)
        )
        n_factors = loadings.shape[1]
        loadings = loadings if n_factors else np.zeros((len(table), 1, n_experts))  # nothing to send is not sent
    elif kind == TILTED:
        table = tilt_profile(n_experts)[None]
    per_request = workload.tokens_per_request if workload.request_sigma else _ONE_REQUEST
    sigma, of_request = float(workload.sigma), float(workload.request_sigma)
    return Popularity(kind, sigma, table, of_request, sd, n_factors, loadings, per_request)


def _fit(plan: Plan, job: Cells) -> tuple[Router, int, int]:
    """What to compile, where in shared memory cells are kept, and how many a step has at most."""
    model = plan.model
    most_cells, most_items = (int(np.diff(first).max()) for first in (job.first_cell, job.first_item))
    for n_threads in _THREADS:
        router = Router(model.n_experts, model.n_group, model.topk_group, model.top_k, n_threads)
        room = room_of(router)
        cells_at = max(room.end, room.token + 2 * most_items)
        fits = 4 * (cells_at + 4 * most_cells) <= _SHARED_BYTES
        if fits and (n_threads < 2 * job.tokens[-1] or n_threads == _THREADS[-1]):
            return router, cells_at, most_cells
    raise InputError(
        "`executor` cuda: a router or a grid so large does not fit into the shared memory of a GPU; take fewer cells"
    )
