"""List the placements, and say when vLLM runs another one than was asked for."""

import textwrap
from argparse import ArgumentParser, Namespace

from sim.placement import LINEAR_BACKENDS, ROUND_ROBIN_BACKENDS, STRATEGIES


def add_arguments(parser: ArgumentParser) -> None:
    """`epsim placements` takes no options."""


def run(arguments: Namespace) -> None:
    """Run `epsim placements`."""
    for name, text in STRATEGIES.items():
        print(f"{name:<15}{text}")
    print(
        "\nWith N redundant slots, copies of experts: eplb+N and eplb_refined+N copy the hot ones; linear+N is vLLM's layout\n"
        "before the first rebalance (slot p holds expert p % n_experts). All slots must divide by the EP size. In a sweep eplb\n"
        "is fitted on other tokens than those that are scored (--fit-tokens, --fit-on); epsim export writes maps for engines.\n"
        "eplb_budget+N spends N x layers copies where they pay: by the load of the busiest rank; in gain, step, advise and with\n"
        "export --gpu by the predicted time of the largest step. Only vllm-ascend loads a map whose layers differ in slots.\n"
        "More ranks than experts need redundant slots that fill them: --ep 320 --placement eplb+64 on 256 experts."
    )
    print(
        "\nvLLM 0.33 silently runs linear although round_robin was asked for when: the EP size is 1; the router has no\n"
        "expert groups (n_group <= 1); there are redundant experts; EPLB is on; or data or sequence parallelism is used with\n"
        f"an all2all backend other than {' or '.join(ROUND_ROBIN_BACKENDS)}, so also with the default. Linear are:\n"
        + textwrap.fill(", ".join(LINEAR_BACKENDS) + ". moonep refuses to start with round_robin.", 118)
    )
