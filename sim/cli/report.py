"""Write one self-contained page to explore sweeps and advice in a browser: pickers, curves, tables, provenance; no network."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from sim.errors import InputError


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of `epsim report`."""
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="DIR", help="folders that epsim sweep or epsim advise wrote"
    )
    parser.add_argument(
        "--out", type=Path, default="report.html", metavar="FILE", help="the page (default: report.html)"
    )


def run(arguments: Namespace) -> None:
    """Run `epsim report`."""
    if arguments.out.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"--out {arguments.out}: must end in .html")
    from sim.report import write_report

    page = write_report(arguments.folders, arguments.out)
    print(f"{page}  {page.stat().st_size / 1e6:.1f} MB; open it in a browser, it needs no network")
