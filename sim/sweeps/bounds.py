"""Rows of tail.csv that sampling cannot give: exact answers, and bounds without a floor.

Tokens must be independent given the layer: traffic by law without request effects. Under uniform traffic the rows hold
as they stand. Where popularity is drawn, the far tail belongs to layers that nobody drew; the rows are then conditional
on the first layer draws of the sweep, and say so. Of a fitted workload the layers are all there are: where all of them
are taken, nothing is left out.
"""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pandas as pd

from sim.sweeps.events import Events, events_of
from sim.sweeps.laws import DrawnLayers, sample_laws
from sim.sweeps.plan import Plan
from sim.sweeps.tables import KEYS, cell_keys, certain_events, impossible_events
from sim.sweeps.tally import Tally
from sim.theory import TINY, UniformLayer, UniformRouter
from sim.traffic import SyntheticTraffic
from sim.traffic.synthetic import X0

_NEAR_1 = (1.01, 1.02, 1.03, 1.04, 1.05, 1.06, 1.08, 1.1, 1.15, 1.2, 1.25, 1.3, 1.4, 1.5, 1.6, 1.75)
_COARSE, _FINE = (1, 1.25, 1.5, 1.75), (1, 1.125, 1.25, 1.375, 1.5, 1.625, 1.75, 1.875)
LADDER, FINE_LADDER = ((*_NEAR_1, *(x * 2.0**i for i in range(1, 14) for x in between)) for between in (_COARSE, _FINE))
"""Imbalance thresholds of bounds, besides those of the sweep; the fine one where rows cost little."""
_DEEPEST = 1e-18  # below this, only the sweep's own thresholds

_NEAR_TINY = 1e6 * TINY

Source = UniformLayer | DrawnLayers
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


def build_bounds(plan: Plan, tally: Tally, n_threads: int) -> pd.DataFrame:
    """Rows of tail.csv with method 'exact' (both bounds agree) or 'bound' (probability and high are the upper bound)."""
    if no_bounds_because(plan):
        return pd.DataFrame()
    grid, n_layers = plan.grid, min(plan.bound_layers, plan.draws or plan.trials)
    assert isinstance(plan.workload, SyntheticTraffic)
    layouts = [(layout, ep_size) for layout, (_, ep_size) in zip(grid.layouts, grid.pairs, strict=True)]
    plain = [p for p in range(len(layouts)) if not plan.has_replicas[p]]
    first = {layouts[p]: p for p in reversed(plain)}  # equal placements have equal rows
    router = _uniform_router(plan, plan.workload)
    sources: dict[int, Source] = {}
    for p in first.values():
        slots = plan.slots[p]
        if router is not None and slots is not None and len(slots.ranks) == 1:
            sources[p] = UniformLayer(router, slots.expert_ranks[0])
    # Random and fitted placements of uniform traffic are as many layouts as layers: they are left to sampling.
    drawn = [p for p in first.values() if router is None or plan.slots[p] is not None]
    drawn = [p for p in drawn if p not in sources]
    sources |= dict(zip(drawn, sample_laws(plan, drawn, n_layers, n_threads), strict=True))
    with ThreadPoolExecutor(n_threads) as pool:
        rows = dict(zip(sources, pool.map(lambda p: _rows_of_pair(plan, p, sources[p]), sources), strict=True))
    keys, rows_out = cell_keys(grid, tally), []
    for cell, (pair, step) in enumerate(grid.cells):
        source = first.get(layouts[pair])
        if source is None or source not in sources:
            continue
        random_placement = plan.slots[pair] is None
        all_layers = plan.workload.popularity == "none" or plan.workload.n_layers == n_layers
        conditional = source in drawn and (random_placement or not all_layers)
        given = f"{n_layers} drawn layers" if conditional else ""
        for metric, threshold, low, high in rows[source][step]:
            low = low if high > _NEAR_TINY else 0.0
            method = "exact" if low == high else "bound"
            rows_out.append((*keys[cell], metric, threshold, high, low, high, method, given))
    return pd.DataFrame(
        rows_out, columns=[*KEYS, "metric", "threshold", "probability", "low", "high", "method", "given"]
    )


def _uniform_router(plan: Plan, workload: SyntheticTraffic) -> UniformRouter | None:
    """The router under uniform traffic; None where experts or tokens are not alike."""
    model = plan.model
    if workload.popularity != "none" or (model.is_grouped and workload.group_sigma > 0):
        return None
    return UniformRouter.of(model, X0)


def _rows_of_pair(plan: Plan, pair: int, source: Source) -> dict[int, list[Row]]:
    """Rows of each step of a pair."""
    grid, events = plan.grid, events_of(plan.grid)
    known = impossible_events(grid, events) | certain_events(grid, events)
    rows: dict[int, list[Row]] = {}
    for cell in range(len(grid.cells)):
        if grid.cells[cell][0] == pair:
            rows[grid.cells[cell][1]] = [
                *_imbalance_rows(plan, cell, source),
                *_other_rows(events, known, int(grid.tokens_of_cell[cell]), cell, source),
            ]
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
        bounds = source.one_rank(tokens) if name == "one_rank" else source.idle_ranks(tokens, least)
        if bounds is not None and (bounds[1] < 1 or bounds[0] == bounds[1]):
            yield name, events.threshold[i], *bounds
