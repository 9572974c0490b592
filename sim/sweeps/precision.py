"""Precision on demand: which cells go on after a stage. Stages end at fixed numbers of trials, so results can be repeated.

A cell stops together with the same EP size and step under the other placements: their changes are paired. The steps that
are left decide how many tokens a trial has, so that stopped large steps cost nothing more.
"""

import numpy as np

from sim.scoring import METRICS
from sim.stats import Moments, effective_blocks, mean_interval, probability_interval
from sim.sweeps.chunk import Stage
from sim.sweeps.grid import events_of
from sim.sweeps.plan import RARE, Plan
from sim.sweeps.tables import event_moments
from sim.sweeps.tally import Tally

FIRST_TRIALS = 1024
"""Trials of the first stage; each further one doubles them."""
_MAX_LOAD = METRICS.index("max_load")
_USELESS = 0.95  # of a half-width that doubled trials leave, where the draws alone would leave it


def first_stage(plan: Plan) -> Stage:
    """All cells: to the end, or, under a precision, to the first check."""
    cells = tuple(range(len(plan.grid.cells)))
    stop = plan.trials if plan.precision is None else min(FIRST_TRIALS, plan.trials)
    return _stage(plan, 0, stop, cells)


def _stage(plan: Plan, done: int, stop: int, cells: tuple[int, ...]) -> Stage:
    if plan.draws is None:
        return Stage(range(done, stop), stop, cells)
    return Stage(range(stop), min(plan.draws, stop), cells)  # a draw's trials belong together: from the start


def next_stage(plan: Plan, stage: Stage, tally: Tally, before: Tally | None, stopped: np.ndarray) -> Stage | None:
    """The stage after `stage`, None if all cells have stopped; why each did is written to `stopped`, str [cells].

    `tally` is of all trials so far, `before` of those before the stage (None in the first).
    """
    cells, grid = np.array(stage.cells), plan.grid
    if plan.precision is None:
        stopped[cells] = "trials"
        return None
    columns = grid.baseline_cells  # same EP size and step
    short = np.isin(columns, columns[~_meets(plan, tally)])
    stopped[cells] = np.where(short[cells], "", "precision")
    if plan.draws is not None and before is not None and stage.draws == plan.draws:
        stuck = _half_width(tally) > _USELESS * _half_width(before)
        at_end = np.isin(columns, columns[stuck & short])
        stopped[cells] = np.where(at_end[cells] & short[cells], "draws", stopped[cells])
    if stage.trials.stop >= plan.trials:
        stopped[cells] = np.where(stopped[cells] == "", "max_trials", stopped[cells])
    alive = tuple(int(cell) for cell in cells if stopped[cell] == "")
    done = stage.trials.stop
    return _stage(plan, done, min(2 * done, plan.trials), alive) if alive else None


def _half_width(tally: Tally) -> np.ndarray:
    """Relative half-width of the mean imbalance of each cell; inf without draws."""
    moments = Moments(*(part[:, _MAX_LOAD] for part in tally.moments("metric")))
    with np.errstate(divide="ignore", invalid="ignore"):
        mean, low, _ = mean_interval(moments, tally.design_of())
        half = (mean - low) / mean
    return np.where(np.isnan(half), np.inf, half)


def _meets(plan: Plan, tally: Tally) -> np.ndarray:
    """Whether each cell has the precision that was asked for."""
    target, grid = plan.precision, plan.grid
    assert target is not None
    met = np.ones(len(grid.cells), bool)
    if target.mean is not None:
        met &= _half_width(tally) <= target.mean
    if target.tail is not None:
        events = events_of(grid)
        moments, design = event_moments(grid, tally)
        with np.errstate(divide="ignore", invalid="ignore"):
            p = moments.total / design.blocks
            low, high = probability_interval(p, effective_blocks(moments, design))
            wide = (high - low) / 2 > target.tail * p
        wide &= (events.metric == _MAX_LOAD) & (high > RARE)
        met[events.cell[wide]] = False
    return met
