"""Run a plan: chunks over threads. Their sums are integers, so the order in which they end does not matter."""

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from sim.errors import whole_number
from sim.model import ModelSpec
from sim.results import SweepResult
from sim.sweeps.chunk import chunk_draws, run_chunk
from sim.sweeps.journal import Journal
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


def run_plan(
    plan: Plan, threads: int | None = None, progress: Progress | None = None, journal: Journal | None = None
) -> SweepResult:
    """Run a checked plan.

    `progress(tokens done, tokens in all)` is called after every chunk; chunks that the journal holds are not computed.
    """
    if threads is not None:
        whole_number("--threads", threads, 1, 4096)
    tally = _tally(plan, threads or _usable_processors(), progress, journal)
    return SweepResult(build_summary(plan, tally), build_tail(plan, tally), build_counts(plan, tally), plan.identity)


def _usable_processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _tally(plan: Plan, threads: int, progress: Progress | None, journal: Journal | None) -> Tally:
    """Sums over all chunks; the first to be computed runs alone, so that kernels are compiled once."""
    total: Tally | None = None
    done = 0

    def take(draws: range, tally: Tally) -> None:
        nonlocal total, done
        if total is None:
            total = tally
        else:
            total.add(tally)
        done += sum(-(-(plan.trials - d) // plan.draws) for d in draws) * int(plan.steps[-1])
        if progress:
            progress(done, plan.trials * int(plan.steps[-1]))

    def finish(draws: range, tally: Tally) -> None:
        if journal:
            journal.add(draws, tally)
        take(draws, tally)

    missing = []
    for draws in chunk_draws(plan):
        kept = journal.read(draws) if journal else None
        if kept is None:
            missing.append(draws)
        else:
            take(draws, kept)
    if missing:
        finish(missing[0], run_chunk(plan, missing[0]))
        _run_parallel(plan, missing[1:], threads, finish)
    assert total is not None
    total.compact()
    return total


def _run_parallel(plan: Plan, chunks: list[range], threads: int, finish: Callable[[range, Tally], None]) -> None:
    """Compute chunks over threads, a few ahead at a time so that finished sums do not pile up."""
    waiting = iter(chunks)
    running: dict[Future[Tally], range] = {}
    with ThreadPoolExecutor(threads) as pool:
        try:
            while True:
                while len(running) < 2 * threads and (draws := next(waiting, None)) is not None:
                    running[pool.submit(run_chunk, plan, draws)] = draws
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    finish(running.pop(future), future.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
