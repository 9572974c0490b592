"""Rows of tail.csv with method 'rare': probabilities over all layers, drawn or not, by importance sampling.

They cost the more, the more cells a sweep has: some seconds each. `sim.theory.rare` says how they come about.
"""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from sim.sweeps.bounds import LADDER
from sim.sweeps.grid import events_of
from sim.sweeps.plan import Plan
from sim.sweeps.tables import KEYS, cell_keys, certain_events, impossible_events
from sim.sweeps.tally import Tally
from sim.theory import RareTail, no_rare_events_because, rare_tail
from sim.traffic import SyntheticTraffic


def build_rare(plan: Plan, tally: Tally, n_threads: int) -> tuple[pd.DataFrame, list[str]]:
    """Rows of tail.csv from `plan.tail_floor` on, of all cells that have any.

    Returns
    -------
    (rows, notes)
        Notes say where the method cannot vouch for a row, and why.
    """
    if plan.tail_floor is None:
        return pd.DataFrame(), []
    if not isinstance(plan.workload, SyntheticTraffic):
        return pd.DataFrame(), ["no rare-event estimates: recorded traffic has no other layers than its own"]
    keys, grid = cell_keys(plan.grid, tally), plan.grid
    known: dict[tuple[str, int, int], RareTail] = {}  # equal placements have equal rows
    rows: list[tuple[object, ...]] = []
    notes: list[str] = []
    for cell, (pair, step) in enumerate(grid.cells):
        ep_size, tokens = int(grid.ep_size_of_cell[cell]), int(grid.tokens_of_cell[cell])
        where = f"{grid.pairs[pair][0]} at EP {ep_size} and {tokens} tokens"
        reason = _no_rare_rows_because(plan, pair) or no_rare_events_because(plan.workload, tokens)
        if reason is not None:
            notes.append(f"no rare-event estimates for {where}: {reason}")
        elif ep_size > 1:
            layout = (grid.layouts[pair], ep_size, step)
            if layout not in known:
                known[layout] = _of_cell(plan, cell, n_threads)
            rows += [(*keys[cell], *row, "rare", "") for row in known[layout].rows]
            notes += list(_refusals(where, known[layout]))
    columns = [*KEYS, "metric", "threshold", "probability", "low", "high", "method", "given"]
    return pd.DataFrame(rows, columns=columns).assign(effective_blocks=np.nan), list(dict.fromkeys(notes))


def _no_rare_rows_because(plan: Plan, pair: int) -> str | None:
    """Why a pair (placement, EP size) stays with sampling; None if it does not."""
    placement = plan.placements[pair]
    if plan.has_replicas[pair]:
        return "the copy of an expert that a token goes to depends on the other tokens"
    if placement is None or placement.n_rows > 1:
        return "the placement differs between layers"
    return None


def _of_cell(plan: Plan, cell: int, n_threads: int) -> RareTail:
    grid, events = plan.grid, events_of(plan.grid)
    pair, ep_size = grid.cells[cell][0], int(grid.ep_size_of_cell[cell])
    placement = plan.placements[pair]
    assert placement is not None
    assert isinstance(plan.workload, SyntheticTraffic)
    assert plan.tail_floor is not None
    open_events = (events.cell == cell) & ~impossible_events(grid, events) & ~certain_events(grid, events)
    names, thresholds = np.array(events.name)[open_events], np.array(events.threshold)[open_events]
    return rare_tail(
        plan.model,
        plan.workload,
        placement.expert_ranks[0],
        int(grid.tokens_of_cell[cell]),
        imbalance=sorted({x for x in (*grid.thresholds, *LADDER) if 1 < x <= ep_size}),
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
