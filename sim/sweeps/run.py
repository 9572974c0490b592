"""Run a plan: chunks over threads, sums in the order of the chunks."""

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from sim.errors import whole_number
from sim.model import ModelSpec
from sim.results import SweepResult
from sim.sweeps.chunk import chunk_draws, run_chunk
from sim.sweeps.plan import DEFAULT_TRIALS, THRESHOLDS, Plan, make_plan
from sim.sweeps.tables import build_counts, build_summary, build_tail
from sim.sweeps.tally import Tally
from sim.workload import Workload

Progress = Callable[[int, int], None]


def sweep(
    model: str | Path | ModelSpec,
    workload: str | Path | Workload,
    *,
    ep_sizes: int | Iterable[int],
    tokens: int | Iterable[int],
    placements: str | Sequence[str],
    trials: int = DEFAULT_TRIALS,
    draws: int | None = None,
    seed: int = 0,
    tokens_per_rank: bool = False,
    ranks_per_node: int = 8,
    thresholds: Iterable[float] = THRESHOLDS,
    threads: int | None = None,
) -> SweepResult:
    """Sample token routings once and score them under every placement, EP size and number of tokens per step.

    Parameters
    ----------
    model, workload : str or ModelSpec, Workload
        Names or paths as `load_model` and `load_workload` take them, or what those return.
    ep_sizes, tokens : int or list of int
        EP sizes, and tokens per step over the whole EP group (per rank with `tokens_per_rank`).
    placements : str or list of str
        Strategies of `sim.place`; changes are given against the first.
    trials : int
        Steps scored in each cell.
    draws : int, optional
        Independent layer draws that the trials come from; by default a fresh layer for every step of a law, and every
        layer of recorded traffic. Intervals rest on the variation between draws.
    seed : int
        Same seed, same rows, on any number of threads.
    ranks_per_node : int
        For node_aware placement and for nodes per token.
    thresholds : list of float
        Imbalance thresholds of the tail.
    threads : int, optional
        Default: the processors that this process may use.

    Returns
    -------
    SweepResult
        `.summary`, `.tail` and `.counts` are DataFrames.

    Raises
    ------
    InputError (a ValueError)
        An argument is out of range, or an input file is missing or invalid.
    """
    plan = make_plan(
        model, workload, ep_sizes=ep_sizes, tokens=tokens, placements=placements, trials=trials, draws=draws, seed=seed,
        tokens_per_rank=tokens_per_rank, ranks_per_node=ranks_per_node, thresholds=thresholds,
    )  # fmt: skip
    return run_plan(plan, threads)


def run_plan(plan: Plan, threads: int | None = None, progress: Progress | None = None) -> SweepResult:
    """Run a checked plan; `progress(tokens done, tokens in all)` is called after every chunk."""
    if threads is not None:
        whole_number("--threads", threads, 1, 4096)
    tally = _tally(plan, threads or _usable_processors(), progress)
    return SweepResult(build_summary(plan, tally), build_tail(plan, tally), build_counts(plan, tally), plan.identity)


def _usable_processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _tally(plan: Plan, threads: int, progress: Progress | None) -> Tally:
    chunks = chunk_draws(plan)
    total = run_chunk(plan, chunks[0])  # alone, so that kernels are compiled once
    tokens_of_trial, done = int(plan.steps[-1]), 0

    def report(draws: range) -> None:
        nonlocal done
        done += sum(-(-(plan.trials - d) // plan.draws) for d in draws) * tokens_of_trial
        if progress:
            progress(done, plan.trials * tokens_of_trial)

    report(chunks[0])
    with ThreadPoolExecutor(threads) as pool:
        waiting = iter(chunks[1:])
        running: dict[Future[Tally], range] = {}
        try:
            while True:
                while len(running) < 2 * threads and (draws := next(waiting, None)) is not None:
                    running[pool.submit(run_chunk, plan, draws)] = draws
                if not running:
                    break
                finished: Any = wait(running, return_when=FIRST_COMPLETED).done
                for future in finished:
                    total.add(future.result())
                    report(running.pop(future))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    total.compact()
    return total
