"""Print the answer of a sweep: per EP size and step the placements, each against the first."""

import math
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from sim.cli.text import add_forms, print_rows, print_table
from sim.errors import InputError
from sim.options import NAMES, WHOLE_NUMBERS

_MAX_ROWS, _MAX_LINES = 28, 40
_FEW = 3  # placements that are all shown where nobody chooses
_KEYS = ["placement", "ep_size", "tokens"]
_SHORT = {"round_robin": "r_robin", "linear_legacy": "legacy", "node_aware": "node_aw"}


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of `epsim show`."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder that epsim sweep wrote")
    parser.add_argument("--ep", type=WHOLE_NUMBERS, metavar="LIST", help="some of the EP sizes")
    parser.add_argument("--tokens", type=WHOLE_NUMBERS, metavar="LIST", help="some of the step sizes")
    parser.add_argument(
        "--placement",
        type=NAMES,
        metavar="LIST",
        help="placements, compared with the first of them (default: all of up to three, else the baseline and round_robin)",
    )
    parser.add_argument(
        "--worst",
        action="store_true",
        help="print the worst cases instead: all load on one rank, and at least half of the ranks idle (all placements)",
    )
    parser.add_argument(
        "--tail",
        action="store_true",
        help="print P(imbalance >= x) instead: sampled, exact and between bounds (all placements)",
    )
    add_forms(parser)


def run(arguments: Namespace) -> None:
    """Run `epsim show`."""
    from sim.placement import ALIASES
    from sim.results import read_result

    result = read_result(arguments.folder)
    if arguments.worst and arguments.tail:
        raise InputError("--worst and --tail are two tables: give one of them")
    named = None if arguments.placement is None else [ALIASES.get(name, name) for name in arguments.placement]
    chosen = (arguments.ep, arguments.tokens, None if named is None else list(dict.fromkeys(named)))
    if print_rows(_rows(result, *chosen, tail=arguments.tail, worst=arguments.worst), arguments):
        return
    printer = print_worst_cases if arguments.worst else print_tail if arguments.tail else print_result
    printer(result, *chosen, arguments.markdown)


def _rows(
    result: Any,
    ep_sizes: list[int] | None,
    tokens: list[int] | None,
    placements: list[str] | None,
    *,
    tail: bool,
    worst: bool,
) -> Any:
    """Rows of summary.csv, or those of tail.csv that a table of it is made of."""
    _check_choice(result.summary, ep_sizes, tokens, placements)
    rows = result.tail if tail or worst else result.summary
    if tail or worst:
        rows = rows[rows.metric.isin(["imbalance"] if tail else ["one_rank", "idle_ranks"])]
    rows = rows[rows.ep_size.isin(ep_sizes or rows.ep_size) & rows.tokens.isin(tokens or rows.tokens)]
    return rows[rows.placement.isin(placements or rows.placement)]


def print_result(
    result: Any,
    ep_sizes: list[int] | None = None,
    tokens: list[int] | None = None,
    placements: list[str] | None = None,
    markdown: bool = False,
) -> None:
    """Print mean and p99 imbalance, P(>= 1.5), P(>= 2) and idle ranks of placements, and the change with its interval."""
    summary = result.summary
    there = list(dict.fromkeys(summary.placement))
    _check_choice(summary, ep_sizes, tokens, placements)
    if placements is None:
        pair = [there[0], *[name for name in ("round_robin", *there[1:]) if name in there[1:]][:1]]
        placements = pair if markdown or len(there) > _FEW else there
    rows = summary[summary.placement == placements[0]]
    rows = rows[rows.ep_size.isin(ep_sizes or rows.ep_size) & rows.tokens.isin(tokens or rows.tokens)]
    most = _MAX_ROWS if markdown else max(4, _MAX_LINES // len(placements))
    shown = rows if tokens else _fewer_steps(rows, most)
    where = list(zip(shown.ep_size, shown.tokens, strict=True))
    first = summary.iloc[0]
    names = " against ".join(filter(None, (placements[0], ", ".join(placements[1:]))))
    title = f"{first.model}, {first.workload} traffic: {names}"
    if markdown:
        print_table("", *_columns(result, placements, where), markdown)
        return
    title += "; imbalance = max / mean rank load of a layer in a step, change: of its mean, 95 %"
    print_table(title, *_lines(result, placements, where), markdown, align=">><", keys=3)
    others = [name for name in there if name not in placements]
    if len(shown) < len(rows) or others:
        print("\nNot shown: " + "; ".join(
            (["other step sizes (--tokens)"] if len(shown) < len(rows) else [])
            + ([f"{', '.join(others)} (--placement)"] if others else [])
        ))  # fmt: skip


def print_worst_cases(
    result: Any,
    ep_sizes: list[int] | None = None,
    tokens: list[int] | None = None,
    placements: list[str] | None = None,
    markdown: bool = False,
) -> None:
    """Print P(all of a step's load on one rank) and P(at least half of the ranks idle), to their true size where it is
    known.
    """
    from sim.stats import best_rows

    summary = result.summary
    _check_choice(summary, ep_sizes, tokens, placements)
    names = placements or list(dict.fromkeys(summary.placement))
    steps = tokens or sorted(summary.tokens.unique())[:4]
    tail = best_rows(result.tail[result.tail.metric.isin(["one_rank", "idle_ranks"])])
    rows = {(row.placement, row.ep_size, row.tokens, row.metric, row.threshold): row for row in tail.itertuples()}
    cells = []
    for ep_size in ep_sizes or sorted(summary.ep_size.unique()):
        for step in steps:
            if ep_size > 1 and (names[0], ep_size, step, "one_rank", 1.0) in rows:
                at = [
                    rows.get((name, ep_size, step, metric, threshold))
                    for metric, threshold in (("one_rank", 1.0), ("idle_ranks", float(-(-ep_size // 2))))
                    for name in names
                ]
                cells.append([str(ep_size), str(step), *(_probability(row) for row in at)])
    short = [_SHORT.get(name, name) for name in names]
    heads = ["EP", "tokens", *[f"{what} {name}" for what in ("one-rank", "half-idle") for name in short]]
    first = summary.iloc[0]
    title = (
        f"{first.model}, {first.workload} traffic: probability that all of a step's load is on one rank, and that at least "
        "half of the ranks are idle"
    )
    print_table(title, heads, cells, markdown, keys=2)


def print_tail(
    result: Any,
    ep_sizes: list[int] | None = None,
    tokens: list[int] | None = None,
    placements: list[str] | None = None,
    markdown: bool = False,
) -> None:
    """Print P(imbalance >= x) of some cells: what was sampled beside what is exact or between bounds."""
    summary, tail = result.summary, result.tail[result.tail.metric == "imbalance"]
    _check_choice(summary, ep_sizes, tokens, placements)
    tail = tail[tail.ep_size.isin(ep_sizes or tail.ep_size) & tail.tokens.isin(tokens or tail.tokens)]
    tail = tail[tail.placement.isin(placements or tail.placement) & (tail.threshold <= tail.ep_size)]
    cells, digits = [], 3 if markdown else 2
    for key, rows in tail.groupby([*_KEYS, "threshold"], sort=False):
        of = {bool(row.method == "sampled"): row for row in rows.itertuples()}
        sampled, theory = of.get(True), of.get(False)
        seen = [_probability(sampled), _interval(sampled, digits)]
        known = (
            ["-", "-", ""]
            if theory is None
            else [theory.method, _interval(theory, digits), theory.given or "all layers"]
        )
        cells.append([*map(str, key[:3]), f"{key[3]:g}", *seen, *known])
    cells.sort(key=lambda row: (row[0], int(row[1]), int(row[2]), float(row[3])))
    heads = ["placement", "EP", "tokens", "x", "sampled P", "sampled 95 %", "method", "method's P", "method holds for"]
    first = summary.iloc[0]
    title = f"{first.model}, {first.workload} traffic: P(imbalance >= x)"
    if markdown:
        print_table(title, heads, cells, markdown)
        return
    given = dict.fromkeys(row[-1] for row in cells if row[-1])
    title += ", sampled, and exact (one number) or between bounds"
    title += f", which hold for {', '.join(given)}" if given else ""
    narrow = [[*row[:6], row[7]] for row in cells]
    print_table(title, [*heads[:4], "P", "95 %", "exact, bounds"], narrow, markdown, align="<", keys=4)


def _interval(row: Any, digits: int) -> str:
    """Lower and upper bound, or the answer where they agree."""
    if row is None:
        return "-"
    low, high = f"{row.low:.{digits}g}", f"{row.high:.{digits}g}"
    return low if row.low == row.high else f"{low} to {high}"


def _check_choice(
    summary: Any, ep_sizes: list[int] | None, tokens: list[int] | None, placements: list[str] | None
) -> None:
    """Refuse what the sweep does not hold."""
    _check("--ep", ep_sizes, summary.ep_size)
    _check("--tokens", tokens, summary.tokens)
    _check("--placement", placements, list(dict.fromkeys(summary.placement)))


def _check(option: str, wanted: list[Any] | None, there: Any) -> None:
    for value in wanted or []:
        if value not in set(there):
            raise InputError(f"{option} {value}: the sweep has {', '.join(map(str, dict.fromkeys(there)))}")


def _fewer_steps(rows: Any, most: int) -> Any:
    """Rows of so many steps of each EP size that the table fits one screen."""
    room = max(1, most // rows.ep_size.nunique())
    if len(rows) <= most:
        return rows
    place = rows.groupby("ep_size").tokens.rank(method="dense").astype(int) - 1
    last = int(place.max())
    return rows[place.isin([round((i + 1) * last / room) for i in range(room)])]


def _found(result: Any) -> tuple[Any, dict[Any, Any]]:
    """Cells of the summary, and the best row of the tail of each cell and threshold."""
    from sim.stats import best_rows

    imbalance = best_rows(result.tail[result.tail.metric == "imbalance"])
    tail = {(row.placement, row.ep_size, row.tokens, row.threshold): row for row in imbalance.itertuples()}
    return result.summary.set_index(_KEYS).sort_index(), tail


def _lines(result: Any, placements: list[str], where: list[tuple[int, int]]) -> tuple[list[str], list[list[str]]]:
    """A line for each placement of a cell."""
    cells, tail = _found(result)
    lines = []
    for ep_size, tokens in where:
        of = [cells.loc[(name, ep_size, tokens)] for name in placements]
        for i, (name, cell) in enumerate(zip(placements, of, strict=True)):
            keys = [str(ep_size), str(tokens)] if i == 0 else ["", ""]
            lines.append([*keys, name, f"{cell.imbalance_mean:.3f}", _change(of[0], cell) if i else ""])
            lines[-1] += [f"{cell.imbalance_p99:.2f}"]
            lines[-1] += [_probability(tail.get((name, ep_size, tokens, x))) for x in (1.5, 2.0)]
            lines[-1] += [f"{cell.idle_ranks_mean:.1f}"]
    return ["EP", "tokens", "placement", "mean", "change", "p99", "P≥1.5", "P≥2", "idle ranks"], lines


def _columns(result: Any, names: list[str], where: list[tuple[int, int]]) -> tuple[list[str], list[list[str]]]:
    """A line for each cell, with a column for each placement."""
    cells, tail = _found(result)
    rows = []
    for ep_size, tokens in where:
        of = [cells.loc[(name, ep_size, tokens)] for name in names]
        rows.append(
            [
                str(ep_size),
                str(tokens),
                *[f"{cell.imbalance_mean:.3f}" for cell in of],
                *[_change(of[0], cell) for cell in of[1:]],
                *[f"{cell.imbalance_p99:.2f}" for cell in of],
                *[_probability(tail.get((name, ep_size, tokens, x))) for x in (1.5, 2.0) for name in names],
                *[f"{cell.idle_ranks_mean:.1f}" for cell in of],
            ]
        )
    short = [_SHORT.get(name, name) for name in names]
    heads = ["EP", "tokens", *[f"mean {name}" for name in short]]
    heads += ["change (95 %)"] if len(names) == 2 else [f"change {name} (95 %)" for name in short[1:]]
    heads += [f"{what} {name}" for what in ("p99", "P≥1.5", "P≥2", "idle") for name in short]
    return heads, rows


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
