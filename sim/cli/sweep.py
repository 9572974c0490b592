"""Sample token routings once and score them under every placement, EP size and number of tokens per step.

Lists take commas and ranges: 1,8,64; 8..64 doubles; 2..12:2 counts up by 2.
"""

import re
import sys
import time
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from sim.cli.show import print_result
from sim.cli.text import folder as folder_name
from sim.cli.text import names, note, numbers, seconds, share, whole_number, whole_numbers
from sim.errors import InputError, unknown
from sim.errors import whole_number as check_whole_number
from sim.files import read_toml

_DEFAULTS: dict[str, Any] = {
    "model": "deepseek-v3",
    "workload": "chat",
    "ep": [8, 16, 32, 64],
    "tokens": [1, 8, 64, 512, 4096],
    "placement": ["linear", "round_robin"],
    "trials": None,
    "precision": None,
    "precision_tail": None,
    "max_trials": None,
    "time_limit": None,
    "draws": None,
    "seed": 0,
    "phase": None,
    "tokens_per_rank": None,
    "ranks_per_node": 8,
    "thresholds": None,
    "bound_layers": None,
    "threads": None,
    "executor": "threads",
    "scheduler": None,
    "out": None,
}
_PARSERS: dict[str, Callable[[str], Any]] = {
    "ep": whole_numbers("--ep"),
    "tokens": whole_numbers("--tokens"),
    "tokens_per_rank": whole_numbers("--tokens-per-rank"),
    "placement": names("--placement"),
    "trials": whole_number("--trials"),
    "precision": share("--precision"),
    "precision_tail": share("--precision-tail"),
    "max_trials": whole_number("--max-trials"),
    "time_limit": seconds("--time-limit"),
    "bound_layers": whole_number("--bound-layers"),
    "draws": whole_number("--draws"),
    "seed": whole_number("--seed"),
    "ranks_per_node": whole_number("--ranks-per-node"),
    "threads": whole_number("--threads"),
    "thresholds": numbers("--thresholds"),
}
_HELP = {
    "model": "preset (epsim models) or path of a Hugging Face config.json",
    "workload": "preset (epsim workloads), file:TRACE of recorded routing, or a .toml file (a preset's keys, or a fit)",
    "ep": "EP sizes, each from 1 to the number of experts",
    "tokens": "tokens per step over the whole EP group",
    "tokens_per_rank": "instead of --tokens: tokens per step and rank",
    "placement": "placements (epsim placements); changes are given against the first",
    "trials": "steps scored in each cell (default: 10000)",
    "precision": "instead of --trials: go on until each mean imbalance is known to this relative half-width, as in 1%%",
    "precision_tail": "the same for each P(imbalance >= x) that is not shown to be below 1e-3, as in 10%%",
    "max_trials": "the most trials under a precision (default: 1000000)",
    "time_limit": "stop a precision run after this time (not before 1024 trials), as in 90s or 10m; the same command goes on",
    "draws": "independent layer draws behind the trials (default: a fresh layer for every step; a record's layers)",
    "seed": "same seed, same rows, on any number of threads",
    "phase": "of recorded or fitted routing: decode (default) or prefill",
    "ranks_per_node": "ranks joined by NVLink, for node_aware and for nodes per token",
    "thresholds": "imbalance thresholds of tail.csv (default: 1.1,1.25,1.5,1.75,2,2.5,3,4,6,8)",
    "bound_layers": "layer draws behind bounds past sampling (default: up to 32, none where that takes long; 0: no bounds)",
    "threads": "default: all processors of this process; of a local cluster, its workers",
    "executor": "threads, or dask: a local cluster, or the one of --scheduler (extra: epsim[cluster])",
    "scheduler": "address of a Dask scheduler, as in tcp://HOST:8786",
    "out": "folder of the result (default: results/MODEL-WORKLOAD)",
}


_PLANNED = ("trials", "draws", "seed", "ranks_per_node", "precision", "precision_tail", "max_trials", "bound_layers")
_NOT_MET = {
    "max_trials": "--max-trials is reached",
    "time_limit": "--time-limit is reached, and the same command goes on",
    "draws": "the layers that there are differ so much that more trials would not help",
}
_METAVARS = {
    "tokens_per_rank": "LIST",
    "thresholds": "LIST",
    "ranks_per_node": "N",
    "trials": "N",
    "precision": "SHARE",
    "precision_tail": "SHARE",
    "max_trials": "N",
    "time_limit": "TIME",
    "bound_layers": "N",
    "scheduler": "ADDRESS",
    "draws": "N",
    "seed": "N",
    "threads": "N",
}


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of `epsim sweep`; their defaults are filled in after the config file."""
    parser.add_argument(
        "--config", metavar="FILE.toml", help="the same options as keys of a TOML file; the command line wins"
    )
    for key, text in _HELP.items():
        default = _DEFAULTS[key]
        shown = ",".join(map(str, default)) if isinstance(default, list) else default
        parser.add_argument(
            f"--{key.replace('_', '-')}",
            default=SUPPRESS,
            metavar=_METAVARS.get(key, "LIST" if isinstance(default, list) else key.upper()),
            help=text + (f" (default: {shown})" if shown is not None else ""),
        )


def read_config(path: str) -> dict[str, Any]:
    """Options from a TOML file; keys are the option names, with - or _."""
    values = read_toml(Path(path), f"--config {path}")
    options = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in _DEFAULTS:
            raise unknown(f"--config {path}: key", key, [option.replace("_", "-") for option in _DEFAULTS])
        items = value if isinstance(value, list) else [value]
        if not items or not all(isinstance(item, str | int | float) and not isinstance(item, bool) for item in items):
            raise InputError(f"--config {path}: {key} must be a number, a string or a list of them")
        text = ",".join(str(item) for item in items)
        options[name] = _PARSERS.get(name, str)(text)
    return options


def run(arguments: Namespace) -> None:
    """Run `epsim sweep`."""
    given = vars(arguments)
    config = given.pop("config")
    given = {key: _PARSERS.get(key, str)(value) for key, value in given.items()}
    options = (read_config(config) if config is not None else {}) | given
    if "tokens" in options and "tokens_per_rank" in options:
        raise InputError("--tokens-per-rank is the alternative to --tokens: give one of them")
    options = _DEFAULTS | options

    from sim.kernels import is_cold
    from sim.model import load_model
    from sim.results import COUNTS, read_identity, read_result, writable_folder, write_result
    from sim.sweeps import Journal, make_plan, no_bounds_because, run_plan
    from sim.sweeps.plan import THRESHOLDS
    from sim.workload import load_workload

    per_rank = options["tokens_per_rank"] is not None
    plan = make_plan(
        load_model(options["model"]),
        load_workload(options["workload"], phase=options["phase"]),
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
        note(_outcome(result, time.monotonic() - started))
    print_result(result)
    print(
        f"\nwritten to {folder}: summary.csv, tail.csv, counts.parquet, provenance.json; figures: epsim plot {folder}"
    )


def _threads_of(options: dict[str, Any]) -> int:
    """Threads, or workers of a local cluster; the options of executors checked."""
    from sim.sweeps.executors import usable_processors

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
    from sim.placement import fallback_notes

    model, workload = plan.model, plan.workload
    if model.unverified:
        note(f"{model.name}: not read from the checkpoint itself: {'; '.join(model.unverified)}")
    if model.caveat:
        note(f"{model.name}: {model.caveat}")
    alike = ("deepseek-r1", "deepseek-v3")  # one router
    same = model.name.startswith(alike) if workload.fitted_to.startswith(alike) else model.name == workload.fitted_to
    if workload.fitted_to and not same:
        note(f"{workload.name} traffic is fitted to {workload.fitted_to}; on {model.name} it is an assumption")
    if "round_robin" in plan.grid.placements:
        for text in fallback_notes(model, list(plan.grid.ep_sizes)):
            note(text)


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
