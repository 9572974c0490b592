"""`epsim claims`: published performance claims tried under some traffic."""

from argparse import ArgumentParser, Namespace
from typing import Any

from sim.cli.terminal import add_output, note_compiling, print_rows, print_table, say, shown_progress, write_answer
from sim.options.kinds import NAMES, SEED, THREADS, Number, Share


def add_claims(parser: ArgumentParser) -> None:
    """Try published performance claims under some traffic: the computed figure with its interval, the verdict, and why."""
    add = parser.add_argument
    add("ids", nargs="*", type=NAMES, metavar="ID", help="some of the claims (default: all)")
    add("--workload", default="chat", metavar="WORKLOAD", help="decode traffic, a preset or .toml file (default: chat)")
    add("--seed", type=SEED, default=0, metavar="N", help="same seed, same table (default: 0)")
    add("--effort", type=Number(0.01, 100), default=1.0, metavar="X", help="scales the number of trials; 0.1 is quick, with "
        "wide intervals (default: 1)")  # fmt: skip
    add("--plausible-share", type=Share(), default="80%", metavar="SHARE", help="the most of a step that routed experts and "
        "exchange may take for a gain to be put down to them (default: 80%%)")  # fmt: skip
    add("--threads", type=THREADS, metavar="N", help="threads (default: all processors of this process)")
    add_output(parser, "claims.csv")


def run_claims(arguments: Namespace) -> None:
    """Run `epsim claims`."""
    from sim.traffic import load_workload
    from sim.verdicts import claims

    options: dict[str, Any] = {
        "only": [name for names in arguments.ids for name in names] or None,
        "seed": arguments.seed,
        "effort": arguments.effort,
        "plausible_share": arguments.plausible_share,
    }
    workload = load_workload(arguments.workload)
    note_compiling()
    with shown_progress():
        table = claims(workload, threads=arguments.threads, **options)
    if not print_rows(table, arguments):
        (_print_markdown if arguments.markdown else _print_blocks)(table)
    write_answer(
        arguments.out, arguments, {"claims": table}, {"workload": workload.name, "law": workload.law, **options}
    )


def _needs(row: Any) -> str:
    """Share of the step that a claim about time needs, with its interval."""
    if row.needed_share != row.needed_share:
        return "-"
    ends = [f"{100 * value:.0f}" if value < 100 else "inf" for value in (row.needed_share_low, row.needed_share_high)]
    return f"{100 * row.needed_share:.0f} % ({ends[0]} to {ends[1]})" if row.needed_share < 100 else "more than all"


def _print_blocks(table: Any) -> None:
    for row in table.itertuples():
        print(f"{row.id}: {row.verdict}")
        lines = [("claim", f"{row.claim} ({row.source}; {row.setup})"), ("computed", row.computed), ("why", row.why)]
        if _needs(row) != "-":
            lines.insert(2, ("needs", f"{_needs(row)} of the step's time for routed experts and exchange"))
        for name, text in [*lines, ("assumed", row.assumed)]:
            first = f"  {name:<9} "
            say(text, first, " " * len(first))
        print()
    kinds = table.verdict.str.replace(r" when.*", "", regex=True).value_counts()
    listed = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    say(f"{table.workload.iloc[0]} traffic, {len(table)} claims: {listed}; intervals are 95 %")


def _print_markdown(table: Any) -> None:
    heads = ["id", "claim", "computed (95 %)", "needs of the step", "verdict"]
    cells = [[row.id, row.claim, row.computed, _needs(row), f"**{row.verdict}**"] for row in table.itertuples()]
    print_table("", heads, cells, markdown=True, align="<<<<<")
