"""Where chunks are computed: on threads, on GPUs, or on a Dask cluster. An executor takes chunks and yields tallies, in any
order.
"""

import asyncio
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures import Executor as Pool
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np

from sim.errors import InputError, unknown
from sim.kernels import is_cold, source_digest
from sim.sweeps import bounds, steps
from sim.sweeps.chunk import CPU_CHUNKS, ChunkSize, Stage, first_stage, run_chunk
from sim.sweeps.plan import Plan, make_plan
from sim.sweeps.tally import Tally

Compute = Callable[[Plan, Stage, range], Tally]
_ANSWER_S = 10
_RETRIES = 5
_AHEAD = 2  # chunks per worker that wait for it


class Executor(NamedTuple):
    """Computes chunks of a stage, and says how large they should be."""

    compute: Callable[[Plan, Stage, list[range]], Iterator[tuple[range, Tally]]]
    chunk_size: Callable[[Plan], ChunkSize] = lambda _: CPU_CHUNKS


@contextmanager
def executor_of(name: str, n_threads: int, plan: Plan, scheduler: str | None = None) -> Iterator[Executor]:
    """The executor of a name, for a plan. Raises InputError where it cannot run here, or cannot run the plan."""
    if name == "threads":
        yield threads(n_threads)
    elif name == "cuda":
        with gpus(plan) as found:
            yield found
    elif name == "dask":
        with dask_cluster(scheduler, n_threads) as cluster:
            yield cluster
    else:
        raise unknown("executor", name, ["threads", "cuda", "dask"])


def threads(n_threads: int) -> Executor:
    """Compute chunks over threads, a few ahead at a time so that finished sums do not pile up."""

    def compute(plan: Plan, stage: Stage, chunks: list[range]) -> Iterator[tuple[range, Tally]]:
        if chunks and n_threads > 1:  # one trial alone, so that kernels are compiled once; its sums are not taken
            draw = chunks[0].start
            first = stage.trials_of(draw)[0]
            with _compiling_beside():
                run_chunk(plan, stage._replace(trials=range(first, first + 1)), range(draw, draw + 1))
        with ThreadPoolExecutor(n_threads) as pool:
            yield from _on_pool(pool, n_threads, run_chunk, plan, stage, chunks)

    return Executor(compute)


@contextmanager
def _compiling_beside() -> Iterator[None]:
    """Where no kernel is compiled yet, another process compiles those of scores and bounds while this one compiles the
    sampler's. It fills the cache and nothing else: what it has not done when it is wanted, or where it fails, is compiled here.
    """
    process = None
    if is_cold() and sys.executable:
        words = [sys.executable, "-c", f"from {__name__} import compile_without_sampler as run; run()"]
        cache = {"NUMBA_CACHE_DIR": str(Path(vars(numba.config)["CACHE_DIR"]).absolute())}
        quiet = subprocess.DEVNULL
        here = Path(__file__).parents[2]  # so that `sim` is this one, whatever lies in the user's folder
        with suppress(OSError):
            process = subprocess.Popen(words, cwd=here, stdin=quiet, stdout=quiet, stderr=quiet, env=os.environ | cache)
    try:
        yield
    finally:
        if process is not None:
            process.terminate()
            process.wait()


def compile_without_sampler() -> None:
    """Compile the kernels that score steps and bound their tails: a small sweep of tokens that nobody samples."""

    def same_tokens(model: Any, _: Any, __: Any, trials: Any, ___: Any, tokens: Any, n_ids: int = 0) -> Any:
        counts = np.zeros((len(trials), len(tokens), model.n_experts), np.int32)
        counts[:, :, : model.top_k] = tokens[:, None]
        ids = np.arange(model.top_k, dtype=np.int16)
        return counts, np.broadcast_to(ids, (len(trials), n_ids, model.top_k)).copy()

    for room in (steps, bounds):
        vars(room)["draw_trials"] = same_tokens
    for workload in ("uniform", "chat"):
        plan = make_plan("deepseek-v3", workload, ep_sizes=[4], tokens=[8, 256], placements=["linear"], bound_layers=1)
        tally = run_chunk(plan, first_stage(plan), range(2))
        bounds.build_bounds(plan, tally, 1)


def _on_pool(
    pool: Pool, n_workers: int, work: Compute, plan: Plan, stage: Stage, chunks: list[range]
) -> Iterator[tuple[range, Tally]]:
    waiting = iter(chunks)
    running: dict[Future[Tally], range] = {}
    try:
        while True:
            while len(running) < _AHEAD * n_workers and (draws := next(waiting, None)) is not None:
                running[pool.submit(work, plan, stage, draws)] = draws
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()
    except BaseException:
        for future in running:
            future.cancel()
        pool.shutdown(wait=False)
        raise


@contextmanager
def gpus(plan: Plan) -> Iterator[Executor]:
    """Compute the chunks of a plan on the NVIDIA GPUs of this machine: one on a thread, several by a process each. Raises
    InputError where there is no GPU, or no numba to use it, or the plan has what is not computed there.
    """
    n_gpus = 0
    with suppress(ImportError):  # a numba without a CUDA target of its own
        from sim.sweeps import device

        n_gpus = device.count_devices()
    if not n_gpus:
        raise InputError(
            "`executor` cuda needs an NVIDIA GPU and the extra 'cuda' (pip install 'epsim[cuda]'): no GPU was found by numba"
        )
    device.check_plan(plan)
    context = get_context("spawn")
    free = context.SimpleQueue()
    for i in range(n_gpus):
        free.put(i)
    pool: Pool = ThreadPoolExecutor(1)
    if n_gpus > 1:
        pool = ProcessPoolExecutor(n_gpus, context, device.take_device, (free,))

    def compute(plan: Plan, stage: Stage, chunks: list[range]) -> Iterator[tuple[range, Tally]]:
        yield from _on_pool(pool, n_gpus, device.run_chunk_on_device, plan, stage, chunks)

    with pool:
        yield Executor(compute, device.chunk_size)


@contextmanager
def dask_cluster(scheduler: str | None, n_workers: int) -> Iterator[Executor]:
    """Compute chunks on the workers of a Dask scheduler; without an address on a local cluster of `n_workers` processes.

    A chunk whose worker dies is computed again by another; its sums are taken once, when its future ends. Raises InputError where
    the `cluster` extra is not installed, or the scheduler does not answer, has no workers, or workers that run another version of
    epsim (whose rows would differ).
    """

    def compute(plan: Plan, stage: Stage, chunks: list[range]) -> Iterator[tuple[range, Tally]]:
        n_workers = max(sum(client.nthreads().values()), 1)
        with client.get_executor(pure=False, retries=_RETRIES) as pool:
            yield from _on_pool(pool, n_workers, run_chunk, plan, stage, chunks)

    try:
        from distributed import LocalCluster
    except ImportError:
        raise InputError("`executor` dask needs the extra 'cluster': pip install 'epsim[cluster]'") from None
    with tempfile.TemporaryDirectory(prefix="epsim-dask-") as folder:
        local = None
        if scheduler is None:
            local = LocalCluster(
                n_workers=n_workers,
                threads_per_worker=1,
                dashboard_address=None,
                local_directory=folder,
                silence_logs=logging.CRITICAL,
            )
            scheduler = str(local.scheduler_address)
        try:
            with _connect(scheduler) as client:
                _check_workers(client, scheduler)
                yield Executor(compute)
        finally:
            if local is not None:
                local.close()


def _connect(scheduler: str) -> Any:
    """A client of a scheduler that answers; the knock comes first, since a client that fails is slow to go away."""
    from distributed import Client
    from distributed.comm.core import connect

    async def knock() -> None:
        comm = await connect(scheduler, timeout=_ANSWER_S)
        await comm.close()

    try:
        asyncio.run(knock())
        return Client(scheduler, timeout=_ANSWER_S, set_as_default=False)
    except (OSError, TimeoutError, ValueError, ImportError):
        raise InputError(
            f"`scheduler` {scheduler}: no Dask scheduler answers there within {_ANSWER_S} s; an address looks like "
            "tcp://HOST:8786"
        ) from None


def _check_workers(client: Any, scheduler: str) -> None:
    try:
        client.wait_for_workers(1, timeout=_ANSWER_S)
        found = client.run(source_digest)
    except TimeoutError:
        raise InputError(
            f"`scheduler` {scheduler} has no workers; start one or more with: dask worker {scheduler}"
        ) from None
    except ImportError as error:
        raise InputError(f"`scheduler` {scheduler}: a worker has no epsim of this version ({error})") from None
    strangers = sorted(worker for worker, digest in found.items() if digest != source_digest())
    if strangers:
        raise InputError(f"`scheduler` {scheduler}: worker {strangers[0]} runs another version of epsim")
