"""Predict the time that one placement saves over another, per layer and per step, by tokens, EP size and GPU."""

from argparse import ArgumentParser, Namespace
from typing import Any

from sim.cli.text import estimate, print_table
from sim.cli.timed import (
    EXTRAPOLATED_TEXT,
    KNEE_TEXT,
    chosen_gpus,
    identity_of,
    say_about_times,
    timed_options,
)
from sim.errors import InputError
from sim.options import (
    NAMES,
    FigureOptions,
    Folder,
    RestOptions,
    StepOptions,
    TimeOptions,
    TrafficOptions,
    add_options,
    given,
)


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of `epsim gain`."""
    add = parser.add_argument
    add(
        "--gpu",
        dest="gpus",
        type=NAMES,
        default="h20",
        metavar="LIST",
        help="GPUs (epsim gpus), or .toml files of your own (default: h20)",
    )
    add("--baseline", default="linear", metavar="A", help="placement to compare with (default: linear)")
    add("--placement", default="round_robin", metavar="B", help="default: round_robin")
    add_options(parser, TrafficOptions)
    add_options(parser, StepOptions, ep_sizes="8,16", tokens="1..16384")
    add_options(parser, TimeOptions)
    add_options(parser, RestOptions)
    add("--markdown", action="store_true", help="print the table alone, as Markdown")
    add_options(parser, FigureOptions)
    add("--out", type=Folder(), metavar="DIR", help="also write gain.csv and the figure there")


def run(arguments: Namespace) -> None:
    """Run `epsim gain`."""
    options, gpus = timed_options(arguments), chosen_gpus(arguments.gpus)
    chosen = {"baseline": arguments.baseline, "placement": arguments.placement, **given(arguments, RestOptions)}
    folder = arguments.out
    from sim.cost.gain import predict_gain

    if "," in arguments.baseline + arguments.placement:
        raise InputError("--baseline and --placement take one placement each")
    say_about_times(options, gpus)
    gains = predict_gain(gpus=gpus, **chosen, **options)
    _print_gains(gains, arguments.markdown)
    if folder is not None:
        from sim.figures import save_as
        from sim.figures.gain import gain_by_tokens
        from sim.files import writable_folder
        from sim.results import write_table

        with writable_folder(folder):
            write_table(gains, folder, "gain", identity_of(options, gpus, **chosen))
            drawn = save_as(gain_by_tokens(gains), folder / "gain_by_tokens", arguments.formats)
        print(f"\nwritten to {folder}: gain.csv, gain.json (what made it), {', '.join(path.name for path in drawn)}")
    if not arguments.markdown:
        _print_crossovers(gains)


def _print_gains(gains: Any, markdown: bool) -> None:
    row = gains.iloc[0]
    title = (
        f"{row.model} in {row['dtype']}, {row.workload} traffic, exchange {row.exchange}: time of {row.placement} against "
        f"{row.baseline}\nlayer: experts of the slowest rank, dispatch and combine, mean and 99th percentile; saved: share "
        "of the layer's time (experts: of the experts' alone)"
    )
    known = gains.moe_share.notna().any()
    heads = ["GPU", "EP", "tokens", "layer us", "p99", "of it exch.", "layer us new", "p99 new", "saved (95 %)"]
    heads += ["experts saved", "MoE ms/step", "new", *(["MoE share", "step saved"] if known else [])]
    cells = []
    for row in gains.itertuples():
        of_step = [f"{row.moe_share:.0%}", f"{row.step_saved:+z.1%}"] if known else []
        cells.append(
            [
                row.gpu,
                str(row.ep_size),
                str(row.tokens),
                f"{row.baseline_layer_us:.0f}",
                f"{row.baseline_layer_us_p99:.0f}",
                f"{row.baseline_exchange_us:.0f}" + ("*" if row.extrapolated else ""),
                f"{row.layer_us:.0f}",
                f"{row.layer_us_p99:.0f}",
                estimate(row.layer_saved, row.layer_saved_high, "+z.1%") + ("~" if row.knee else " "),
                f"{row.experts_saved:+z.1%}",
                f"{row.baseline_step_ms:.1f}",
                f"{row.step_ms:.1f}",
                *of_step,
            ]
        )
    print_table(title, heads, cells, markdown, align="<")
    if gains.extrapolated.any() and not markdown:
        print(EXTRAPOLATED_TEXT)


def _print_crossovers(gains: Any) -> None:
    points = "; ".join(f"{row.gpu} {row.crossover_tokens:.0f}" for row in gains.drop_duplicates("gpu").itertuples())
    print(
        "\nCrossover, the tokens per step from which, under even load, a rank's time grows with its tokens and not with"
    )
    print(f"its distinct experts alone: {points}")
    if gains.knee.any():
        print(KNEE_TEXT)
