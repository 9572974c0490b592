"""Add finished sweeps that differ in their seeds: their raw counts, and tables of the sums."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from sim.cli.show import print_result
from sim.errors import InputError
from sim.options import Folder


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of `epsim combine`."""
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="DIR", help="folders that epsim sweep or combine wrote"
    )
    parser.add_argument("--out", required=True, type=Folder(), metavar="DIR", help="folder of the sum")


def run(arguments: Namespace) -> None:
    """Run `epsim combine`."""
    from sim.files import writable_folder
    from sim.results import read_identity, read_result, write_result
    from sim.sweeps import combine

    out = arguments.out
    result = combine([(str(path), read_result(path, sealed=True)) for path in arguments.folders])
    held = read_identity(out)
    if held is not None and held != result.identity:
        raise InputError(f"--out {out} holds another sweep; choose another folder")
    if (out / ".partial").exists():
        raise InputError(f"--out {out} holds an unfinished sweep; choose another folder")
    with writable_folder(out):
        write_result(result, out)
    print_result(result)
    print(f"\nsum of {len(arguments.folders)} sweeps, written to {out}")
