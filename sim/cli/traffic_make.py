"""`epsim traffic make` and `match`: synthetic traffic with a wanted imbalance."""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from sim.cli.inputs import read_inputs, say_about_inputs
from sim.cli.terminal import add_output, note, note_compiling, print_rows, print_table, say, shown_progress
from sim.errors import InputError, counted
from sim.files import model_label
from sim.options import MadeOptions, MatchOptions, TrafficOptions
from sim.options.declare import add_options
from sim.options.kinds import NewFile

_NEAR = 0.02  # of what is asked for: a scale reaches it


def add_make(parser: ArgumentParser) -> None:
    """Write synthetic recorded routing, with a wanted imbalance."""
    add_options(parser, TrafficOptions, only=("model", "workload", "phase"))
    add_options(parser, MadeOptions)
    out = NewFile(endings=(".npz",))
    parser.add_argument("--out", type=out, required=True, metavar="TRACE.npz", help="the trace that is written")


def run_make(arguments: Namespace) -> None:
    from sim.fit.made import LARGE_STEP, make_traffic, match, trace_imbalance
    from sim.progress import phase
    from sim.traffic import SyntheticTraffic

    if (arguments.imbalance is None) != (arguments.ep_sizes is None):
        raise InputError("`imbalance` and `ep_sizes` go together")
    model, workload = read_inputs(arguments)
    if not isinstance(workload, SyntheticTraffic):
        raise InputError(f"`workload` {workload.name}: a trace is made of synthetic traffic, and this is one")
    note_compiling()
    say_about_inputs(model, workload)
    scale, sizes = 1.0, {"popularity": 1.0 if arguments.imbalance else 0.0, "tokens": 1.0}
    with shown_progress():
        if arguments.imbalance is not None:
            with phase("popularity", sizes):
                step = min(arguments.tokens, LARGE_STEP)
                n_layers = model.n_moe_layers or 0
                found = match(workload, model, arguments.imbalance, arguments.ep_sizes, step, n_layers, arguments.seed)
                scale = found.scale
        with phase("tokens", sizes):
            trace = make_traffic(workload, model, arguments.tokens, arguments.sequences, arguments.seed, scale)
    write_trace(trace, arguments.out)
    n_layers, n_tokens, top_k = trace.topk_ids.shape
    say(
        f"{n_tokens} tokens in {counted(len(trace.starts) - 1, 'sequence')}, {counted(n_layers, 'layer')}, top-{top_k} of "
        f"{model.n_experts} experts, of {workload.name} traffic"
        + ("" if arguments.imbalance is None else f" with its popularity scaled by {scale:.4g}")
        + f", seed {arguments.seed}"
    )
    if arguments.imbalance is not None:
        reached = trace_imbalance(trace, model, arguments.ep_sizes)
        say(
            f"max / mean rank load of all its tokens, linear placement at EP {arguments.ep_sizes}, mean of layers: {reached:.3f} "
            f"(asked for: {arguments.imbalance:g})"
        )
        if abs(reached / arguments.imbalance - 1) > _NEAR:
            note(f"the nearest that this workload and this number of tokens reach is {reached:.3f}")
    say(f"written to {arguments.out}; use it as --workload file:{arguments.out} --model {arguments.model}")


def write_trace(trace: Any, path: Path) -> None:
    """Write recorded routing in the form that `epsim traffic show` and all readers take. Raises OSError."""
    import numpy as np

    from sim.files import whole_files

    with whole_files(path) as (temporary,):
        np.savez_compressed(
            temporary,
            topk_ids=np.ascontiguousarray(trace.topk_ids.transpose(1, 0, 2)),
            sequence_lengths=np.diff(trace.starts),
            layers=trace.layer_ids,
        )


def add_match(parser: ArgumentParser) -> None:
    """Name the presets nearest to an imbalance that was read off a log."""
    add_options(parser, TrafficOptions, only=("model",))
    add_options(parser, MatchOptions)
    add_output(parser)


def run_match(arguments: Namespace) -> None:
    from concurrent.futures import ThreadPoolExecutor

    import pandas as pd

    from sim.fit.made import match
    from sim.kernels import usable_processors
    from sim.model import load_model
    from sim.progress import track
    from sim.router import check_pair
    from sim.traffic import SyntheticTraffic, load_workload, workload_names

    note_compiling()
    model = load_model(arguments.model)
    fitting: list[SyntheticTraffic] = []
    for workload in map(load_workload, arguments.workloads or workload_names()):
        if not isinstance(workload, SyntheticTraffic):
            raise InputError(f"`workload` {workload.name}: only synthetic traffic can be scaled")
        try:
            check_pair(model, workload)
        except InputError:
            if arguments.workloads:
                raise
            continue
        fitting.append(workload)
    x, ep_size, tokens = arguments.imbalance, arguments.ep_sizes, min(arguments.tokens, 2**20)
    names = [workload.name for workload in fitting]
    with shown_progress(), ThreadPoolExecutor(usable_processors()) as pool:
        matches = pool.map(lambda workload: match(workload, model, x, ep_size, tokens, seed=arguments.seed), fitting)
        found = list(track(matches, [1.0] * len(fitting), names))
    found.sort(key=lambda one: abs(one.unscaled - x))
    rows = pd.DataFrame([vars(one) for one in found]).rename(
        columns={"name": "workload", "unscaled": "imbalance", "unscaled_half": "imbalance_half"}
    )
    if print_rows(rows, arguments):
        return
    title = (
        f"{model_label(model.name)}, linear placement at EP {ep_size}, {tokens} tokens per step: mean over layers of max / mean "
        f"rank load (± 95 %, over layers), beside {x:g}"
    )
    columns: dict[str, Any] = {
        "workload": "name",
        "imbalance as it is": lambda one: f"{one.unscaled:.3f} ± {one.unscaled_half:.3f}",
        "off": lambda one: f"{one.unscaled / x - 1:+.1%}",
        "popularity scale": "scale:.3f",
        "imbalance with it": "reached:.3f",
    }
    print_table(title, found, columns, arguments.markdown, align="<")
    if not arguments.markdown and found:
        near = [one.name for one in found if abs(one.unscaled - x) <= one.unscaled_half]
        reaching = [one for one in found if abs(one.reached / x - 1) < _NEAR]
        print()
        say(
            f"Nearest as it is: {found[0].name}. "
            + (f"Within the interval of {', '.join(near)}." if near else f"{x:g} lies in no preset's interval.")
        )
        if not reaching:
            print(f"No scale of any preset reaches {x:g}.")
            return
        best = min(reaching, key=lambda one: abs(one.scale - 1))
        sigma = next(workload.sigma for workload in fitting if workload.name == best.name)
        as_sigma = f", which is sigma {best.scale * sigma:.3g} in a .toml file" if sigma else ""
        say(
            f"Nearest scale: {best.name} with its popularity scaled by {best.scale:.3g}{as_sigma}. A trace of it: epsim traffic "
            f"make --model {arguments.model} --workload {best.name} --imbalance {x:g} --ep {ep_size} --out TRACE.npz"
        )
