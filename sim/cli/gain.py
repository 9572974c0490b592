"""`epsim gain`: the time that placements save, per layer and per step, by tokens, EP size and GPU."""

import re
from argparse import ArgumentParser, Namespace
from typing import Any

from sim.cli.inputs import identity_of, read_inputs, say_about_maps, say_about_times, step_options
from sim.cli.terminal import add_output, answer, estimate, print_table, say, shown_progress
from sim.errors import InputError
from sim.files import model_label
from sim.options import EXCHANGES, GpuOptions, RestOptions, StepOptions, TimeOptions, TrafficOptions
from sim.options.declare import add_options, given, section_of
from sim.options.kinds import NAMES

EXTRAPOLATED_TEXT = (
    "* exchange computed, not measured: measured are pair without imbalance, on one node of H100, H200, B200 and GB200 up to "
    "256 tokens a rank and on H800 of 128 at EP 8 to 256; deepep_high_throughput on one node of H100, H200, B200, B300, GB200 "
    "and GB300 up to 16,384; and token, gather and reduce on 2 and 4 H100s (4 H200s: within 10 % in the median)"
)
SEVERAL_EXCHANGES = f"one or several, with commas, of {EXCHANGES}"
_IN_STEP_TEXT = (
    "in_step: the best split of each step's pairs over the copies of {}, by the busiest rank's load, as LPLB and others balance "
    "within the step; its times are without what the balancer takes. Balancers that copy experts within the step (UltraEP, "
    "MoonEP) have perfect balance as their end."
)


def add_gain(parser: ArgumentParser) -> None:
    """Predict the time that one placement saves over another, per layer and per step, by tokens, EP size and GPU."""
    add_options(parser, GpuOptions, only=("gpus", "baseline"))
    add = section_of(parser, GpuOptions.title).add_argument
    add("--placement", type=NAMES, default="round_robin", metavar="LIST", help="compared with it (default: round_robin); "
        "also 'perfect balance', whose experts none can beat, and in_step: the best split of each step's pairs over the copies "
        "of the one that has the most (--balancer-us)")  # fmt: skip
    add_options(parser, TrafficOptions)
    add_options(parser, StepOptions, ep_sizes="8,16", tokens="1..16384")
    add_options(parser, TimeOptions, helps={"exchange": SEVERAL_EXCHANGES})
    add_options(parser, RestOptions)
    add_output(parser, "gain.csv and the figures", figures=True)


def run_gain(arguments: Namespace) -> None:
    from sim.cost import load_gpu
    from sim.cost.gain import predict_gain

    if "," in arguments.baseline:
        raise InputError(
            f"`baseline` {arguments.baseline}: one placement; those that are compared with it are --placement"
        )
    model, workload = read_inputs(arguments)
    gpus: list[Any] = [load_gpu(name) for name in dict.fromkeys(arguments.gpus)]
    options = step_options(arguments, model, gpus)
    options["exchange"] = options["exchange"].split(",")
    chosen = {"baseline": arguments.baseline, "placement": arguments.placement, **given(arguments, RestOptions)}
    names = [arguments.baseline, *arguments.placement]
    say_about_maps(names, model, options["ep_sizes"], options["ranks_per_node"])
    say_about_times(model, workload, gpus, options)
    with shown_progress():
        gains = predict_gain(model, workload, gpus, **chosen, **options)
    identity = identity_of(model, workload, options, gpus, **chosen)
    answer(
        arguments.out, arguments, lambda: print_table_of(gains, identity, arguments.markdown), {"gain": gains}, identity,
        lambda: _figures(gains),
    )  # fmt: skip


def _figures(gains: Any) -> dict[str, Any]:
    """A figure for each placement, by the name of its file."""
    from sim.figures.gain import gain_by_tokens

    if gains.placement.nunique() == 1:
        return {"gain_by_tokens": gain_by_tokens(gains)}
    slug = {name: re.sub(r"[^A-Za-z0-9+]+", "_", name.removeprefix("file:")).strip("_") for name in gains.placement}
    return {
        f"gain_by_tokens-{slug[name]}": gain_by_tokens(rows) for name, rows in gains.groupby("placement", sort=False)
    }


def print_table_of(gains: Any, about: dict[str, Any], markdown: bool) -> None:
    """Print gains, their notes and break-even."""
    row, names = gains.iloc[0], ", ".join(dict.fromkeys(gains.placement))
    exchanges = ", ".join(dict.fromkeys(gains.exchange))
    title = (
        f"{model_label(row.model)} in {row['dtype']}, {row.workload} traffic, exchange {exchanges}: time of {names} against "
        f"{row.baseline}\nsaved: share of the layer's time (experts: of the experts' alone); layer: experts of the slowest rank, "
        "dispatch and combine, mean and 99th percentile"
    )
    if (gains.placement == "in_step").any():
        title += (
            f"\nin_step is against {row.baseline} too; its break-even, below, is against the same copies evenly used"
        )
    varying = [column for column in ("exchange", "placement") if gains[column].nunique() > 1]
    columns: dict[str, Any] = {column: column for column in varying} | {
        "GPU": "gpu",
        "EP": "ep_size",
        "tokens": "tokens",
        "saved (95 %)": layer_saved,
        "experts saved": "experts_saved:+z.1%",
    }
    if gains.moe_share.notna().any():
        columns |= {"step saved": "step_saved:+z.1%", "MoE share": "moe_share:.0%"}
    columns |= {
        "layer us": "baseline_layer_us:.0f",
        "layer us new": "layer_us:.0f",
        "exchange us": lambda row: f"{row.baseline_exchange_us:.0f}" + ("*" if row.extrapolated else ""),
        "p99 us": "baseline_layer_us_p99:.0f",
        "p99 us new": "layer_us_p99:.0f",
        "MoE ms/step": "baseline_step_ms:.1f",
        "new": "step_ms:.1f",
    }
    n = len(varying)
    print_table(title, gains.itertuples(), columns, markdown, align="<" * (1 + n), keys=3 + n)
    if markdown:
        return
    if gains.extrapolated.any():
        say(EXTRAPOLATED_TEXT)
    say_break_even(gains)
    points = "; ".join(f"{row.gpu} {row.crossover_tokens:.0f}" for row in gains.drop_duplicates("gpu").itertuples())
    print()
    say(
        "Crossover, the tokens per step from which, under even load, a rank's time grows with its tokens and not with its "
        f"distinct experts alone: {points}"
    )
    if gains.knee.any():
        say(knee_text(gains["dtype"].iloc[0]))


def layer_saved(row: Any) -> str:
    """The saved share of a layer's time as a cell; ~ near the crossover."""
    return estimate(row.layer_saved, row.layer_saved_high, "+z.1%") + ("~" if row.knee else " ")


def knee_text(dtype: str) -> str:
    """What ~ says of a gain."""
    from sim.cost.gain import KNEE

    low, high = KNEE[dtype]
    return (
        f"~ from {low:g} to {high:g} times the crossover in {dtype}: kernels step at whole tiles there, and gains are not known "
        "to 5 points (results/README.md)"
    )


def say_break_even(gains: Any) -> None:
    """Of placement in_step, where there is one: what it is, and from how many tokens per step it pays for its balancer."""
    rows = gains[gains.placement == "in_step"]
    if not len(rows):
        return
    keys = [column for column in ("exchange", "gpu", "ep_size") if rows[column].nunique() > 1] or ["ep_size"]
    copies = rows.copies_of.iloc[0]
    say(_IN_STEP_TEXT.format(copies), indent="    ")
    say(
        f"Break-even, the tokens per step from which it buys more of a layer, over {copies} with an even split, than the "
        "balancer takes (--balancer-us; its default is LPLB's own figure, not verified):",
        indent="    ",
    )
    for _, of in rows.groupby(["exchange", "gpu", "ep_size"], sort=False):
        most = of.loc[of.tokens.idxmax()]
        where = ", ".join(f"EP {most[key]}" if key == "ep_size" else str(most[key]) for key in keys)
        ends = [f"{most[f'break_even_tokens{end}']:,.0f}" for end in ("", "_low", "_high")]
        bought = f"it buys {most.bought_us:.0f} us at {most.tokens}, the balancer takes {most.balancer_us:.0f}"
        if most.break_even_tokens == float("inf"):
            text = f"not up to {most.tokens}; {bought}"
        elif most.break_even_tokens == of.tokens.min():
            text = f"at all of them; {bought}"
        else:
            text = f"{ends[0]} ({ends[1]} to {ends[2].replace('inf', 'beyond')}); {bought}"
        say(f"{where}: {text}", "  ", "    ")
