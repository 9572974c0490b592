"""Try published performance claims under some traffic: the computed figure with its interval, the verdict, and why."""

import sys
from argparse import ArgumentParser, Namespace
from typing import Any

from sim.cli.progress import shown_progress
from sim.cli.text import add_forms, filled, note_compiling, print_rows, print_table, say_written
from sim.options import NAMES, SEED, THREADS, Folder, Number, Share


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of `epsim claims`."""
    parser.add_argument("ids", nargs="*", type=NAMES, metavar="ID", help="some of the claims (default: all)")
    parser.add_argument("--workload", default="chat", help="decode traffic, a preset or .toml file (default: chat)")
    parser.add_argument("--seed", type=SEED, default=0, metavar="N", help="same seed, same table (default: 0)")
    parser.add_argument(
        "--effort",
        type=Number(0.01, 100),
        default=1.0,
        metavar="X",
        help="scales the number of trials; 0.1 is quick, with wide intervals (default: 1)",
    )
    parser.add_argument(
        "--plausible-share",
        type=Share(),
        default="80%",
        metavar="SHARE",
        help="the most of a step that routed experts and exchange may take for a gain to be put down to them (default: 80%%)",
    )
    parser.add_argument("--threads", type=THREADS, metavar="N", help="default: all processors of this process")
    add_forms(parser)
    parser.add_argument("--out", type=Folder(), metavar="DIR", help="also write claims.csv there")


def run(arguments: Namespace) -> None:
    """Run `epsim claims`."""
    options: dict[str, Any] = {
        "only": [name for names in arguments.ids for name in names] or None,
        "seed": arguments.seed,
        "effort": arguments.effort,
        "plausible_share": arguments.plausible_share,
    }
    folder = arguments.out
    note_compiling()
    sys.stderr.flush()
    from sim.traffic import load_workload
    from sim.verdicts import claims

    workload = load_workload(arguments.workload)
    with shown_progress():
        table = claims(workload, threads=arguments.threads, **options)
    if print_rows(table, arguments):
        pass
    elif arguments.markdown:
        _print_markdown(table)
    else:
        _print_blocks(table)
    if folder is not None:
        from sim.files import writable_folder
        from sim.results import write_table

        with writable_folder(folder):
            write_table(table, folder, "claims", {"workload": workload.name, "law": workload.law, **options})
        say_written(f"written to {folder}: claims.csv, claims.json (what made it)", arguments)


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
            print(filled(text, first, " " * len(first)))
        print()
    kinds = table.verdict.str.replace(r" when.*", "", regex=True).value_counts()
    listed = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    print(filled(f"{table.workload.iloc[0]} traffic, {len(table)} claims: {listed}; intervals are 95 %"))


def _print_markdown(table: Any) -> None:
    heads = ["id", "claim", "computed (95 %)", "needs of the step", "verdict"]
    cells = [[row.id, row.claim, row.computed, _needs(row), f"**{row.verdict}**"] for row in table.itertuples()]
    print_table("", heads, cells, markdown=True, align="<<<<<")
