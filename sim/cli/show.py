"""Print the answer of a sweep: per EP size and step one placement against another."""

import math
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from sim.cli.text import print_table
from sim.errors import InputError
from sim.options import NAMES, WHOLE_NUMBERS

_MAX_ROWS = 28
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
        metavar="A,B",
        help="the two placements (default: the baseline and round_robin)",
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
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")


def run(arguments: Namespace) -> None:
    """Run `epsim show`."""
    from sim.placement import ALIASES
    from sim.results import read_result

    result = read_result(arguments.folder)
    if arguments.worst and arguments.tail:
        raise InputError("--worst and --tail are two tables: give one of them")
    printer = print_worst_cases if arguments.worst else print_tail if arguments.tail else print_result
    printer(
        result,
        arguments.ep,
        arguments.tokens,
        None if arguments.placement is None else [ALIASES.get(name, name) for name in arguments.placement],
        arguments.markdown,
    )


def print_result(
    result: Any,
    ep_sizes: list[int] | None = None,
    tokens: list[int] | None = None,
    pair: list[str] | None = None,
    markdown: bool = False,
) -> None:
    """Print mean and p99 imbalance, P(>= 1.5), P(>= 2) and idle ranks of two placements, the change with its interval."""
    summary = result.summary
    there = list(dict.fromkeys(summary.placement))
    _check_choice(summary, ep_sizes, tokens, pair)
    if pair is not None and len(pair) > 2:
        raise InputError(f"--placement {','.join(pair)}: one or two placements are compared")
    if pair is None:
        pair = [there[0], *[name for name in ("round_robin", *there[1:]) if name in there[1:]][:1]]
    rows = summary[summary.placement == pair[0]]
    rows = rows[rows.ep_size.isin(ep_sizes or rows.ep_size) & rows.tokens.isin(tokens or rows.tokens)]
    shown = rows if tokens else _fewer_steps(rows)
    heads, cells = _columns(result, pair, list(zip(shown.ep_size, shown.tokens, strict=True)))
    first = summary.iloc[0]
    title = f"{first.model}, {first.workload} traffic: {' against '.join(pair)}"
    print_table(title + "; imbalance = max / mean rank load of a layer in a step", heads, cells, markdown)
    if markdown:
        return
    if len(shown) < len(rows):
        print("(some of the step sizes; all of them, and all placements, are in summary.csv)")


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
    print_table(title, heads, cells, markdown)


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
    cells = []
    for key, rows in tail.groupby([*_KEYS, "threshold"], sort=False):
        of = {bool(row.method == "sampled"): row for row in rows.itertuples()}
        sampled, theory = of.get(True), of.get(False)
        seen = [_probability(sampled), _interval(sampled)]
        known = ["-", "-", ""] if theory is None else [theory.method, _interval(theory), theory.given or "all layers"]
        cells.append([*map(str, key[:3]), f"{key[3]:g}", *seen, *known])
    cells.sort(key=lambda row: (row[0], int(row[1]), int(row[2]), float(row[3])))
    heads = ["placement", "EP", "tokens", "x", "sampled P", "sampled 95 %", "method", "method's P", "method holds for"]
    first = summary.iloc[0]
    print_table(f"{first.model}, {first.workload} traffic: P(imbalance >= x)", heads, cells, markdown)


def _interval(row: Any) -> str:
    """Lower and upper bound, or the answer where they agree."""
    if row is None:
        return "-"
    return f"{row.low:.3g}" if row.low == row.high else f"{row.low:.3g} to {row.high:.3g}"


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


def _fewer_steps(rows: Any) -> Any:
    """Rows of so many steps of each EP size that the table fits one screen."""
    room = max(1, _MAX_ROWS // rows.ep_size.nunique())
    if len(rows) <= _MAX_ROWS:
        return rows
    place = rows.groupby("ep_size").tokens.rank(method="dense").astype(int) - 1
    last = int(place.max())
    return rows[place.isin([round((i + 1) * last / room) for i in range(room)])]


def _columns(result: Any, pair: list[str], where: list[tuple[int, int]]) -> tuple[list[str], list[list[str]]]:
    from sim.stats import best_rows

    cells = result.summary.set_index(_KEYS).sort_index()
    imbalance = best_rows(result.tail[result.tail.metric == "imbalance"])
    tail = {(row.placement, row.ep_size, row.tokens, row.threshold): row for row in imbalance.itertuples()}
    rows = []
    for ep_size, tokens in where:
        of = [cells.loc[(name, ep_size, tokens)] for name in pair]
        rows.append(
            [
                str(ep_size),
                str(tokens),
                *[f"{cell.imbalance_mean:.3f}" for cell in of],
                *([_change(*of)] if len(of) > 1 else []),
                *[f"{cell.imbalance_p99:.2f}" for cell in of],
                *[_probability(tail.get((name, ep_size, tokens, x))) for x in (1.5, 2.0) for name in pair],
                *[f"{cell.idle_ranks_mean:.1f}" for cell in of],
            ]
        )
    short = [_SHORT.get(name, name) for name in pair]
    heads = ["EP", "tokens", *[f"mean {name}" for name in short], *(["change (95 %)"] if len(pair) > 1 else [])]
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
