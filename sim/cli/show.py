"""Print the answer of a sweep: per EP size and step one placement against another."""

import math
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from sim.cli.text import names, table, whole_numbers
from sim.errors import InputError

_MAX_ROWS = 28
_KEYS = ["placement", "ep_size", "tokens"]
_SHORT = {"round_robin": "r_robin", "linear_legacy": "legacy", "node_aware": "node_aw"}


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of `epsim show`."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder that epsim sweep wrote")
    parser.add_argument("--ep", metavar="LIST", help="some of the EP sizes")
    parser.add_argument("--tokens", metavar="LIST", help="some of the step sizes")
    parser.add_argument("--placement", metavar="A,B", help="the two placements (default: the baseline and round_robin)")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")


def run(arguments: Namespace) -> None:
    """Run `epsim show`."""
    from sim.placement import ALIASES
    from sim.results import read_result

    result = read_result(arguments.folder)
    ep_sizes, tokens, pair = arguments.ep, arguments.tokens, arguments.placement
    print_result(
        result,
        whole_numbers("--ep")(ep_sizes) if ep_sizes is not None else None,
        whole_numbers("--tokens")(tokens) if tokens is not None else None,
        [ALIASES.get(name, name) for name in names("--placement")(pair)] if pair is not None else None,
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
    _check("--ep", ep_sizes, summary.ep_size)
    _check("--tokens", tokens, summary.tokens)
    _check("--placement", pair, there)
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
    if markdown:
        print("| " + " | ".join(heads) + " |\n|" + "---:|" * len(heads))
        print("\n".join("| " + " | ".join(row) + " |" for row in cells))
        return
    print(f"{title}; imbalance = max / mean rank load of a layer in a step\n\n{_two_line_table(heads, cells)}")
    if len(shown) < len(rows):
        print("(some of the step sizes; all of them, and all placements, are in summary.csv)")


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
    cells = result.summary.set_index(_KEYS).sort_index()
    tail = _best_rows(result.tail[result.tail.metric == "imbalance"])
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
                *[_probability(tail, (name, ep_size, tokens, x)) for x in (1.5, 2.0) for name in pair],
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


def _best_rows(tail: Any) -> dict[tuple[Any, ...], Any]:
    """Of each cell and threshold the row that says most: exact, else sampled; a bound for what was never seen, unless it
    holds for some layers only.
    """
    best: dict[tuple[Any, ...], Any] = {}
    for row in tail.itertuples():
        key = (row.placement, row.ep_size, row.tokens, row.threshold)
        held = best.get(key)
        if held is None or (not row.given and (row.method == "exact" or held.probability == 0)):
            best[key] = row
    return best


def _probability(tail: dict[tuple[Any, ...], Any], key: tuple[str, int, int, float]) -> str:
    """A probability; what was never seen is below its upper bound; - where the sweep has no such threshold."""
    row = tail.get(key)
    if row is None:
        return "-"
    if row.low == 0 and row.high > 0 and (row.probability == 0 or row.method == "bound"):
        return f"<{_rounded_up(row.high)}"
    return f"{row.probability:.3f}" if row.probability >= 0.001 or row.high == 0 else f"{row.probability:.0e}"


def _rounded_up(bound: float) -> str:
    """A bound with two digits that is not below it."""
    unit = 10.0 ** (math.floor(math.log10(bound)) - 1)
    up = math.ceil(bound / unit - 1e-9) * unit
    return f"{up:.2g}" if up >= 0.001 else f"{up:.1e}"


def _two_line_table(heads: list[str], rows: list[list[str]]) -> str:
    """A table whose column heads are split at the first blank into two lines."""
    first = [head.partition(" ")[0] for head in heads]
    second = [head.partition(" ")[2] for head in heads]
    top, rule, *body = table(second, [first, *rows], ">" * len(heads)).splitlines()
    return "\n".join([body[0], top, rule, *body[1:]])
