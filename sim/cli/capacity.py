"""`epsim capacity`: how much room buffers need, in tokens, rows and bytes, at a given risk."""

import math
from argparse import ArgumentParser, Namespace
from typing import Any

from sim.cli.inputs import read_inputs, say_about_inputs, say_about_layers
from sim.cli.terminal import add_output, answer, note, note_compiling, pivoted, print_lines, say, say_notes
from sim.errors import InputError
from sim.files import model_label
from sim.options import CapacityOptions, TrafficOptions
from sim.options.declare import add_options, given, section_of
from sim.options.kinds import Number, Seconds

_KEYS = ["ep_size", "tokens", "placement"]
_PER_SECOND, _MOST_PER_SECOND = 20.0, 1e6
_SHORT = {"received": "received tokens", "pairs": "rows of a rank", "expert_rows": "rows of an expert"}
_TITLE_EXCHANGE = {"token": "buffer", "pair": "buffer", "workspace": "workspace", "deepep_low_latency": "low latency"}
_MEANINGS = {
    "received tokens": "distinct tokens that a rank has room for where a token is sent once to each rank; of step: as a fraction "
    "of the step's tokens, what vLLM's --ep-max-recv-tokens-fraction was to take (#57262, closed)",
    "rows factor": "(token, expert) pairs of a rank over the balanced ones; vLLM's MoE workspace grows with them. Of worst: over "
    "the most that there can be, torchtitan's non_blocking_capacity_factor (HybridEP)",
    "expert factor": "rows of an expert over the balanced ones: Megatron-LM's --moe-expert-capacity-factor, which it applies to "
    "the tokens of one rank (give these as --tokens)",
    "DeepEP tokens": "num_max_dispatch_tokens_per_rank, in SGLang SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK: what a rank "
    "sends at most, whatever the routing; with its low-latency buffer (! above DeepEP's limit of 32 GiB)",
}


def add_capacity(parser: ArgumentParser) -> None:
    """How much room buffers need: tokens and rows that a rank or an expert receives more of with at most a given probability.

    Of one layer of one step, of any layer of a step, and of any layer of any step of a horizon; for the median deployment
    (layers drawn once) and for the worst 5 % of them. Given its layers, a deployment's tokens, the layers of a step and steps
    are taken as independent. Recorded steps (epsim step --traffic) exceed a capacity in some layer as often or up to a seventh
    less.
    """
    add_options(parser, TrafficOptions)
    cells = {"ep_sizes": "16,32,64", "tokens": "2048", "placements": "linear,round_robin"}
    add_options(parser, CapacityOptions, without="horizon_steps", **cells,
        helps={"placements": "placements (epsim placements)"})  # fmt: skip
    add = section_of(parser, CapacityOptions.title).add_argument
    add("--horizon", type=Seconds(), metavar="TIME", help="also of any step of so long, as in 24h")
    add("--steps-per-second", type=Number(1e-6, _MOST_PER_SECOND), metavar="X", help=f"steps of the horizon (default: "
        f"{_PER_SECOND:g})")  # fmt: skip
    add_output(parser, "capacity.csv and the figure", figures=True)


def run_capacity(arguments: Namespace) -> None:
    from sim.cost.buffers import size_buffers
    from sim.router import routing_law

    options = given(arguments, CapacityOptions)
    if arguments.horizon is not None:
        options["horizon_steps"] = round(arguments.horizon * (arguments.steps_per_second or _PER_SECOND))
        if not options["horizon_steps"]:
            raise InputError("--horizon: it has no step; take a longer one, or more --steps-per-second")
    elif arguments.steps_per_second is not None:
        raise InputError("--steps-per-second goes with --horizon")
    model, workload = read_inputs(arguments)
    note_compiling()
    say_about_inputs(model, workload)
    say_about_layers(arguments.layer_correlation)
    if arguments.layer_correlation is not None:
        note(
            "with a layer correlation some layer of a step exceeds less often; below a probability of about 1 % nothing changes"
        )
    say_notes()
    found = size_buffers(model, workload, curves=arguments.out is not None, **options)
    note(*found.notes)
    identity = {name: value for name, value in options.items() if name not in ("threads", "fit_on")}
    identity |= {"fit_on": None if options["fit_on"] is None else str(options["fit_on"])}
    identity |= {"model": model.name, "workload": workload.name, "law": routing_law(model, workload)}

    def figures() -> dict[str, Any]:
        from sim.figures.buffers import capacity_curves

        of = f"{model_label(model.name)}, {workload.name} traffic"
        return {"capacity": capacity_curves(found.curves, options["risk"], of)} if len(found.curves) else {}

    answer(
        arguments.out, arguments, lambda: print_table_of(found.table, identity, arguments.markdown),
        {"capacity": found.table}, identity, figures,
    )  # fmt: skip


def print_table_of(table: Any, about: dict[str, Any], markdown: bool) -> None:
    """Print what to set, then each quantity by scope, of a table and the options that made it."""
    table = table.sort_values(["ep_size", "tokens"], kind="stable")
    given = (table.risk / about["risk"] - 1).abs() < 1e-9  # other rows are of --capacity-factor
    asked = table[given]
    _print_answer(asked, about, markdown)
    for quantity, text in _SHORT.items():
        rows = asked[asked.quantity == quantity]
        if len(rows):
            print()
            _print_quantity(rows, text, about["risk"], markdown)
    if about["capacity_factor"] is not None:
        print()
        _print_factor(table[~given], about["capacity_factor"], markdown)


def _print_answer(asked: Any, about: dict[str, Any], markdown: bool) -> None:
    """The capacities of the widest scope, and the options of engines that take them."""
    from sim.cost.buffers import DEEPEP_LIMIT_BYTES

    last = asked.groupby([*_KEYS, "quantity"], sort=False).tail(1)
    heads = ["EP", "tokens", "placement", "received tokens", "of step", "rows factor", "of worst", "expert factor"]
    lines, sizes = [], []
    for (ep_size, tokens, placement), rows in last.groupby(_KEYS, sort=False):
        of: dict[str, Any] = {row.quantity: row for row in rows.itertuples()}
        received, pairs, expert = of.get("received"), of["pairs"], of.get("expert_rows")
        line = [str(ep_size), str(tokens), str(placement)]
        line += [f"{received.capacity_tokens:.0f}", _up(received.capacity_tokens / tokens)] if received else ["-", "-"]
        line += [_up(pairs.factor), _up(pairs.capacity_tokens / pairs.worst_case_tokens)]
        lines.append([*line, _up(expert.factor) if expert else "-", str(-(-tokens // ep_size))])
        sizes.append([_worst_bytes(expert) if expert else math.nan])
    unit, in_unit = _in_bytes(sizes)
    for line, (size,), (text,) in zip(lines, sizes, in_unit, strict=True):
        line.append(text + "!" * (size > DEEPEP_LIMIT_BYTES))
    row, where = last.iloc[0], {"layer": "one layer of a step", "step": "any layer of a step"}
    where["horizon"] = f"any layer of any of {about.get('horizon_steps')} steps"
    title = (
        f"{model_label(row.model)}, {row.workload} traffic: what to set, so that it is exceeded in {where[row.scope]} with a "
        f"probability of at most {about['risk']:g}{'' if row.deployments == 'all' else ', in 95 % of deployments'}"
    )
    print_lines(title, [*heads, "DeepEP tokens", f"DeepEP {unit}"], lines, markdown, align=">><", keys=3)
    if markdown:
        return
    print()
    for name, text in _MEANINGS.items():
        say(text, f"{name}: ", "    ")


def _up(value: float) -> str:
    """A value to set, not below what it must be."""
    return f"{math.ceil(1000 * value - 1e-6) / 1000:.3f}"


def _print_quantity(rows: Any, text: str, risk: float, markdown: bool) -> None:
    """Capacities of one quantity: in tokens or rows by scope, and in bytes by exchange."""
    exchanges = list(dict.fromkeys(rows.exchange))
    first = rows[rows.exchange == exchanges[0]]
    scopes, lines = pivoted(
        first.assign(balanced=first.balanced_tokens.map(_count)), [*_KEYS, "balanced"], ["scope", "deployments"],
        lambda row: f"{row.capacity_tokens:.0f} ({row.factor:.2f}x)",
    )  # fmt: skip
    sizes = []
    for line, (_, of) in zip(lines, rows.groupby(_KEYS, sort=False), strict=True):
        line.append(f"{of.worst_case_tokens.iloc[0]}")
        last = [rows.iloc[-1] for _, rows in of.groupby("exchange", sort=False)]
        sizes.append([*(row.bytes for row in last), _worst_bytes(last[-1])])
    unit, in_unit = _in_bytes(sizes)
    heads = ["EP", "tokens", "placement", "balanced"]
    heads += [f"{scope} {'layers drawn afresh' if of == 'all' else of.replace('_', ' ')}" for scope, of in scopes]
    heads += ["worst case", *(f"{_TITLE_EXCHANGE[exchange]} {unit}" for exchange in exchanges), f"worst {unit}"]
    title = (
        f"{text[0].upper()}{text[1:]} by scope: the capacity that is exceeded with a probability of at most {risk:g}, and its "
        "factor over the balanced load; bytes of the last of these"
    )
    print_lines(
        title, heads, [line + of for line, of in zip(lines, in_unit, strict=True)], markdown, align=">><", keys=3
    )


def _worst_bytes(row: Any) -> float:
    """Bytes of the worst case, from those of the capacity: they grow with its rows; nan where it has none."""
    rows = [row.capacity_tokens, row.worst_case_tokens]
    if row.exchange == "deepep_low_latency":  # whose size is in tokens per rank
        rows = [-(-n // row.ep_size) for n in rows]
    return float(row.bytes * rows[1] / rows[0]) if rows[0] else math.nan


def _in_bytes(sizes: list[list[float]]) -> tuple[str, list[list[str]]]:
    """Sizes in the largest of GiB, MiB and KiB that shows two digits of the smallest one, and the unit."""
    least = min((size for line in sizes for size in line if size > 0), default=2**30)
    unit, scale = next(((name, 2**n) for name, n in (("GiB", 30), ("MiB", 20)) if least >= 0.1 * 2**n), ("KiB", 2**10))
    return unit, [["-" if size != size else f"{size / scale:.2f}" for size in line] for line in sizes]


def _count(x: float) -> str:
    """Tokens or rows, of few with a decimal: factors are of them."""
    return f"{x:.1f}" if x < 10 else f"{x:.0f}"


def _print_factor(rows: Any, factor: float, markdown: bool) -> None:
    """A line for each cell and quantity: P(exceed) in each scope, and the share that is dropped."""
    rows = rows[rows.exchange != "workspace"]
    scopes = list(dict.fromkeys(zip(rows.scope, rows.deployments, strict=True)))
    heads = ["EP", "tokens", "placement", "of", "capacity", "dropped share"]
    heads += [f"P({scope}) {'all' if of == 'all' else of.replace('_', ' ')}" for scope, of in scopes]
    cells = []
    for keys, cell in rows.groupby([*_KEYS, "quantity"], sort=False):
        first = cell.iloc[0]
        line = [*map(str, keys[:3]), _SHORT[str(keys[3])], f"{first.capacity_tokens:.0f}"]
        line.append("-" if first.dropped_share != first.dropped_share else f"{first.dropped_share:.2g}")
        at = cell.set_index(["scope", "deployments"]).risk
        cells.append([*line, *(f"{at[scope]:.2g}" for scope in scopes)])
    title = f"Capacity factor {factor:g}: what it drops, and the probability that it is exceeded in a layer, a step, a horizon"
    print_lines(title, heads, cells, markdown, align=">><<", keys=4)
