"""What the verbs that turn loads into time share: reading their options, and what they say about their answers."""

import sys
from argparse import Namespace
from typing import Any

from sim.cli.text import note, note_compiling, say_about_file, say_about_inputs, traffic_fields
from sim.options import StepOptions, TimeOptions, given

IN_STEP_TEXT = (
    "in_step: the best split of each step's pairs over the copies of {}, by the busiest rank's load, as LPLB and others balance "
    "within the step; its times are without what the balancer takes. Balancers that copy experts within the step (UltraEP, "
    "MoonEP) have perfect balance as their end."
)
EXTRAPOLATED_TEXT = (
    "* exchange computed, not measured: measured are pair without imbalance, on one node of H100, H200, B200 and GB200 up to\n"
    "256 tokens a rank and on H800 of 128 at EP 8 to 256; and token, gather and reduce on 2 and 4 H100s"
)


def knee_text(dtype: str) -> str:
    """What ~ says of a gain."""
    from sim.cost.gain import KNEE

    low, high = KNEE[dtype]
    return (
        f"~ from {low:g} to {high:g} times the crossover in {dtype}: kernels step at whole tiles there, and gains are not known "
        "to 5 points (results/README.md)"
    )


def timed_options(arguments: Namespace) -> dict[str, Any]:
    """Keyword arguments of `predict_gain` and `predict_steps` that the options stand for, and model and workload."""
    from sim.model import load_model
    from sim.traffic import load_workload

    workload = load_workload(arguments.workload, **traffic_fields(arguments))
    say_about_file(workload)
    return {"model": load_model(arguments.model), "workload": workload, **step_options(arguments)}


def step_options(arguments: Namespace) -> dict[str, Any]:
    """Keyword arguments that stand for the options of steps, their sampling and their times."""
    return given(arguments, StepOptions) | given(arguments, TimeOptions)


def chosen_gpus(names: list[str]) -> list[Any]:
    """The GPUs of names and files."""
    from sim.cost import load_gpu

    return [load_gpu(name) for name in dict.fromkeys(names)]


def identity_of(options: dict[str, Any], gpus: list[Any], **more: Any) -> dict[str, Any]:
    """All that a table depends on, as JSON values."""
    from dataclasses import asdict

    identity = {name: value for name, value in options.items() if name not in ("model", "workload", "threads")}
    identity |= {"model": options["model"].name, "workload": options["workload"].name}
    return identity | {"law": law_of(options["workload"]), "gpus": [asdict(gpu) for gpu in gpus]} | more


def say_about_times(options: dict[str, Any], gpus: list[Any]) -> None:
    """Remarks on numbers that were not verified, or that are assumed."""
    from sim.cost.times import NETWORK_GB_PER_S

    note_compiling()
    say_about_inputs(options["model"], options["workload"])
    stored = model_dtype(options["model"])
    if stored != options["dtype"]:
        note(
            f"{options['model'].name}: its experts are stored as {options['model'].routed_dtype}, times and memory are for "
            f"{options['dtype']} (--dtype)"
        )
    for gpu in gpus:
        if gpu.unverified:
            note(f"{gpu.name}: not verified: {', '.join(gpu.unverified)}")
        if (
            gpu.scale_out_gb_per_s is None
            and options["exchange"] not in ("none", ["none"])
            and not options["network_gb_per_s"]
        ):
            note(
                f"{gpu.name}: its network differs by cluster; taken as {NETWORK_GB_PER_S:g} GB/s (--network-gb sets it)"
            )
    sys.stderr.flush()


def say_about_maps(names: list[str], model: Any, ep_sizes: list[int], ranks_per_node: int) -> None:
    """Notes on placements that are read from files."""
    from sim.placement import notes_on, place_fixed

    for name in names:
        if name.startswith("file:"):
            notes = [text for size in ep_sizes for text in notes_on(place_fixed(name, model, size, ranks_per_node))]
            for text in dict.fromkeys(notes):
                note(text)


def break_even_lines(gains: Any) -> list[str]:
    """Of placement in_step: what it is, and from how many tokens per step it pays for its balancer. Empty without it."""
    rows = gains[gains.placement == "in_step"]
    if not len(rows):
        return []
    keys = [column for column in ("exchange", "gpu", "ep_size") if rows[column].nunique() > 1] or ["ep_size"]
    lines = [
        IN_STEP_TEXT.format(rows.copies_of.iloc[0]),
        f"Break-even, the tokens per step from which it buys more of a layer, over {rows.copies_of.iloc[0]} with an even split, "
        "than the balancer takes (--balancer-us; its default is LPLB's own figure, not verified):",
    ]
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
        lines.append(f"  {where}: {text}")
    return lines


def model_dtype(model: Any) -> str:
    """The type of the routed experts of a checkpoint in the words of --dtype, as far as it is one."""
    return next((dtype for dtype in ("bf16", "fp8", "fp4") if dtype in model.routed_dtype), model.routed_dtype)


def law_of(traffic: Any) -> dict[str, Any]:
    """What tells traffic apart: its law, or the digest of load counts."""
    return traffic.law if hasattr(traffic, "law") else {"counts": traffic.digest}
