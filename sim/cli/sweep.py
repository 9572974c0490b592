"""Sample token routings once and score them under every placement, EP size and number of tokens per step.

Lists take commas and ranges: 1,8,64; 8..64 doubles; 2..12:2 counts up by 2.
"""

import re
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from sim.cli.show import print_result
from sim.cli.sweep_options import DEFAULTS, PARSERS, add_arguments, read_config
from sim.cli.text import folder as folder_name
from sim.cli.text import note, say_about_inputs
from sim.errors import InputError, unknown
from sim.errors import whole_number as check_whole_number

__all__ = ["add_arguments", "run"]

_PLANNED = (
    "trials", "draws", "seed", "ranks_per_node", "precision", "precision_tail", "max_trials", "bound_layers", "fit_tokens",
    "fit_on", "replica_choice",
)  # fmt: skip
_NOT_MET = {
    "max_trials": "--max-trials is reached",
    "time_limit": "--time-limit is reached, and the same command goes on",
    "draws": "the layers that there are differ so much that more trials would not help",
}


def run(arguments: Namespace) -> None:
    """Run `epsim sweep`."""
    given = vars(arguments)
    config = given.pop("config")
    given = {key: PARSERS.get(key, str)(value) for key, value in given.items()}
    options = (read_config(config) if config is not None else {}) | given
    if "tokens" in options and "tokens_per_rank" in options:
        raise InputError("--tokens-per-rank is the alternative to --tokens: give one of them")
    options = DEFAULTS | options

    from sim.kernels import is_cold
    from sim.model import load_model
    from sim.results import COUNTS, read_identity, read_result, writable_folder, write_result
    from sim.sweeps import Journal, make_plan, no_bounds_because, replicas_have_no_bounds, run_plan
    from sim.sweeps.plan import THRESHOLDS
    from sim.traffic import load_workload

    per_rank = options["tokens_per_rank"] is not None
    plan = make_plan(
        load_model(options["model"]),
        load_workload(options["workload"], phase=options["phase"], dummy_tokens=options["dummy_tokens"]),
        ep_sizes=options["ep"],
        tokens=options["tokens_per_rank"] if per_rank else options["tokens"],
        placements=options["placement"],
        tokens_per_rank=per_rank,
        thresholds=options["thresholds"] or THRESHOLDS,
        **{key: options[key] for key in _PLANNED},
    )
    n_threads = _threads_of(options)
    out = options["out"]
    default = f"results/{_slug(plan.model.name)}-{_slug(plan.workload.name)}"
    folder = folder_name("--out", default if out is None else out)
    held = read_identity(folder)
    _check_same(folder, held, plan.identity)
    _say_notes(plan)
    if (reason := no_bounds_because(plan)) is not None:
        note(f"no bounds past sampling: {reason}")
    if (reason := replicas_have_no_bounds(plan)) is not None:
        note(f"no bounds past sampling for {reason}")
    whole = held is not None and (folder / COUNTS).exists()
    result = read_result(folder) if whole else None
    if result is not None and not (result.summary.stopped == "time_limit").any():
        print(f"{folder} holds this sweep already; nothing was computed.\n")
    else:
        if is_cold():
            note("compiling the kernels, once for this version: about 30 seconds")
        started = time.monotonic()
        progress = _progress(started) if sys.stderr.isatty() else None
        with writable_folder(folder), _executor(options, n_threads) as executor, Journal(folder, plan) as journal:
            result = run_plan(
                plan, executor, n_threads=n_threads, progress=progress, journal=journal,
                time_limit_s=options["time_limit"],
            )  # fmt: skip
            _check_same(folder, read_identity(folder), plan.identity)
            write_result(result, folder)
            if not (result.summary.stopped == "time_limit").any():
                journal.clear()
        if progress:
            print("\r\033[K", end="", file=sys.stderr)
        for text in result.notes:
            note(text)
        note(_outcome(result, time.monotonic() - started))
    print_result(result)
    print(
        f"\nwritten to {folder}: summary.csv, tail.csv, counts.parquet, provenance.json; figures: epsim plot {folder}"
    )


def _threads_of(options: dict[str, Any]) -> int:
    """Threads, or workers of a local cluster; the options of executors checked."""
    from sim.kernels import usable_processors

    if options["executor"] not in ("threads", "dask"):
        raise unknown("--executor", options["executor"], ["threads", "dask"])
    if options["scheduler"] is not None and options["executor"] != "dask":
        raise InputError("--scheduler goes with --executor dask")
    if options["time_limit"] is not None and options["precision"] is None and options["precision_tail"] is None:
        raise InputError("--time-limit goes with --precision or --precision-tail")
    threads = options["threads"]
    return usable_processors() if threads is None else check_whole_number("--threads", threads, 1, 4096)


def _executor(options: dict[str, Any], n_threads: int) -> AbstractContextManager[Any]:
    from sim.sweeps import executors

    if options["executor"] == "dask":
        return executors.dask_cluster(options["scheduler"], n_threads)
    return nullcontext(executors.threads(n_threads))


def _check_same(folder: Path, held: dict[str, Any] | None, wanted: dict[str, Any]) -> None:
    """Refuse a folder that holds another sweep."""
    if held is not None and held != wanted:
        if held.get("schema") != wanted["schema"]:
            raise InputError(
                f"--out {folder} holds a sweep of another version of epsim; choose another folder, or delete that one"
            )
        raise InputError(f"--out {folder} holds another sweep ({_difference(held, wanted)}); choose another folder")


def _outcome(result: Any, seconds: float) -> str:
    """How much was done, and which cells did not get to the precision that was asked for."""
    summary = result.summary
    text = f"up to {summary.trials.max()} trials of up to {summary.tokens.max()} tokens, {len(summary)} cells, "
    text += f"in {seconds:.1f} s"
    for reason, why in _NOT_MET.items():
        short = summary[summary.stopped == reason]
        if len(short):
            worst = short.iloc[((short.imbalance_mean_high - short.imbalance_mean) / short.imbalance_mean).argmax()]
            half = (worst.imbalance_mean_high - worst.imbalance_mean) / worst.imbalance_mean
            text += (
                f". {len(short)} cells are short of the precision: {why}; the widest mean, {worst.placement} at EP "
                f"{worst.ep_size} and {worst.tokens} tokens, is known to {half:.2%} (column `stopped` of summary.csv)"
            )
    return text


def _slug(name: str) -> str:
    """Name for a folder: a path is cut to its last part."""
    last = Path(name.removeprefix("file:")).stem if "/" in name or name.startswith("file:") else name
    return re.sub(r"[^A-Za-z0-9.]+", "-", last).strip("-").lower() or "model"


def _difference(held: dict[str, Any], wanted: dict[str, Any]) -> str:
    key = next(key for key in [*wanted, *held] if held.get(key) != wanted.get(key))
    return f"{key} {held.get(key)!r}, not {wanted.get(key)!r}"[:200]


def _say_notes(plan: Any) -> None:
    from sim.placement import notes_on, why_linear

    say_about_inputs(plan.model, plan.workload)
    for text in dict.fromkeys(
        text for placement in plan.placements if placement is not None for text in notes_on(placement)
    ):
        note(text)
    if plan.fit:
        note(f"load-aware placements are fitted on {plan.fit}, and scored on none of these")
    if "round_robin" in plan.grid.placements:
        for reason in dict.fromkeys(why_linear(plan.model, size) for size in plan.grid.ep_sizes):
            if reason:
                note(f"vLLM silently runs linear where round_robin is asked for if {reason}")


def _progress(started: float) -> Callable[[int, int], None]:
    def show(done: int, total: int) -> None:
        seconds = time.monotonic() - started
        left = seconds * (total - done) / done
        rate = done / seconds / 1e6
        print(
            f"\r\033[K{done / total:4.0%}  {rate:.1f} M tokens/s  {left:.0f} s left",
            end="",
            file=sys.stderr,
            flush=True,
        )

    return show
