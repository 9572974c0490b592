"""`epsim step`: what an engine would log of each step, balancedness and time, beside a log of your own."""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from sim.cli.inputs import identity_of, read_inputs, say_about_layers, say_about_maps, say_about_times, step_options
from sim.cli.terminal import add_output, answer, note, print_lines, print_table, say, shown_progress
from sim.errors import InputError, counted
from sim.files import model_label
from sim.options import GpuOptions, LayerOptions, StepOptions, SweepOptions, TimeOptions, TrafficOptions
from sim.options.declare import add_options, section_of
from sim.options.kinds import Choice

_SHORT = {
    "balancedness_vllm": "balancedness, vLLM",
    "balancedness_sglang": "balancedness, SGLang",
    "slowest_rank_ms": "slowest ranks, ms",
    "moe_ms": "with exchange, ms",
    "mean_imbalance": "max / mean of layers",
    "worst_imbalance": "of the worst layer",
}


def add_step(parser: ArgumentParser) -> None:
    """Predict what an engine would log of each step: balancedness over layers, and time; lay your own log beside it."""
    add_options(parser, TrafficOptions)
    add = section_of(parser, TrafficOptions.title).add_argument
    add("--traffic", metavar="FILE", help="recorded routing, in place of --workload: also replay whole steps, all layers of the "
        "same tokens, beside independent layers: time, its autocorrelation, the worst layer, "
        "and what --layer-correlation is")  # fmt: skip
    add_options(parser, SweepOptions, only=("placements",), placements="linear,round_robin",
        helps={"placements": "placements (epsim placements)"})  # fmt: skip
    add_options(parser, StepOptions, ep_sizes="8,16", tokens="64,4096")
    add_options(parser, LayerOptions)
    add_options(parser, GpuOptions, only=("gpu",))
    add_options(parser, TimeOptions)
    add = section_of(parser, "your log").add_argument
    add("--log", type=Path, metavar="FILE", help="vLLM's or SGLang's lines with balancedness, or a number a line")
    add("--log-metric", type=Choice(names=tuple(_SHORT)), default="balancedness_vllm", metavar="NAME",
        help=f"what the log holds: {', '.join(_SHORT)} (default: balancedness_vllm)")  # fmt: skip
    add_output(parser, "steps.csv")


def run_step(arguments: Namespace) -> None:
    from sim.cost import load_gpu
    from sim.cost.step_log import compare_log, predict_steps, read_log

    if arguments.traffic is not None:
        if arguments.workload != TrafficOptions.workload:
            raise InputError("--traffic goes without --workload: it is the workload")
        for name in ("phase", "tokens_per_request"):
            if getattr(arguments, name) not in (None, 1, "decode"):
                raise InputError(f"`{name}` does not go with --traffic: its steps take the next token of each request")
        arguments.workload = f"file:{arguments.traffic}"
    model, workload = read_inputs(arguments)
    if arguments.traffic is not None and not hasattr(workload, "topk_ids"):
        raise InputError(
            f"--traffic {arguments.traffic}: whole steps need the experts of single tokens, not synthetic traffic"
        )
    log = None if arguments.log is None else read_log(arguments.log, arguments.log_metric)
    note(*(log.notes if log is not None else []))
    if "," in arguments.gpu:
        raise InputError(f"--gpu {arguments.gpu}: one GPU at a time")
    gpu, placements, correlation = load_gpu(arguments.gpu), arguments.placements, arguments.layer_correlation
    options = step_options(arguments, model, [gpu])
    say_about_maps(placements, model, options["ep_sizes"], options["ranks_per_node"])
    say_about_times(model, workload, [gpu], options)
    say_about_layers(correlation)
    replayed = None
    with shown_progress():
        steps = predict_steps(model, workload, gpu, placements=placements, layer_correlation=correlation, **options)
        if arguments.traffic is not None:
            from sim.cost.step_log import replay_steps

            replayed = replay_steps(model, workload, gpu, placements=placements, **options)
    compared = None if log is None else compare_log(steps, arguments.log_metric, log.values)

    def show() -> None:
        if compared is not None:
            _print_log(compared, arguments)
            print()
        print_table_of(steps, identity, arguments.markdown)
        if replayed is not None:
            _print_replay(replayed, arguments)

    tables = {} if replayed is None else {"replay": replayed.steps, "replay_exceeded": replayed.exceeded}
    identity = identity_of(model, workload, options, [gpu], placements=placements)
    identity |= {} if correlation is None else {"layer_correlation": correlation}
    answer(arguments.out, arguments, show, tables | {"steps": steps}, identity, rows=compared)


_CELL: dict[str, Any] = {"EP": "ep_size", "tokens": "tokens", "placement": "placement"}


def _digits(value: float) -> str:
    return "-" if value != value else f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _in_digits(name: str) -> Any:
    """A column of a table."""
    return lambda row: _digits(getattr(row, name))


def print_table_of(steps: Any, about: dict[str, Any], markdown: bool) -> None:
    """Print what steps would log."""
    row = steps.iloc[0]
    title = (
        f"{model_label(row.model)} in {row['dtype']} on {row.gpu}, {row.workload} traffic, exchange {row.exchange}: what a "
        "step through all layers would log\n"
        "mean with its 95 % interval over layer sets (none with one), quantiles over steps; sd between layer "
        "sets (deployments), and of one set's steps"
    )
    columns = _CELL | {
        "logged": lambda row: _SHORT[row.metric],
        "mean (95 %)": lambda row: (
            _digits(row.mean) + (f" ± {_digits(row.high - row.mean)}" if row.high == row.high else "")
        ),
        **{name: _in_digits(f"p{name[1:]:>02}") for name in ("p1", "p50", "p99")},
        "sd between": _in_digits("sd_between_sets"),
        "sd within": _in_digits("sd_within_set"),
    }
    rows = steps.sort_values(["ep_size", "tokens"], kind="stable").itertuples()
    print_table(title, rows, columns, markdown, align=">><<", keys=4)


def _print_log(table: Any, arguments: Namespace) -> None:
    row = table.iloc[0]
    title = (
        f"your log: {counted(row.log_steps, 'value')} of {arguments.log_metric}, mean {_digits(row.log_mean)}, beside simulated "
        "steps\ninside: share of your values between their p1 and p99; sds apart: your mean from theirs, in standard deviations "
        "of one deployment from another; your log agrees within two of these; unclear: its own noise may be the difference"
    )
    columns = _CELL | {
        "simulated mean": _in_digits("mean"), "p1": _in_digits("p01"), "p99": _in_digits("p99"), "inside": "inside:.0%",
        "sds apart": "sds_apart:+.1f", "your log": lambda row: row.verdict or "-",
    }  # fmt: skip
    print_table(title, table.itertuples(), columns, arguments.markdown, align=">><", keys=3)


_KEYS = ["ep_size", "tokens", "placement"]


def _print_replay(replayed: Any, arguments: Namespace) -> None:
    """Times of whole steps, their worst layers, and what to pass on."""
    from sim.cost.step_log import OPENING, measured_correlation

    steps = replayed.steps.sort_values(["ep_size", "tokens"], kind="stable")
    title = (
        f"\nWhole steps of {steps.workload.iloc[0]}, all layers of the same tokens: ms of a step's layers with exchange\n"
        f"continuous batching; all requests started together, and the same from step {OPENING} until the longest ends; layers "
        "that are independent.\nvariance of time, and of mean imbalance, over that of independent layers; correlation of "
        "consecutive steps' times"
    )
    of_imbalance = list(steps[steps.metric == "mean_imbalance"].itertuples())
    columns = _CELL | {
        "steps are": "mode", "steps": "steps", **{f"{name} ms": _in_digits(name) for name in ("mean", "sd", "p50", "p99")},
        "auto- correlation": "autocorrelation:.2f", "variance of time (95 %)": _ratio,
        "variance of imbalance (95 %)": lambda row: _ratio(row.imbalance),
    }  # fmt: skip
    rows = steps[steps.metric == "moe_ms"].assign(imbalance=of_imbalance).itertuples()
    print_table(title, rows, columns, arguments.markdown, align=">><<", keys=4)
    title = (
        "\nThe worst layer of a step, continuous batching | independent layers: imbalance, mean and p99 over steps;\n"
        "P(some layer exceeds x), replayed | product over layers of each one's own, as capacities take it"
    )
    exceeded = replayed.exceeded
    shares = list(dict.fromkeys(exceeded["share"])) if len(exceeded) else []
    heads = ["EP", "tokens", "placement", "worst mean", "worst p99", *(f"about {share:g}" for share in shares)]
    lines = []
    for keys, cell in steps[steps.metric == "worst_imbalance"].groupby(_KEYS, sort=False):
        at = cell.set_index("mode")
        line = [*map(str, keys)]
        line += [f"{at[name]['continuous']:.3f} | {at[name]['independent']:.3f}" for name in ("mean", "p99")]
        for share in shares:
            rows = exceeded[(exceeded[_KEYS] == list(keys)).all(axis=1) & (exceeded["share"] == share)]
            line += [f"{row.above:.2f}: {row.replayed:.3f} | {row.product:.3f}" for row in rows.itertuples()] or ["-"]
        lines.append(line)
    print_lines(title, heads, lines, arguments.markdown, align=">><", keys=3)
    low, middle, high = measured_correlation(steps)
    if middle == middle:
        print()
        say(
            f"Measured: --layer-correlation {max(middle, 1):.2f} (geometric mean of the rows' variance of imbalance under "
            f"continuous batching, which are {low:.2f} to {high:.2f})"
        )


def _ratio(row: Any) -> str:
    """A ratio of variances with its interval, where it has one."""
    if row.mode == "independent" or row.variance_ratio != row.variance_ratio:
        return "-"
    interval = f" ({row.variance_ratio_low:.2f} to {row.variance_ratio_high:.2f})"
    return f"{row.variance_ratio:.2f}" + (interval if row.variance_ratio_low == row.variance_ratio_low else "")
