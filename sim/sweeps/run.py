"""Run a plan: its chunks on an executor, in stages where a precision decides. Sums are integers, so order does not matter."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from sim.errors import whole_number
from sim.kernels import usable_processors
from sim.model import ModelSpec
from sim.results import SweepResult
from sim.router import routing_law
from sim.sweeps import executors
from sim.sweeps.bounds import build_bounds
from sim.sweeps.chunk import Stage, stage_chunks
from sim.sweeps.grid import events_of
from sim.sweeps.journal import Journal
from sim.sweeps.placements import PlacementLike
from sim.sweeps.plan import THRESHOLDS, Plan, make_plan
from sim.sweeps.precision import first_stage, next_stage
from sim.sweeps.tables import build_summary, build_tail
from sim.sweeps.tally import Tally, build_counts, only_cells
from sim.traffic import LoadCounts, RecordedTraffic, Workload

Progress = Callable[[int, int], None]


def sweep(
    model: str | Path | ModelSpec,
    workload: str | Path | Workload,
    *,
    ep_sizes: int | Iterable[int],
    tokens: int | Iterable[int],
    placements: PlacementLike | Iterable[PlacementLike],
    trials: int | None = None,
    draws: int | None = None,
    seed: int = 0,
    tokens_per_rank: bool = False,
    ranks_per_node: int = 8,
    thresholds: Iterable[float] = THRESHOLDS,
    precision: float | None = None,
    precision_tail: float | None = None,
    max_trials: int | None = None,
    bound_layers: int | None = None,
    fit_tokens: int | None = None,
    fit_on: str | Path | RecordedTraffic | LoadCounts | None = None,
    replica_choice: str = "even",
    threads: int | None = None,
) -> SweepResult:
    """Sample token routings once and score them under every placement, EP size and number of tokens per step.

    Parameters
    ----------
    model, workload : str or ModelSpec, Workload
        Names or paths as `load_model` and `load_workload` take them, or what those return.
    ep_sizes, tokens : int or list of int
        EP sizes, and tokens per step over the whole EP group (per rank with `tokens_per_rank`).
    placements : str, Placement, int array, or list of these
        Names of strategies of `sim.place`; placements (several of one name are taken as one on several EP sizes); or the rank
        of each expert, [n_experts] or [layers, n_experts]. Changes are given against the first.
    trials : int, optional
        Steps scored in each cell; default 10,000. Not with a precision.
    draws : int, optional
        Independent layer draws that the trials come from; by default a fresh layer for every step of synthetic
        traffic, and every layer of recorded or fitted traffic. Intervals rest on the variation between draws.
    seed : int
        Same seed, same rows, on any number of threads.
    ranks_per_node : int
        For node_aware placement and for nodes per token.
    thresholds : list of float
        Imbalance thresholds of the tail.
    precision, precision_tail : float, optional
        Stop a cell when the relative half-width of the interval of its mean imbalance (of each P(imbalance >= x) that is
        not shown to be below 1e-3) is at most this, at 1024, 2048, 4096, ... trials.
    max_trials : int, optional
        The most trials under a precision; default 1,000,000.
    bound_layers : int, optional
        Layers used for analytic tail bounds where popularity is drawn; default up to 32, and none in grids that are large for
        their trials. 0 for no bounds.
    fit_tokens : int, optional
        Of synthetic traffic: tokens of each layer draw, other than those that are scored, that load-aware placements (eplb)
        are fitted on; default 16384.
    fit_on : str, Path, RecordedTraffic or LoadCounts, optional
        Of recorded or fitted traffic: other traffic of the same layers to fit on. By default recorded traffic is fitted on every
        second sequence, and all placements are scored on the others; fitted traffic, as `fit_tokens` says.
    replica_choice : str
        Which copy of a replicated expert a token goes to: 'even' split, or 'vllm_hash' of the token's index in the step.
    threads : int, optional
        Default: the processors that this process may use.

    Returns
    -------
    SweepResult
        `.summary`, `.tail` and `.counts` are DataFrames; `.notes` says which bounds could not be computed.

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
    plan = make_plan(
        model, workload, ep_sizes=ep_sizes, tokens=tokens, placements=placements, trials=trials, draws=draws, seed=seed,
        tokens_per_rank=tokens_per_rank, ranks_per_node=ranks_per_node, thresholds=thresholds, precision=precision,
        precision_tail=precision_tail, max_trials=max_trials, bound_layers=bound_layers, fit_tokens=fit_tokens,
        fit_on=fit_on, replica_choice=replica_choice,
    )  # fmt: skip
    n_threads = usable_processors() if threads is None else whole_number("--threads", threads, 1, 4096)
    return run_plan(plan, executors.threads(n_threads), n_threads=n_threads)


def run_plan(
    plan: Plan,
    executor: executors.Executor,
    *,
    n_threads: int = 1,
    progress: Progress | None = None,
    journal: Journal | None = None,
    time_limit_s: float | None = None,
) -> SweepResult:
    """Run a checked plan.

    Chunks run on `executor`, the bounds past sampling on `n_threads` threads. `progress(tokens done, tokens of the stage)`
    is called after every chunk; chunks that the journal holds are not computed.
    """
    tally, stopped = _run_stages(plan, executor, progress, journal, time_limit_s)
    bounds, notes = build_bounds(plan, tally, n_threads)
    tail = [build_tail(plan.grid, tally), bounds]
    return SweepResult(
        build_summary(plan.grid, tally, stopped, cell_ids(plan)),
        pd.concat([part for part in tail if len(part)], ignore_index=True),
        build_counts(plan.grid, tally),
        plan.identity,
        notes,
    )


def cell_ids(plan: Plan) -> list[str]:
    """Of each cell a digest of everything that changes the distribution of its blocks, and of nothing else."""
    law, grid = routing_law(plan.model, plan.workload), plan.grid
    about = [
        [law, grid.layouts[pair], int(grid.ep_size_of_cell[cell]), int(grid.tokens_of_cell[cell]), plan.ranks_per_node]
        for cell, (pair, _) in enumerate(grid.cells)
    ]
    return [hashlib.sha256(json.dumps(cell, sort_keys=True).encode()).hexdigest()[:16] for cell in about]


class _OutOfTime(Exception):  # noqa: N818
    pass


def _run_stages(
    plan: Plan,
    executor: executors.Executor,
    progress: Progress | None,
    journal: Journal | None,
    time_limit_s: float | None,
) -> tuple[Tally, np.ndarray]:
    """Sums over all stages, and why each cell stopped, str [cells]."""
    stopped = np.full(len(plan.grid.cells), "", dtype=object)
    stage: Stage | None = first_stage(plan)
    total: Tally | None = None
    started_s, end_s = time.monotonic(), math.inf
    while stage is not None:
        try:
            new = _run_stage(plan, stage, executor, progress, journal, end_s)
        except _OutOfTime:
            stopped[list(stage.cells)] = "time_limit"
            break
        if time_limit_s is not None:
            end_s = started_s + time_limit_s  # the first stage is run in any case
        before, total = total, _with_stage(plan, total, new, stage)
        stage = next_stage(plan, stage, total, before, stopped)
    assert total is not None
    total.compact()
    return total, stopped


def _run_stage(
    plan: Plan,
    stage: Stage,
    executor: executors.Executor,
    progress: Progress | None,
    journal: Journal | None,
    end_s: float,
) -> Tally:
    """Sums over the chunks of a stage. Raises _OutOfTime when the clock has passed `end_s`."""
    total = _nothing(plan)
    of_trial = int(plan.grid.tokens_of_cell[list(stage.cells)].max())
    done = 0

    def take(draws: range, tally: Tally) -> None:
        nonlocal done
        total.add(tally)
        done += sum(len(stage.trials_of(draw)) for draw in draws) * of_trial
        if progress:
            progress(done, len(stage.trials) * of_trial)

    missing = []
    for draws in stage_chunks(plan, stage):
        kept = journal.read(stage, draws) if journal else None
        if kept is None:
            missing.append(draws)
        else:
            take(draws, kept)
    if missing and time.monotonic() > end_s:
        raise _OutOfTime
    for n_computed, (draws, tally) in enumerate(executor(plan, stage, missing), 1):
        if journal:
            journal.add(stage, draws, tally)
        take(draws, tally)
        if n_computed < len(missing) and time.monotonic() > end_s:
            raise _OutOfTime
    total.compact()
    return total


def _nothing(plan: Plan) -> Tally:
    return Tally.zero(len(plan.grid.cells), len(events_of(plan.grid).cell), len(plan.grid.pair_of_rank))


def _with_stage(plan: Plan, total: Tally | None, new: Tally, stage: Stage) -> Tally:
    """Sums with those of a further stage: added, or, where it went through its draws from the start, in their place."""
    if total is None:
        return new
    if stage.trials.start == 0:
        total = only_cells(plan.grid, total, np.setdiff1d(np.arange(len(plan.grid.cells)), stage.cells))
    both = _nothing(plan)
    both.add(total)
    both.add(new)
    both.compact()
    return both
