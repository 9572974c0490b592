"""`epsim sweep`: sample, score, write, and print the answer."""

import re
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, TypeVar

from sim.cli.finished import print_result
from sim.cli.inputs import say_about_inputs
from sim.cli.terminal import add_output, note, note_compiling, print_rows, say_notes, say_written, shown_progress
from sim.errors import InputError, counted
from sim.files import model_label
from sim.options import LinkOptions, RunOptions, SweepOptions, TrafficOptions
from sim.options.declare import add_options, given, section_of
from sim.options.kinds import Folder
from sim.progress import phase, watching

if TYPE_CHECKING:
    from sim.results import SweepResult
    from sim.sweeps import Journal, Plan
    from sim.sweeps.run import Sampled

T = TypeVar("T")
_NOT_MET = {
    "max_trials": "--max-trials is reached",
    "time_limit": "--time-limit is reached, and the same command goes on",
    "draws": "the layers that there are differ so much that more trials would not help",
}


def add_sweep(parser: ArgumentParser) -> None:
    """Sample token routings once and score them under every placement, EP size and number of tokens per step.

    Lists take commas and ranges: 1,8,64; 8..64 doubles; 2..12:2 counts up by 2.
    """
    add = parser.add_argument
    add("--config", metavar="FILE.toml", help="the same options as keys of a TOML file; the command line wins")
    add_options(parser, TrafficOptions)
    add_options(parser, SweepOptions, ep_sizes="8,16,32,64", tokens="1,8,64,512,4096", placements="linear,round_robin")
    add_options(parser, RunOptions)
    add_output(parser)
    add = section_of(parser, "output").add_argument
    add("--out", type=Folder(), metavar="DIR", help="folder of the result; {model} and {workload} in it stand for their names "
        "(default: results/MODEL-WORKLOAD-ID, the id of what is sampled)")  # fmt: skip
    add("--rank-traffic", action="store_true", help="also write rank_traffic/*.npz: what each rank sends to each, mean and 99th "
        "percentile (keys: help(sim.rank_traffic))")  # fmt: skip
    add_options(parser, LinkOptions, only=("source_imbalance",), source_imbalance="1")


def run_sweep(arguments: Namespace) -> None:
    run_options = RunOptions(**given(arguments, RunOptions))
    _check_run(run_options, arguments)
    from sim.kernels import usable_processors
    from sim.sweeps import make_plan, work_of
    from sim.traffic import load_workload

    names = list(dict.fromkeys(part.strip() for part in arguments.workload.split(",")))
    if len(names) > 1 and arguments.out is not None and "{workload}" not in str(arguments.out):
        raise InputError(
            f"`out` {arguments.out}: several workloads need a folder each, as in results/{{model}}-{{workload}}"
        )
    fields = {name: getattr(arguments, name) for name in ("phase", "tokens_per_request", "dummy_tokens")}
    workloads = [load_workload(name, arguments.model, **fields) for name in names]
    plans = [make_plan(arguments.model, workload, **given(arguments, SweepOptions)) for workload in workloads]
    sources = _sources(arguments, plans)
    folders = [_folder(arguments.out, plan) for plan in plans]
    results = [_held(folder, plan) for folder, plan in zip(folders, plans, strict=True)]
    for workload, plan in zip(workloads, plans, strict=True):
        note(*getattr(workload, "notes", ()))
        _say_notes(plan)
    parts = [f"{plan.workload.name} ({i} of {len(plans)})" if len(plans) > 1 else "" for i, plan in enumerate(plans, 1)]
    computed = [i for i, result in enumerate(results) if result is None]
    n_threads = run_options.threads or usable_processors()
    sizes, beside = dict.fromkeys(parts, 0.0), 0.0
    for i in computed:
        work = work_of(plans[i])
        after = sum(work.values()) - work["sampling"]
        is_beside = i != computed[-1] and n_threads > 1  # what follows its sampling ends with the part of the next one
        sizes[parts[i]] = beside + work["sampling"] + (0.0 if is_beside else after)
        beside = after if is_beside else 0.0
    with shown_progress(), _beside() as submit:
        pending: dict[int, Future[SweepResult]] = {}
        for i in computed:
            with phase(parts[i], sizes):
                finish = _sample_into(folders[i], plans[i], run_options, n_threads)
                for future in pending.values():
                    future.result()  # one is finished beside the next at most, and an error ends the run
                if i == computed[-1] or n_threads == 1:
                    results[i] = finish()
                else:
                    pending[i] = submit(finish)
        for i, future in pending.items():
            results[i] = future.result()
        if sources is not None:
            from sim.cost.links import traffic_of_plan, write_traffic

            for folder, plan in zip(folders, plans, strict=True):
                write_traffic(traffic_of_plan(plan, sources, n_threads), folder / "rank_traffic")
    import pandas as pd

    is_alone = print_rows(pd.concat([result.summary for result in results if result], ignore_index=True), arguments)
    for i, (folder, result) in enumerate(zip(folders, results, strict=True)):
        if i and not (is_alone or arguments.markdown):
            print()
        if not is_alone:
            print_result(result, arguments.markdown)
        files = ["summary.csv", "tail.csv", "counts.parquet", "provenance.json"] if i in computed else []
        files += [] if sources is None else ["rank_traffic/*.npz"]
        text = f"written to {folder}: {', '.join(files)}"
        text = text if files else f"nothing was computed, {folder} holds this sweep already"
        say_written(f"{text}; figures: epsim plot {folder}", arguments)


def _folder(out: Path | None, plan: "Plan") -> Path:
    """Folder of a result; by default one that no other sweep has."""
    from sim.results import digest_of

    names = {"model": _slug(model_label(plan.model.name).removesuffix(".json")), "workload": _slug(plan.workload.name)}
    if out is None:
        return Path("results") / f"{names['model']}-{names['workload']}-{digest_of(plan.identity)[:8]}"
    text = str(out)
    for name, value in names.items():
        text = text.replace(f"{{{name}}}", value)
    return Path(text)


def _held(folder: Path, plan: "Plan") -> "SweepResult | None":
    """The finished result of this plan, if its folder holds it. Raises InputError where it holds another sweep."""
    from sim.results import COUNTS, read_identity, read_result

    held = read_identity(folder)
    _check_same(folder, held, plan.identity)
    result = read_result(folder) if held is not None and (folder / COUNTS).exists() else None
    return None if result is not None and (result.summary.stopped == "time_limit").any() else result


def _check_run(options: RunOptions, arguments: Namespace) -> None:
    if options.scheduler is not None and options.executor != "dask":
        raise InputError("`scheduler` goes with `executor` dask")
    if options.time_limit is not None and arguments.precision is None and arguments.precision_tail is None:
        raise InputError("`time_limit` goes with `precision` or `precision_tail`")


@contextmanager
def _beside() -> Iterator[Callable[[Callable[[], T]], Future[T]]]:
    """Run what is submitted on one thread beside this one. An error in the block, an interrupt say, ends it at its next
    announcement of progress.
    """
    failed = Event()

    def stop_if_failed(share: float, name: str) -> None:
        if failed.is_set():
            raise KeyboardInterrupt

    def watched(work: Callable[[], T]) -> T:
        with watching(stop_if_failed):
            return work()

    with ThreadPoolExecutor(1) as pool:
        try:
            yield lambda work: pool.submit(watched, work)
        except BaseException:
            failed.set()
            raise


def _sample_into(folder: Path, plan: "Plan", options: RunOptions, n_threads: int) -> Callable[[], "SweepResult"]:
    """Sample a plan; finished chunks stay in the folder. What is returned makes the tables, and writes them in their place."""
    from sim.files import writable_folder
    from sim.sweeps import Journal, sample_plan
    from sim.sweeps.executors import executor_of

    note_compiling()
    started_s = time.monotonic()
    with (
        executor_of(options.executor, n_threads, plan, options.scheduler) as executor,
        writable_folder(folder),
        Journal(folder, plan, executor.chunk_size(plan)) as journal,
    ):
        note(*journal.notes)
        if journal.goes_on:
            note(f"goes on from the trials that {folder} holds of this sweep")
        say_notes()
        sampled = sample_plan(plan, executor, journal, options.time_limit)
    return partial(_finish_into, folder, plan, sampled, journal, n_threads, started_s)


def _finish_into(
    folder: Path, plan: "Plan", sampled: "Sampled", journal: "Journal", n_threads: int, started_s: float
) -> "SweepResult":
    from sim.results import read_identity, write_result
    from sim.sweeps import finish_plan

    result = finish_plan(plan, sampled, n_threads)
    _check_same(folder, read_identity(folder), plan.identity)
    write_result(result, folder)
    if not (result.summary.stopped == "time_limit").any():
        journal.clear()
    note(*result.notes)
    note(_outcome(result, time.monotonic() - started_s))
    return result


def _sources(arguments: Namespace, plans: list["Plan"]) -> list[float] | None:
    """How tokens are shared over source ranks, None where rank traffic is not asked for."""
    if not arguments.rank_traffic:
        if arguments.source_imbalance != [1.0]:
            raise InputError("`source_imbalance` goes with --rank-traffic")
        return None
    from sim.cost.links import plan_links

    for plan in plans:
        plan_links(plan, arguments.source_imbalance)
    return list(arguments.source_imbalance)


def _check_same(folder: Path, held: dict[str, Any] | None, wanted: dict[str, Any]) -> None:
    """Refuse a folder that holds another sweep."""
    if held is not None and held != wanted:
        if held.get("schema") != wanted["schema"]:
            raise InputError(
                f"`out` {folder} holds a sweep of another version of epsim; choose another folder, or delete that one"
            )
        key = next(key for key in [*wanted, *held] if held.get(key) != wanted.get(key))
        differs = f"{key} {held.get(key)!r}, not {wanted.get(key)!r}"[:200]
        raise InputError(f"`out` {folder} holds another sweep ({differs}); choose another folder")


def _outcome(result: "SweepResult", seconds: float) -> str:
    """How much was done, and which cells did not get to the precision that was asked for."""
    summary = result.summary
    text = f"up to {counted(summary.trials.max(), 'trial')} of up to {counted(summary.tokens.max(), 'token')}, "
    text += f"{counted(len(summary), 'cell')}, in {seconds:.1f} s"
    for reason, why in _NOT_MET.items():
        short = summary[summary.stopped == reason]
        if len(short):
            worst = short.iloc[((short.imbalance_mean_high - short.imbalance_mean) / short.imbalance_mean).argmax()]
            half = (worst.imbalance_mean_high - worst.imbalance_mean) / worst.imbalance_mean
            text += (
                f". {counted(len(short), 'cell')} short of the precision: {why}; the widest mean, {worst.placement} at EP "
                f"{worst.ep_size} and {worst.tokens} tokens, is known to {half:.2%} (column `stopped` of summary.csv)"
            )
    return text


def _slug(name: str) -> str:
    """Name for a folder: a path is cut to its last part."""
    last = Path(name.removeprefix("file:")).stem if "/" in name or name.startswith("file:") else name
    return re.sub(r"[^A-Za-z0-9.]+", "-", last).strip("-").lower() or "model"


def _say_notes(plan: "Plan") -> None:
    from sim.placement import notes_on, why_linear
    from sim.sweeps import no_bounds_because, replicas_have_no_bounds

    say_about_inputs(plan.model, plan.workload)
    for placement in plan.placements:
        note(*(notes_on(placement) if placement is not None else []))
    if plan.fit:
        note(f"load-aware placements are fitted on {plan.fit}, and scored on none of these")
    if plan.replica_choice != "even" and not any(plan.has_replicas):
        note(f"--replica-choice {plan.replica_choice} changes nothing: no placement here has copies")
    if "round_robin" in plan.grid.placements:
        for reason in dict.fromkeys(why_linear(plan.model, size) for size in plan.grid.ep_sizes):
            if reason:
                note(f"vLLM falls back to linear where round_robin is asked for, with a warning in its log: {reason}")
    if (why := no_bounds_because(plan)) is not None:
        note(f"no bounds past sampling: {why}")
    if (why := replicas_have_no_bounds(plan)) is not None:
        note(f"no bounds past sampling for {why}")
