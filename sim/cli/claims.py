"""`epsim claims`: published performance claims tried under some traffic."""

from argparse import ArgumentParser, Namespace
from functools import partial
from typing import Any

from sim.cli.terminal import add_output, answer, note_compiling, print_table, say, shown_progress
from sim.errors import counted
from sim.options import ClaimOptions
from sim.options.declare import add_options, given
from sim.options.kinds import NAMES


def add_claims(parser: ArgumentParser) -> None:
    """Try published performance claims under some traffic: the computed figure with its interval, the verdict, and why."""
    add = parser.add_argument
    add("ids", nargs="*", type=NAMES, metavar="ID", help="some of the claims, or those of a pull request, as in 15517 (default: "
        "all)")  # fmt: skip
    add("--workload", default="chat", metavar="WORKLOAD", help="decode traffic, a preset or .toml file (default: chat)")
    add_options(parser, ClaimOptions, plausible_share="80%")
    add_output(parser, "claims.csv")


def run_claims(arguments: Namespace) -> None:
    from sim.traffic import load_workload
    from sim.verdicts import claims

    options = {"only": [name for names in arguments.ids for name in names] or None, **given(arguments, ClaimOptions)}
    workload = load_workload(arguments.workload)
    note_compiling()
    with shown_progress():
        table = claims(workload, **options)
    identity = {"workload": workload.name, "law": workload.law, **options}
    del identity["threads"]
    show = partial(print_table_of, table, identity, arguments.markdown)
    answer(arguments.out, arguments, show, {"claims": table}, identity)


def print_table_of(table: Any, about: dict[str, Any], markdown: bool) -> None:
    """Print claims and their verdicts, one by one, or as a table in Markdown."""
    if markdown:
        columns: dict[str, Any] = {"id": "id", "claim": "claim", "computed (95 %)": "computed"}
        columns |= {"needs of the step": _needs, "verdict": lambda row: f"**{row.verdict}**"}
        print_table("", table.itertuples(), columns, markdown, align="<<<<<")
        return
    for row in table.itertuples():
        print(f"{row.id}: {row.verdict}")
        lines = [("claim", f"{row.claim} ({row.source}; {row.setup})"), ("computed", row.computed), ("why", row.why)]
        if _needs(row) != "-":
            lines.insert(2, ("needs", f"{_needs(row)} of the step's time for routed experts and exchange"))
        for name, text in [*lines, ("assumed", row.assumed)]:
            first = f"  {name:<9} "
            say(text, first, " " * len(first))
        print()
    kinds = table.verdict.str.replace(r"only when.*", "on a condition", regex=True).value_counts()
    listed = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    say(f"{table.workload.iloc[0]} traffic, {counted(len(table), 'claim')}: {listed}; intervals are 95 %")


def _needs(row: Any) -> str:
    """Share of the step that a claim about time needs, with its interval."""
    if row.needed_share != row.needed_share:
        return "-"
    ends = [f"{100 * value:.0f}" if value < 100 else "inf" for value in (row.needed_share_low, row.needed_share_high)]
    return f"{100 * row.needed_share:.0f} % ({ends[0]} to {ends[1]})" if row.needed_share < 100 else "more than all"
