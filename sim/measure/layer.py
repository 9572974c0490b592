"""Whole layers, measured on one process a GPU: this one plans, asks them all for one cell after another, and keeps the table."""

import contextlib
import json
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from sim.errors import InputError, RunError
from sim.files import whole_files
from sim.measure.experts import Say
from sim.measure.layer_plan import Cell, LayerSteps
from sim.measure.run import software
from sim.measure.table import Rows, growing_table, partial_path
from sim.measure.timers import cuda_torch
from sim.measure.torch_layer import TOLERANCE, TorchLayer

LAYER_COLUMNS = {
    "model": str,
    "gpu": str,
    "dtype": str,
    "ep_size": int,
    "exchange": str,
    "workload": str,
    "tokens": int,
    "step": int,
    "placement": str,
    "rank": int,
    "layer_us": float,  # the whole layer: what waits for the slowest rank, so much the same on all
    "experts_us": float,  # the rank's grouped GEMMs and activation alone
    "exchange_us": float,  # the layer without those
    "pairs": int,
    "distinct": int,
    "received": int,  # tokens that need the rank
    "layers": int,
    "replays": int,
    "seed": int,
    "versions": str,
}
"""Columns of a table of measured layers and their types."""
_PATIENCE_S = 300.0  # ranks that say nothing for so long are given up: longer than NCCL's own limit
_CHECKED_TOKENS = 2048  # at most, in the check against a plain computation


class Ranks:
    """The processes of an EP group. One that fails, dies or says nothing ends them all."""

    def __init__(self, steps: LayerSteps, device: str, serve: Callable[..., None] | None = None) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory(prefix="epsim-")
        rendezvous = Path(self._folder.name) / "store"
        self._processes, self._ends = [], []
        for rank in range(steps.ep_size):
            here, there = spawn.Pipe()
            process = spawn.Process(target=serve or _serve, args=(rank, steps, device, rendezvous, there), daemon=True)
            process.start()
            there.close()
            self._processes.append(process)
            self._ends.append(here)

    def ask(self, *question: Any) -> list[Any]:
        """Send all ranks the name of a method of `TorchLayer` and its arguments; their answers, rank by rank. Raises RunError
        where a rank failed, ended, or did not answer in time.
        """
        for rank, end in enumerate(self._ends):
            try:
                end.send(question)
            except OSError:
                raise self._ended(rank) from None
        return self.answers()

    def answers(self) -> list[Any]:
        """What all ranks say next; they say hello by themselves."""
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + _PATIENCE_S
        while len(answers) < len(self._ends):
            waiting = {end: rank for rank, end in enumerate(self._ends) if rank not in answers}
            dead = {process.sentinel: rank for rank, process in enumerate(self._processes)}
            ready = wait([*waiting, *dead], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise RunError(f"ranks {sorted(waiting.values())} did not answer within {_PATIENCE_S:.0f} s")
            for end in ready:
                if isinstance(end, Connection) and end in waiting:
                    answers[waiting[end]] = self._answer(waiting[end])
            ended = [dead[end] for end in ready if end in dead]
            if ended:
                raise self._ended(ended[0])
        return [answers[rank] for rank in range(len(self._ends))]

    def _answer(self, rank: int) -> Any:
        try:
            is_well, answer = self._ends[rank].recv()
        except (EOFError, OSError):
            raise self._ended(rank) from None
        if not is_well:
            raise RunError(f"rank {rank}: {answer}")
        return answer

    def _ended(self, rank: int) -> RunError:
        self._processes[rank].join(5)
        code = self._processes[rank].exitcode
        with contextlib.suppress(EOFError, OSError):  # it may have said why
            if self._ends[rank].poll():
                return RunError(f"rank {rank}: {self._ends[rank].recv()[1]}")
        return RunError(f"rank {rank} ended with exit status {code}; the others were stopped")

    def close(self, well: bool) -> None:
        """End all processes: those of a run that ended well leave their group first."""
        if well:
            for end in self._ends:
                with contextlib.suppress(OSError):
                    end.send(None)
            for process in self._processes:
                process.join(10)
        for process in self._processes:
            if process.is_alive():
                process.kill()  # in NCCL it may not listen to anything milder
            process.join()
        for end in self._ends:
            end.close()
        self._folder.cleanup()


@contextmanager
def running_ranks(steps: LayerSteps, device: str, serve: Callable[..., None] | None = None) -> Iterator[Ranks]:
    """The processes of an EP group, none of which outlives the block; `serve` is what each runs (by default, a layer)."""
    ranks, well = Ranks(steps, device, serve), False
    try:
        yield ranks
        well = True
    finally:
        ranks.close(well)


def _serve(rank: int, steps: LayerSteps, device: str, rendezvous: Path, end: Connection) -> None:
    """A rank's process: does what it is asked for until it is asked for nothing."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the parent's to handle: it ends its ranks
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        layer = TorchLayer(steps, rank, device, rendezvous)
        end.send((True, layer.about))
        while (question := end.recv()) is not None:
            method, *arguments = question
            end.send((True, getattr(layer, method)(*arguments)))
        layer.close()
    except Exception as error:
        end.send((False, " ".join(f"{type(error).__name__}: {error}".split())[:300]))
        os._exit(1)  # at once: what NCCL would still wait for never comes


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def gpus_for(ep_size: int | None, device: str) -> int:
    """The EP size: as many GPUs as asked for, or all that there are. Raises InputError without PyTorch, or with too few."""
    if find_spec("torch") is None:
        raise InputError("--layer needs PyTorch, which is not installed: pip install 'epsim[gpu]'")
    there = max(2, ep_size or 2) if device == "cpu" else int(cuda_torch().cuda.device_count())
    if not 2 <= (ep_size or there) <= there:
        raise InputError(
            f"--layer{'' if ep_size is None else f' `ep_sizes` {ep_size}'}: needs a GPU for each rank, two at least, and this "
            f"machine has {there} (--device cpu runs the same path at toy sizes)"
        )
    return ep_size or there


def measure_layers(
    steps: LayerSteps, device: str, out: Path, *, time_limit_s: float = float("inf"), say: Say = print
) -> None:
    """Measure layers on all ranks at once, and write their table, the CSV file `out`, and FILE.json beside it.

    Nothing is timed before every exchange and placement gave what a plain computation gives. Layers of a cell, which
    differ in exchange and placement, are kept together, or none of them. `device` is 'cuda' (NCCL, rank r on GPU r) or 'cpu'
    (gloo, for tests at toy sizes). No cell begins `time_limit_s` after the call.

    Raises InputError where the file is there already, or GPUs are of different kinds; RunError where a rank failed or died, or
    the run was told to end (SIGTERM, SIGHUP): the others are ended, and rows that were written are kept in `NAME.partial.csv`.
    """
    started = time.monotonic()
    with growing_table(out, LAYER_COLUMNS) as table, saying_why(table, out):
        with running_ranks(steps, device) as ranks:
            about = ranks.answers()
            kinds = sorted({answer["gpu"] for answer in about})
            if len(kinds) > 1:
                raise InputError(f"--layer needs GPUs of one kind, and there are {' and '.join(kinds)}")
            say(f"{steps.ep_size} x {kinds[0]}: {about[0]['kernel']}; {time.monotonic() - started:.0f} s")
            worst = _check(ranks, steps)
            say(f"checked: largest relative error {worst:.1e}; {time.monotonic() - started:.0f} s")
            versions = f"{software()}; {about[0]['versions']}"
            fixed = {"model": steps.model.name, "gpu": kinds[0], "dtype": steps.dtype, "ep_size": steps.ep_size}
            fixed |= {"seed": steps.seed, "versions": versions}
            step = -1
            for cell in steps.cells():
                now = time.monotonic() - started
                if now > time_limit_s:
                    say(f"--time-limit is reached in step {cell.step + 1}")
                    break
                if cell.step != step:
                    step = cell.step
                    done = f"{table.written} rows after {now:.1f} s"
                    say(
                        f"step {step + 1} of {steps.n_steps}: {done}, {min(ranks.ask('free_memory')):.0%} of memory free"
                    )
                table.add([fixed | row for row in _rows(cell, ranks.ask("measure", cell))])
        if not table.written:
            raise InputError("nothing was measured: --time-limit was reached first")
    say(f"{table.written} rows in {time.monotonic() - started:.0f} s")
    with whole_files(out.with_suffix(".json")) as (temporary,):
        found = {"gpu": kinds[0], "kernel": about[0]["kernel"], "versions": versions, "largest_relative_error": worst}
        temporary.write_text(json.dumps(found, indent=1) + "\n")


@contextmanager
def saying_why(table: Rows, out: Path) -> Iterator[None]:
    """What ends a run early says why, and where its rows are: a time limit of the shell or a scheduler (SIGTERM) too."""

    def end(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_IGN)
        raise RunError(
            f"ended by {signal.Signals(number).name}, as a time limit from outside would (--time-limit ends well)"
        )

    is_main = threading.current_thread() is threading.main_thread()
    before = {n: signal.signal(n, end) for n in (signal.SIGTERM, signal.SIGHUP)} if is_main else {}
    try:
        yield
    except RunError as error:
        if not table.written:
            raise
        raise RunError(f"{error}; {table.written} rows are kept in {partial_path(out)}") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check(ranks: Ranks, steps: LayerSteps) -> float:
    """Largest relative error of every exchange and placement, at the fewest tokens and at many."""
    few = steps.tokens[0]
    many = max(n for n in steps.tokens if n <= max(few, _CHECKED_TOKENS))
    workload, worst = next(iter(steps.ids)), 0.0
    for tokens in sorted({few, many}):
        for placement in steps.placements:
            for exchange in steps.exchanges:
                for rank, error in enumerate(ranks.ask("check", workload, placement, exchange, tokens)):
                    if not error <= TOLERANCE[steps.dtype]:  # so that NaN is wrong
                        raise RunError(
                            f"rank {rank}: a layer of {tokens} tokens under {placement} and {exchange} has a relative error "
                            f"of {error:.2g}; nothing was timed"
                        )
                    worst = max(worst, error)
    return worst


def _rows(cell: Cell, answers: list[list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    about = {"workload": cell.workload, "tokens": cell.tokens, "step": cell.step}
    for layers in zip(*answers, strict=True):
        for rank, layer in enumerate(layers):
            times = {name: f"{value:.2f}" for name, value in layer.items() if name.endswith("_us")}
            yield about | {"rank": rank} | layer | times
