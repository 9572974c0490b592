"""Who sends how much to whom: matrices of source and destination ranks over sampled steps, for network simulators.

The tokens of a step sit on source ranks one block after another, as data parallelism has them; a destination is a rank that
holds an expert. The `token` kind of exchange sends a token once to each rank that needs it, the `pair` kind once for each of
its experts (`sim.cost.exchange`). Results go back the same way: the combine is the transpose of the dispatch.
"""

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import brentq

from sim.cost.inputs import expert_width
from sim.cost.tables import exchange_profile
from sim.errors import InputError
from sim.files import whole_files
from sim.kernels import kernel, usable_processors
from sim.model import ModelSpec
from sim.options import LinkOptions
from sim.options.declare import takes
from sim.progress import track
from sim.router import draw_trials
from sim.stats import Design, Moments, mean_interval, quantile_shares
from sim.sweeps.chunk import Stage
from sim.sweeps.plan import Plan, make_plan, no_single_tokens_because
from sim.sweeps.run import cell_ids
from sim.sweeps.steps import place_pairs
from sim.traffic import Workload

_KINDS = ("token", "pair")
_CHUNK_TOKENS, _CHUNK_NUMBERS, _CHUNK_DRAWS = 2**19, 2**21, 256
_MOST_COUNTERS = 2**27  # in the histograms of all cells


@takes(LinkOptions)
def rank_traffic(
    model: str | Path | ModelSpec, workload: str | Path | Workload, **options: Any
) -> dict[tuple[str, int, int], dict[str, np.ndarray]]:
    """Traffic from each source rank to each destination rank: mean and 99th percentile over the steps of a layer.

    Parameters
    ----------
    model, workload
        As in `sim.sweep`; with the same seed the steps are the same.
    **options

    Returns
    -------
    dict by (placement, ep_size, tokens) of dict of arrays
        What `epsim sweep --rank-traffic` writes, a file for each cell:

        - `token_mean`, `token_p99` float64 [source, destination]: tokens of a step, those that stay on their rank in the
          diagonal; with `_low` and `_high` appended, the ends of 95 % intervals (NaN where there are too few draws).
        - `token_out_mean`, ... [source]: all that a rank sends to other ranks; `token_in_mean`, ... [destination]: all that it
          receives from other ranks.
        - `pair_mean`, ...: the same of (token, expert) pairs.
        - `token_dispatch_bytes`, `token_combine_bytes`, `pair_dispatch_bytes`, `pair_combine_bytes`: bytes of one on its way
          there and back, of `hidden_size` values: pairs are dispatched in FP8 with scales, all else goes in BF16. Left out
          where the model does not tell its width.
        - `source_tokens` int64 [source]: tokens that sit on each rank in every step.
        - `model`, `workload`, `placement`, `ep_size`, `tokens`, `trials`, `draws`, `seed`, `cell_id`: what it is of.

        A column of a step's matrix sums to what `sim.score_tokens` counts: received tokens, and load. Replicas: the copy that
        vLLM's hash of the token's index in the step takes.

    Raises
    ------
    InputError
        As `sim.sweep`; shares that do not fit an EP size; traffic, or so many tokens, that single ones are not held.

    Examples
    --------
    >>> import sim
    >>> found = sim.rank_traffic("mixtral-8x7b", "uniform", ep_sizes=4, tokens=64, placements="linear", threads=1)
    >>> cell = found["linear", 4, 64]
    >>> cell["source_tokens"].tolist(), cell["token_mean"][0].round().tolist(), float(cell["pair_mean"].sum())
    ([16, 16, 16, 16], [7.0, 7.0, 7.0, 7.0], 128.0)
    """
    chosen = LinkOptions(**options)
    names = ("ep_sizes", "tokens", "tokens_per_rank", "ranks_per_node", "seed", "placements", "trials", "draws")
    of_plan = {name: getattr(chosen, name) for name in (*names, "fit_tokens", "fit_on")}
    plan = make_plan(model, workload, bound_layers=0, received="off", **of_plan)
    return traffic_of_plan(plan, chosen.source_imbalance, chosen.threads or usable_processors())


class Links(NamedTuple):
    """The numbers of a cell: of each kind the matrix, row by row, then what each rank sends to others, and receives from them."""

    first_source: np.ndarray  # int64 [ranks + 1], first token of each source rank, and the number of tokens
    first_counter: np.ndarray  # int64 [numbers + 1], where the histogram of each number begins, and the end


def plan_links(plan: Plan, source_imbalance: Sequence[float]) -> list[Links]:
    """The numbers of each cell of a plan; InputError where there is no such traffic, or too much to count."""
    if plan.precision:
        raise InputError("rank traffic goes with `trials`, not with a precision")
    if reason := no_single_tokens_because(plan.workload, int(plan.grid.steps[-1])):
        raise InputError(f"`rank_traffic`: {reason}")
    cells, top_k = [], plan.grid.top_k
    for cell, (pair, step) in enumerate(plan.grid.cells):
        n_ranks = int(plan.grid.ep_size_of_cell[cell])
        tokens = source_tokens(int(plan.grid.steps[step]), n_ranks, source_imbalance)
        most = []
        for of_destination, of_token in ((1, min(top_k, n_ranks)), (min(top_k, plan.grid.largest_rank[pair]), top_k)):
            received = of_destination * (tokens.sum() - tokens)
            most += [np.repeat(of_destination * tokens, n_ranks), of_token * tokens, received]
        first_counter = np.cumsum(np.concatenate([[0], np.concatenate(most) + 1]))
        cells.append(Links(np.cumsum(np.concatenate([[0], tokens])), first_counter))
    if (counters := sum(int(cell.first_counter[-1]) for cell in cells)) > _MOST_COUNTERS:
        raise InputError(
            f"rank traffic of {len(cells)} cells would hold {counters / 2**28:.1f} GiB of counters, at most "
            f"{_MOST_COUNTERS / 2**28:.1f} fit; take fewer `ep_sizes` or fewer `tokens`"
        )
    return cells


def source_tokens(tokens: int, ep_size: int, imbalance: Sequence[float]) -> np.ndarray:
    """Tokens of each source rank, int64 [ep_size]: by the shares given, or, of a single number, by shares whose largest is so
    many times their mean, each the same fraction of the one before. The largest remainders, of equals the first, are rounded up.
    """
    if len(imbalance) == 1:
        busiest = imbalance[0]
        if not 1 <= busiest <= ep_size:
            raise InputError(f"`source_imbalance` {busiest:g}: must be from 1 to the EP size, {ep_size}")
        fraction = brentq(lambda q: ep_size / np.polyval(np.ones(ep_size), q) - busiest, 0.0, 1.0)
        shares = fraction ** np.arange(ep_size)
    else:
        shares = np.array(imbalance)
        if len(shares) != ep_size:
            raise InputError(f"`source_imbalance`: {len(shares)} shares go with EP size {len(shares)}, not {ep_size}")
        if not shares.any():
            raise InputError("`source_imbalance`: one share at least must be above 0")
    exact = shares / shares.sum() * tokens
    whole = np.floor(exact + 1e-9).astype(np.int64)
    whole[np.argsort(whole - exact, kind="stable")[: tokens - whole.sum()]] += 1
    return whole


def traffic_of_plan(
    plan: Plan, source_imbalance: Sequence[float], n_threads: int
) -> dict[tuple[str, int, int], dict[str, np.ndarray]]:
    """`rank_traffic` of the cells of a plan."""
    cells, grid = plan_links(plan, source_imbalance), plan.grid
    sizes = [len(cell.first_counter) - 1 for cell in cells]
    counters = [np.zeros(cell.first_counter[-1], np.int32) for cell in cells]
    sums = [np.zeros((3, size), np.int64) for size in sizes]
    n_draws, n_ids, lock = plan.draws or plan.trials, int(grid.steps[-1]), Lock()
    stage = Stage(range(plan.trials), n_draws, ())

    def run(draws: range) -> None:
        groups = place_pairs(plan, draws, range(len(grid.pairs)))
        total, blocks = [np.zeros((len(draws), size), np.int64) for size in sizes], np.zeros((len(draws), 1), np.int64)
        for first in stage.trials_of(draws.start):
            trials = range(first, min(first + len(draws), plan.trials))
            _, ids = draw_trials(plan.model, plan.workload, plan.seed, trials, n_draws, grid.steps, n_ids)
            blocks[: len(trials)] += 1
            for group in groups:
                slots = group.slots_of_all(ids)
                for cell in np.flatnonzero(np.isin(grid.pair_of_cell, group.pairs)):
                    row = group.rows[: len(trials), np.searchsorted(group.pairs, grid.pair_of_cell[cell])]
                    numbers = np.zeros((len(trials), sizes[cell]), np.int64)
                    _fill_links(
                        slots, np.ascontiguousarray(row), group.layouts.ranks, cells[cell].first_source, numbers
                    )
                    total[cell][: len(trials)] += numbers
                    with lock:
                        _count_numbers(numbers, cells[cell].first_counter, counters[cell])
        with lock:
            for sum_of_cell, of_draw in zip(sums, total, strict=True):
                sum_of_cell += [of_draw.sum(axis=0), (of_draw**2).sum(axis=0), (of_draw * blocks).sum(axis=0)]

    size = min(_CHUNK_TOKENS // n_ids, _CHUNK_NUMBERS // sum(sizes), _CHUNK_DRAWS, -(-n_draws // n_threads))
    chunks = [range(i, min(i + max(size, 1), n_draws)) for i in range(0, n_draws, max(size, 1))]
    with ThreadPoolExecutor(n_threads) as pool:
        list(track(pool.map(run, chunks), [len(chunk) for chunk in chunks], ["rank traffic"] * len(chunks)))
    ids_of_cells = cell_ids(plan)
    return {
        (*grid.pairs[pair], int(grid.steps[step])): {
            **_statistics(plan, cells[cell], sums[cell], counters[cell]),
            **_row_bytes(plan.model),
            **_about(plan, cell, np.diff(cells[cell].first_source), ids_of_cells[cell]),
        }
        for cell, (pair, step) in enumerate(grid.cells)
    }


def write_traffic(found: dict[tuple[str, int, int], dict[str, np.ndarray]], folder: Path) -> None:
    """Write PLACEMENT-epN-tokensN.npz for each cell, all or none. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{re.sub(r'[^A-Za-z0-9+._]+', '_', name)[-100:]}-ep{size}-tokens{n}.npz" for name, size, n in found]
    with whole_files(*(folder / name for name in names)) as paths:
        for path, arrays in zip(paths, found.values(), strict=True):
            np.savez_compressed(path, **arrays)  # type: ignore[arg-type]


@kernel
def count_links(slots, rank_of_slot, first_source, links):
    """Add a step's tokens and pairs from each source to each destination to links int64 [2, ranks, ranks]: slots int [tokens,
    top_k]; first_source int64 [ranks + 1].
    """
    last = np.full(links.shape[1], -1)  # the last token that each destination took
    for source in range(links.shape[1]):
        for t in range(first_source[source], first_source[source + 1]):
            for k in range(slots.shape[1]):
                rank = rank_of_slot[slots[t, k]]
                links[1, source, rank] += 1
                if last[rank] != t:
                    last[rank] = t
                    links[0, source, rank] += 1


@kernel
def _fill_links(slots, layout_of_trial, ranks, first_source, numbers):
    """Add the numbers of steps, see `Links`: slots int [trials, tokens, top_k]; ranks int32 [layouts, slots]; numbers int64
    [trials, numbers].
    """
    n = first_source.size - 1
    links = np.empty((2, n, n), np.int64)
    for t in range(slots.shape[0]):
        links[:] = 0
        count_links(slots[t], ranks[layout_of_trial[t]], first_source, links)
        for kind in range(2):
            at = kind * (n * n + 2 * n)
            for source in range(n):
                for rank in range(n):
                    numbers[t, at + n * source + rank] += links[kind, source, rank]
                    if source != rank:
                        numbers[t, at + n * n + source] += links[kind, source, rank]
                        numbers[t, at + n * n + n + rank] += links[kind, source, rank]


@kernel
def _count_numbers(numbers, first_counter, counters):
    """Count the values of each number, int64 [trials, numbers], in its histogram: counters int32, flat."""
    for t in range(numbers.shape[0]):
        for i in range(numbers.shape[1]):
            counters[first_counter[i] + numbers[t, i]] += 1


@kernel
def _read_quantile(counters, first_counter, rank, values):
    """The value of this rank, from 1 up, in each histogram: values float64 [numbers]."""
    for i in range(values.size):
        below, value = 0, 0
        while below + counters[first_counter[i] + value] < rank:
            below += counters[first_counter[i] + value]
            value += 1
        values[i] = value


def _statistics(plan: Plan, cell: Links, sums: np.ndarray, counters: np.ndarray) -> dict[str, np.ndarray]:
    """Mean and 99th percentile of a cell's numbers, with intervals; those of the percentile count a draw once."""
    n_draws, n = plan.draws or plan.trials, len(cell.first_source) - 1
    found = list(mean_interval(Moments(*sums.astype(float)), Design.of(plan.trials, n_draws)))
    for share in (0.99, *quantile_shares(0.99, n_draws)):
        found.append(np.full(sums.shape[1], np.nan))
        if share == share:
            _read_quantile(counters, cell.first_counter, max(int(np.ceil(share * plan.trials - 1e-9)), 1), found[-1])
    ends = [f"{what}{end}" for what in ("mean", "p99") for end in ("", "_low", "_high")]
    arrays: dict[str, np.ndarray] = {}
    for end, numbers in zip(ends, found, strict=True):
        for kind, of_kind in zip(_KINDS, numbers.reshape(2, -1), strict=True):
            matrix, sent, received = np.split(of_kind, [n * n, n * n + n])
            arrays |= {f"{kind}_{end}": matrix.reshape(n, n), f"{kind}_out_{end}": sent, f"{kind}_in_{end}": received}
    return arrays


def _row_bytes(model: ModelSpec) -> dict[str, np.ndarray]:
    """Bytes of one token or pair there and back; nothing where the model does not tell its width."""
    if not (model.expert_hidden_size or model.hidden_size):
        return {}
    width = expert_width(model)
    bytes_of = {
        f"{kind}_{way}_bytes": np.array(width * of_value)
        for kind in _KINDS
        for way, of_value in zip(("dispatch", "combine"), exchange_profile(kind, "").bytes_per_value, strict=True)
    }
    return {"hidden_size": np.array(width), **bytes_of}


def _about(plan: Plan, cell: int, source: np.ndarray, cell_id: str) -> dict[str, np.ndarray]:
    names = ("model", "workload", "placement", "ep_size", "tokens")
    about = dict(zip(names, plan.grid.keys(cell), strict=True)) | {"trials": plan.trials}
    about |= {"draws": plan.draws or plan.trials, "seed": plan.seed, "cell_id": cell_id}
    return {"source_tokens": source} | {name: np.array(value) for name, value in about.items()}
