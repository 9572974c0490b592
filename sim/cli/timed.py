"""Options that the verbs share which turn loads into time, and what these verbs say about their answers."""

import sys
from argparse import ArgumentParser, Namespace
from typing import Any

from sim.cli.text import names, note, say_about_inputs, threads, whole_number, whole_numbers
from sim.errors import InputError

KNEE_TEXT = (
    "~ from a third of the crossover to six times it: times bend there, the model has a corner, and measured gains differ\n"
    "most from predicted ones (README, Measured)"
)
EXTRAPOLATED_TEXT = "* exchange computed, not measured: times are published for 128 tokens a rank on H800, EP 8 to 256"


def add_timed_arguments(parser: ArgumentParser, ep: str, tokens: str) -> None:
    """Add the options; `ep` and `tokens` are the defaults of these lists."""
    add_step_arguments(parser, ep, tokens)
    parser.add_argument(
        "--workload", default="chat", metavar="WORKLOAD", help="traffic, as in epsim sweep (default: chat)"
    )
    parser.add_argument(
        "--exchange",
        default="deepep_low_latency",
        help="dispatch and combine: deepep_low_latency (default), deepep_high_throughput or none",
    )


def add_step_arguments(parser: ArgumentParser, ep: str, tokens: str, *, steps: int = 512, layer_sets: int = 32) -> None:
    """Add the options of the model, the steps and their sampling."""
    add = parser.add_argument
    add(
        "--model", default="deepseek-v3", metavar="MODEL", help="preset or path of a config.json (default: deepseek-v3)"
    )
    add("--phase", help="of recorded routing: decode (default) or prefill")
    add("--dummy-tokens", metavar="N", help="identical tokens that each step has besides, of idle data-parallel ranks")
    add("--ep", default=ep, metavar="LIST", help=f"EP size, or sizes (default: {ep})")
    add("--tokens", metavar="LIST", help=f"tokens per step over the whole EP group (default: {tokens})")
    add("--tokens-per-rank", metavar="LIST", help="instead of --tokens: tokens per step and rank")
    add("--dtype", default="fp8", help="type of weights and inputs: fp8 (default), bf16 or fp4")
    add(
        "--network-gb",
        metavar="GB/S",
        help="network bandwidth of a GPU per direction (default: the GPU's; 50 if it has none)",
    )
    add("--ranks-per-node", default="8", metavar="N", help="ranks joined by NVLink (default: 8)")
    add(
        "--layer-sets",
        default=str(layer_sets),
        metavar="N",
        help=f"independent sets of the model's layers, of traffic by law (default: {layer_sets})",
    )
    add(
        "--steps",
        default=str(steps),
        metavar="N",
        help=f"steps of each size, fewer where they are large (default: {steps})",
    )
    add("--seed", default="0", metavar="N", help="same seed, same rows, on any number of threads (default: 0)")
    add("--threads", metavar="N", help="default: all processors of this process")
    parser.set_defaults(default_tokens=tokens)


def timed_options(arguments: Namespace) -> dict[str, Any]:
    """Keyword arguments of `predict_gain` and `predict_steps` that the options stand for, and model and workload."""
    from sim.model import load_model
    from sim.traffic import load_workload

    steps = step_options(arguments)
    workload = load_workload(arguments.workload, phase=arguments.phase, dummy_tokens=dummy_tokens(arguments))
    return {"model": load_model(arguments.model), "workload": workload, "exchange": arguments.exchange, **steps}


def dummy_tokens(arguments: Namespace) -> int | None:
    """--dummy-tokens, or None."""
    return None if arguments.dummy_tokens is None else whole_number("--dummy-tokens")(arguments.dummy_tokens)


def step_options(arguments: Namespace) -> dict[str, Any]:
    """Keyword arguments that stand for the options of steps and their sampling."""
    if arguments.tokens is not None and arguments.tokens_per_rank is not None:
        raise InputError("--tokens-per-rank is the alternative to --tokens: give one of them")
    per_rank = arguments.tokens_per_rank is not None
    of_group = arguments.default_tokens if arguments.tokens is None else arguments.tokens
    text = arguments.tokens_per_rank if per_rank else of_group
    return {
        "ep_sizes": whole_numbers("--ep")(arguments.ep),
        "tokens": whole_numbers("--tokens-per-rank" if per_rank else "--tokens")(text),
        "tokens_per_rank": per_rank,
        "dtype": arguments.dtype,
        "network_gb_per_s": _positive("--network-gb", arguments.network_gb),
        "ranks_per_node": whole_number("--ranks-per-node")(arguments.ranks_per_node),
        "layer_sets": whole_number("--layer-sets")(arguments.layer_sets),
        "most_steps": whole_number("--steps")(arguments.steps),
        "seed": whole_number("--seed")(arguments.seed),
        "threads": threads(arguments.threads),
    }


def chosen_gpus(text: str) -> list[Any]:
    """The GPUs of a list of names and files."""
    from sim.cost import load_gpu

    return [load_gpu(name) for name in dict.fromkeys(names("--gpu")(text))]


def identity_of(options: dict[str, Any], gpus: list[Any], **more: Any) -> dict[str, Any]:
    """All that a table depends on, as JSON values."""
    from dataclasses import asdict

    identity = {name: value for name, value in options.items() if name not in ("model", "workload", "threads")}
    identity |= {"model": options["model"].name, "workload": options["workload"].name}
    return identity | {"law": _law(options["workload"]), "gpus": [asdict(gpu) for gpu in gpus]} | more


def say_about_times(options: dict[str, Any], gpus: list[Any]) -> None:
    """Remarks on numbers that were not verified, or that are assumed."""
    from sim.cost.times import NETWORK_GB_PER_S
    from sim.kernels import is_cold

    if is_cold():
        note("compiling the kernels, once for this version: about 30 seconds")
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
        if gpu.scale_out_gb_per_s is None and options["exchange"] != "none" and not options["network_gb_per_s"]:
            note(
                f"{gpu.name}: its network differs by cluster; taken as {NETWORK_GB_PER_S:g} GB/s (--network-gb sets it)"
            )
    sys.stderr.flush()


def model_dtype(model: Any) -> str:
    """The type of the routed experts of a checkpoint in the words of --dtype, as far as it is one."""
    return next((dtype for dtype in ("bf16", "fp8", "fp4") if dtype in model.routed_dtype), model.routed_dtype)


def _positive(option: str, text: str | None) -> float | None:
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1e6:
        raise InputError(f"{option} '{text}': expected a number above 0, and at most 1e6")
    return value


def share_or_none(option: str, text: str | None) -> float | None:
    """A share as in 40% or 0.4, or None."""
    from sim.cli.text import share

    return None if text is None else share(option)(text)


def step_us_or_none(text: str | None) -> float | None:
    """--step-ms in microseconds, or None."""
    value = _positive("--step-ms", text)
    return None if value is None else 1e3 * value


def _law(traffic: Any) -> dict[str, Any]:
    """What tells traffic apart: its law, or the digest of load counts."""
    return traffic.law if hasattr(traffic, "law") else {"counts": traffic.digest}
