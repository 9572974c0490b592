"""Predict what an engine would log of each step: balancedness over layers, and time; lay your own log beside it."""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from sim.cli.progress import shown_progress
from sim.cli.text import add_forms, note, print_rows, print_table, say_written
from sim.cli.timed import identity_of, say_about_maps, say_about_times, timed_options
from sim.errors import InputError
from sim.options import Choice, Folder, StepOptions, SweepOptions, TimeOptions, TrafficOptions, add_options

_SHORT = {
    "balancedness_vllm": "balancedness, vLLM",
    "balancedness_sglang": "balancedness, SGLang",
    "slowest_rank_ms": "slowest ranks, ms",
    "moe_ms": "with exchange, ms",
    "mean_imbalance": "max / mean of layers",
    "worst_imbalance": "of the worst layer",
}


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of `epsim step`."""
    parser.add_argument(
        "--gpu", default="h200", metavar="GPU", help="a GPU (epsim gpus), or a .toml file (default: h200)"
    )
    add_options(parser, SweepOptions, only=("placements",), placements="linear,round_robin")
    add_options(parser, TrafficOptions)
    add_options(parser, StepOptions, ep_sizes="8,16", tokens="64,4096")
    add_options(parser, TimeOptions)
    parser.add_argument(
        "--log",
        type=Path,
        metavar="FILE",
        help="your own log to lay beside: vLLM's or SGLang's lines with balancedness, or a number a line",
    )
    parser.add_argument(
        "--log-metric",
        type=Choice(names=tuple(_SHORT)),
        default="balancedness_vllm",
        metavar="NAME",
        help=f"what the log holds: {', '.join(_SHORT)}",
    )
    add_forms(parser)
    parser.add_argument(
        "--traffic",
        metavar="FILE",
        help="recorded routing, in place of --workload: also replay whole steps, all layers of the same tokens, beside "
        "independent layers",
    )
    parser.add_argument("--out", type=Folder(), metavar="DIR", help="also write steps.csv there")


def run(arguments: Namespace) -> None:
    """Run `epsim step`."""
    if arguments.traffic is not None:
        arguments.workload = f"file:{arguments.traffic}"
    options, folder = timed_options(arguments), arguments.out
    if arguments.traffic is not None and not hasattr(options["workload"], "topk_ids"):
        raise InputError(
            f"--traffic {arguments.traffic}: whole steps need the experts of single tokens, not synthetic traffic"
        )
    from sim.cost import load_gpu
    from sim.cost.step_log import compare_log, predict_steps, read_log

    log = None if arguments.log is None else read_log(arguments.log, arguments.log_metric)
    for text in log.notes if log is not None else ():
        note(text)
    if "," in arguments.gpu:
        raise InputError(f"--gpu {arguments.gpu}: one GPU at a time")
    gpu = load_gpu(arguments.gpu)
    say_about_maps(arguments.placements, options["model"], options["ep_sizes"], options["ranks_per_node"])
    say_about_times(options, [gpu])
    with shown_progress():
        steps = predict_steps(gpu=gpu, placements=arguments.placements, **options)
        replayed = None if arguments.traffic is None else _replay(options, arguments)
    compared = None if log is None else compare_log(steps, arguments.log_metric, log.values)
    if not print_rows(steps if compared is None else compared, arguments):
        _print_steps(steps, arguments.markdown)
        if compared is not None:
            _print_log(compared, arguments)
        if replayed is not None:
            _print_replay(replayed, options["workload"].name, arguments.markdown)
    if folder is not None:
        from sim.files import writable_folder
        from sim.results import write_table

        with writable_folder(folder):
            if replayed is not None:
                write_table(replayed, folder, "replay", identity_of(options, [gpu], placements=arguments.placements))
            write_table(steps, folder, "steps", identity_of(options, [gpu], placements=arguments.placements))
        say_written(f"written to {folder}: steps.csv, steps.json (what made it)", arguments)


def _replay(options: dict[str, Any], arguments: Namespace) -> Any:
    """Whole steps of recorded traffic, beside independent layers."""
    import pandas as pd

    from sim.cost.replay import compare_modes
    from sim.sweeps import make_plan
    from sim.traffic import RecordedTraffic

    cells = {name: options[name] for name in ("ep_sizes", "tokens", "tokens_per_rank", "ranks_per_node", "seed")}
    plan = make_plan(
        options["model"],
        options["workload"],
        placements=arguments.placements,
        trials=1,
        bound_layers=0,
        received="off",
        **cells,
    )
    assert isinstance(plan.workload, RecordedTraffic)
    tables = []
    for ep_size in plan.grid.ep_sizes:
        pairs = [p for p, (_, size) in enumerate(plan.grid.pairs) if size == ep_size]
        placed = [placement for p in pairs if (placement := plan.placements[p]) is not None]
        for tokens in sorted({int(n) for n in plan.grid.tokens_of_cell[plan.grid.ep_size_of_cell == ep_size]}):
            if placed:
                tables.append(compare_modes(plan.workload, placed, tokens, options["most_steps"], options["seed"]))
    if not tables:
        raise InputError(
            "--traffic: random placements differ by layer draw, and are not replayed; name another --placement"
        )
    return pd.concat(tables, ignore_index=True)


def _print_replay(table: Any, workload: str, markdown: bool) -> None:
    title = (
        f"\nWhole steps of {workload}: imbalance = max / mean of a layer; its mean over layers, and the worst layer\n"
        "continuous batching, all requests started together, and layers that are independent; variance of a step's mean over "
        "that of\nindependent layers, and correlation of consecutive steps"
    )
    heads = [
        "EP",
        "tokens",
        "placement",
        "steps are",
        "mean",
        "sd",
        "worst mean",
        "worst p99",
        "variance ratio",
        "auto- correlation",
    ]
    lines = [
        [
            str(row.ep_size), str(row.tokens), row.placement, row.mode, f"{row.layers_mean:.3f}", f"{row.layers_sd:.4f}",
            f"{row.worst_mean:.3f}", f"{row.worst_p99:.3f}", f"{row.variance_ratio:.2f}", f"{row.autocorrelation:.2f}",
        ]
        for row in table.itertuples()
    ]  # fmt: skip
    print_table(title, heads, lines, markdown, align=">><<")


def _digits(value: float) -> str:
    return "-" if value != value else f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _print_steps(steps: Any, markdown: bool) -> None:
    row = steps.iloc[0]
    title = (
        f"{row.model} in {row['dtype']} on {row.gpu}, {row.workload} traffic: what a step through all layers would log\n"
        "mean with its 95 % interval over layer sets (none with one), quantiles over steps; sd between layer sets "
        "(deployments), and of one set's steps"
    )
    heads = ["EP", "tokens", "placement", "logged", "mean (95 %)", "p1", "p50", "p99", "sd between", "sd within"]
    cells = [
        [
            str(row.ep_size),
            str(row.tokens),
            row.placement,
            _SHORT[row.metric],
            _digits(row.mean) + (f" ± {_digits(row.high - row.mean)}" if row.high == row.high else ""),
            _digits(row.p01),
            _digits(row.p50),
            _digits(row.p99),
            _digits(row.sd_between_sets),
            _digits(row.sd_within_set),
        ]
        for row in steps.sort_values(["ep_size", "tokens"], kind="stable").itertuples()
    ]
    print_table(title, heads, cells, markdown, align=">><<", keys=4)


def _print_log(table: Any, arguments: Namespace) -> None:
    row = table.iloc[0]
    title = (
        f"\nyour log: {row.log_steps} values of {arguments.log_metric}, mean {_digits(row.log_mean)}; inside: share of them "
        "between p1 and p99 of the\nsimulated steps; sds apart: its mean from the simulated one, in standard deviations "
        "between deployments"
    )
    heads = ["EP", "tokens", "placement", "simulated mean", "p1", "p99", "inside", "sds apart"]
    cells = [
        [
            str(row.ep_size),
            str(row.tokens),
            row.placement,
            _digits(row.mean),
            _digits(row.p01),
            _digits(row.p99),
            f"{row.inside:.0%}",
            "-" if row.sds_apart != row.sds_apart else f"{row.sds_apart:+.1f}",
        ]
        for row in table.itertuples()
    ]
    print_table(title, heads, cells, arguments.markdown, align=">><", keys=3)
