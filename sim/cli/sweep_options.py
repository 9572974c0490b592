"""Options of `epsim sweep`: defaults, parsers and help, from the command line or a TOML file."""

from argparse import SUPPRESS, ArgumentParser
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sim.cli.text import names, numbers, seconds, share, whole_number, whole_numbers
from sim.errors import InputError, unknown
from sim.files import read_toml

DEFAULTS: dict[str, Any] = {
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
    "dummy_tokens": None,
    "tokens_per_rank": None,
    "ranks_per_node": 8,
    "thresholds": None,
    "bound_layers": None,
    "fit_tokens": None,
    "fit_on": None,
    "replica_choice": "even",
    "threads": None,
    "executor": "threads",
    "scheduler": None,
    "out": None,
}
PARSERS: dict[str, Callable[[str], Any]] = {
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
    "fit_tokens": whole_number("--fit-tokens"),
    "draws": whole_number("--draws"),
    "dummy_tokens": whole_number("--dummy-tokens"),
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
    "dummy_tokens": "identical tokens that each step has besides, as idle data-parallel ranks run them (default: 0)",
    "ranks_per_node": "ranks joined by NVLink, for node_aware and for nodes per token",
    "thresholds": "imbalance thresholds of tail.csv (default: 1.1,1.25,1.5,1.75,2,2.5,3,4,6,8)",
    "bound_layers": "layer draws behind bounds past sampling (default: up to 32, none where that takes long; 0: no bounds)",
    "fit_tokens": "tokens of each layer draw, other than those scored, that eplb is fitted on (default: 16384)",
    "fit_on": "of recorded or fitted traffic: other traffic of the same layers to fit eplb on (default: every second sequence)",
    "replica_choice": "copy of a replicated expert that a token goes to: even, or vllm_hash of the token's index",
    "threads": "default: all processors of this process; of a local cluster, its workers",
    "executor": "threads, or dask: a local cluster, or the one of --scheduler (extra: epsim[cluster])",
    "scheduler": "address of a Dask scheduler, as in tcp://HOST:8786",
    "out": "folder of the result (default: results/MODEL-WORKLOAD)",
}

_METAVARS = {
    **dict.fromkeys(("tokens_per_rank", "thresholds"), "LIST"),
    **dict.fromkeys(
        (
            "ranks_per_node",
            "trials",
            "max_trials",
            "bound_layers",
            "fit_tokens",
            "draws",
            "dummy_tokens",
            "seed",
            "threads",
        ),
        "N",
    ),
    **dict.fromkeys(("precision", "precision_tail"), "SHARE"),
    **{"time_limit": "TIME", "scheduler": "ADDRESS", "fit_on": "FILE", "replica_choice": "NAME"},
}


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of `epsim sweep`; their defaults are filled in after the config file."""
    parser.add_argument(
        "--config", metavar="FILE.toml", help="the same options as keys of a TOML file; the command line wins"
    )
    for key, text in _HELP.items():
        default = DEFAULTS[key]
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
        if name not in DEFAULTS:
            raise unknown(f"--config {path}: key", key, [option.replace("_", "-") for option in DEFAULTS])
        items = value if isinstance(value, list) else [value]
        if not items or not all(isinstance(item, str | int | float) and not isinstance(item, bool) for item in items):
            raise InputError(f"--config {path}: {key} must be a number, a string or a list of them")
        text = ",".join(str(item) for item in items)
        options[name] = PARSERS.get(name, str)(text)
    return options
