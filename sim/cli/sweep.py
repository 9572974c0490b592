"""Sample token routings once and score them under every placement, EP size and number of tokens per step.

Lists take commas and ranges: 1,8,64; 8..64 doubles; 2..12:2 counts up by 2.
"""

import re
import sys
import time
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sim.cli.show import print_result
from sim.cli.text import names, note, numbers, whole_number, whole_numbers
from sim.errors import InputError, unknown
from sim.errors import whole_number as check_whole_number
from sim.files import read_toml

_DEFAULTS: dict[str, Any] = {
    "model": "deepseek-v3",
    "workload": "chat",
    "ep": [8, 16, 32, 64],
    "tokens": [1, 8, 64, 512, 4096],
    "placement": ["linear", "round_robin"],
    "trials": 10_000,
    "draws": None,
    "seed": 0,
    "phase": None,
    "tokens_per_rank": None,
    "ranks_per_node": 8,
    "thresholds": None,
    "threads": None,
    "out": None,
}
_PARSERS: dict[str, Callable[[str], Any]] = {
    "ep": whole_numbers("--ep"),
    "tokens": whole_numbers("--tokens"),
    "tokens_per_rank": whole_numbers("--tokens-per-rank"),
    "placement": names("--placement"),
    "trials": whole_number("--trials"),
    "draws": whole_number("--draws"),
    "seed": whole_number("--seed"),
    "ranks_per_node": whole_number("--ranks-per-node"),
    "threads": whole_number("--threads"),
    "thresholds": numbers("--thresholds"),
}
_HELP = {
    "model": "preset (epsim models) or path of a Hugging Face config.json",
    "workload": "preset (epsim workloads), file:TRACE.npz of recorded routing, or a .toml file with a preset's keys",
    "ep": "EP sizes, each from 1 to the number of experts",
    "tokens": "tokens per step over the whole EP group",
    "tokens_per_rank": "instead of --tokens: tokens per step and rank",
    "placement": "placements (epsim placements); changes are given against the first",
    "trials": "steps scored in each cell",
    "draws": "independent layer draws behind the trials (default: a fresh layer for every step; a record's layers)",
    "seed": "same seed, same rows, on any number of threads",
    "phase": "of recorded routing: decode (default) or prefill",
    "ranks_per_node": "ranks joined by NVLink, for node_aware and for nodes per token",
    "thresholds": "imbalance thresholds of tail.csv (default: 1.1,1.25,1.5,1.75,2,2.5,3,4,6,8)",
    "threads": "default: all processors of this process",
    "out": "folder of the result (default: results/MODEL-WORKLOAD)",
}


_METAVARS = {
    "tokens_per_rank": "LIST",
    "thresholds": "LIST",
    "ranks_per_node": "N",
    "trials": "N",
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
    from sim.sweeps import Journal, make_plan, run_plan
    from sim.sweeps.plan import THRESHOLDS
    from sim.workload import load_workload

    per_rank = options["tokens_per_rank"] is not None
    plan = make_plan(
        load_model(options["model"]),
        load_workload(options["workload"], phase=options["phase"]),
        ep_sizes=options["ep"],
        tokens=options["tokens_per_rank"] if per_rank else options["tokens"],
        placements=options["placement"],
        trials=options["trials"],
        draws=options["draws"],
        seed=options["seed"],
        tokens_per_rank=per_rank,
        ranks_per_node=options["ranks_per_node"],
        thresholds=options["thresholds"] or THRESHOLDS,
    )
    threads = options["threads"]
    if threads is not None:
        check_whole_number("--threads", threads, 1, 4096)
    out = options["out"]
    if out is not None and (not out.strip() or "\0" in out):
        raise InputError("--out must be the name of a folder")
    folder = Path(out or f"results/{_slug(plan.model.name)}-{_slug(plan.workload.name)}")
    held = read_identity(folder)
    if held is not None and held != plan.identity:
        raise InputError(
            f"--out {folder} holds another sweep ({_difference(held, plan.identity)}); choose another folder"
        )
    _say_notes(plan)
    if held is not None and (folder / COUNTS).exists():
        result = read_result(folder)
        print(f"{folder} holds this sweep already; nothing was computed.\n")
    else:
        if is_cold():
            note("compiling the kernels, once for this version: about 20 seconds")
        started = time.monotonic()
        with writable_folder(folder):
            journal = Journal(folder, plan)
            result = run_plan(plan, threads, _progress(started) if sys.stderr.isatty() else None, journal)
            write_result(result, folder)
            journal.clear()
        seconds = time.monotonic() - started
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr)
        note(f"{plan.trials} trials of up to {plan.steps[-1]} tokens, {len(plan.cells)} cells, in {seconds:.1f} s")
    print_result(result)
    print(
        f"\nwritten to {folder}: summary.csv, tail.csv, counts.parquet, provenance.json; figures: epsim plot {folder}"
    )


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
    if workload.fitted_to and not model.name.startswith("deepseek-r1") and not model.name.startswith("deepseek-v3"):
        note(f"{workload.name} traffic is fitted to {workload.fitted_to}; on {model.name} it is an assumption")
    if "round_robin" in plan.placements:
        for text in fallback_notes(model, list(plan.ep_sizes)):
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
