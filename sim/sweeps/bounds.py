"""Rows of tail.csv that sampling cannot give: exact answers, bounds without a floor, and rare-event estimates.

For exact answers and bounds tokens must be independent given the layer: synthetic traffic without request effects. Under
uniform traffic the rows hold as they stand. Where popularity is drawn, the far tail belongs to layers that nobody drew; the rows
are then conditional on the first layer draws of the sweep, and say so. Of fitted traffic the layers are all there are: where all
of them are taken, nothing is left out. Tokens that bounds are counted from are none of the sweep's.

Rare-event estimates (`plan.tail_floor`) hold for all layers, drawn or not; they cost some seconds a cell.
"""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import TypeAlias

import numpy as np
import pandas as pd

from sim.progress import map_on, phase, track
from sim.router import draw_trials
from sim.sweeps.grid import Events, events_of
from sim.sweeps.plan import Plan
from sim.sweeps.steps import Group, place_pairs
from sim.sweeps.tables import KEYS, cell_keys, certain_events, impossible_events
from sim.sweeps.tally import Tally
from sim.theory import (
    TINY,
    DrawnLayers,
    RareTail,
    UniformLayer,
    UniformRouter,
    no_rare_events_because,
    rare_tail,
    tally_loads,
)
from sim.traffic import SyntheticTraffic
from sim.traffic.synthetic import X0

_NEAR_1 = (1.01, 1.02, 1.03, 1.04, 1.05, 1.06, 1.08, 1.1, 1.15, 1.2, 1.25, 1.3, 1.4, 1.5, 1.6, 1.75)
_COARSE, _FINE = (1, 1.25, 1.5, 1.75), (1, 1.125, 1.25, 1.375, 1.5, 1.625, 1.75, 1.875)
LADDER, FINE_LADDER = ((*_NEAR_1, *(x * 2.0**i for i in range(1, 14) for x in between)) for between in (_COARSE, _FINE))
"""Imbalance thresholds of bounds, besides those of the sweep; the fine one where rows cost little."""
_DEEPEST = 1e-12  # below this, only the sweep's own thresholds

_NEAR_TINY = 1e6 * TINY
_BATCH_TOKENS = 2**13
_MOST_BATCHES = 16  # per layer
_LEAST_BATCHES, _TRIALS_PER_BATCH = 4, 625  # a larger sweep has more precise ones
_HOT = 8  # ranks of a layer whose pairs are looked at
_PER_LAYER, _PER_RANK, _PER_RARE_CELL = 150_000.0, 420.0, 8e7
"""Work in the time of a sampled token: to count the tokens of a layer, to bound one of its ranks in a cell, and to estimate a
cell's rare events; measured on DeepSeek-V3.
"""
_FIRST_TRIAL = 3072 * 2**20  # beyond any trial of a sweep; trial t runs layer t % 2**20

Source: TypeAlias = UniformLayer | DrawnLayers
Row = tuple[str, float, float, float]  # metric, threshold, lower and upper bound


def no_bounds_because(plan: Plan) -> str | None:
    """Why a sweep stays with sampling; None if it does not."""
    if not isinstance(plan.workload, SyntheticTraffic):
        return (
            "a recorded step takes its tokens from different sequences, without replacement: they are not independent"
        )
    if plan.workload.request_sigma > 0:
        return "the tokens of a request are not independent"
    if plan.workload.dummy_tokens > 0:
        return "dummy tokens are identical, not independent"
    if plan.bound_layers == 0:
        return "--bound-layers is 0 (the default where bounds would take longer than the sampling)"
    return None


def replicas_have_no_bounds(plan: Plan) -> str | None:
    """Which placements stay with sampling where others do not, and why; None if there are none."""
    names = dict.fromkeys(name for (name, _), has in zip(plan.grid.pairs, plan.has_replicas, strict=True) if has)
    if not names or no_bounds_because(plan):
        return None
    return f"{', '.join(names)}: the copy that a token goes to depends on the others, so tokens are not independent"


def work_of_bounds(plan: Plan) -> dict[str, float]:
    """About how long `build_bounds` takes to count tokens of layers, and to bound ranks, in the time of a sampled token."""
    layers = 0 if no_bounds_because(plan) else min(plan.bound_layers, plan.draws or plan.trials)
    return {"layers": _PER_LAYER * layers, "ranks": _PER_RANK * layers * int(plan.grid.ep_size_of_cell.sum())}


def build_bounds(plan: Plan, tally: Tally, n_threads: int) -> tuple[pd.DataFrame, list[str]]:
    """Rows of tail.csv with method 'exact' (both bounds agree) or 'bound' (probability and high are the upper bound).

    A bound that cannot be computed is left out, with a note: what was sampled must not be lost for it.
    """
    if no_bounds_because(plan):
        return pd.DataFrame(), []
    grid, n_layers = plan.grid, min(plan.bound_layers, plan.draws or plan.trials)
    layouts = [(layout, ep_size) for layout, (_, ep_size) in zip(grid.layouts, grid.pairs, strict=True)]
    plain = [p for p in range(len(layouts)) if not plan.has_replicas[p]]
    first = {layouts[p]: p for p in reversed(plain)}  # equal placements have equal rows
    work = work_of_bounds(plan)
    try:
        with phase("layers", work):
            sources = _sources(plan, list(first.values()), n_layers, n_threads)
    except Exception as error:
        return pd.DataFrame(), [f"no bounds past sampling: {_reason(error)}"]
    largest_first = sorted(sources, key=lambda p: -grid.pairs[p][1])  # no thread is left with a large one at the end
    sizes = [float(grid.pairs[p][1]) for p in largest_first]
    with phase("ranks", work), ThreadPoolExecutor(n_threads) as pool:
        rows_of = map_on(pool, lambda p: _try_rows(plan, p, sources[p]), largest_first, sizes)
    found = dict(zip(largest_first, rows_of, strict=True))
    keys, rows_out = cell_keys(grid, tally), []
    all_layers = plan.synthetic.popularity == "none" or plan.workload.n_layers == n_layers
    for cell, (pair, step) in enumerate(grid.cells):
        source = first.get(layouts[pair])
        rows = None if source is None else found.get(source)
        if source is None or rows is None or isinstance(rows, str):
            continue
        conditional = isinstance(sources[source], DrawnLayers) and (plan.placements[pair] is None or not all_layers)
        given = f"{n_layers} drawn layers" if conditional else ""
        for metric, threshold, low, high in rows[step]:
            low = low if high > _NEAR_TINY else 0.0
            method = "exact" if low == high else "bound"
            rows_out.append((*keys[cell], metric, threshold, high, low, high, method, given))
    notes = [
        "no bounds past sampling for {} at EP {}: {}".format(*grid.pairs[p], reason)
        for p, reason in found.items()
        if isinstance(reason, str)
    ]
    return _table(rows_out), notes


def _table(rows: list[tuple[object, ...]]) -> pd.DataFrame:
    columns = [*KEYS, "metric", "threshold", "probability", "low", "high", "method", "given"]
    return pd.DataFrame(rows, columns=columns).assign(effective_blocks=np.nan)


def _sources(plan: Plan, pairs: list[int], n_layers: int, n_threads: int) -> dict[int, Source]:
    """Where the bounds of pairs come from, of those that have any."""
    router = _uniform_router(plan)
    sources: dict[int, Source] = {}
    for p in pairs:
        placement = plan.placements[p]
        if router is not None and placement is not None and placement.n_rows == 1:
            sources[p] = UniformLayer(router, placement.expert_ranks[0])
    # Random and fitted placements of uniform traffic are as many layouts as layers: they are left to sampling.
    drawn = [p for p in pairs if router is None or plan.placements[p] is not None]
    drawn = [p for p in drawn if p not in sources]
    return sources | dict(zip(drawn, sample_token_loads(plan, drawn, n_layers, n_threads), strict=True))


def _try_rows(plan: Plan, pair: int, source: Source) -> dict[int, list[Row]] | str:
    """Rows of each step of a pair, or why there are none."""
    try:
        return _rows_of_pair(plan, pair, source)
    except Exception as error:
        return _reason(error)


def _reason(error: Exception) -> str:
    return f"they could not be computed ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"


def _uniform_router(plan: Plan) -> UniformRouter | None:
    """The router under uniform traffic; None where experts or tokens are not alike."""
    model, workload = plan.model, plan.synthetic
    if workload.popularity != "none" or (model.is_grouped and workload.group_sigma > 0):
        return None
    return UniformRouter.of(model, X0)


def _rows_of_pair(plan: Plan, pair: int, source: Source) -> dict[int, list[Row]]:
    grid, events = plan.grid, events_of(plan.grid)
    known = impossible_events(grid, events) | certain_events(grid, events)
    rows: dict[int, list[Row]] = {}
    for cell, (of, step) in enumerate(grid.cells):
        if of == pair:
            others = _other_rows(events, known, int(grid.tokens_of_cell[cell]), cell, source)
            rows[step] = [*_imbalance_rows(plan, cell, source), *others]
    if isinstance(source, DrawnLayers):
        source.forget_sums()
    return rows


def _imbalance_rows(plan: Plan, cell: int, source: Source) -> Iterator[Row]:
    grid = plan.grid
    tokens, mean = int(grid.tokens_of_cell[cell]), grid.mean_load(cell)
    bounds = {1: (1.0, 1.0)}  # of small steps many thresholds ask for the same load
    last = 1.0
    for x in sorted({*grid.thresholds, *(FINE_LADDER if isinstance(source, UniformLayer) else LADDER)}):
        if x > grid.ep_size_of_cell[cell] or (last < _DEEPEST and x not in grid.thresholds):
            continue
        least = math.ceil(Fraction(str(x)) * mean)
        if least not in bounds:
            bounds[least] = source.max_load(tokens, least)
        low, last = bounds[least]
        if last < 1:
            yield "imbalance", x, low, last


def _other_rows(events: Events, known: np.ndarray, tokens: int, cell: int, source: Source) -> Iterator[Row]:
    for i in (events.cell == cell).nonzero()[0]:
        name, least = events.name[i], int(events.least[i])
        if name == "imbalance" or known[i]:
            continue
        if name == "received":
            bounds: tuple[float, float] | None = source.received(tokens, least)
        else:
            bounds = source.one_rank(tokens) if name == "one_rank" else source.idle_ranks(tokens, least)
        if bounds is not None and (bounds[1] < 1 or bounds[0] == bounds[1]):
            yield name, events.threshold[i], *bounds


def sample_token_loads(plan: Plan, pairs: list[int], n_layers: int, n_threads: int) -> list[DrawnLayers]:
    """Of some pairs of the grid, without replicas, on layer draws 0 .. n_layers - 1."""
    if not pairs:
        return []
    [group] = place_pairs(plan, range(n_layers), pairs)
    n_batches = min(max(plan.trials // _TRIALS_PER_BATCH, _LEAST_BATCHES), _MOST_BATCHES)
    n_tokens = n_batches * _BATCH_TOKENS
    with ThreadPoolExecutor(n_threads) as pool:
        layers = map_on(pool, lambda i: _count(plan, group, i, n_batches), range(n_layers), [1.0] * n_layers)
        of_pairs = zip(*layers, strict=True)
        return list(pool.map(lambda of_pair: DrawnLayers.of_counts(of_pair, n_tokens), of_pairs))


def _count(plan: Plan, group: Group, layer: int, n_batches: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Of each pair: tokens with j experts on each rank; the hottest ranks; tokens with j experts on two of these."""
    counts, _ = _tokens(plan, layer, _MOST_BATCHES)
    found = []
    ranks = group.layouts.ranks[group.rows[layer]]
    for p, rank in zip(group.pairs, ranks, strict=True):
        ep_size = plan.grid.pairs[p][1]
        hot = np.sort(np.argsort(-np.bincount(rank, counts[0, 0], ep_size), kind="stable")[:_HOT])
        width = plan.grid.top_k + 1
        found.append(
            (np.zeros((ep_size, width), np.int64), hot, np.zeros((len(hot) * (len(hot) - 1) // 2, width), np.int64))
        )
    for batch in range(n_batches):
        _, ids = _tokens(plan, layer, batch)
        for rank, (single, hot, together) in zip(ranks, found, strict=True):
            tally_loads(ids[0], rank, hot, single, together)
    return found


def _tokens(plan: Plan, layer: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
    trial = _FIRST_TRIAL + batch * 2**20 + layer
    tokens = np.array([_BATCH_TOKENS])
    return draw_trials(plan.model, plan.workload, plan.seed, range(trial, trial + 1), 2**20, tokens, _BATCH_TOKENS)


def work_of_rare(plan: Plan) -> float:
    """About how long `build_rare` takes, in the time of a sampled token."""
    return _PER_RARE_CELL * len(_rare_cells(plan))


def build_rare(plan: Plan, tally: Tally, n_threads: int) -> tuple[pd.DataFrame, list[str]]:
    """Rows of tail.csv from `plan.tail_floor` on, of all cells that have any, and notes on those that it cannot vouch for."""
    if plan.tail_floor is None:
        return pd.DataFrame(), []
    if not isinstance(plan.workload, SyntheticTraffic):
        return pd.DataFrame(), ["no rare-event estimates: recorded traffic has no other layers than its own"]
    cells = _rare_cells(plan)
    tails = track((_of_cell(plan, cell, n_threads) for cell in cells.values()), [1.0] * len(cells))
    found, keys = dict(zip(cells, tails, strict=True)), cell_keys(plan.grid, tally)
    rows: list[tuple[object, ...]] = []
    notes: list[str] = []
    for cell, (pair, step) in enumerate(plan.grid.cells):
        placement, ep_size = plan.grid.pairs[pair]
        where = f"{placement} at EP {ep_size} and {plan.grid.steps[step]} tokens"
        tail = found.get((plan.grid.layouts[pair], ep_size, step))
        reason = _no_rare_rows_because(plan, cell)
        if reason is not None:
            notes.append(f"no rare-event estimates for {where}: {reason}")
        elif tail is not None:
            rows += [(*keys[cell], *row, "rare", "") for row in tail.rows]
            notes += list(_refusals(where, tail))
    return _table(rows), list(dict.fromkeys(notes))


def _rare_cells(plan: Plan) -> dict[tuple[str, int, int], int]:
    """Cells whose rare events are estimated, by layout, EP size and step: equal placements have equal rows."""
    if plan.tail_floor is None or not isinstance(plan.workload, SyntheticTraffic):
        return {}
    found: dict[tuple[str, int, int], int] = {}
    for cell, (pair, step) in enumerate(plan.grid.cells):
        ep_size = plan.grid.pairs[pair][1]
        if ep_size > 1 and _no_rare_rows_because(plan, cell) is None:
            found.setdefault((plan.grid.layouts[pair], ep_size, step), cell)
    return found


def _no_rare_rows_because(plan: Plan, cell: int) -> str | None:
    """Why a cell of synthetic traffic stays with sampling; None if it does not."""
    pair = plan.grid.cells[cell][0]
    placement = plan.placements[pair]
    if plan.has_replicas[pair]:
        return "the copy of an expert that a token goes to depends on the other tokens"
    if placement is None or placement.n_rows > 1:
        return "the placement differs between layers"
    return no_rare_events_because(plan.synthetic, int(plan.grid.tokens_of_cell[cell]))


def _of_cell(plan: Plan, cell: int, n_threads: int) -> RareTail:
    grid, events = plan.grid, events_of(plan.grid)
    pair, ep_size = grid.cells[cell][0], int(grid.ep_size_of_cell[cell])
    placement = plan.placements[pair]
    assert placement is not None
    assert plan.tail_floor is not None
    open_events = (events.cell == cell) & ~impossible_events(grid, events) & ~certain_events(grid, events)
    names, thresholds = np.array(events.name)[open_events], np.array(events.threshold)[open_events]
    return rare_tail(
        plan.model,
        plan.synthetic,
        placement.expert_ranks[0],
        int(grid.tokens_of_cell[cell]),
        imbalance=sorted({x for x in (*grid.thresholds, *FINE_LADDER) if 1 < x <= ep_size}),
        idle_ranks=[int(m) for m in thresholds[names == "idle_ranks"]],
        one_rank="one_rank" in names,
        floor=plan.tail_floor,
        seed=plan.seed,
        n_threads=n_threads,
    )


def _refusals(where: str, tail: RareTail) -> Iterator[str]:
    """Notes on the thresholds that were refused, by reason."""
    names = {"imbalance": "imbalance >= {:g}", "idle_ranks": "idle ranks >= {:g}", "one_rank": "one rank"}
    for reason in dict.fromkeys(reason for _, _, reason in tail.refused):
        events = [names[metric].format(x) for metric, x, why in tail.refused if why == reason]
        yield f"no rare-event estimates for {where} of {', '.join(events)}: {reason}"
