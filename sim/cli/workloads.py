"""List the traffic presets with what they stand for and where their figures come from."""

from argparse import ArgumentParser, Namespace

from sim.traffic import load_workload, workload_names


def add_arguments(parser: ArgumentParser) -> None:
    """`epsim workloads` takes no options."""


def run(arguments: Namespace) -> None:
    """Run `epsim workloads`."""
    for workload in map(load_workload, workload_names()):
        law = ", ".join(f"{key} {value}" for key, value in workload.law.items())
        print(f"{workload.name}\n    {workload.about}\n    law:    {law}\n    source: {workload.source}\n")
    print(
        "Every preset but uniform is fitted to DeepSeek-R1; on another model it is an assumption.\n"
        "Recorded routing: file:TRACE, expert ids of tokens in .npz, .npy or JSON lines (epsim traffic show TRACE).\n"
        "Fitted to a record or to load counts: the .toml file that epsim traffic fit writes.\n"
        "Your own law: a .toml file with the keys popularity, sigma, group_sigma, request_sigma, tokens_per_request."
    )
