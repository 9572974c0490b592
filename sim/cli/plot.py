"""Draw the figures of a sweep. A plot never samples: it reads what `epsim sweep` wrote."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from sim.errors import InputError
from sim.options import NAMES, PlotOptions, add_options, given


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of `epsim plot`."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder that epsim sweep wrote")
    parser.add_argument("--figures", type=NAMES, metavar="LIST", help="some of the figures by name (default: all)")
    add_options(parser, PlotOptions)


def run(arguments: Namespace) -> None:
    """Run `epsim plot`."""
    options = PlotOptions(**given(arguments, PlotOptions))
    from sim.errors import unknown
    from sim.figures import FIGURES, draw, save_as
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
    if options.tokens is not None and options.tokens not in set(result.summary.tokens):
        have = ", ".join(map(str, sorted(result.summary.tokens.unique())))
        raise InputError(f"`tokens` {options.tokens}: the sweep has {have}")
    worst_case = {"deepest": options.deepest} | ({} if options.tokens is None else {"tokens": options.tokens})
    for name in chosen:
        figure = draw(name, result, **(worst_case if name in ("exceedance", "worst_case_by_ep") else {}))
        if figure is None:
            print(f"{name}: not drawn, as the placements do not differ in it")
            continue
        for path in save_as(figure, arguments.folder / name, options.formats):
            print(path)
