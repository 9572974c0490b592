"""Draw the figures of a sweep as PNG and SVG. A plot never samples: it reads what `epsim sweep` wrote."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from sim.errors import InputError, unknown
from sim.options import NAMES, Whole


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of `epsim plot`."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder that epsim sweep wrote")
    parser.add_argument("--figures", type=NAMES, metavar="LIST", help="some of the figures by name (default: all)")
    parser.add_argument(
        "--tokens",
        type=Whole(),
        metavar="N",
        help="tokens per step of the worst-case figures (default: nearest to 64)",
    )
    parser.add_argument("--format", type=NAMES, default="png,svg", metavar="LIST", help="png, svg or both (default)")


def run(arguments: Namespace) -> None:
    """Run `epsim plot`."""
    suffixes = arguments.format
    for suffix in suffixes:
        if suffix not in ("png", "svg"):
            raise InputError(f"--format {suffix}: must be png, svg or both")
    from sim.figures import FIGURES, save
    from sim.results import read_result

    chosen = list(FIGURES) if arguments.figures is None else arguments.figures
    for name in chosen:
        if name not in FIGURES:
            raise unknown("figure", name, FIGURES)
    result = read_result(arguments.folder)
    if result.counts.empty:
        raise InputError(
            f"{arguments.folder} lacks counts.parquet, which the figures are drawn from; run the sweep again"
        )
    tokens = arguments.tokens
    if tokens is not None and tokens not in set(result.summary.tokens):
        have = ", ".join(map(str, sorted(result.summary.tokens.unique())))
        raise InputError(f"--tokens {tokens}: the sweep has {have}")
    for name in chosen:
        options = {"tokens": tokens} if tokens and name in ("exceedance", "worst_case_by_ep") else {}
        figure = FIGURES[name](result, **options)
        for suffix in suffixes:
            path = arguments.folder / f"{name}.{suffix}"
            save(figure, path)
            print(path)
