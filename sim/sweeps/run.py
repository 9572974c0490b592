"""Run a plan: its chunks on an executor, in stages where a precision decides. Sums are integers, so order does not matter.

Stages end at fixed numbers of trials, so results can be repeated. A cell stops together with the same EP size and step under
the other placements: their changes are paired. The steps that are left decide how many tokens a trial has, so that stopped
large steps cost nothing more.
"""

import hashlib
import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from sim.kernels import usable_processors
from sim.model import ModelSpec
from sim.options import SweepOptions
from sim.options.declare import takes
from sim.options.kinds import THREADS
from sim.progress import advance, phase
from sim.results import SweepResult
from sim.router import routing_law
from sim.scoring import METRICS
from sim.stats import Moments, effective_blocks, mean_interval, probability_interval
from sim.sweeps import executors
from sim.sweeps.bounds import build_bounds, build_rare, work_of_bounds, work_of_rare
from sim.sweeps.chunk import Stage, first_stage, stage_chunks, stage_of
from sim.sweeps.grid import events_of
from sim.sweeps.journal import Journal
from sim.sweeps.plan import RARE, Plan, make_plan
from sim.sweeps.tables import build_summary, build_tail, event_moments
from sim.sweeps.tally import Tally, build_counts, only_cells
from sim.traffic import Workload


@takes(SweepOptions)
def sweep(
    model: str | Path | ModelSpec,
    workload: str | Path | Workload,
    *,
    threads: int | None = None,
    executor: str = "threads",
    **options: Any,
) -> SweepResult:
    """Sample token routings once and score them under every placement, EP size and number of tokens per step.

    Parameters
    ----------
    model, workload : str, Path, ModelSpec, Workload
        Names or paths as `load_model` and `load_workload` take them, or what those return.
    threads : int, optional
        Default: the processors that this process may use. Rows do not depend on it.
    executor : str
        'threads', or 'cuda' for the NVIDIA GPUs of this machine (extra: epsim[cuda]).
    **options

    Returns
    -------
    SweepResult
        `.summary`, `.tail` and `.counts` are DataFrames; `.notes` says which bounds and estimates could not be computed.

    Raises
    ------
    InputError (a ValueError)
        An argument is out of range, or an input file is missing or invalid.

    Examples
    --------
    >>> import sim
    >>> mine = [(255 - expert) // 32 for expert in range(256)]
    >>> result = sim.sweep(
    ...     "deepseek-v3", "uniform", ep_sizes=8, tokens=64, placements=["linear", mine], trials=100, bound_layers=0, threads=1
    ... )
    >>> result.summary.placement.tolist()
    ['linear', 'array']
    """
    plan = make_plan(model, workload, **options)
    n_threads = usable_processors() if threads is None else THREADS.check("threads", threads)
    with executors.executor_of(executor, n_threads, plan) as chosen:
        return run_plan(plan, chosen, n_threads=n_threads)


class Sampled(NamedTuple):
    """What the sampling of a plan saw."""

    tally: Tally
    stopped: np.ndarray  # why each cell stopped, str [cells]


def run_plan(
    plan: Plan, executor: executors.Executor, *, n_threads: int = 1, journal: Journal | None = None
) -> SweepResult:
    """Run a checked plan: `sample_plan`, then `finish_plan`. Progress is announced in the phases of `work_of`."""
    return finish_plan(plan, sample_plan(plan, executor, journal), n_threads)


def sample_plan(
    plan: Plan, executor: executors.Executor, journal: Journal | None = None, time_limit_s: float | None = None
) -> Sampled:
    """Sample and score the chunks of a plan on `executor`, but for those that the journal holds."""
    with phase("sampling", work_of(plan)):
        return _run_stages(plan, executor, journal, time_limit_s)


def finish_plan(plan: Plan, sampled: Sampled, n_threads: int) -> SweepResult:
    """The tables of what was sampled, with bounds and rare-event estimates past it."""
    work, (tally, stopped) = work_of(plan), sampled
    with phase("bounds", work):
        bounds, notes = build_bounds(plan, tally, n_threads)
    with phase("rare events", work):
        rare, about_rare = build_rare(plan, tally, n_threads)
    with phase("writing", work):
        tail = [build_tail(plan.grid, tally), bounds, rare]
        return SweepResult(
            build_summary(plan.grid, tally, stopped, cell_ids(plan)),
            pd.concat([part for part in tail if len(part)], ignore_index=True),
            build_counts(plan.grid, tally),
            plan.identity,
            notes + about_rare,
        )


def work_of(plan: Plan) -> dict[str, float]:
    """About how long the phases of a plan take, relative to each other and to those of other plans."""
    grid = plan.grid
    tokens = plan.trials * int(grid.steps[-1]) + plan.fit_tokens * (plan.draws or plan.trials)
    blocks = plan.trials * int(grid.ep_size_of_cell.sum())
    return {
        "sampling": _TOKENS_TO_START + tokens + _TOKENS_PER_RANK * blocks,
        "bounds": sum(work_of_bounds(plan).values()),
        "rare events": work_of_rare(plan),
        "writing": _TOKENS_PER_ROW * len(grid.cells),
    }


def cell_ids(plan: Plan) -> list[str]:
    """Of each cell a digest of everything that changes the distribution of its blocks, and of nothing else."""
    law, grid = routing_law(plan.model, plan.workload), plan.grid
    about = [
        [law, grid.layouts[pair], int(grid.ep_size_of_cell[cell]), int(grid.tokens_of_cell[cell]), plan.ranks_per_node]
        for cell, (pair, _) in enumerate(grid.cells)
    ]
    return [hashlib.sha256(json.dumps(cell, sort_keys=True).encode()).hexdigest()[:16] for cell in about]


_TOKENS_TO_START, _TOKENS_PER_RANK, _TOKENS_PER_ROW = 1e6, 0.02, 3000.0
"""What it takes in the time of a sampled token to start, to score a rank of a block, and to write a cell; measured on
DeepSeek-V3.
"""


_MAX_LOAD = METRICS.index("max_load")
_USELESS = 0.95  # of a half-width that doubled trials leave, where the draws alone would leave it


class _OutOfTime(Exception):  # noqa: N818
    pass


def _run_stages(
    plan: Plan, executor: executors.Executor, journal: Journal | None, time_limit_s: float | None
) -> Sampled:
    """Sums over all stages, and why each cell stopped."""
    stopped = np.full(len(plan.grid.cells), "", dtype=object)
    stage: Stage | None = first_stage(plan)
    total: Tally | None = None
    started_s, end_s = time.monotonic(), math.inf
    while stage is not None:
        try:
            new = _run_stage(plan, stage, executor, journal, end_s)
        except _OutOfTime:
            stopped[list(stage.cells)] = "time_limit"
            break
        if time_limit_s is not None:
            end_s = started_s + time_limit_s  # the first stage is run in any case
        before, total = total, _with_stage(plan, total, new, stage)
        stage = _next_stage(plan, stage, total, before, stopped)
    assert total is not None
    total.compact()
    return Sampled(total, stopped)


def _run_stage(plan: Plan, stage: Stage, executor: executors.Executor, journal: Journal | None, end_s: float) -> Tally:
    """Sums over the chunks of a stage. Raises _OutOfTime when the clock has passed `end_s`."""
    total = Tally.zero(plan.grid)
    of_trial = int(plan.grid.tokens_of_cell[list(stage.cells)].max())
    done = 0

    def take(draws: range, tally: Tally) -> None:
        nonlocal done
        total.add(tally)
        done += stage.design(draws)[0] * of_trial
        advance((stage.trials.start + done / of_trial) / plan.trials)  # under a precision, of the most that it may take

    missing = stage_chunks(plan, stage, executor.chunk_size(plan))
    if journal:
        missing = []
        for draws, kept in journal.finished(stage):
            if kept is None:
                missing.append(draws)
            else:
                take(draws, kept)
    if missing and time.monotonic() > end_s:
        raise _OutOfTime
    for n_computed, (draws, tally) in enumerate(executor.compute(plan, stage, missing), 1):
        if journal:
            journal.add(stage, draws, tally)
        take(draws, tally)
        if n_computed < len(missing) and time.monotonic() > end_s:
            raise _OutOfTime
    total.compact()
    if journal:
        journal.finish(stage, total)
    return total


def _with_stage(plan: Plan, total: Tally | None, new: Tally, stage: Stage) -> Tally:
    """Sums with those of a further stage: added, or, where it went through its draws from the start, in their place."""
    if total is None:
        return new
    if stage.trials.start == 0:
        total = only_cells(plan.grid, total, np.setdiff1d(np.arange(len(plan.grid.cells)), stage.cells))
    both = Tally.zero(plan.grid)
    both.add(total)
    both.add(new)
    both.compact()
    return both


def _next_stage(plan: Plan, stage: Stage, tally: Tally, before: Tally | None, stopped: np.ndarray) -> Stage | None:
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
    return stage_of(plan, range(done, min(2 * done, plan.trials)), alive) if alive else None


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
