"""Finished sweeps: their answer printed again, drawn, written as a page, and added to others."""

import math
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from sim.cli.inputs import check_there, rows_of
from sim.cli.terminal import add_output, print_lines, print_rows
from sim.errors import InputError
from sim.files import model_label
from sim.options import PlotOptions
from sim.options.declare import add_options, given
from sim.options.kinds import NAMES, WHOLE_NUMBERS, Folder, NewFile

_MAX_ROWS, _MAX_LINES = 28, 40
_FEW = 3  # placements that are all shown where nobody chooses
_KEYS = ["placement", "ep_size", "tokens"]
_OTHERS = {"capacity": "capacity", "gain": "gain", "steps": "step", "claims": "claims"}
"""Tables of other verbs that are shown again, by name."""
_ELSEWHERE = {"depends": "epsim depends --show", "advice": "epsim report"}
_SHORT = {"round_robin": "r_robin", "linear_legacy": "legacy", "node_aware": "node_aw"}


def add_show(parser: ArgumentParser) -> None:
    """Print the answer of a sweep: per EP size and step the placements, each against the first.

    Or that of epsim capacity, gain, step or claims.
    """
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="folder that --out of one of these wrote")
    add("--ep", dest="ep_sizes", type=WHOLE_NUMBERS, metavar="LIST", help="some of the EP sizes")
    add("--tokens", type=WHOLE_NUMBERS, metavar="LIST", help="some of the step sizes")
    add("--placement", type=NAMES, metavar="LIST", help="placements, compared with the first of them (default: all of up to "
        "three, else the baseline and round_robin)")  # fmt: skip
    add = parser.add_mutually_exclusive_group().add_argument
    add("--worst", action="store_true", help="the worst cases instead: all load on one rank, and at least half of the ranks "
        "idle (all placements)")  # fmt: skip
    add("--tail", action="store_true", help="P(imbalance >= x) instead, sampled and computed (all placements)")
    add_output(parser)


def run_show(arguments: Namespace) -> None:
    from sim.files import is_there
    from sim.placement import ALIASES
    from sim.results import PROVENANCE, read_result

    named = None if arguments.placement is None else [ALIASES.get(name, name) for name in arguments.placement]
    chosen = {"ep_size": arguments.ep_sizes, "tokens": arguments.tokens}
    chosen["placement"] = None if named is None else list(dict.fromkeys(named))
    others = () if is_there(arguments.folder / PROVENANCE) else (*_OTHERS, *_ELSEWHERE)
    found = next((name for name in others if is_there(arguments.folder / f"{name}.json")), "")
    if found in _ELSEWHERE:
        raise InputError(f"{arguments.folder} holds {found}.csv, which {_ELSEWHERE[found]} {arguments.folder} shows")
    if found:
        _show_other(arguments, found, chosen)
        return
    result = read_result(arguments.folder)
    check_there(result.summary, chosen, "the sweep")
    rows = rows_of(result.summary, chosen)
    if arguments.worst or arguments.tail:
        metrics = ["imbalance"] if arguments.tail else ["one_rank", "idle_ranks"]
        rows = rows_of(result.tail[result.tail.metric.isin(metrics)], chosen)
    if print_rows(rows, arguments):
        return
    printer = _print_worst_cases if arguments.worst else _print_tail if arguments.tail else print_result
    printer(result, arguments.markdown, chosen)


def _show_other(arguments: Namespace, name: str, chosen: dict[str, Any]) -> None:
    """Show a table that another verb wrote."""
    from sim.results import read_table

    verb = _OTHERS[name]
    if arguments.worst or arguments.tail:
        raise InputError(f"--worst and --tail go with a sweep; {arguments.folder} holds {name}.csv of epsim {verb}")
    table, about = read_table(arguments.folder, name, verb)
    check_there(table, chosen, f"{name}.csv")
    rows = rows_of(table, chosen)
    if not print_rows(rows, arguments):
        import_module(f"sim.cli.{verb}").print_table_of(rows, about[name], arguments.markdown)


def _about(result: Any) -> str:
    first = result.summary.iloc[0]
    return f"{model_label(first.model)}, {first.workload} traffic"


def print_result(result: Any, markdown: bool, chosen: dict[str, Any] | None = None) -> None:
    """Print mean and p99 imbalance, P(>= 1.5), P(>= 2) and idle ranks of placements, and the change with its interval."""
    chosen = chosen or {}
    summary = result.summary
    there = list(dict.fromkeys(summary.placement))
    placements = chosen.get("placement")
    if placements is None:
        pair = [there[0], *[name for name in ("round_robin", *there[1:]) if name in there[1:]][:1]]
        placements = pair if markdown or len(there) > _FEW else there
    rows = rows_of(summary, chosen | {"placement": placements[:1]})
    most = _MAX_ROWS if markdown else max(4, _MAX_LINES // len(placements))
    shown = rows if chosen.get("tokens") else _fewer_steps(rows, most)
    where = list(zip(shown.ep_size, shown.tokens, strict=True))
    if markdown:
        print_lines("", *_columns(result, placements, where), markdown)
        return
    names = " against ".join(filter(None, (placements[0], ", ".join(placements[1:]))))
    title = (
        f"{_about(result)}: {names}; imbalance = max / mean rank load of a layer in a step, change: of its mean, 95 %"
    )
    print_lines(title, *_lines(result, placements, where), markdown, align=">><", keys=3)
    left = ["other step sizes (--tokens)"] if len(shown) < len(rows) else []
    others = [name for name in there if name not in placements]
    left += [f"{', '.join(others)} (--placement)"] if others else []
    if left:
        print(f"\nNot shown: {'; '.join(left)}")


def _print_worst_cases(result: Any, markdown: bool, chosen: dict[str, Any]) -> None:
    """Print P(all of a step's load on one rank) and P(at least half of the ranks idle), to their true size where it is
    known.
    """
    from sim.stats import best_rows

    summary = result.summary
    names = chosen["placement"] or list(dict.fromkeys(summary.placement))
    steps = chosen["tokens"] or sorted(summary.tokens.unique())[:4]
    tail = best_rows(result.tail[result.tail.metric.isin(["one_rank", "idle_ranks"])])
    rows = {(row.placement, row.ep_size, row.tokens, row.metric, row.threshold): row for row in tail.itertuples()}
    lines = []
    for ep_size in chosen["ep_size"] or sorted(summary.ep_size.unique()):
        for step in steps:
            if ep_size > 1 and (names[0], ep_size, step, "one_rank", 1.0) in rows:
                at = [
                    rows.get((name, ep_size, step, metric, threshold))
                    for metric, threshold in (("one_rank", 1.0), ("idle_ranks", float(-(-ep_size // 2))))
                    for name in names
                ]
                lines.append([str(ep_size), str(step), *(_probability(row) for row in at)])
    short = [_SHORT.get(name, name) for name in names]
    heads = ["EP", "tokens", *[f"{what} {name}" for what in ("one-rank", "half-idle") for name in short]]
    title = f"{_about(result)}: P(all of a step's load on one rank), and P(at least half of the ranks idle)"
    print_lines(title, heads, lines, markdown, keys=2)


def _print_tail(result: Any, markdown: bool, chosen: dict[str, Any]) -> None:
    """Print P(imbalance >= x) of some cells: what was sampled beside what is exact or between bounds."""
    tail = rows_of(result.tail[result.tail.metric == "imbalance"], chosen)
    tail = tail[tail.threshold <= tail.ep_size]
    lines, digits = [], 3 if markdown else 2
    for key, rows in tail.groupby([*_KEYS, "threshold"], sort=False):
        of = {bool(row.method == "sampled"): row for row in rows.itertuples()}
        sampled, theory = of.get(True), of.get(False)
        seen = [_probability(sampled), _interval(sampled, digits)]
        known = (
            ["-", "-", ""]
            if theory is None
            else [theory.method, _interval(theory, digits), theory.given or "all layers"]
        )
        lines.append([*map(str, key[:3]), f"{key[3]:g}", *seen, *known])
    lines.sort(key=lambda row: (row[0], int(row[1]), int(row[2]), float(row[3])))
    heads = ["placement", "EP", "tokens", "x", "sampled P", "sampled 95 %", "method", "method's P", "method holds for"]
    title = f"{_about(result)}: P(imbalance >= x)"
    if markdown:
        print_lines(title, heads, lines, markdown)
        return
    given = dict.fromkeys(row[-1] for row in lines if row[-1])
    title += ", sampled, and exact (one number) or between bounds"
    title += f", which hold for {', '.join(given)}" if given else ""
    narrow = [[*row[:6], row[7]] for row in lines]
    print_lines(title, [*heads[:4], "P", "95 %", "exact, bounds"], narrow, markdown, align="<", keys=4)


def _interval(row: Any, digits: int) -> str:
    """Lower and upper bound, or the answer where they agree."""
    if row is None:
        return "-"
    low, high = f"{row.low:.{digits}g}", f"{row.high:.{digits}g}"
    return low if row.low == row.high else f"{low} to {high}"


def _fewer_steps(rows: Any, most: int) -> Any:
    """Rows of so many steps of each EP size that the table fits one screen."""
    room = max(1, most // rows.ep_size.nunique())
    if len(rows) <= most:
        return rows
    place = rows.groupby("ep_size").tokens.rank(method="dense").astype(int) - 1
    last = int(place.max())
    return rows[place.isin([round((i + 1) * last / room) for i in range(room)])]


def _found(
    result: Any, placements: list[str], where: list[tuple[int, int]]
) -> Iterator[tuple[list[str], Any, list[str]]]:
    """Of each cell its EP size and tokens, five figures of each placement, and the others' changes against the first."""
    from sim.stats import best_rows

    rows = result.summary.set_index(_KEYS).sort_index()
    imbalance = best_rows(result.tail[result.tail.metric == "imbalance"])
    tail = {(row.placement, row.ep_size, row.tokens, row.threshold): row for row in imbalance.itertuples()}
    for ep_size, tokens in where:
        of = {name: rows.loc[(name, ep_size, tokens)] for name in placements}
        figures = [
            [
                f"{cell.imbalance_mean:.3f}", f"{cell.imbalance_p99:.2f}",
                *(_probability(tail.get((name, ep_size, tokens, x))) for x in (1.5, 2.0)), f"{cell.idle_ranks_mean:.1f}",
            ]
            for name, cell in of.items()
        ]  # fmt: skip
        first, *others = of.values()
        yield [str(ep_size), str(tokens)], figures, [_change(first, cell) for cell in others]


def _lines(result: Any, placements: list[str], where: list[tuple[int, int]]) -> tuple[list[str], list[list[str]]]:
    """A line for each placement of a cell."""
    lines = []
    for keys, figures, changes in _found(result, placements, where):
        for i, (mean, *others) in enumerate(figures):
            lines.append([*(["", ""] if i else keys), placements[i], mean, changes[i - 1] if i else "", *others])
    return ["EP", "tokens", "placement", "mean", "change", "p99", "P≥1.5", "P≥2", "idle ranks"], lines


def _columns(result: Any, names: list[str], where: list[tuple[int, int]]) -> tuple[list[str], list[list[str]]]:
    """A line for each cell, with a column for each placement."""
    lines = []
    for keys, figures, changes in _found(result, names, where):
        mean, *others = zip(*figures, strict=True)
        lines.append([*keys, *mean, *changes, *(text for figure in others for text in figure)])
    short = [_SHORT.get(name, name) for name in names]
    heads = ["EP", "tokens", *[f"mean {name}" for name in short]]
    heads += ["change (95 %)"] if len(names) == 2 else [f"change {name} (95 %)" for name in short[1:]]
    heads += [f"{what} {name}" for what in ("p99", "P≥1.5", "P≥2", "idle") for name in short]
    return heads, lines


def _change(first: Any, second: Any) -> str:
    """Change of the mean imbalance, with its paired interval where the first is the sweep's baseline."""
    change = second.imbalance_mean - first.imbalance_mean
    if second.baseline != first.name[0]:
        return f"{change:+.3f}"
    return f"{change:+.3f} ± {second.imbalance_change_mean_high - second.imbalance_change_mean:.3f}"


def _probability(row: Any) -> str:
    """A probability; what is only known to be below a bound shows the bound; - where the sweep has no such row."""
    if row is None:
        return "-"
    if row.low == 0 and row.high > 0:
        return f"<{_rounded_up(row.high)}"
    if row.low == row.high and row.low in (0.0, 1.0):
        return f"{row.low:.0f}"
    return f"{row.probability:.3f}" if row.probability >= 0.001 else f"{row.probability:.0e}"


def _rounded_up(bound: float) -> str:
    """A bound with two digits that is not below it."""
    unit = 10.0 ** (math.floor(math.log10(bound)) - 1)
    up = math.ceil(bound / unit - 1e-9) * unit
    return f"{up:.2g}" if up >= 0.001 else f"{up:.1e}"


def add_combine(parser: ArgumentParser) -> None:
    """Add finished sweeps that differ in their seeds: their raw counts, and tables of the sums."""
    add = parser.add_argument
    add("folders", nargs="+", type=Path, metavar="DIR", help="folders that epsim sweep or combine wrote")
    add("--out", required=True, type=Folder(), metavar="DIR", help="folder of the sum")


def run_combine(arguments: Namespace) -> None:
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
    print_result(result, markdown=False)
    print(f"\nsum of {len(arguments.folders)} sweeps, written to {out}")


def add_plot(parser: ArgumentParser) -> None:
    """Draw the figures of sweeps. A plot never samples: it reads what epsim sweep wrote."""
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="folders that epsim sweep wrote")
    parser.add_argument("--figures", type=NAMES, metavar="LIST", help="some of the figures by name (default: all)")
    add_options(parser, PlotOptions)


def run_plot(arguments: Namespace) -> None:
    options = PlotOptions(**given(arguments, PlotOptions))
    from sim.errors import unknown
    from sim.figures import FIGURES, draw, save_as
    from sim.results import read_result

    chosen = list(FIGURES) if arguments.figures is None else arguments.figures
    for name in chosen:
        if name not in FIGURES:
            raise unknown("figure", name, FIGURES)
    worst_case = {"deepest": options.deepest} | ({} if options.tokens is None else {"tokens": options.tokens})
    for folder in arguments.folders:
        result = read_result(folder)
        if result.counts.empty:
            raise InputError(f"{folder} lacks counts.parquet, which the figures are drawn from; run the sweep again")
        check_there(result.summary, {"tokens": None if options.tokens is None else [options.tokens]}, "the sweep")
        for name in chosen:
            figure = draw(name, result, **(worst_case if name in ("exceedance", "worst_case_by_ep") else {}))
            if figure is None:
                print(f"{name}: not drawn, as it would show nothing of this sweep")
                continue
            for path in save_as(figure, folder / name, options.formats):
                print(path)


def add_report(parser: ArgumentParser) -> None:
    """Write one page to explore sweeps and advice in a browser: pickers, curves, tables, provenance. It needs no network."""
    add = parser.add_argument
    add("folders", nargs="+", type=Path, metavar="DIR", help="folders that epsim sweep or epsim advise wrote")
    page = NewFile(endings=(".html", ".htm"))
    add("--out", type=page, default="report.html", metavar="FILE", help="the page (default: report.html)")


def run_report(arguments: Namespace) -> None:
    from sim.report import write_report

    page = write_report(arguments.folders, arguments.out)
    print(f"{page}  {page.stat().st_size / 1e6:.1f} MB; open it in a browser, it needs no network")
