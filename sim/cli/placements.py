"""List the placements, and say when vLLM runs another one than was asked for."""

from argparse import ArgumentParser, Namespace

from sim.placement import STRATEGIES


def add_arguments(parser: ArgumentParser) -> None:
    """`epsim placements` takes no options."""


def run(arguments: Namespace) -> None:
    """Run `epsim placements`."""
    for name, text in STRATEGIES.items():
        print(f"{name:<15}{text}")
    print(
        "\nWith N redundant slots, copies of experts: eplb+N and eplb_refined+N copy the hot ones; linear+N is vLLM's layout\n"
        "before the first rebalance (slot p holds expert p % n_experts). All slots must divide by the EP size. In a sweep eplb\n"
        "is fitted on other tokens than those that are scored (--fit-tokens, --fit-on); epsim export writes maps for engines."
    )
    print(
        "\nvLLM 0.33 silently runs linear although round_robin was asked for when: the EP size is 1; the router has no\n"
        "expert groups (n_group <= 1); there are redundant experts; EPLB is on; or data or sequence parallelism is used with\n"
        "an all2all backend other than deepep_low_latency or nixl_ep (the default backend is another)."
    )
