"""Predict the time that one placement saves over another, per layer and per step, by tokens, EP size and GPU."""

import re
from argparse import ArgumentParser, Namespace
from typing import Any

from sim.cli.progress import shown_progress
from sim.cli.text import add_forms, estimate, filled, print_rows, print_table, say_written
from sim.cli.timed import (
    EXTRAPOLATED_TEXT,
    break_even_lines,
    chosen_gpus,
    identity_of,
    knee_text,
    say_about_maps,
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
        default="h200",
        metavar="LIST",
        help="GPUs (epsim gpus), or .toml files of your own (default: h200)",
    )
    add("--baseline", default="linear", metavar="A", help="placement to compare with (default: linear)")
    add(
        "--placement",
        type=NAMES,
        default="round_robin",
        metavar="LIST",
        help="placements that are compared with it (default: round_robin); also 'perfect balance', which none can beat, and "
        "in_step: the best split of each step's pairs over the copies of that one which has the most, with the tokens per step "
        "from which a balancer within the step pays (--balancer-us)",
    )
    add_options(parser, TrafficOptions)
    add_options(parser, StepOptions, ep_sizes="8,16", tokens="1..16384")
    add_options(parser, TimeOptions)
    add_options(parser, RestOptions)
    add_forms(parser)
    add_options(parser, FigureOptions)
    add("--out", type=Folder(), metavar="DIR", help="also write gain.csv and the figure there")


def run(arguments: Namespace) -> None:
    """Run `epsim gain`."""
    options, gpus = timed_options(arguments), chosen_gpus(arguments.gpus)
    options["exchange"] = options["exchange"].split(",")
    chosen = {"baseline": arguments.baseline, "placement": arguments.placement, **given(arguments, RestOptions)}
    folder = arguments.out
    from sim.cost.gain import predict_gain

    if "," in arguments.baseline:
        raise InputError(
            f"`baseline` {arguments.baseline}: one placement; those that are compared with it are --placement"
        )
    maps = [arguments.baseline, *arguments.placement]
    say_about_maps(maps, options["model"], options["ep_sizes"], options["ranks_per_node"])
    say_about_times(options, gpus)
    with shown_progress():
        gains = predict_gain(gpus=gpus, **chosen, **options)
    if not print_rows(gains, arguments):
        _print_gains(gains, arguments.markdown)
    if folder is not None:
        from sim.figures import save_as
        from sim.figures.gain import gain_by_tokens
        from sim.files import writable_folder
        from sim.results import write_table

        with writable_folder(folder):
            write_table(gains, folder, "gain", identity_of(options, gpus, **chosen))
            files = [
                path
                for of, rows in _by_placement(gains).items()
                for path in save_as(gain_by_tokens(rows), folder / f"gain_by_tokens{of and '-'}{of}", arguments.formats)
            ]
        names = ", ".join(path.name for path in files)
        say_written(f"written to {folder}: gain.csv, gain.json (what made it), {names}", arguments)
    if not (arguments.markdown or arguments.json or arguments.csv):
        _print_crossovers(gains)


def _by_placement(gains: Any) -> dict[str, Any]:
    """Rows of each placement by its name in a file's name; of a single one by ''."""
    several = gains.placement.nunique() > 1
    return {
        re.sub(r"[^A-Za-z0-9+]+", "_", name.removeprefix("file:")).strip("_") if several else "": rows
        for name, rows in gains.groupby("placement", sort=False)
    }


def _print_gains(gains: Any, markdown: bool) -> None:
    row, names = gains.iloc[0], ", ".join(dict.fromkeys(gains.placement))
    exchanges = ", ".join(dict.fromkeys(gains.exchange))
    title = (
        f"{row.model} in {row['dtype']}, {row.workload} traffic, exchange {exchanges}: time of {names} against "
        f"{row.baseline}\nlayer: experts of the slowest rank, dispatch and combine, mean and 99th percentile; saved: share "
        "of the layer's time (experts: of the experts' alone)"
    )
    if (gains.placement == "in_step").any():
        title += (
            f"\nin_step is against {row.baseline} too; its break-even, below, is against the same copies evenly used"
        )
    known = gains.moe_share.notna().any()
    varying = [column for column in ("exchange", "placement") if gains[column].nunique() > 1]
    heads = [
        *varying,
        "GPU",
        "EP",
        "tokens",
        "layer us",
        "p99",
        "of it exch.",
        "layer us new",
        "p99 new",
        "saved (95 %)",
    ]
    heads += ["experts saved", "MoE ms/step", "new", *(["MoE share", "step saved"] if known else [])]
    cells = []
    for row in gains.itertuples():
        of_step = [f"{row.moe_share:.0%}", f"{row.step_saved:+z.1%}"] if known else []
        cells.append(
            [
                *(getattr(row, column) for column in varying),
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
    print_table(title, heads, cells, markdown, align="<" * (1 + len(varying)), keys=3 + len(varying))
    if gains.extrapolated.any() and not markdown:
        print(filled(EXTRAPOLATED_TEXT))


def _print_crossovers(gains: Any) -> None:
    points = "; ".join(f"{row.gpu} {row.crossover_tokens:.0f}" for row in gains.drop_duplicates("gpu").itertuples())
    for line in break_even_lines(gains):
        print(filled(line.strip(), line[: len(line) - len(line.lstrip())], "    "))
    print()
    print(filled(
        "Crossover, the tokens per step from which, under even load, a rank's time grows with its tokens and not with its "
        f"distinct experts alone: {points}"
    ))  # fmt: skip
    if gains.knee.any():
        print(filled(knee_text(gains["dtype"].iloc[0])))
