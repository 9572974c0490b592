"""List the traffic presets with what they stand for and where their figures come from."""

from argparse import ArgumentParser, Namespace

from sim.cli.progress import shown_progress
from sim.cli.text import filled, note_compiling
from sim.options import WHOLE_NUMBERS, TrafficOptions, add_options
from sim.traffic import load_workload, workload_names


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of `epsim workloads`."""
    parser.add_argument(
        "--imbalance",
        action="store_true",
        help="compute of each preset the imbalance: mean over layers of max / mean rank load of a large step, linear placement",
    )
    parser.add_argument(
        "--ep", type=WHOLE_NUMBERS, default="8,16,32,64", metavar="LIST", help="EP sizes of it (default: 8,16,32,64)"
    )
    add_options(parser, TrafficOptions, only=("model",))


def run(arguments: Namespace) -> None:
    """Run `epsim workloads`."""
    found = _imbalances(arguments) if arguments.imbalance else {}
    for workload in map(load_workload, workload_names()):
        law = ", ".join(f"{key} {value}" for key, value in workload.law.items())
        print(workload.name)
        lines = [("", workload.about), ("law: ", law), ("source: ", workload.source)]
        lines += [(f"imbalance at EP {arguments.text}: ", found[workload.name])] if workload.name in found else []
        for name, text in lines:
            print(filled(f"{name}{text}", "    ", "    " + " " * (8 if name else 0)))
        print()
    print(
        "On another model than the one that it is fitted to, a preset is an assumption.\n"
        "Recorded routing: file:TRACE, expert ids of tokens in .npz, .npy or JSON lines\n"
        "  (epsim traffic show TRACE).\n"
        "Fitted to a record or to load counts: the .toml file of epsim traffic fit.\n"
        "Your own law: a .toml file with the keys popularity, sigma, group_sigma,\n"
        "  request_sigma, tokens_per_request; local_share, context_tokens and context_shares where\n"
        "  the effect of a request decays.\n"
        "How uneven each is: epsim workloads --imbalance. Which is nearest to a number in\n"
        "  your log: epsim traffic match."
    )


def _imbalances(arguments: Namespace) -> dict[str, str]:
    """Of each preset its imbalances in words, on the model if it goes with that, else on the one that it is fitted to."""
    from sim.errors import InputError
    from sim.fit.made import mean_imbalances
    from sim.model import load_model
    from sim.progress import track
    from sim.router import check_pair
    from sim.traffic import SyntheticTraffic

    note_compiling()
    arguments.text = ", ".join(map(str, arguments.ep))
    names, found = workload_names(), {}
    with shown_progress():
        for name in track(names, [1.0] * len(names), names):
            workload, model = load_workload(name), load_model(arguments.model)
            try:
                check_pair(model, workload)
            except InputError:
                assert isinstance(workload, SyntheticTraffic)
                model = load_model(workload.fitted_to)
            sizes = [size for size in arguments.ep if size <= model.n_experts]
            values = [f"{value:.2f}" for value in mean_imbalances(workload, model, sizes)]
            found[name] = f"{', '.join(values + ['-'] * (len(arguments.ep) - len(sizes)))} ({model.name})"
    return found
